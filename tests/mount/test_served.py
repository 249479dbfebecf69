"""A mount for a restore: in no directory, its daemon nobody's but the restore's."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.mountpoint import mounts as all_mounts
from tests.faults import FaultServer
from tests.images import tar_layer
from tests.mount.mounting import LOG_LINE, descriptors, is_alive, lazyfs, wait_until
from tests.mount.published import checkpoint_files, publish, write_layout

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a detached mount needs root")
FILES = checkpoint_files()
PAGES = FILES["checkpoint/pages-1.img"]


class Keeper:
    """The program `tests.mount.serving`, to be asked."""

    def __init__(self, reference: str, home: Path) -> None:
        self.home = home
        (home / "cache").mkdir(mode=0o700, exist_ok=True)
        self.environment = {**os.environ, "LAZYFS_RUN_DIR": str(home / "run")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mount.serving", reference, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        self.code, self.said = self._answer()
        self.pid = self._process.pid
        self.daemon = int(self.ask("served.pid")) if self.code == 0 else 0

    def ask(self, expression: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate(timeout=30)

    def kill(self) -> None:
        self._process.kill()
        self.end()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    keeper = Keeper(write_layout(tmp_path / "layout", tar_layer(FILES)), tmp_path)
    assert keeper.code == 0
    yield keeper
    keeper.kill()
    wait_until(lambda: not is_alive(keeper.daemon), "the daemon has ended")
    log = (tmp_path / "served.log").read_text()
    for line in log.splitlines():
        found = LOG_LINE.match(line)
        assert found, log
        assert found[1] in ("INFO", "DEBUG") or "may not restore" in line, log


@as_root
def test_it_is_read_by_others_and_stands_in_no_mount_table(keeper: Keeper) -> None:
    images = Path(keeper.said)
    assert images == Path(f"/proc/{keeper.pid}/fd/{images.name}")
    assert (images / "pages-1.img").read_bytes() == PAGES
    assert not [each for each in all_mounts() if str(keeper.home) in each.source]
    assert keeper.ask("served.judge()") is None
    assert keeper.ask("served.status()['restores']") == "the container web"


@as_root
def test_the_daemon_has_nothing_of_its_starters(keeper: Keeper) -> None:
    targets = descriptors(keeper.daemon)
    assert [targets[number] for number in range(3)] == ["/dev/null"] * 3
    theirs = set(descriptors(keeper.pid).values())
    shared = {each for each in targets.values() if each in theirs and each.startswith("pipe:")}
    assert len(shared) == 1, "but the pipe that tells it of its starter's end"
    assert os.getsid(keeper.daemon) == keeper.daemon
    assert Path(f"/proc/{keeper.daemon}/cwd").readlink() == Path("/")


@as_root
def test_status_tells_what_it_is_for(keeper: Keeper) -> None:
    listed = lazyfs("status", env=keeper.environment)
    assert "restore of the container web\trestoring\t" in listed.out
    everything = json.loads(lazyfs("status", "--json", env=keeper.environment).out)
    (told,) = [each for each in everything if each.get("pid") == keeper.daemon]
    assert (told["state"], told["restores"]) == ("restoring", "the container web")


@as_root
@pytest.mark.parametrize("how", ["end", "kill"])
def test_it_ends_with_its_starter_however_that_ends(keeper: Keeper, how: str) -> None:
    getattr(keeper, how)()
    wait_until(lambda: not is_alive(keeper.daemon), "the daemon has ended")
    assert list((keeper.home / "run").glob("*.sock")) == []


@as_root
def test_it_lives_on_while_somebody_else_holds_it(keeper: Keeper) -> None:
    held = os.open(keeper.said, os.O_RDONLY | os.O_DIRECTORY)
    keeper.kill()
    assert is_alive(keeper.daemon)
    file = os.open("pages-1.img", os.O_RDONLY, dir_fd=held)
    assert os.pread(file, len(PAGES), 0) == PAGES
    os.close(file)
    os.close(held)
    wait_until(lambda: not is_alive(keeper.daemon), "the daemon has ended")


@as_root
def test_a_daemon_that_was_killed_is_a_verdict(keeper: Keeper) -> None:
    os.kill(keeper.daemon, signal.SIGKILL)
    wait_until(lambda: bool(keeper.ask("served.has_ended")), "it is known")
    assert "the daemon of the mount is gone" in keeper.ask("served.judge()")


@as_root
def test_a_read_that_failed_is_a_verdict(server: FaultServer, tmp_path: Path) -> None:
    reference = publish(server, tar_layer({**FILES, "checkpoint/pages-2.img": bytes(8 << 20)}))
    keeper = Keeper(reference, tmp_path)
    try:
        server.stop()
        with pytest.raises(OSError):
            (Path(keeper.said) / "pages-2.img").read_bytes()
        assert "of the checkpoint failed" in keeper.ask("served.judge()")
    finally:
        keeper.kill()
        wait_until(lambda: not is_alive(keeper.daemon), "the daemon has ended")


@pytest.mark.parametrize(("reference", "code"), [("oci:/nowhere:1", 3), ("127.0.0.1:9/web:1", 3)])
def test_what_goes_wrong_has_its_exit_code(reference: str, code: int, tmp_path: Path) -> None:
    keeper = Keeper(reference, tmp_path)
    keeper.end()
    assert keeper.code == code, keeper.said
    assert list(tmp_path.glob("run/*.sock")) == []

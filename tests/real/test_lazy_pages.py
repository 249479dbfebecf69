"""lazyfs in the place of `criu lazy-pages`: real processes, restored by real CRIU."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from testbed import CriuError, Restored, Testbed, Weather
from testbed.process import wait_until

from lazyfs.lazypages.protocol import SOCKET_NAME
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.mounts import Mount, mounted
from tests.real.movers import Mover, dumped_lazily, mover

pytestmark = pytest.mark.real

SLOW_BYTES_S = 48 << 20
"""Of a link on which a process runs for seconds before all of its memory has come."""
KILLED = ("the tasks of a restore are killed", "a restore has failed")


def lazily(mount: Mount) -> dict[str, Any]:
    """Return what a mount tells of the memory that it serves."""
    told: dict[str, Any] = mount.status()["lazy_pages"]
    return told


def wait_home(mount: Mount, timeout_s: float = 60) -> dict[str, Any]:
    """Wait until nobody misses memory any more; return what is told then."""
    wait_until(
        lambda: lazily(mount)["state"] in ("home", "failed"), "all memory is home", timeout_s
    )
    told = lazily(mount)
    assert (told["state"], told["failed"], told["missing_bytes"]) == ("home", None, 0), told
    return told


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def served(
    reference: str, work: Path, *options: str, forgiven: tuple[str, ...] = ()
) -> Iterator[tuple[Mount, Path]]:
    """Mount with a socket for lazy pages; give the mount, and CRIU's work directory."""
    criu = work / "criu"
    criu.mkdir(parents=True)
    with mounted(reference, work, "--lazy-pages", str(criu), *options, forgiven=forgiven) as mount:
        yield mount, criu


def restored(dumped: Checkpoint, mount: Mount, criu: Path) -> Restored:
    return dumped.restore(mount.directory, criu, lazy_pages=criu / SOCKET_NAME)


@pytest.fixture(scope="module")
def single(testbed: Testbed, shelf: Path) -> Checkpoint:
    return dumped_lazily(lambda name: checkpoint(testbed, shelf / "single" / name, size_mib=64))


@pytest.fixture(scope="module")
def moving(testbed: Testbed, shelf: Path) -> Mover:
    return mover(testbed, shelf / "mover", "--size", "96", "--steps", "4000", "--zombie")


@pytest.fixture
def far(store: Store) -> Iterator[Weather]:
    """The registry behind a slow link."""
    with Weather(store.address, rate_bytes_s=SLOW_BYTES_S) as weather:
        yield weather


# ---- all is well ----


def test_a_process_goes_on_and_its_memory_comes(single: Checkpoint, work: Path) -> None:
    with served(str(single.layer), work) as (mount, criu):
        assert lazily(mount)["state"] == "waiting"
        with restored(single, mount, criu) as process:
            single.before.assert_goes_on(process)
            told = wait_home(mount)
            assert told["bytes_faulted"] + told["bytes_background"] > 64 << 20
            assert told["faults"] < 2000
            assert single.before.hashes == process.memory_hash()


@pytest.mark.parametrize(
    "options",
    [
        {"children": 2, "size_mib": 24, "shared_mib": 24},
        {"children": 2, "size_mib": 32, "cow": True},
        {"size_mib": 32, "pattern": "scattered", "percent": 30},
    ],
    ids=["shared-memory", "copy-on-write", "scattered"],
)
def test_a_family_goes_on(testbed: Testbed, work: Path, options: dict[str, Any]) -> None:
    family = checkpoint(testbed, work / "dump", **options)
    with (
        served(str(family.layer), work) as (mount, criu),
        restored(family, mount, criu) as processes,
    ):
        family.before.assert_goes_on(processes)
        wait_home(mount)
        assert family.before.hashes == processes.memory_hash()


@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_memory_is_right_whatever_a_process_does_with_it_while_it_comes(
    store: Store, moving: Mover, far: Weather, work: Path, kept: str
) -> None:
    image = store.push("mover", moving)
    with (
        served(f"{far.address}/{image}", work, "--cache", kept) as (mount, criu),
        moving.restore(mount.directory, criu, criu / SOCKET_NAME) as process,
    ):
        assert moving.work(process).value == "0"
        assert wait_home(mount)["faults_fetched"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_memory_is_right_whatever_a_process_does_with_it_while_it_comes_quickly(
    testbed: Testbed, work: Path, seed: int
) -> None:
    dumped = mover(testbed, work / "dump", "--size", "64", "--seed", str(seed))
    with (
        served(str(dumped.layer), work) as (mount, criu),
        dumped.restore(mount.directory, criu, criu / SOCKET_NAME) as process,
    ):
        assert dumped.work(process).value == "0"
        wait_home(mount)


def test_one_mount_serves_one_restore_after_the_other(single: Checkpoint, work: Path) -> None:
    with served(str(single.layer), work) as (mount, criu):
        for count in (1, 2):
            with restored(single, mount, criu) as process:
                single.before.assert_goes_on(process)
                wait_home(mount)
            assert lazily(mount)["restores"] == count


def test_a_process_that_exits_needs_its_memory_no_more(
    store: Store, testbed: Testbed, far: Weather, work: Path
) -> None:
    dumped = mover(testbed, work / "dump", "--size", "96", "--exit")
    image = store.push("exits", dumped)
    with (
        served(f"{far.address}/{image}", work) as (mount, criu),
        dumped.restore(mount.directory, criu, criu / SOCKET_NAME) as process,
    ):
        os.kill(process.pid, signal.SIGUSR1)
        told = wait_home(mount)
        assert told["bytes_faulted"] + told["bytes_background"] < 90 << 20


def test_unmounting_waits_until_all_memory_has_come(
    store: Store, single: Checkpoint, far: Weather, work: Path
) -> None:
    image = store.push("unmounted", single)
    with served(f"{far.address}/{image}", work) as (mount, criu):
        process = restored(single, mount, criu)
    with process:
        single.before.assert_goes_on(process)


# ---- it goes wrong ----


def test_whoever_misses_memory_dies_with_the_daemon(
    store: Store, single: Checkpoint, far: Weather, work: Path
) -> None:
    image = store.push("killed", single)
    with served(f"{far.address}/{image}", work) as (mount, criu):
        with restored(single, mount, criu) as process:
            process.wait_first_loop()
            assert lazily(mount)["missing_bytes"] > 0
            mount.kill()
            wait_until(lambda: not is_alive(process.pid), "the process has been killed", 20)
            loops = process.status.events("loop")
            assert {event.value for event in loops} == {single.before.last[0].value}
        mount.start()


def test_all_children_die_with_the_daemon(
    store: Store, moving: Mover, far: Weather, work: Path
) -> None:
    image = store.push("children", moving)
    program = str(moving.testbed.program("mover"))
    mine = str(moving.status.path)

    def lives() -> list[str]:
        found = []
        for each in Path("/proc").glob("[0-9]*"):
            try:
                words = (each / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if words[0] == program and mine in words:
                found.append(each.name)
        return [pid for pid in found if is_alive(int(pid))]

    with served(f"{far.address}/{image}", work) as (mount, criu):
        with moving.restore(mount.directory, criu, criu / SOCKET_NAME) as process:
            os.kill(process.pid, signal.SIGUSR1)
            wait_until(lambda: len(lives()) > 1, "it has a child", 30)
            assert lazily(mount)["missing_bytes"] > 0
            mount.kill()
            wait_until(lambda: not lives(), "all have been killed", 20)
            assert not moving.status.events("done")
        mount.start()


def test_whoever_misses_memory_dies_when_the_daemon_is_stopped(
    store: Store, single: Checkpoint, far: Weather, work: Path
) -> None:
    image = store.push("stopped", single)
    with served(f"{far.address}/{image}", work, forgiven=KILLED) as (mount, criu):
        with restored(single, mount, criu) as process:
            os.kill(mount.status()["pid"], signal.SIGTERM)
            wait_until(lambda: not is_alive(process.pid), "the process has been killed", 20)
            assert not process.status.events("hash", process.started_s)
        wait_until(lambda: not os.path.ismount(mount.directory), "it is unmounted", 20)
        mount.start()


def test_whoever_misses_memory_that_cannot_be_had_is_killed(
    store: Store, single: Checkpoint, work: Path
) -> None:
    image = store.push("lost", single)
    options = ("--deadline", "1")
    excuses = (*KILLED, "gave up", "waiting to go on", "could not be fetched", "not proven yet")
    with (
        store.served_at(work / "far") as far,
        Weather(far.address, rate_bytes_s=16 << 20) as slow,
        served(f"{slow.address}/{image}", work, *options, forgiven=excuses) as (
            mount,
            criu,
        ),
        restored(single, mount, criu) as process,
    ):
        far.stop()
        wait_until(lambda: not is_alive(process.pid), "the process has been killed", 60)
        assert not process.status.events("hash", process.started_s)
        wait_until(lambda: lazily(mount)["state"] == "failed", "that it is told", 10)
        assert lazily(mount)["failed"]


def test_what_cannot_be_served_fails_the_restore(
    testbed: Testbed, single: Checkpoint, work: Path
) -> None:
    with served(str(single.layer), work, forgiven=KILLED) as (mount, criu):
        (criu / SOCKET_NAME).rename(criu / "aside")
        with pytest.raises(CriuError):
            restored(single, mount, criu)
        (criu / "aside").rename(criu / SOCKET_NAME)
        with restored(single, mount, criu) as process:
            single.before.assert_goes_on(process)
            wait_home(mount)

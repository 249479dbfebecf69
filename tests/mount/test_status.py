"""What a mount tells of itself, and commands that wait for it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.faults import FaultServer, reset, stall
from tests.images import zstd_chunked
from tests.mount.mounting import Mount, Mounts, Reader, command, lazyfs, open_file, wait_until
from tests.mount.published import (
    FEW,
    LAYERS,
    MIB,
    asked_ranges,
    checkpoint_files,
    publish,
    publish_files,
    publish_referring,
    write_layout,
)

PAGES = "checkpoint/pages-1.img"
FILES = checkpoint_files(12 * MIB)
DATA = FILES[PAGES]


@pytest.fixture
def local(tmp_path: Path) -> str:
    return write_layout(tmp_path / "layout", zstd_chunked(FILES))


@pytest.fixture
def remote(server: FaultServer) -> str:
    """In a registry; nothing of it is fetched that nobody reads."""
    return publish(server, zstd_chunked(FILES))


def status_of(directory: Path, code: int = 0) -> dict[str, Any]:
    done = lazyfs("status", "--json", directory)
    assert (done.code, done.err) == (code, ""), done
    told: dict[str, Any] = json.loads(done.out)
    return told


def all_mounts(below: Path) -> list[dict[str, Any]]:
    done = lazyfs("status", "--json")
    assert (done.code, done.err) == (0, "")
    return [each for each in json.loads(done.out) if each["directory"].startswith(f"{below}/")]


# -- what is told -------------------------------------------------------------------------------


def test_a_mount_tells_of_itself(mounts: Mounts, remote: str) -> None:
    mount = mounts.mount(remote)
    wait_until(lambda: mount.status()["here_bytes"] > 0, "small files are fetched ahead")
    told = status_of(mount.directory)
    assert told["reference"].startswith(f"{remote.rpartition(':')[0]}@sha256:")
    assert (told["state"], told["directory"]) == ("serving", str(mount.directory))
    assert (told["pid"], told["view"]) == (mount.pid, "criu")
    assert 0 < told["here_bytes"] == told["proven_bytes"] < told["content_bytes"]
    assert told["safe_offline"] is False
    assert told["safe_unmount"] is True
    assert told["last_error"] is told["failed"] is told["completion"] is None
    assert set(told) == set(mount.status())
    text = lazyfs("status", mount.directory).out
    assert f"Mount: {mount.directory}\nState: serving\n" in text
    assert "Unmount: safe" in text
    assert "Offline: not yet: lazyfs wait" in text


def test_who_holds_a_file_is_counted(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    with ExitStack() as stack:
        stack.enter_context(open_file(mount / "pages-1.img"))
        stack.enter_context(open_file(mount.directory, os.O_RDONLY | os.O_DIRECTORY))
        told = mount.status()
        assert (told["open_files"], told["open_directories"]) == (1, 1)
        assert told["safe_unmount"] is False
        waiting = subprocess.Popen(command("wait", "--unused", mount.directory))
        assert lazyfs("wait", "--unused", "--timeout=0.1", mount.directory).code == 1
        assert waiting.poll() is None
    assert waiting.wait(timeout=20) == 0
    assert mount.status()["safe_unmount"] is True


def test_who_waits_for_what(server: FaultServer, mounts: Mounts, remote: str) -> None:
    mount = mounts.mount(remote)
    may_go_on = threading.Event()
    server.always("/blobs/", stall(until=may_go_on))
    reader = Reader(mount / "pages-1.img", 8 * MIB, 4096)
    wait_until(lambda: bool(mount.status()["reading"]), "somebody waits")
    told = status_of(mount.directory)
    reading = told["reading"][0]
    assert reading["path"] == PAGES
    assert reading["offset"] <= 8 * MIB < reading["offset"] + reading["size_bytes"]
    assert reading["opened_by_pid"] == reader.pid
    assert told["longest_wait_s"] > 0
    assert told["safe_unmount"] is False
    assert f"Waiting: {PAGES}: " in lazyfs("status", mount.directory).out
    server.forgive()
    may_go_on.set()
    assert reader.result().startswith("4096 ")
    wait_until(lambda: mount.status()["reading"] == [], "what the kernel read ahead is there, too")


def test_what_failed_last(server: FaultServer, mounts: Mounts, remote: str) -> None:
    mounts.expect_log("read answered with an error")
    mounts.tolerate_log("could not be fetched ahead")
    mount = mounts.mount(remote, "--deadline=0.5")
    server.always("/blobs/", reset())
    assert Reader(mount / "pages-1.img", 8 * MIB, 4096).result() == "EIO"
    told = status_of(mount.directory)
    assert told["failed_reads"] > 0
    assert told["last_error"].startswith("read answered with an error: ")
    assert told["last_error_at"].endswith("+00:00")
    assert told["failed"] is None


STRANGER = 65533
"""Nobody's user id; not the one that other tests take."""


@pytest.fixture
def forger(mounts: Mounts, local: str) -> Iterator[Mount]:
    """A mount of ours, for whose daemon another user's program answers."""
    mount = mounts.mount(local)
    device = os.stat(mount.directory).st_dev
    directory = Path(f"/tmp/lazyfs-{STRANGER}")
    script = """
import os, socket, sys
directory, device, user = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.setgid(user)
os.setuid(user)
os.mkdir(directory, 0o700)
listening = socket.socket(socket.AF_UNIX)
listening.bind(f"{directory}/mount-{device}.sock")
listening.listen()
print("ready", flush=True)
text = b'{"reference": "forged", "failed": null, "safe_offline": true, "pid": 1}'
while True:
    link, _ = listening.accept()
    link.recv(65536)
    link.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n" + text)
    link.close()
"""
    words = [sys.executable, "-c", script, directory, str(device), str(STRANGER)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield mount
        finally:
            process.kill()
            shutil.rmtree(directory)


def test_what_a_stranger_says_of_a_mount_is_not_believed(forger: Mount) -> None:
    """Whoever drives a restore as root goes by what is told: of a dead daemon, too."""
    assert status_of(forger.directory)["pid"] == forger.pid
    assert all_mounts(forger.directory.parent)[0]["pid"] == forger.pid
    forger.signal(signal.SIGKILL)
    forger.wait_end()
    assert status_of(forger.directory, code=1)["state"] == "dead"
    assert lazyfs("wait", "--complete", forger.directory).code == 1


def test_a_daemon_that_answers_without_end_holds_nobody_up(
    mounts: Mounts, local: str, tmp_path: Path
) -> None:
    runs = tmp_path / "run"
    surroundings = {**os.environ, "LAZYFS_RUN_DIR": str(runs)}
    mount = mounts.mount(local, env=surroundings)
    path = next(runs.glob("*.sock"))
    path.unlink()
    over = threading.Event()
    good = b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"failed": null}'

    def answer(link: socket.socket) -> None:
        with link, suppress(OSError):
            if link.recv(65536).startswith(b"GET"):
                link.sendall(good)
                return
            while not over.wait(0.1):
                link.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listening.accept()[0],)).start()

    with socket.socket(socket.AF_UNIX) as listening, open_file(runs, os.O_PATH) as directory:
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        listening.listen()
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            done = lazyfs("wait", "--complete", mount.directory, env=surroundings, timeout=30)
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert done.code == 1
    assert "its daemon does not answer" in done.err


def test_a_list_of_all(mounts: Mounts, local: str, tmp_path: Path) -> None:
    """Those that serve, one whose daemon is dead, one that is stuck: nobody waits long for it."""
    serving, dead, stuck = (mounts.mount(local, at=tmp_path / name) for name in ("a", "b", "c"))
    dead.signal(signal.SIGKILL)
    dead.wait_end()
    stuck.signal(signal.SIGSTOP)
    try:
        waiting = subprocess.Popen(
            command("wait", "--unused", stuck.directory), stderr=subprocess.PIPE, text=True
        )
        found = {each["directory"]: each["state"] for each in all_mounts(tmp_path)}
        assert found == {
            str(serving.directory): "serving",
            str(dead.directory): "dead",
            str(stuck.directory): "stuck",
        }
        assert status_of(dead.directory, code=1)["reference"].startswith("oci:")
        text = lazyfs("status", dead.directory).out
        assert f"its daemon has ended; mount again, or clear it away: lazyfs umount {dead}" in text
        err = waiting.communicate(timeout=60)[1]
        assert (waiting.returncode, err) == (1, f"lazyfs: {stuck}: its daemon does not answer\n")
    finally:
        stuck.signal(signal.SIGCONT)
    lines = lazyfs("status").out.splitlines()
    assert any(line.startswith(f"{stuck}\tserving\t") for line in lines)
    assert dead.umount().code == 0
    assert len(all_mounts(tmp_path)) == 2


def test_one_that_was_detached_lives_until_its_files_are_closed(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    with open_file(mount / "pages-1.img"):
        waiting = subprocess.Popen(command("umount", "--lazy", mount.directory))
        wait_until(lambda: not mount.is_mounted, "it is detached")
        (told,) = all_mounts(mounts.home)
        assert (told["state"], told["pid"]) == ("detached", mount.pid)
        assert lazyfs("status", mount.directory).code == 2
    assert waiting.wait(timeout=20) == 0
    assert all_mounts(mounts.home) == []


def test_where_there_is_no_mount(mounts: Mounts, tmp_path: Path) -> None:
    for arguments in (["status"], ["wait", "--unused"], ["wait", "--complete"]):
        done = lazyfs(*arguments, tmp_path)
        assert (done.code, done.out) == (2, "")
        assert f"{tmp_path} is not a lazyfs mount" in done.err
    assert lazyfs("wait", tmp_path).code == 2


# -- the control socket -------------------------------------------------------------------------


def socket_of(mount: Mount) -> Path:
    return Path(f"/run/lazyfs/mount-{os.stat(mount.directory).st_dev}.sock")


def test_the_control_socket_is_the_mounting_users(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    path = socket_of(mount)
    assert path.lstat().st_mode & 0o777 == 0o600
    assert path.parent.lstat().st_mode & 0o777 == 0o700
    assert mount.umount().code == 0
    assert not path.exists()


def test_what_dead_daemons_left_is_cleared_away(
    mounts: Mounts, local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory of the test's own: any lazyfs that comes up would do it."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(tmp_path / "run"))
    mount = mounts.mount(local)
    (left,) = (tmp_path / "run").glob("mount-*.sock")
    mount.signal(signal.SIGKILL)
    mount.wait_end()
    assert left.exists()
    mounts.mount(local, at=mounts.home / "mnt")
    wait_until(lambda: len(all_mounts(mounts.home)) == 1, "one is left")
    with socket.socket(socket.AF_UNIX) as link, suppress(FileNotFoundError):
        link.connect(str(left))  # where the new one has its name


def test_nonsense_does_not_hurt(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    for words in (b"", b"\0\n\n\r\n\r\n", b"GET /" + b"x" * 100_000, b"GET /status HTTP/1.1\r\n"):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(socket_of(mount)))
            link.settimeout(20)
            with suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(words)
                link.shutdown(socket.SHUT_WR)
                link.recv(4096)
    assert status_of(mount.directory)["state"] == "serving"


# -- metrics ------------------------------------------------------------------------------------


def metrics_of(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_metrics_at_a_port(mounts: Mounts, local: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = mounts.refuse(local, f"--metrics=127.0.0.1:{port}")
        assert (done.code, done.err) == (
            1,
            f"lazyfs: cannot listen on 127.0.0.1:{port}: Address already in use\n",
        )
    mount = mounts.mount(local, f"--metrics=127.0.0.1:{port}")
    (mount / "pages-1.img").read_bytes()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        found = metrics_of(answer.read().decode())
    told = mount.status()
    assert found["lazyfs_read_bytes_total"] == told["bytes_read"] >= len(DATA)
    assert found["lazyfs_content_bytes"] == told["content_bytes"]
    assert found["lazyfs_failed"] == 0
    assert found["process_resident_memory_bytes"] > 0
    for path in ("status", "complete"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=20)


def test_metrics_at_a_path(mounts: Mounts, local: str) -> None:
    path = mounts.home / "metrics.sock"
    for _ in range(2):  # a killed one leaves its socket behind
        mount = mounts.mount(local, f"--metrics=unix:{path}")
        assert path.lstat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            link.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            with link.makefile("rb") as answer:
                text = answer.read().partition(b"\r\n\r\n")[2].decode()
        assert metrics_of(text)["lazyfs_open_files"] == 0
        mount.signal(signal.SIGKILL)
        mount.wait_end()
    done = mounts.refuse(local, "--metrics=everywhere", at=mounts.home / "layout")
    assert done.code == 2
    assert "'everywhere' is no address to listen on" in done.err


# -- all of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FEW, "zstd:seekable", "soci"])
def test_complete_is_all_here_and_proven(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """After it, nothing is asked of the source any more."""
    mount = mounts.mount(publish_files(server, FILES, kind))
    done = lazyfs("wait", "--complete", "--timeout=60", mount.directory)
    assert (done.code, done.out, done.err) == (0, "", "")
    told = status_of(mount.directory)
    assert told["safe_offline"] is True
    assert told["here_bytes"] == told["proven_bytes"] == told["content_bytes"]
    server.stop()
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert mount.status()["failed_reads"] == 0
    assert lazyfs("wait", "--complete", mount.directory).code == 0, "it is so already"


def test_complete_where_an_index_only_refers(server: FaultServer, mounts: Mounts) -> None:
    """The blob is decoded from its start beside the reader."""
    mount = mounts.mount(publish_referring(server, LAYERS["soci"](FILES)))
    assert lazyfs("wait", "--complete", "--timeout=60", mount.directory).code == 0
    told = mount.status()
    assert (told["safe_offline"], told["blob_proven"]) == (True, True)


@pytest.mark.parametrize("kind", FEW)
def test_complete_checks_what_an_earlier_mount_left(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    reference = publish_files(server, FILES, kind)
    for _ in range(2):
        mount = mounts.mount(reference)
        assert lazyfs("wait", "--complete", mount.directory).code == 0
        told = mount.status()
        assert mount.umount().code == 0
    assert told["safe_offline"] is True
    assert told["chunks_from_cache"] > 0


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked"])
def test_it_cannot_be_completed(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """The source is gone for longer than the deadline; when it is back, it can."""
    mounts.tolerate_log("not proven yet|could not be fetched ahead")
    mount = mounts.mount(publish_files(server, FILES, kind), "--deadline=1")
    server.always("/blobs/", reset())
    done = lazyfs("wait", "--complete", "--timeout=60", mount.directory)
    assert (done.code, done.out) == (3, "")
    assert f"{mount.directory} cannot be completed: " in done.err
    assert mount.status()["completion"]["state"] == "failed"
    server.forgive()
    assert lazyfs("wait", "--complete", "--timeout=60", mount.directory).code == 0
    assert (mount / "pages-1.img").read_bytes() == DATA


def test_wrong_bytes_cannot_be_completed(server: FaultServer, mounts: Mounts) -> None:
    mounts.expect_log("every read fails from now on")
    layer = LAYERS["tar"](FILES)
    reference = publish(server, layer)
    (resource,) = (item for path, item in server.resources.items() if layer.digest in path)
    wrong = bytearray(layer.blob)
    wrong[8 * MIB] ^= 1
    resource.body = bytes(wrong)
    mount = mounts.mount(reference)
    done = lazyfs("wait", "--complete", mount.directory)
    assert done.code == 5
    assert "does not match its digest" in done.err
    assert status_of(mount.directory, code=1)["state"] == "failed"
    assert "every read fails" in lazyfs("status", mount.directory).out


@pytest.mark.parametrize("kind", [*FEW, "zstd:seekable"])
def test_warm_fills_the_cache(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """A mount fetches nothing of the layer afterwards, nor does a second run."""
    layer = LAYERS[kind](FILES)
    reference = publish(server, layer)
    done = lazyfs("warm", f"--cache-dir={mounts.cache_dir}", reference)
    assert (done.code, done.err) == (0, "")
    assert ", proven; " in done.out
    heads = {(0, 64 << 10)}
    fetched = set(asked_ranges(server, layer)) - heads
    done = lazyfs("warm", f"--cache-dir={mounts.cache_dir}", reference)
    assert done.code == 0
    assert ": all there: " in done.out or "; " in done.out
    mount = mounts.mount(reference)
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert lazyfs("wait", "--complete", mount.directory).code == 0
    again = [each for each in asked_ranges(server, layer) if each not in fetched]
    assert sum(stop - start for start, stop in again) < len(layer.blob) // 4, again


def test_warm_without_a_source(server: FaultServer, mounts: Mounts, remote: str) -> None:
    server.always("/blobs/", reset())
    done = lazyfs("warm", "--deadline=0.5", f"--cache-dir={mounts.cache_dir}", remote)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("lazyfs: ")
    assert "Traceback" not in done.err

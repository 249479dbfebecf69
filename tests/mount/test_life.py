"""How a mount begins and ends, with and against the will of who began it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyfs import mountpoint
from tests.faults import FaultServer, stall
from tests.images import zstd_chunked
from tests.mount.mounting import (
    AT_ONCE_S,
    Done,
    Mount,
    Mounts,
    Reader,
    Waiter,
    command,
    descriptors,
    error_of,
    is_alive,
    lazyfs,
    open_file,
    run,
    wait_until,
)
from tests.mount.published import MIB, checkpoint_files, publish, write_layout
from tests.mount.writers import gzip_layer

FILES = checkpoint_files(12 * MIB)
DATA = FILES["checkpoint/pages-1.img"]


@pytest.fixture
def local(tmp_path: Path) -> str:
    """An image on this machine."""
    return write_layout(tmp_path / "layout", zstd_chunked(FILES))


@pytest.fixture
def remote(server: FaultServer) -> str:
    """An image in the registry."""
    return publish(server, zstd_chunked(FILES))


@contextmanager
def begun(mounts: Mounts, *words: str | Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    """`lazyfs mount` under way, on `mnt`."""
    (mounts.home / "mnt").mkdir(exist_ok=True)
    process = subprocess.Popen(
        command("mount", *mounts.options(*words), mounts.home / "mnt"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def nothing_is_left(mounts: Mounts) -> bool:
    return not mounts.processes() and mountpoint.mounted_at(mounts.home / "mnt") is None


# -- beginning ----------------------------------------------------------------------------------


def test_it_returns_when_the_directory_answers(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    assert mount.said.out == f"mounted {mount.status()['reference']} on {mount.directory}\n"
    assert mount.said.err == ""
    assert (mount / "inventory.img").exists()
    assert "INFO" in mounts.log()
    (log,) = mounts.cache_dir.glob("log/*.log")
    assert log.name == str(mount.directory).strip("/").replace("/", "-") + ".log"
    assert log.parent.stat().st_mode & 0o077 == 0


def test_in_a_command_substitution(mounts: Mounts, local: str) -> None:
    """It ends although the daemon lives on: that keeps no end of the pipe."""
    (mounts.home / "mnt").mkdir()
    words = command("mount", *mounts.options(), local, mounts.home / "mnt")
    done = run(["sh", "-c", 'said=$("$@" 2>&1); echo "<$said>"', "sh", *words], timeout=20)
    assert done.out.startswith("<mounted oci:")
    assert done.out.endswith(f" on {mounts.home}/mnt>\n")


def test_the_daemon_keeps_nothing_of_its_caller(mounts: Mounts, local: str) -> None:
    """Not its locks, its directory, its terminal, its output."""
    here = mounts.home / "here"
    here.mkdir()
    with open(mounts.home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        mount = mounts.mount(local, pass_fds=[lock.fileno()], cwd=here)
        home = Path(f"/proc/{mount.pid}")
        kept = descriptors(mount.pid)
    with open(mounts.home / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert {kept[0], kept[1], kept[2]} == {"/dev/null"}
    assert str(mounts.home / "lock") not in kept.values()
    assert os.readlink(home / "cwd") == "/"
    assert os.getsid(mount.pid) == mount.pid
    assert (mount / "pages-1.img").read_bytes() == DATA


def test_relative_paths_are_the_callers(mounts: Mounts, local: str) -> None:
    (mounts.home / "mnt").mkdir()
    layout = os.path.relpath(local.removeprefix("oci:"), mounts.home)
    options = ("--cache-dir=cache", "--log-file=it.log", f"oci:{layout}", "mnt")
    done = lazyfs("mount", *options, cwd=mounts.home)
    assert done.code == 0, done
    mount = Mount(mounts.home / "mnt", done)
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert mount.umount().code == 0
    assert "unmounted" in (mounts.home / "it.log").read_text()
    assert list(mounts.cache_dir.glob("layers/*/content"))


def test_in_the_foreground(mounts: Mounts, local: str) -> None:
    log = mounts.home / "it.log"
    mounts.log_files.append(log)
    with begun(mounts, "--foreground", f"--log-file={log}", local) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.endswith(f" on {mounts.home}/mnt\n")
        mount = Mount(mounts.home / "mnt", lazyfs("--version"))
        assert mount.pid == process.pid
        assert mount.umount().code == 0
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0
    assert "unmounted" in log.read_text()


@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
@pytest.mark.parametrize("foreground", [(), ("--foreground",)], ids=["detached", "foreground"])
def test_interrupted_while_it_mounts(
    server: FaultServer, mounts: Mounts, remote: str, where: str, foreground: tuple[str, ...]
) -> None:
    """Ctrl-C reaches all processes of the terminal's foreground, that is, the command."""
    server.script(where, stall())
    with begun(mounts, *foreground, remote, process_group=0) as process:
        server.wait_count(where, 1)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert nothing_is_left(mounts)


_AT_ONCE = """
import os, signal, sys, time
from pathlib import Path
from lazyfs.cli.daemon import run_detached

fork = os.fork
def fork_and_interrupt():
    child = fork()
    if child:
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGINT)
    return child
os.fork = fork_and_interrupt
code, said = run_detached(lambda ready: time.sleep(600), Path(sys.argv[1]))
print(code, repr(said))
"""


def test_interrupted_as_soon_as_there_is_a_daemon(tmp_path: Path) -> None:
    """On a busy machine the daemon may have come far before its starter runs again."""
    done = run([sys.executable, "-c", _AT_ONCE, str(tmp_path / "log")], timeout=20)
    child, *rest = done.out.split("\n")
    assert (rest, done.err, done.code) == (["130 ''", ""], "", 0)
    assert not is_alive(int(child))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_caller_goes_before_it_is_ready(
    server: FaultServer, mounts: Mounts, remote: str, number: signal.Signals
) -> None:
    """Nobody would know of the mount."""
    may_go_on = threading.Event()
    server.script("/blobs/", stall(until=may_go_on))
    with begun(mounts, remote) as process:
        server.wait_count("/blobs/", 1)
        process.send_signal(number)
        process.wait(timeout=20)
        may_go_on.set()
    wait_until(lambda: nothing_is_left(mounts), "the daemon has followed its caller")


def test_the_caller_never_hears_that_it_is_ready(
    server: FaultServer, mounts: Mounts, remote: str
) -> None:
    """What was said to him is not heard by one who does not run until he is killed."""
    may_go_on = threading.Event()
    server.script("/blobs/", stall(until=may_go_on))
    with begun(mounts, remote) as process:
        server.wait_count("/blobs/", 1)
        process.send_signal(signal.SIGSTOP)
        may_go_on.set()
        directory = mounts.home / "mnt"
        wait_until(lambda: mountpoint.mounted_at(directory) is not None, "it is mounted")
        process.kill()
    wait_until(lambda: nothing_is_left(mounts), "the daemon has followed its caller")


def test_a_caller_who_is_stopped_keeps_nobody_waiting_for_long(
    server: FaultServer, mounts: Mounts, remote: str
) -> None:
    """Ctrl-Z; he hears of it when he goes on."""
    may_go_on = threading.Event()
    server.script("/blobs/", stall(until=may_go_on))
    with begun(mounts, remote) as process:
        server.wait_count("/blobs/", 1)
        process.send_signal(signal.SIGSTOP)
        may_go_on.set()
        directory = mounts.home / "mnt"
        wait_until(lambda: mountpoint.mounted_at(directory) is not None, "it is mounted")
        assert "inventory.img" in Waiter("ls", directory).result()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
    assert Mount(directory, Done(0, out, err)).umount().code == 0


def test_a_caller_who_ignores_the_end_of_children_hears_how_it_failed(mounts: Mounts) -> None:
    """Some supervisors ignore SIGCHLD, and whatever they start does then."""
    (mounts.home / "empty").mkdir()
    done = mounts.refuse(f"oci:{mounts.home}/empty", preexec_fn=_ignore_children)
    assert done.code == 3
    assert len(done.err.splitlines()) == 1


def _ignore_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def test_two_at_once(mounts: Mounts, local: str, tmp_path: Path) -> None:
    """Of one image, on two directories; the second has no part in the first one's cache."""
    first = mounts.mount(local)
    second = mounts.mount(local, at=tmp_path / "other")
    for mount in (first, second):
        assert (mount / "pages-1.img").read_bytes() == DATA
    assert first.umount().code == 0
    assert (second / "inventory.img").exists()


# -- ending -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts(mounts: Mounts, local: str, number: signal.Signals) -> None:
    with begun(mounts, "--foreground", local) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(number)
        assert process.wait(timeout=20) == 0
    assert nothing_is_left(mounts)
    mount = mounts.mount(local)
    mount.signal(number)
    mount.wait_end()
    assert nothing_is_left(mounts)
    assert f"{number.name}: unmounting" in mounts.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_reader_waits(
    server: FaultServer, mounts: Mounts, remote: str, number: signal.Signals
) -> None:
    mount = mounts.mount(remote)
    server.always("/blobs/", stall())
    asked = server.count("/blobs/")
    reader = Reader(mount / "pages-1.img", 8 * MIB, 4096)
    server.wait_count("/blobs/", asked + 1)
    wait_until(reader.is_waiting, "it has asked")
    began = time.monotonic()
    mount.signal(number)
    assert reader.result() in ("ECONNABORTED", "ENOTCONN", "EIO")
    mount.wait_end()
    assert time.monotonic() - began < AT_ONCE_S
    assert nothing_is_left(mounts)


def test_a_reader_that_is_killed(server: FaultServer, mounts: Mounts, remote: str) -> None:
    """It goes at once, and others are served as before."""
    mount = mounts.mount(remote)
    may_go_on = threading.Event()
    server.script("/blobs/", *[stall(until=may_go_on)] * 4)
    asked = server.count("/blobs/")
    reader = Reader(mount / "pages-1.img", 8 * MIB, 4096)
    server.wait_count("/blobs/", asked + 1)
    reader.kill()
    may_go_on.set()
    assert (mount / "pages-1.img").read_bytes() == DATA


def test_killed(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    file = os.open(mount / "pages-1.img", os.O_RDONLY)
    mount.signal(signal.SIGKILL)
    mount.wait_end()
    assert error_of(lambda: os.pread(file, 4096, 8 * MIB)) in ("ENOTCONN", "ECONNABORTED")
    assert error_of(lambda: os.close(file)) in (None, "ENOTCONN"), "a flush, which fails"
    assert error_of(lambda: os.listdir(mount.directory)) == "ENOTCONN"
    done = mount.umount()
    assert (done.code, done.out, done.err) == (0, "", "")
    assert not mount.is_mounted


def test_killed_while_a_reader_waits(server: FaultServer, mounts: Mounts, remote: str) -> None:
    mount = mounts.mount(remote)
    server.always("/blobs/", stall())
    asked = server.count("/blobs/")
    reader = Reader(mount / "pages-1.img", 8 * MIB, 4096)
    server.wait_count("/blobs/", asked + 1)
    mount.signal(signal.SIGKILL)
    assert reader.result() in ("ENOTCONN", "ECONNABORTED", "EIO")
    assert mount.umount().code == 0


@pytest.mark.parametrize("busy", [False, True])
def test_a_dead_mount_is_mounted_over(mounts: Mounts, local: str, busy: bool) -> None:
    mount = mounts.mount(local)
    (mounts.home / "link").symlink_to("mnt")
    file = os.open(mount / "pages-1.img", os.O_RDONLY) if busy else os.open("/", os.O_RDONLY)
    try:
        mount.signal(signal.SIGKILL)
        mount.wait_end()
        mount = mounts.mount(local)
        assert (mount / "pages-1.img").read_bytes() == DATA
        mount.signal(signal.SIGKILL)
        mount.wait_end()
        mount = mounts.mount(local, at=mounts.home / "link")
        assert (mount / "pages-1.img").read_bytes() == DATA
    finally:
        error_of(lambda: os.close(file))
    mounted = [each for each in mountpoint.mounts() if each.directory == f"{mounts.home}/mnt"]
    assert len(mounted) == 1, "none lies below another"


def test_an_unmount_while_it_is_busy(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    with open_file(mount / "pages-1.img") as file:
        done = mount.umount()
        assert done.code == 1
        assert done.err == (
            f"lazyfs: {mount.directory} is busy: a process has a file or its working directory "
            f"there; see `fuser -vm {mount.directory}`, or detach it now: "
            f"lazyfs umount --lazy {mount.directory}\n"
        )
        assert mount.is_mounted
        assert os.pread(file, 4096, MIB) == DATA[MIB : MIB + 4096]
        waiting = subprocess.Popen(command("umount", "--lazy", mount.directory))
        wait_until(lambda: not mount.is_mounted, "it is detached")
        assert is_alive(mount.pid)
        assert os.pread(file, 4096, 5 * MIB) == DATA[5 * MIB : 5 * MIB + 4096]
    assert waiting.wait(timeout=20) == 0
    mount.wait_end()
    assert mount.umount().code == 2


def test_an_unmount_while_the_daemon_is_stopped(mounts: Mounts, local: str) -> None:
    """It answers nobody, but holds up nobody who unmounts."""
    mount = mounts.mount(local)
    mount.signal(signal.SIGSTOP)
    try:
        done = mount.umount()
        assert (done.code, done.out) == (1, "")
        assert "does not answer; detach it all the same: lazyfs umount --lazy" in done.err
        assert mount.is_mounted
        assert mount.umount("--lazy").code == 0
        assert not mount.is_mounted
    finally:
        mount.signal(signal.SIGCONT)
    mount.wait_end()


def test_a_daemon_that_is_stopped_with_nothing_cached_holds_up_no_command(
    mounts: Mounts, tmp_path: Path
) -> None:
    """What still grows is looked at anew each time; no command may look at the mount itself."""
    mount = mounts.mount(write_layout(tmp_path / "stream", gzip_layer(FILES)))
    mount.signal(signal.SIGSTOP)
    try:
        assert lazyfs("status", mount.directory, timeout=30).code == 1
        assert mount.umount("--lazy").code == 0
        assert not mount.is_mounted
    finally:
        mount.signal(signal.SIGCONT)
    mount.wait_end()


def test_unmounted_by_others(mounts: Mounts, local: str) -> None:
    """The system's own programs do as well."""
    for program in (["umount"], ["fusermount3", "-u"], ["umount", "-l"], ["fusermount3", "-uz"]):
        mount = mounts.mount(local)
        assert run([*program, mount.directory]).code == 0
        mount.wait_end()
    assert "a bug" not in mounts.log()


def test_unmounted_and_free_for_the_next(mounts: Mounts, local: str) -> None:
    """When `umount` returns, daemon and its lock on the cache are gone."""
    for number in range(3):
        mount = mounts.mount(local)
        (mount / "pages-1.img").read_bytes()
        assert (mount.status()["chunks_from_cache"] > 0) == (number > 0)
        assert mount.umount().code == 0
        assert not is_alive(mount.pid)


def test_aborted_by_the_kernel(mounts: Mounts, local: str) -> None:
    """As a host's administrator does with a filesystem that hangs."""
    mount = mounts.mount(local)
    connections = "/sys/fs/fuse/connections"
    minor = os.minor(os.stat(mount.directory).st_dev)
    script = f"mount -t fusectl none {connections}; echo 1 > {connections}/{minor}/abort"
    assert run(["unshare", "-m", "sh", "-c", script]).code == 0
    mount.wait_end()
    assert mounts.mount(local).umount().code == 0


def test_the_state_is_json(mounts: Mounts, local: str) -> None:
    mount = mounts.mount(local)
    script = "import os, sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], sys.argv[2]))"
    done = run([sys.executable, "-c", script, mount.directory, "user.lazyfs.status"])
    assert json.loads(done.out)["pid"] == mount.pid

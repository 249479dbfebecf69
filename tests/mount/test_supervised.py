"""Mounts under a supervisor: systemd's protocol, crashes and upgrades, a mount made by others."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lazyfs import mountpoint
from tests.faults import FaultServer, stall
from tests.images import zstd_chunked
from tests.mount.mounting import (
    Mount,
    Mounts,
    Reader,
    command,
    error_of,
    is_alive,
    lazyfs,
    open_file,
    run,
)
from tests.mount.published import MIB, checkpoint_files, publish, write_layout

FILES = checkpoint_files(12 * MIB)
DATA = FILES["checkpoint/pages-1.img"]
NOBODY = 65534


@pytest.fixture
def local(tmp_path: Path) -> str:
    return write_layout(tmp_path / "layout", zstd_chunked(FILES))


# -- systemd ------------------------------------------------------------------------------------


class Manager:
    """As much of a service manager as a service sees of it: a socket for its notifications."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(30)
        self.environment = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}

    def next(self) -> dict[str, str]:
        lines = self._socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def wait(self, key: str) -> str:
        while key not in (told := self.next()):
            pass
        return told[key]

    def silent_for(self, seconds: float) -> bool:
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(30)
        return False

    def drain(self) -> None:
        while not self.silent_for(0.05):
            pass

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"{tmp_path}/notify"
    manager = Manager(name if request.param == "path" else f"@{name}")
    yield manager
    manager.close()


@contextmanager
def in_foreground(
    mounts: Mounts, reference: str, environment: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    directory = mounts.home / "mnt"
    directory.mkdir(exist_ok=True)
    words = mounts.options("--foreground", f"--log-file={mounts.home}/it.log", reference)
    mounts.log_files.append(mounts.home / "it.log")
    process = subprocess.Popen(
        command("mount", *words, directory), stdout=subprocess.PIPE, text=True, env=environment
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_the_service_manager_is_told(mounts: Mounts, manager: Manager, local: str) -> None:
    """When the mount answers, that its loop runs, how it is, and when it ends."""
    with in_foreground(mounts, local, manager.environment) as process:
        assert manager.wait("READY") == "1"
        assert mountpoint.mounted_at(mounts.home / "mnt") is not None
        assert " MiB here" in manager.wait("STATUS")
        assert [manager.wait("WATCHDOG") for _ in range(3)] == ["1"] * 3
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" in environment, "as it was started"
        process.send_signal(signal.SIGTERM)
        assert manager.wait("STOPPING") == "1"
        assert process.wait(timeout=20) == 0


def test_a_loop_that_is_stuck_tells_nothing(mounts: Mounts, tmp_path: Path, local: str) -> None:
    manager = Manager(f"{tmp_path}/notify")
    with in_foreground(mounts, local, manager.environment) as process:
        manager.wait("WATCHDOG")
        process.send_signal(signal.SIGSTOP)
        manager.drain()
        assert manager.silent_for(1.0)
        process.send_signal(signal.SIGCONT)
        manager.wait("WATCHDOG")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    manager.close()


def test_a_daemon_leaves_its_callers_manager_alone(
    mounts: Mounts, tmp_path: Path, local: str
) -> None:
    """A service that mounts something is not lazyfs."""
    manager = Manager(f"{tmp_path}/notify")
    mount = mounts.mount(local, env=manager.environment)
    assert manager.silent_for(0.5)
    assert mount.umount().code == 0
    manager.close()


# -- crashes and upgrades -----------------------------------------------------------------------


def test_a_killed_mount_is_taken_over_while_it_is_busy(
    server: FaultServer, mounts: Mounts, tmp_path: Path
) -> None:
    """Readers in flight, open files, a working directory: all get errors, and the next is warm."""
    layer = zstd_chunked(FILES)
    reference = publish(server, layer)
    mount = mounts.mount(reference)
    assert lazyfs("wait", "--complete", mount.directory).code == 0
    other = mounts.mount(reference, f"--cache-dir={tmp_path}/cold", at=tmp_path / "other")
    mounts.log_files += list((tmp_path / "cold/log").glob("*"))
    asked = server.count(layer.digest)
    server.always("/blobs/", stall())
    with ExitStack() as stack:
        reader = Reader(other / "pages-1.img", 8 * MIB, 4096)
        server.wait_count(layer.digest, asked + 1)
        file = os.open(mount / "pages-1.img", os.O_RDONLY)
        stack.callback(error_of, lambda: os.close(file))
        words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        inside = subprocess.Popen(words, cwd=mount.directory, stdin=subprocess.PIPE)
        stack.enter_context(inside)
        stack.callback(inside.kill)
        for each in (mount, other):
            each.signal(signal.SIGKILL)
            each.wait_end()
        assert reader.result() in ("ENOTCONN", "ECONNABORTED", "EIO")
        assert error_of(lambda: os.pread(file, 4096, 8 * MIB)) in ("ENOTCONN", "ECONNABORTED")
        server.forgive()
        asked = server.count(layer.digest)
        began_s = time.monotonic()
        mount = mounts.mount(reference)
        print(f"taken over in {time.monotonic() - began_s:.2f} s")
        assert (mount / "pages-1.img").read_bytes() == DATA
        assert server.count(layer.digest) - asked <= 2, "the footer and the table of contents"
    assert other.umount().code == 0


def test_a_living_mount_is_replaced(mounts: Mounts, local: str) -> None:
    """Who holds a file keeps it, and the old daemon; whoever comes now meets the new one."""
    old = mounts.mount(local)
    with open_file(old / "pages-1.img") as file:
        assert "lazyfs mount --replace" in mounts.refuse(local).err
        new = mounts.mount(local, "--replace")
        assert new.pid != old.pid
        assert (new / "pages-1.img").read_bytes() == DATA
        assert is_alive(old.pid)
        assert os.pread(file, 4096, 5 * MIB) == DATA[5 * MIB : 5 * MIB + 4096]
    old.wait_end()
    assert new.is_mounted
    assert mounts.mount(local, "--replace", at=mounts.home / "fresh").umount().code == 0


def test_a_living_mount_stays_until_another_can_take_its_place(mounts: Mounts, local: str) -> None:
    old = mounts.mount(local)
    mounts.refuse(f"{local}:absent", "--replace")
    assert (old / "pages-1.img").read_bytes() == DATA


def test_of_two_mounts_at_once_on_one_directory_one_comes_up(
    server: FaultServer, mounts: Mounts
) -> None:
    """Both find it empty; neither may end up below the other."""
    reference = publish(server, zstd_chunked(FILES))
    directory = mounts.home / "mnt"
    directory.mkdir()
    may_go_on = threading.Event()
    server.script("/manifests/", stall(until=may_go_on), stall(until=may_go_on))
    words = command("mount", *mounts.options(reference), directory)
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    server.wait_count("/manifests/", 2)
    may_go_on.set()
    said = [each.communicate(timeout=60)[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 2], said
    assert "is a mount already" in "".join(said)
    assert [each.directory for each in mountpoint.mounts()].count(str(directory)) == 1
    assert (directory / "pages-1.img").read_bytes() == DATA


# -- a mount that others have made --------------------------------------------------------------


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of nobody's."""
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv")
    home = Path(tempfile.mkdtemp(prefix="lazyfs-given-"))
    (home / "mnt").mkdir()
    (home / "run").mkdir(mode=0o700)
    for path in (home, home / "run"):
        os.chown(path, NOBODY, NOBODY)
    write_layout(home / "layout", zstd_chunked(FILES))
    mounts = Mounts(home)
    mounts.cache_dir = home / "xdg/lazyfs"
    yield home
    mounts.close()
    shutil.rmtree(home)


def as_nobody(
    home: Path, *arguments: str | Path, given: int | None = None
) -> subprocess.Popen[str]:
    """`lazyfs` as a user who may not open /dev/fuse."""
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    read = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    environment = {"HOME": str(home), "XDG_CACHE_HOME": f"{home}/xdg"}
    environment |= {"XDG_RUNTIME_DIR": f"{home}/run", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*words, *read, *command(*arguments)],
        env={**os.environ, **environment},
        pass_fds=[given] if given is not None else [],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
    )


@contextmanager
def given_mount(directory: Path) -> Iterator[int]:
    """Mount as a CSI driver does, and yield the end that the filesystem shall serve."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    flags = 1 | 2 | 4  # MS_RDONLY, MS_NOSUID, MS_NODEV: linux/mount.h
    options = f"fd={device},rootmode=40000,user_id={NOBODY},group_id={NOBODY}"
    libc = ctypes.CDLL(None, use_errno=True)
    words = (b"a-checkpoint", os.fsencode(directory), b"fuse.lazyfs")
    code = libc.mount(*words, flags, f"{options},default_permissions,allow_other".encode())
    assert code == 0, os.strerror(ctypes.get_errno())
    try:
        yield device
    finally:
        os.close(device)


@pytest.mark.parametrize("foreground", [False, True], ids=["detached", "foreground"])
def test_a_mount_that_was_given(home: Path, foreground: bool) -> None:
    """The daemon needs no right but to read; who mounted unmounts."""
    directory = home / "mnt"
    with given_mount(directory) as device:
        options = ["--foreground"] if foreground else []
        words = ("mount", *options, "oci:layout", f"/dev/fd/{device}")
        process = as_nobody(home, *words, given=device)
        if foreground:
            assert process.stdout is not None
            said, err = process.stdout.readline(), ""
        else:
            said, err = process.communicate(timeout=60)
        assert (said.endswith(f" on /dev/fd/{device}\n"), err) == (True, "")
    mount = Mount(directory, lazyfs("--version"))
    assert os.stat(f"/proc/{mount.pid}").st_uid == NOBODY
    assert (mount / "pages-1.img").read_bytes() == DATA
    told = lazyfs("status", "--json", directory)
    assert json.loads(told.out)["state"] == "serving"
    asked = as_nobody(home, "status", "--json", directory)
    out, err = asked.communicate(timeout=60)
    assert (json.loads(out)["pid"], err) == (mount.pid, "")
    waited = as_nobody(home, "wait", "--complete", directory)
    assert waited.communicate(timeout=60) == ("", "")
    assert run(["umount", directory]).code == 0
    mount.wait_end()
    if foreground:
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0
    assert not list((home / "run/lazyfs").glob("*.sock"))


def test_a_given_mount_ends_by_a_signal(home: Path) -> None:
    """The mount stays, for who made it to unmount, and answers with errors."""
    directory = home / "mnt"
    with given_mount(directory) as device:
        process = as_nobody(home, "mount", "oci:layout", f"/dev/fd/{device}", given=device)
        assert process.communicate(timeout=60)[1] == ""
    mount = Mount(directory, lazyfs("--version"))
    mount.signal(signal.SIGTERM)
    mount.wait_end()
    assert error_of(lambda: os.listdir(directory)) == "ENOTCONN"
    assert lazyfs("umount", directory).code == 0


def test_what_is_given_must_be_a_mount(mounts: Mounts, local: str) -> None:
    done = mounts.refuse(local, at=Path("/dev/fd/77"))
    assert (done.code, "/dev/fd/77 is not open" in done.err) == (2, True)
    with open_file(Path(os.devnull)) as file:
        done = mounts.refuse(local, at=Path(f"/dev/fd/{file}"), pass_fds=[file])
        assert (done.code, "is not open on /dev/fuse" in done.err) == (2, True)
    device = os.open("/dev/fuse", os.O_RDWR)
    try:
        done = mounts.refuse(local, at=Path(f"/dev/fd/{device}"), pass_fds=[device])
        assert done.code == 1
        assert "nothing has been mounted with it" in done.err
    finally:
        os.close(device)

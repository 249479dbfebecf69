"""The guard of tasks that miss memory: what lives and what dies when the server ends."""

import ctypes
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.guard import watch
from testbed.process import wait_until

from lazyfs.lazypages.ending import end_tasks, pid_of
from lazyfs.lazypages.uffd import Outcome, Userfaultfd

pytestmark = pytest.mark.real

_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API = 0xC018AA3F
_SERVER = """
import ctypes, fcntl, os, struct, subprocess, sys
from lazyfs.lazypages.guard import Guard

guard = Guard.start()
task = subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
child = int(task.stdout.readline())
pidfd = os.pidfd_open(task.pid)
guard.protect(pidfd)
if "released" in sys.argv:
    guard.release(pidfd)
if "missing" in sys.argv:
    uffd = ctypes.CDLL(None).syscall(int(sys.argv[1]), os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("=QQQ", 0xAA, 0, 0))
if "stopped" in sys.argv:
    guard.stop()
print(guard.pid, task.pid, child, flush=True)
sys.stdin.read()
"""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Server:
    """A process with a guard and a task, which has a child."""

    def __init__(self, *words: str) -> None:
        number = str(_USERFAULTFD[platform.machine()])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, number, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.guard, self.task, self.child = map(int, self.process.stdout.readline().split())
        watch(self.task)
        watch(self.child)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        for pid in (self.task, self.child):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    found: list[Server] = []
    yield found
    for each in found:
        each.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_task_that_misses_memory_dies_with_the_server_and_so_does_its_child(
    servers: list[Server], number: signal.Signals
) -> None:
    server = Server("missing")
    servers.append(server)
    assert lives(server.guard)
    server.process.send_signal(number)
    wait_until(lambda: not lives(server.task) and not lives(server.child), "they die", 20)
    wait_until(lambda: not lives(server.guard), "the guard ends too", 20)


@pytest.mark.parametrize("words", [("nothing",), ("released",), ("missing", "released")])
def test_a_task_that_misses_nothing_lives_on(servers: list[Server], words: tuple[str, ...]) -> None:
    server = Server(*words)
    servers.append(server)
    server.process.kill()
    wait_until(lambda: not lives(server.guard), "the guard ends", 20)
    assert lives(server.task)
    assert lives(server.child)


def test_the_guard_does_not_mind_being_told_to_end(servers: list[Server]) -> None:
    server = Server("missing")
    servers.append(server)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(server.guard, number)
    server.process.kill()
    wait_until(lambda: not lives(server.task), "the task dies", 20)


def test_a_guard_that_is_stopped_is_gone(servers: list[Server]) -> None:
    server = Server("stopped")
    servers.append(server)
    assert server.guard == 0


def own_uffd() -> Userfaultfd:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_USERFAULTFD[platform.machine()], os.O_CLOEXEC | os.O_NONBLOCK)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    api = (ctypes.c_uint64 * 3)(0xAA, 0, 0)
    assert libc.ioctl(descriptor, ctypes.c_ulong(_UFFDIO_API), api) == 0
    return Userfaultfd(descriptor)


def test_memory_that_somebody_runs_in_is_alive() -> None:
    uffd = own_uffd()
    assert uffd.is_alive()
    assert len(uffd.read()) == 0
    assert uffd.copy(1 << 20, bytes(4096)).outcome is Outcome.UNMAPPED
    assert uffd.zero(3, 4096).outcome is Outcome.FAILED
    uffd.close()
    uffd.close()


def test_ending_tasks_gives_up_on_memory_whose_owner_is_not_found() -> None:
    uffd = own_uffd()
    assert not end_tasks([], [uffd.descriptor], patience_s=0.05)
    uffd.close()
    assert end_tasks([], [])


def test_a_pidfd_names_its_process_until_that_ends() -> None:
    process = subprocess.Popen(["sleep", "1000"])
    pidfd = os.pidfd_open(process.pid)
    assert pid_of(pidfd) == process.pid
    process.kill()
    process.wait()
    assert pid_of(pidfd) == -1
    os.close(pidfd)
    assert pid_of(pidfd) == -1

"""A restore of two processes that have a userfaultfd, and that no CRIU restores."""

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import cast

import pytest
import trio

from lazyfs.checkpoint.criu_memory import PageExtent, PageFlags, Pagemap, Vma
from lazyfs.ground.data import Data
from lazyfs.ground.errors import FetchError, LazyfsError
from lazyfs.lazypages.counts import Counts
from lazyfs.lazypages.guard import Guard
from lazyfs.lazypages.memory import Level, TaskMemory
from lazyfs.lazypages.order import Part
from lazyfs.lazypages.pages import Images, Job, LazyMemory
from lazyfs.lazypages.session import Session
from lazyfs.lazypages.task import Desk
from tests.lazypages.test_task import PAGE

TASK = """
import ctypes, fcntl, os, platform, socket, struct, sys, time
page = os.sysconf("SC_PAGESIZE")
number = {"x86_64": 323}.get(platform.machine(), 282)
uffd = ctypes.CDLL(None).syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("=3Q", 0xAA, 0, 0))
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(ctypes.c_void_p(16 * page), ctypes.c_size_t(16 * page), 3, 0x100022, -1, 0)
assert at == 16 * page, at
if "unregistered" not in sys.argv:
    fcntl.ioctl(uffd, 0xC020AA00, struct.pack("=4Q", at, 16 * page, 1, 0))
link = socket.socket(fileno=int(sys.argv[1]))
link.sendall(struct.pack("=i", int(sys.argv[2])))
socket.send_fds(link, [b"x"], [uffd])
link.close()
print("announced", flush=True)
time.sleep(600)
"""


class Released:
    """A guard that notes nothing."""

    def protect(self, pidfd: int) -> None: ...
    def release(self, pidfd: int) -> None: ...


class Lost:
    """A pages file that cannot be had, once that is asked for."""

    def __init__(self) -> None:
        self.is_lost = trio.Event()

    path = "pages-1.img"

    def peek(self, offset: int, size_bytes: int) -> Data | None:
        return None

    def is_foreseen(self, offset: int) -> bool:
        return False

    def begin(self, offset: int, size_bytes: int) -> Sequence[Job]:
        return ()

    async def wait(self, offset: int, size_bytes: int) -> None:
        await self.is_lost.wait()

    async def read(self, *_: object) -> Data:
        await self.is_lost.wait()
        raise FetchError("lost", transient=False)


class TwoTasks:
    """Of which 1 has no lazy memory, and 2 has memory in a file that is lost."""

    def __init__(self, file: Lost) -> None:
        self._file = file

    async def foreseen(self) -> list[Part]:
        await trio.sleep_forever()
        raise AssertionError("nobody knows")

    def expect_faults(self) -> None:
        pass

    async def memory_of(self, pid: int) -> LazyMemory:
        flags = PageFlags.PRESENT | (PageFlags.LAZY if pid == 2 else PageFlags.PRESENT)
        pagemap = Pagemap(1, (PageExtent(16 * PAGE, 16, flags),))
        vmas = [Vma(0, 64 * PAGE, 0, 3, 0x22, 1)]
        return LazyMemory(TaskMemory(vmas, [Level(pagemap, 16 * PAGE)], PAGE), [self._file])


def started(link: socket.socket, pid: int, *words: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", TASK, str(link.fileno()), str(pid), *words]
    return subprocess.Popen(command, pass_fds=[link.fileno()], stdout=subprocess.PIPE)


class Restore:
    """Both of them, announced as CRIU would."""

    def __init__(self, file: Lost, *words: str) -> None:
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._words = words
        self.tasks: list[subprocess.Popen[bytes]] = []
        self.desk = Desk(Counts())
        self.session = Session(cast(Images, TwoTasks(file)), cast(Guard, Released()), self.desk)

    async def announce(self, *pids: int) -> None:
        with self._theirs:
            for pid in pids or (1, 2):
                self.tasks.append(started(self._theirs, pid, *self._words))
                stdout = self.tasks[-1].stdout
                assert stdout is not None
                assert await trio.to_thread.run_sync(stdout.readline) == b"announced\n"
            self._theirs.sendall(b"FTSR")

    async def run(self) -> None:
        await self.session.run(trio.socket.from_stdlib_socket(self.ours))

    def assert_killed(self) -> None:
        assert [each.wait(10) for each in self.tasks] == [-signal.SIGKILL] * 2
        assert not self.session.is_held

    def close(self) -> None:
        for each in self.tasks:
            each.kill()
            each.communicate()
        self.ours.close()


async def test_a_task_that_has_its_memory_dies_with_one_that_does_not_get_it() -> None:
    file = Lost()
    restore = Restore(file)

    async def lose() -> None:
        await restore.announce()
        with trio.fail_after(20):
            while not restore.session.is_restored or len(restore.session.tasks) > 1:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert restore.tasks[0].poll() is None
        file.is_lost.set()

    try:
        with trio.fail_after(50), pytest.RaisesGroup(FetchError, flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lose)
                await restore.run()
        restore.assert_killed()
    finally:
        restore.close()


async def test_who_has_all_of_their_memory_does_not_wait_for_what_a_trace_may_foretell() -> None:
    restore = Restore(Lost())
    try:
        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(restore.announce, 1)
                await restore.run()
        assert restore.tasks[0].poll() is None
    finally:
        restore.close()


async def test_who_has_ended_does_not_wait_for_the_end_of_a_recording() -> None:
    restore = Restore(Lost())
    restore.desk.precise = True

    async def end() -> None:
        await restore.announce(2)
        with trio.fail_after(20):
            while not restore.session.is_restored:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert restore.session.missing_bytes == 16 * PAGE
        restore.tasks[0].kill()

    try:
        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end)
                await restore.run()
    finally:
        restore.close()


async def test_memory_that_would_read_as_zeros_since_nobody_registered_it_fails_the_restore() -> (
    None
):
    restore = Restore(Lost(), "unregistered")
    try:
        with (
            trio.fail_after(50),
            pytest.RaisesGroup(
                pytest.RaisesExc(LazyfsError, match="has not registered"), flatten_subgroups=True
            ),
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(restore.announce)
                await restore.run()
        restore.assert_killed()
    finally:
        restore.close()

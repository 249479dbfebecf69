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
from lazyfs.ground.errors import FetchError
from lazyfs.lazypages.counts import Counts
from lazyfs.lazypages.guard import Guard
from lazyfs.lazypages.memory import Level, TaskMemory
from lazyfs.lazypages.pages import Images, Job, LazyMemory
from lazyfs.lazypages.session import Session
from lazyfs.lazypages.task import Desk
from tests.lazypages.test_task import PAGE

TASK = """
import ctypes, fcntl, os, platform, socket, struct, sys, time
number = {"x86_64": 323}.get(platform.machine(), 282)
uffd = ctypes.CDLL(None).syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("=3Q", 0xAA, 0, 0))
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

    async def memory_of(self, pid: int) -> LazyMemory:
        flags = PageFlags.PRESENT | (PageFlags.LAZY if pid == 2 else PageFlags.PRESENT)
        pagemap = Pagemap(1, (PageExtent(16 * PAGE, 16, flags),))
        vmas = [Vma(0, 64 * PAGE, 0, 3, 0x22, 1)]
        return LazyMemory(TaskMemory(vmas, [Level(pagemap, 16 * PAGE)], PAGE), [self._file])


def started(link: socket.socket, pid: int) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-c", TASK, str(link.fileno()), str(pid)]
    return subprocess.Popen(words, pass_fds=[link.fileno()], stdout=subprocess.PIPE)


async def test_a_task_that_has_its_memory_dies_with_one_that_does_not_get_it() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    tasks: list[subprocess.Popen[bytes]] = []
    file = Lost()
    session = Session(cast(Images, TwoTasks(file)), cast(Guard, Released()), Desk(Counts()))

    async def announce() -> None:
        with theirs:
            for pid in (1, 2):
                tasks.append(started(theirs, pid))
                assert tasks[-1].stdout is not None
                assert await trio.to_thread.run_sync(tasks[-1].stdout.readline) == b"announced\n"
            theirs.sendall(b"FTSR")
        with trio.fail_after(20):
            while not session.is_restored or len(session.tasks) > 1:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert tasks[0].poll() is None
        file.is_lost.set()

    try:
        with trio.fail_after(50), pytest.RaisesGroup(FetchError, flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(announce)
                await session.run(trio.socket.from_stdlib_socket(ours))
        assert [each.wait(10) for each in tasks] == [-signal.SIGKILL] * 2
        assert not session.is_held
    finally:
        for each in tasks:
            each.kill()
            each.communicate()
        ours.close()

"""One restore: the tasks that CRIU announces on one connection, until all have their memory.

If anything of it cannot be had, all tasks of the restore are killed, and so are they when the
server is made to stop: no descriptor is closed while somebody could read zeros for what is missing.
"""

import array
import logging
import os
import socket
import struct
import time

import trio

from lazyfs.ground.errors import LazyfsError, MalformedError
from lazyfs.lazypages.ahead import Ahead
from lazyfs.lazypages.ending import end_tasks
from lazyfs.lazypages.guard import Guard
from lazyfs.lazypages.missing import Missing
from lazyfs.lazypages.pages import Images
from lazyfs.lazypages.protocol import (
    NUMBER_BYTES,
    SOCKET_NAME,
    Announced,
    Finished,
    parse_announcement,
)
from lazyfs.lazypages.task import Desk, Task
from lazyfs.lazypages.uffd import Userfaultfd, userfaultfds

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("=iII")
"""struct ucred: pid, uid, gid. Source: unix(7)."""
_TASKS_MOST = 16 * 1024
_PATIENCE_S = 30.0


class Session:
    """One restore; `run` it."""

    def __init__(self, images: Images, guard: Guard, desk: Desk) -> None:
        self._images = images
        self._guard = guard
        self._desk = desk
        self.tasks: list[Task] = []
        """Those that are not over, in the order of their coming."""
        self.is_restored = False
        """CRIU has said that all tasks are about to run."""
        self.is_held = False
        """Somebody could not be killed, and the descriptors are left open."""
        self._uffds: list[Userfaultfd] = []
        """All that may be open."""
        self._pidfds: list[int] = []
        """Of all tasks until the end of the restore: a child may miss what its parent has."""
        self._news = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._foresight = trio.CancelScope()

    @property
    def missing_bytes(self) -> int:
        """How much has still to come."""
        return sum(task.missing_bytes for task in self.tasks)

    async def run(self, link: trio.socket.SocketType) -> None:
        """Hear of the tasks, and serve them until they have all of their memory.

        Raises:
            LazyfsError: it could not be had, and the tasks have been killed. In a group.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._send)
                nursery.start_soon(self._send_foreseen)
                await self._hear_of_tasks(link)
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                await self._end()

    # -- what CRIU says ---------------------------------------------------------------------

    async def _hear_of_tasks(self, link: trio.socket.SocketType) -> None:
        while not self.is_restored:
            data, announcer, _ = await _receive(link, NUMBER_BYTES)
            said = parse_announcement(data)
            if isinstance(said, Finished):
                self.is_restored = True
            elif isinstance(said, Announced):
                _, sender, descriptors = await _receive(link, 1)
                found = userfaultfds(descriptors)
                for other in set(descriptors) - set(found):
                    os.close(other)
                self._uffds += map(Userfaultfd, found)
                if len(found) != 1 or sender != announcer:
                    raise MalformedError(f"process {said.pid} comes without its userfaultfd")
                await self._take_in(said.pid, sender, self._uffds[-1])
        log.info("restored: %d bytes are still to come", self.missing_bytes)
        if self._desk.journal is not None:
            self._desk.journal.mark("restored", time.monotonic())
        for task in list(self.tasks):
            task.check_registered()
        for task in list(self.tasks):
            task.may_end()
        self._news.set()

    async def _take_in(self, pid: int, host_pid: int, uffd: Userfaultfd) -> None:
        """Serve a task, by its pid in the images and its pid here."""
        if len(self._uffds) > _TASKS_MOST:
            raise MalformedError(f"more than {_TASKS_MOST} tasks in one restore")
        if host_pid <= 0:
            raise LazyfsError(
                f"process {pid} is restored where it cannot be seen from here, so nothing could be "
                "done if its memory did not come: run lazyfs in a pid namespace above it"
            )
        try:
            pidfd = os.pidfd_open(host_pid)
        except OSError as error:
            raise LazyfsError(f"process {pid} ({host_pid}) has gone: {error.strerror}") from None
        self._pidfds.append(pidfd)
        self._guard.protect(pidfd)
        lazy = await self._images.memory_of(pid)
        self._images.expect_faults()
        missing = Missing(lazy.memory.ranges)
        task = Task(f"process {pid}", uffd, lazy, missing, self._desk, self._on_fork)
        log.info("process %d (%d here): %d bytes come lazily", pid, host_pid, task.missing_bytes)
        self._start(task, pidfd)

    # -- the tasks --------------------------------------------------------------------------

    def _on_fork(self, parent: Task, descriptor: int) -> None:
        uffd = Userfaultfd(descriptor)
        self._uffds.append(uffd)
        name = f"a child of {parent.name}"
        child = Task(name, uffd, parent.lazy, parent.missing(), self._desk, self._on_fork)
        log.debug("%s: it misses %d bytes", name, child.missing_bytes)
        self._start(child, None)
        if self.is_restored:
            child.may_end()

    def _start(self, task: Task, pidfd: int | None) -> None:
        if self._nursery is None:  # all are being ended
            return
        self.tasks.append(task)
        self._nursery.start_soon(self._live, task, pidfd)
        self._news.set()

    async def _live(self, task: Task, pidfd: int | None) -> None:
        """Run a task, and see when it ends."""
        async with trio.open_nursery() as nursery:
            if pidfd is not None:
                nursery.start_soon(_watch, task, pidfd)
            await task.run()
            nursery.cancel_scope.cancel()
        self.tasks.remove(task)
        self._uffds.remove(task.uffd)
        self._news.set()

    async def _send(self) -> None:
        """Send what nobody has asked for: of one task after the other, until all is sent."""
        while True:
            waiting = [task for task in self.tasks if task.missing_bytes]
            if self._desk.precise or not waiting:
                if self.is_restored and not self.tasks:
                    self._foresight.cancel()
                    return
                await self._wait_news()
                continue
            for task in waiting if not self.is_restored else waiting[:1]:
                await task.send_some()

    async def _wait_news(self) -> None:
        """Come back when a task has come or gone, or more may be sent than before."""
        self._news = trio.Event()
        async with trio.open_nursery() as nursery:

            async def wait_whole() -> None:
                await self._desk.whole.wait()
                nursery.cancel_scope.cancel()

            if self._desk.precise:
                nursery.start_soon(wait_whole)
            await self._news.wait()
            nursery.cancel_scope.cancel()

    async def _send_foreseen(self) -> None:
        """Send what a trace says will be wanted, beside all the rest and before it."""
        with self._foresight:
            try:
                parts = await self._images.foreseen()
            except LazyfsError as error:
                log.info("what a trace foretells cannot be told of memory: %s", error)
                return
            if parts and not self._desk.precise:
                await Ahead(parts, self.tasks).run(lambda: self.is_restored)

    # -- the end ----------------------------------------------------------------------------

    async def _end(self) -> None:
        """Kill who is left, and let go."""
        uffds = [uffd for uffd in self._uffds if uffd.descriptor >= 0]
        if uffds:
            log.error("the tasks of a restore are killed: %d bytes are missing", self.missing_bytes)
            descriptors = [uffd.descriptor for uffd in uffds]
            self.is_held = True  # until it is known that they are dead
            self.is_held = not await trio.to_thread.run_sync(
                end_tasks, self._pidfds[:], descriptors, _PATIENCE_S
            )
            if self.is_held:
                log.critical(
                    "somebody whose memory does not come could not be found, and waits for it "
                    "until this process and its guard are killed"
                )
                return
        for uffd in uffds:
            uffd.close()
        self.tasks.clear()
        for pidfd in self._pidfds[:]:
            self._forget(pidfd)

    def _forget(self, pidfd: int) -> None:
        self._pidfds.remove(pidfd)
        self._guard.release(pidfd)
        os.close(pidfd)


async def _watch(task: Task, pidfd: int) -> None:
    await trio.lowlevel.wait_readable(pidfd)
    task.note_exit()


async def _receive(link: trio.socket.SocketType, size_bytes: int) -> tuple[bytes, int, list[int]]:
    """Return so many bytes, the pid here of who sent them, and the descriptors beside them.

    Raises:
        LazyfsError: the connection ended before.
    """
    found = bytearray()
    sender = 0
    descriptors: list[int] = []
    space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4)
    while len(found) < size_bytes:
        try:
            data, ancillary, flags, _ = await link.recvmsg(
                size_bytes - len(found), space, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            data, ancillary, flags = b"", [], 0
            log.debug("%s: %s", SOCKET_NAME, error)
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(value[: len(value) // numbers.itemsize * numbers.itemsize])
                descriptors += numbers
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = _CREDENTIALS.unpack(value)[0]
        if not data or flags & socket.MSG_CTRUNC:
            for each in descriptors:
                os.close(each)
            raise LazyfsError("CRIU has given the restore up, or its connection was lost")
        found += data
    return bytes(found), sender, descriptors

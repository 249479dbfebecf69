"""The socket on which restores announce themselves, and what can be told of all of them."""

import errno
import logging
import os
import resource
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.ground.errors import LazyfsError, UsageError, raise_sole_error
from lazyfs.lazypages.counts import Counts
from lazyfs.lazypages.guard import Guard
from lazyfs.lazypages.pages import Images
from lazyfs.lazypages.protocol import SOCKET_NAME
from lazyfs.lazypages.session import Session
from lazyfs.lazypages.task import Desk

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("=iII")
_BACKLOG = 10


class LazyPages:
    """The server of one checkpoint's lazy pages: `listen`, then `run`."""

    def __init__(self, checkpoint: OpenedCheckpoint, guard: Guard) -> None:
        """`guard`: started before there were threads; it stays the caller's."""
        self._checkpoint = checkpoint
        self._guard = guard
        self._images = Images(checkpoint)
        self._desk = Desk(Counts(), checkpoint.counters.journal)
        self._sessions: list[Session] = []
        self._restores = 0
        self._failed: str | None = None
        self._failures = 0
        self._last_failure: str | None = None
        self._is_held = False
        self._news = trio.Event()
        self._path: Path | None = None

    def be_precise(self) -> None:
        """Bring just what is wanted, until `be_whole`: somebody records that."""
        self._desk.precise = True

    def be_whole(self) -> None:
        """Bring all the rest too, behind what is wanted."""
        self._desk.precise = False
        self._desk.whole.set()

    # -- what is told -----------------------------------------------------------------------

    @property
    def missing_bytes(self) -> int:
        """How much has still to come, for all tasks together."""
        return sum(session.missing_bytes for session in self._sessions)

    @property
    def failed(self) -> str | None:
        """Why the tasks of the latest restore have been killed, if they have."""
        return self._failed

    @property
    def is_idle(self) -> bool:
        """Whether nobody is being restored, or waits for memory."""
        return not self._sessions

    @property
    def is_held(self) -> bool:
        """Whether descriptors had to be left open, since somebody could not be found and killed."""
        return self._is_held

    def as_json(self) -> dict[str, Any]:
        """Return what `docs/json.md` describes."""
        if self._failed is not None:
            state = "failed"
        elif any(not session.is_restored for session in self._sessions):
            state = "restoring"
        elif self._sessions:
            state = "transferring"
        else:
            state = "home" if self._restores else "waiting"
        return {
            "socket": str(self._path) if self._path is not None else None,
            "state": state,
            "failed": self._failed,
            "guard_pid": self._guard.pid or None,
            "failures": self._failures,
            "last_failure": self._last_failure,
            "restores": self._restores,
            "tasks": sum(len(session.tasks) for session in self._sessions),
            "missing_bytes": self.missing_bytes,
            **self._desk.counts.as_json(),
        }

    async def wait_home(self) -> None:
        """Come back when a restore has come, and nobody waits for memory any more.

        Raises:
            LazyfsError: the tasks of a restore have been killed.
        """
        while self._sessions or not (self._restores or self._failed):
            await self._news.wait()
        if self._failed is not None:
            raise LazyfsError(self._failed)

    async def wait_idle(self) -> None:
        """Come back when nobody is being restored, or waits for memory."""
        while self._sessions:
            await self._news.wait()

    # -- what is done -----------------------------------------------------------------------

    def listen(self, work_dir: Path) -> socket.socket:
        """Return a socket that listens in the work directory of a restore; for `run`.

        Raises:
            UsageError: it cannot be there.
        """
        self._path = work_dir.absolute() / SOCKET_NAME
        _allow_many_descriptors()
        return _listen(work_dir)

    async def run(self, listening: socket.socket) -> None:
        """Serve restores, several at a time, until cancelled. The socket stays the caller's."""
        listener = trio.socket.from_stdlib_socket(listening)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._prepare)
            nursery.start_soon(self._watch_guard)
            while True:
                try:
                    link, _ = await listener.accept()
                except OSError as error:
                    if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                        raise
                    log.warning("nobody can be restored now: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._serve, link)

    async def _prepare(self) -> None:
        """Read the images of all tasks before anybody asks."""
        try:
            await self._images.prepare()
        except LazyfsError as error:
            log.info("the tasks' memory could not be looked at ahead: %s", error)
        except Exception:  # a bug must not end the mount
            log.exception("lazy pages cannot be prepared: please report this")

    async def _watch_guard(self) -> None:
        """Say so if tasks have nobody any more who would see to them in our place."""
        await trio.lowlevel.wait_readable(self._guard.pidfd)
        log.error(
            "the guard of lazy pages was killed: whoever misses memory would go on without if this "
            "process ended now"
        )

    async def _serve(self, link: trio.socket.SocketType) -> None:
        """Serve a restore; whatever happens to it, the mount goes on."""
        session = Session(self._images, self._guard, self._desk)
        with link:
            if not _is_welcome(link):
                return
            self._sessions.append(session)
            self._failed = None
            try:
                await self._live(session, link)
                self._restores += 1
                log.info("all memory has come, or nobody is left to want it")
            except LazyfsError as error:
                self._fail(str(error))
            except Exception as error:  # a bug must not end the mount
                log.exception("lazy pages failed: please report this")
                self._fail(f"a bug: {error!r}")
            except trio.Cancelled:
                self._fail("the server was stopped")
                raise
            finally:
                self._sessions.remove(session)
                self._is_held = self._is_held or session.is_held
                self._tell()

    async def _live(self, session: Session, link: trio.socket.SocketType) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                await session.run(link)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_sole_error(group)

    async def _watch(self) -> None:
        """End a restore whose bytes are known to be wrong."""
        await self._checkpoint.condemned.wait()
        self._checkpoint.raise_if_condemned()

    def _fail(self, why: str) -> None:
        log.critical("a restore has failed, and its tasks have been killed: %s", why)
        self._failed = self._last_failure = why
        self._failures += 1

    def _tell(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()


def _is_welcome(link: trio.socket.SocketType) -> bool:
    """Whether who restores is of this user, or root: it is given the checkpoint's memory."""
    data = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user = _CREDENTIALS.unpack(data)[1]
    if user in (0, os.geteuid()):
        return True
    log.warning("user %d has no business with %s", user, SOCKET_NAME)
    return False


def _allow_many_descriptors() -> None:
    """Each task has two here, and each child that it forks while its memory comes has one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(work_dir: Path) -> socket.socket:
    """Listen there; a path through /proc, since that of a socket may have 107 bytes at most."""
    listening = socket.socket(socket.AF_UNIX)
    directory = -1
    try:
        directory = os.open(work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(SOCKET_NAME, dir_fd=directory, follow_symlinks=False).st_mode):
                os.unlink(SOCKET_NAME, dir_fd=directory)
        os.fchmod(listening.fileno(), 0o600)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # inherited when accepted
        listening.bind(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen on {SOCKET_NAME} in {work_dir}: {error.strerror or error}"
        ) from None
    finally:
        if directory >= 0:
            os.close(directory)
    return listening

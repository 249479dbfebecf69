"""The sockets of running mounts, in the run directory (`transport/run_directory.py`).

A socket is called after its mount's device number, which no two mounts share.

Light imports only: used by commands that import nothing else of lazyfs.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from lazyfs.transport.run_directory import open_run_directory, run_directory

log = logging.getLogger(__name__)

_SOCKET_NAME = re.compile(r"(?:mount-(\d+)|pid-\d+)\.sock")
_LOCK_TIMEOUT_S = 1.0
_BACKLOG = 32


class Found(msgspec.Struct, frozen=True):
    """The socket of a mount that is, or was."""

    path: Path
    device: int | None
    """Of the mount, as `st_dev`; None if its daemon does not know it."""
    user_id: int
    """Whose it is."""


class ListeningSocket:
    """This daemon's socket, to be found by its mount's device."""

    def __init__(self, device: int | None, directory: Path | None = None) -> None:
        """Listen; what dead daemons left behind is cleared away.

        Raises:
            OSError: the directory is not to be used.
        """
        self.name = f"mount-{device}.sock" if device is not None else f"pid-{os.getpid()}.sock"
        self._directory = open_run_directory(str(directory or run_directory()))
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(self.socket.fileno(), 0o600)
            temporary = f".{os.getpid()}.new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._directory)
            self.socket.bind(_path_in(self._directory, temporary))
            self.socket.listen(_BACKLOG)
            with _locked(partial(fcntl.flock, self._directory)) as is_locked:
                if is_locked:
                    _clear(self._directory)
                os.rename(
                    temporary,
                    self.name,
                    src_dir_fd=self._directory,
                    dst_dir_fd=self._directory,
                )
            self._inode = os.stat(self.name, dir_fd=self._directory).st_ino
        except BaseException:
            self.socket.close()
            os.close(self._directory)
            raise

    def close(self) -> None:
        """Stop listening, and leave nothing behind."""
        self.socket.close()
        with contextlib.suppress(OSError):
            if os.stat(self.name, dir_fd=self._directory).st_ino == self._inode:
                os.unlink(self.name, dir_fd=self._directory)
        os.close(self._directory)


@contextlib.contextmanager
def mounting(mount_point: Path) -> Iterator[None]:
    """Be the only one of this user's daemons that looks at a directory and mounts on it.

    As far as that can be had soon: a daemon that is stopped at it keeps nobody from mounting.
    """
    with contextlib.ExitStack() as stack:
        try:
            directory = open_run_directory(run_directory())
            stack.callback(os.close, directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            locks = os.open("mounting.locks", flags, 0o600, dir_fd=directory)
            stack.callback(os.close, locks)
        except OSError as problem:
            log.debug("others are not kept from mounting at once: %s", problem)
        else:  # a byte for each path, give or take two that share one
            at = zlib.crc32(os.fsencode(mount_point))
            stack.enter_context(_locked(lambda kind: fcntl.lockf(locks, kind, 1, at)))
        yield


def find_sockets() -> list[Found]:
    """Return the sockets of this user's mounts; for root, of everybody's."""
    user = os.geteuid()
    directories = {Path(run_directory()): user}
    if user == 0:
        for path in Path("/run/user").glob("*/lazyfs"):
            with contextlib.suppress(ValueError):
                directories[path] = int(path.parent.name)
        for path in Path("/tmp").glob("lazyfs-*"):  # noqa: S108 - looked at before it is believed
            with contextlib.suppress(ValueError):
                directories[path] = int(path.name.removeprefix("lazyfs-"))
    found = []
    for directory, owner in directories.items():
        with contextlib.suppress(OSError):
            answer = directory.lstat()
            is_theirs = stat.S_ISDIR(answer.st_mode) and answer.st_uid == owner
            if is_theirs and not answer.st_mode & 0o077:
                found += list(_sockets_in(directory, owner))
    return found


def connect(found: Found, timeout_s: float) -> socket.socket:
    """Connect to a daemon.

    Raises:
        ConnectionRefusedError, FileNotFoundError: it is dead.
        TimeoutError: it has too much to do.
        OSError: it is not to be reached, or is somebody else.
    """
    descriptor = os.open(found.path.parent, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    link = socket.socket(socket.AF_UNIX)
    try:
        link.settimeout(timeout_s)
        link.connect(_path_in(descriptor, found.path.name))
        _expect_user(link, found)
    except BaseException:
        link.close()
        raise
    finally:
        os.close(descriptor)
    return link


class _Link(Protocol):
    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


def peer_user(link: _Link) -> int:
    """Return the user at the other end. Source: unix(7), SO_PEERCRED; three ints."""
    answer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(answer[4:8], sys.byteorder)


def _expect_user(link: socket.socket, found: Found) -> None:
    if peer_user(link) not in (0, found.user_id):
        raise PermissionError(errno.EPERM, f"{found.path} is served by another user")


def _sockets_in(directory: Path, owner: int) -> Iterator[Found]:
    for path in sorted(directory.iterdir()):
        name = _SOCKET_NAME.fullmatch(path.name)
        if name is not None:
            yield Found(path, int(name[1]) if name[1] else None, owner)


def _clear(directory: int) -> None:
    """Remove sockets on which nobody listens. The directory must be locked."""
    for name in os.listdir(directory):
        if _SOCKET_NAME.fullmatch(name) is None:
            continue
        with socket.socket(socket.AF_UNIX) as link, contextlib.suppress(OSError):
            link.setblocking(False)
            try:
                link.connect(_path_in(directory, name))
            except ConnectionRefusedError:
                os.unlink(name, dir_fd=directory)
                log.debug("%s was left behind", name)


@contextlib.contextmanager
def _locked(lock: Callable[[int], None]) -> Iterator[bool]:
    """Hold a lock, if it can be had soon; yield whether it is held. `lock` is told what to do."""
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    is_locked = False
    while not is_locked and time.monotonic() < deadline_s:
        try:
            lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            time.sleep(0.01)
    try:
        yield is_locked
    finally:
        if is_locked:
            lock(fcntl.LOCK_UN)


def _path_in(directory: int, name: str) -> str:
    """Return a short path: a socket's is at most 107 bytes, and this one cannot be redirected."""
    return f"/proc/self/fd/{directory}/{name}"

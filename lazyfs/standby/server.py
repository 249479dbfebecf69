"""A standby: listens, looks at who asks, forks a deputy for each who may.

One thread, one poll, and nothing in it that waits: what a client sends is read by the deputy. Who
asks is looked at here, before anything is read: the same user and group, and the same rights in all
that /proc tells (`rights.py`). A standby whose own files have changed declines, and ends.

When a standby ends, its deputies and their clients go on; only how a signal ended a deputy is not
told to its client any more.

Source: unix(7), SO_PEERCRED; socket(7), SO_PEERPIDFD (Linux 6.5); sd_listen_fds(3).
"""

import errno
import fcntl
import logging
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from socket import AF_UNIX, SO_PEERCRED, SOCK_SEQPACKET, SOL_SOCKET, socket
from types import FrameType

from lazyfs.ground.errors import LazyfsError, UsageError
from lazyfs.standby import wire
from lazyfs.standby.deputy import Command, Origin, become
from lazyfs.standby.preload import Preloaded
from lazyfs.standby.rights import Gone, difference, rights_of
from lazyfs.transport.run_directory import open_run_directory, run_directory

log = logging.getLogger(__name__)

_BACKLOG = 128
_FIRST_GIVEN = 3
_SO_PEERPIDFD = 77
_LOCK_NAME = "standby.lock"
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Declined(Exception):
    """Whoever asks has to carry on by himself."""


@contextmanager
def listening(environment: MutableMapping[str, str]) -> Iterator[tuple[socket, str]]:
    """Yield the socket that systemd has given, or one in the run directory; and its name.

    Raises:
        UsageError: another standby of this user listens; what was given is no such socket.
        LazyfsError: there can be none.
    """
    given = environment.pop("LISTEN_FDS", "")
    for_whom = environment.pop("LISTEN_PID", "")
    environment.pop("LISTEN_FDNAMES", None)
    if given and for_whom == str(os.getpid()):
        listener = socket(fileno=_FIRST_GIVEN)
        if given != "1" or (listener.family, listener.type) != (AF_UNIX, SOCK_SEQPACKET):
            raise UsageError("systemd must give one socket: ListenSequentialPacket=")
        listener.set_inheritable(False)
        yield listener, str(listener.getsockname())
        return
    path = run_directory()
    try:
        directory = open_run_directory(path)
    except OSError as problem:
        raise LazyfsError(f"{path} is not to be used: {problem.strerror}") from None
    try:
        with _listening_in(directory, path) as listener:
            yield listener, f"{path}/{wire.SOCKET_NAME}"
    finally:
        os.close(directory)


@contextmanager
def _listening_in(directory: int, path: str) -> Iterator[socket]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(_LOCK_NAME, flags, 0o600, dir_fd=directory)
    listener = socket(AF_UNIX, SOCK_SEQPACKET)
    inode = None
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not its children
        except OSError:
            raise UsageError(f"there is a standby already, at {path}") from None
        with suppress(FileNotFoundError):
            os.unlink(wire.SOCKET_NAME, dir_fd=directory)
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(f"/proc/self/fd/{directory}/{wire.SOCKET_NAME}")
        listener.listen(_BACKLOG)
        inode = os.stat(wire.SOCKET_NAME, dir_fd=directory).st_ino
        yield listener
    finally:
        with suppress(OSError):
            if inode == os.stat(wire.SOCKET_NAME, dir_fd=directory).st_ino:
                os.unlink(wire.SOCKET_NAME, dir_fd=directory)
        listener.close()
        os.close(lock)


class Standby:
    """One that listens."""

    def __init__(self, listener: socket, commands: Mapping[str, Command]) -> None:
        """Import everything. This process must have one thread, and keeps to it."""
        self._listener = listener
        self._commands = commands
        self._preloaded = Preloaded()
        self._origin = Origin()
        self._rights = rights_of("self")
        self._links: dict[int, socket] = {}
        """Of each deputy, by its pid."""
        self._is_stopped = False

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Serve until a signal ends it, or lazyfs has changed."""
        self._listener.setblocking(False)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # any that a client has is had
        woken, wake = os.pipe()
        for end in (woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or `&` in a script
                signal.signal(number, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(woken, select.POLLIN)
        on_ready()
        while not self._is_stopped:
            for descriptor, _ in poll.poll():
                if descriptor == woken:
                    with suppress(BlockingIOError):
                        os.read(woken, 4096)
                    self._reap()
                else:
                    self._accept()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopped = True

    def _accept(self) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError as problem:
            log.debug("nobody is to be heard: %s", problem)
            return
        try:
            client = self._judge(link)
            self._origin.look_again()
            link.send(wire.WELCOME)
            pid = os.fork()
        except (_Declined, Gone, OSError) as reason:
            log.info("declined: %s", reason)
            with link, suppress(OSError):
                link.setblocking(False)
                link.send(wire.NO + str(reason).encode()[: wire.REASON_MOST_BYTES])
            return
        if pid == 0:
            become(link, client, self._origin, self._commands)
        log.info("process %d is the command of process %d", pid, client)
        self._links[pid] = link

    def _judge(self, link: socket) -> int:
        """Return who asks, if he may.

        Raises:
            _Declined: he may not.
            Gone: he is.
        """
        credentials = link.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)
        pid, user, group = (
            int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4, 8)
        )
        if (user, group) != (os.geteuid(), os.getegid()):
            raise _Declined("it is for another user or group")
        if pid <= 0:
            raise _Declined("it cannot see who asks: another PID namespace")
        client = _pidfd_of(link, pid)
        try:
            differing = difference(self._rights, rights_of(pid))
            poll = select.poll()
            poll.register(client, select.POLLIN)
            if poll.poll(0):
                raise Gone("who asked has ended")
        finally:
            os.close(client)
        if differing is not None:
            raise _Declined(f"it has another {differing}")
        if not self._preloaded.is_current():
            self._is_stopped = True
            raise _Declined("lazyfs has changed since the standby was started; it ends")
        return pid

    def _reap(self) -> None:
        """Tell the clients of deputies that have ended how those did."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            link = self._links.pop(pid, None)
            if link is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            kind = wire.ENDED if code >= 0 else wire.KILLED
            with link, suppress(OSError):
                link.setblocking(False)
                with suppress(BlockingIOError):  # what it has not read would be all that is heard
                    link.recv(wire.REQUEST_MOST_BYTES)
                link.send(kind + abs(code).to_bytes(4, sys.byteorder))


def _pidfd_of(link: socket, pid: int) -> int:
    """Return a pidfd of who has connected; from the socket itself where the kernel has that."""
    try:
        try:
            answer = link.getsockopt(SOL_SOCKET, _SO_PEERPIDFD, 4)
            return int.from_bytes(answer, sys.byteorder)
        except OSError as problem:
            if problem.errno != errno.ENOPROTOOPT:  # it has ended: the pid is another's, perhaps
                raise
        return os.pidfd_open(pid)
    except OSError:
        raise Gone("who asked has ended") from None

"""The lazy-pages side of a restore by stock CRIU, and who sees that nobody runs without pages.

CRIU's own daemon (`criu lazy-pages`) serves page faults from the mount. If it fails or is killed
while pages are missing, the kernel closes its userfaultfds, and the tasks would go on with pages
of zeros. So a *guard* listens on the work directory's socket in the daemon's place, hands what
CRIU sends on to it, and keeps duplicates of the descriptors: a task that misses a page then waits
until it is killed.

A duplicate is given up as soon as the daemon has closed its own: the kernel has fork, munmap and
madvise wait until their events are read, which nobody would do. Descriptors that the daemon gets
from forks are duplicated soon after (within `_LOOK_S`): a task that forks while its pages are
missing, and whose daemon dies within that time, is the one case that is not held.

The guard is a process of its own, forked from the restore's keeper, so that it outlives it: it
ends when all pages are home, or when told.

Source: CRIU, `criu/uffd.c` (`send_uffd`, `ud_open`, `lazy_pages_finish_restore`): an int32 pid,
then a byte with the descriptor; a zombie is a negative pid without one; at the end a uint32.
"""

import ctypes
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from lazyfs.background import close_inherited
from lazyfs.ground.errors import LazyfsError

log = logging.getLogger(__name__)

SOCKET = "lazy-pages.socket"
LOG = "lazy-pages.log"
_FINISHED = 0x52535446
_WORD = struct.Struct("=i")
_LOOK_S = 0.025
_PART_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 30.0
_LINGER_S = 10.0
_END_TIMEOUT_S = 5.0
_UFFD = "anon_inode:[userfaultfd]"
_SYS_KCMP, _SYS_PIDFD_GETFD = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine, 272), 438
_KCMP_FILE = 0
_MESSAGE_MOST_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class LazyPages:
    """The server of pages that are missing, until the last is home."""

    def __init__(self, pid: int, hearing: int) -> None:
        self.pid = pid
        """The guard's; what else serves is below it."""
        self._hearing = hearing
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    def start(
        cls, work_dir: Path, images_path: Path, criu: Sequence[str], kept: Sequence[int] = ()
    ) -> "LazyPages":
        """Start a server; return when CRIU can be started, with `work_dir` as its own.

        The guard keeps the descriptors `kept`: those that hold the mount.

        Raises:
            LazyfsError: it does not start; the message ends with its log.
        """
        hearing, telling = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(hearing)
            _guard(telling, work_dir, images_path, criu, kept)
        os.close(telling)
        if os.read(hearing, 1) != b"+":
            message = os.read(hearing, _MESSAGE_MOST_BYTES).decode(errors="replace")
            os.close(hearing)
            os.waitpid(pid, 0)
            raise LazyfsError(f"the lazy-pages side does not start: {message or 'it was killed'}")
        return cls(pid, hearing)

    def fileno(self) -> int:
        """Return what can be read when it has ended, one way or the other."""
        return self._hearing

    def wait(self) -> str | None:
        """Return why pages are missing for good, once it has ended; None if all are home.

        Where it says why, the tasks are held until `end`.
        """
        message = os.read(self._hearing, _MESSAGE_MOST_BYTES)
        if message == b"+":
            return None
        return message.decode(errors="replace") or "the guard of the lazy-pages side was killed"

    def end(self) -> None:
        """End it. What misses pages must have been killed before."""
        if self._pidfd < 0:
            return
        os.close(self._hearing)
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        if not poll.poll(_END_TIMEOUT_S * 1000):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self._pidfd = -1


def _guard(
    telling: int, work_dir: Path, images_path: Path, criu: Sequence[str], kept: Sequence[int]
) -> None:
    """Be the guard; never returns."""
    guard = None
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        close_inherited({telling, *kept})
        guard = _Guard(work_dir, images_path, criu)
        signal.signal(signal.SIGTERM, guard.leave)
        os.write(telling, b"+")
        guard.hand_on()
        guard.hold()
        os.write(telling, b"+")
        code = 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, the tasks are to be killed
        message = str(error) or type(error).__name__
        with suppress(OSError):
            os.write(telling, b"-" * (guard is None) + message.encode()[:_MESSAGE_MOST_BYTES])
            _wait_for_leave(telling)
    finally:
        os._exit(code)


def _wait_for_leave(telling: int) -> None:
    """Keep what is held until the tasks have been killed, or nobody is there who would."""
    poll = select.poll()
    poll.register(telling, 0)
    poll.poll()  # POLLERR: the reader has closed its end
    time.sleep(_LINGER_S)  # ended by a signal, but by whoever takes the keeper's place


class _Guard:
    """Between CRIU and its lazy-pages daemon."""

    def __init__(self, work_dir: Path, images_path: Path, criu: Sequence[str]) -> None:
        self._held: list[int] = []
        self._listening = _listen(work_dir)
        inside = work_dir / "lazy-pages"
        inside.mkdir(mode=0o700, exist_ok=True)
        self._log = work_dir / LOG
        words = [*criu, "lazy-pages", "-v1", "-o", str(self._log)]
        words += ["--images-dir", str(images_path), "--work-dir", str(inside)]
        try:
            self._daemon = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise LazyfsError(f"{criu[0]}: {error.strerror}") from None
        self._pidfd = os.pidfd_open(self._daemon.pid)
        self._link = self._connect(inside)

    def leave(self, *_: object) -> NoReturn:
        """End, and the daemon too: whoever could miss a page has been killed."""
        with suppress(OSError):
            self._daemon.kill()
            self._daemon.wait()
        os._exit(0)

    def hand_on(self) -> None:
        """Hand on what CRIU sends, up to its word that the tasks run.

        Raises:
            LazyfsError: CRIU or its daemon is gone.
        """
        self._wait(self._listening.fileno())
        client, _ = self._listening.accept()
        self._listening.close()
        client.settimeout(_PART_TIMEOUT_S)
        with client:
            while True:
                self._wait(client.fileno())
                word = client.recv(_WORD.size, socket.MSG_WAITALL)
                if len(word) < _WORD.size:
                    raise LazyfsError("CRIU ended before the tasks ran")
                self._link.sendall(word)
                (number,) = _WORD.unpack(word)
                if number == _FINISHED:
                    break
                if number > 0:
                    self._hand_on_descriptor(client)
        self._link.close()

    def hold(self) -> None:
        """Hold descriptors until the daemon has no more use for them.

        Raises:
            LazyfsError: it has failed.
        """
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        while not poll.poll(_LOOK_S * 1000):
            self._look()
        code = self._daemon.wait()
        if code != 0:
            raise LazyfsError(f"criu lazy-pages ended {_how(code)}{_last_words(self._log)}")
        self._let_go(self._held)

    def _hand_on_descriptor(self, client: socket.socket) -> None:
        byte, descriptors, _, _ = socket.recv_fds(client, 1, 1)
        if not byte or not descriptors:
            raise LazyfsError("CRIU sent no userfaultfd")
        self._held += descriptors
        socket.send_fds(self._link, [byte], descriptors)

    def _look(self) -> None:
        """Compare with what the daemon has open: give up what it has closed, hold what is new."""
        pid = self._daemon.pid
        theirs = []
        with suppress(OSError):
            for each in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    if str(each.readlink()) == _UFFD:
                        theirs.append(int(each.name))
        if not Path(f"/proc/{pid}/fd").exists() or self._has_ended():
            return
        known: dict[int, int] = {}
        for number in theirs:
            for held in self._held:
                if _is_same(pid, number, held):
                    known[number] = held
        for number in theirs:
            if number not in known:
                ours = _libc.syscall(_SYS_PIDFD_GETFD, self._pidfd, number, 0)
                if ours >= 0:
                    self._held.append(ours)
                    known[number] = ours
        if not self._has_ended():
            self._let_go([held for held in self._held if held not in known.values()])

    def _let_go(self, descriptors: Sequence[int]) -> None:
        for descriptor in list(descriptors):
            self._held.remove(descriptor)
            os.close(descriptor)

    def _has_ended(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def _wait(self, descriptor: int) -> None:
        """Wait until something can be read.

        Raises:
            LazyfsError: the daemon has ended.
        """
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        ready = [each for each, _ in poll.poll()]
        if self._pidfd in ready:
            code = self._daemon.wait()
            raise LazyfsError(f"criu lazy-pages ended {_how(code)}{_last_words(self._log)}")

    def _connect(self, inside: Path) -> socket.socket:
        """Connect to the daemon once it listens."""
        link = socket.socket(socket.AF_UNIX)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        where = os.open(inside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            while time.monotonic() < deadline_s:
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    link.connect(f"/proc/self/fd/{where}/{SOCKET}")
                    return link
                if self._has_ended():
                    code = self._daemon.wait()
                    raise LazyfsError(f"criu lazy-pages ended {_how(code)}{_last_words(self._log)}")
                time.sleep(0.002)
        finally:
            os.close(where)
        raise LazyfsError(f"criu lazy-pages does not listen after {_START_TIMEOUT_S:.0f} s")


def _listen(work_dir: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    (work_dir / SOCKET).unlink(missing_ok=True)
    where = os.open(work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:  # a socket's path is at most 107 bytes
        listening.bind(f"/proc/self/fd/{where}/{SOCKET}")
    finally:
        os.close(where)
    listening.listen(1)
    return listening


def _is_same(pid: int, theirs: int, ours: int) -> bool:
    """Whether two descriptors are of one open file. Source: kcmp(2)."""
    words = (os.getpid(), pid, _KCMP_FILE, ours, theirs)
    return bool(_libc.syscall(_SYS_KCMP, *map(ctypes.c_long, words)) == 0)


def _how(code: int) -> str:
    return f"by signal {-code}" if code < 0 else f"with code {code}"


def _last_words(path: Path) -> str:
    with suppress(OSError):
        lines = path.read_text(errors="replace").splitlines()
        if lines:
            return f": {lines[-1].strip()}"
    return ""

"""A process that outlives the server, however that ends, and lets no task run on without memory.

It shares the server's table of descriptors (clone(2), CLONE_FILES): whatever userfaultfd the server
holds the guard holds too, also one that the kernel has just made for a task's child, and what the
server closes is closed. So nothing has to be told but whose memory it is: pidfds, which are in the
same table, by their numbers in memory that both see. When the server has ended and anything is
left, the guard closes everything else, kills those tasks, and lets go.

It is started while the process has one thread, and does nothing but wait. What it cannot survive
is what ends all of a cgroup or a container at once, itself included.

Source: Linux, kernel/fork.c (copy_files), clone(2), pidfd_open(2).
"""

import ctypes
import errno
import logging
import mmap
import os
import platform
import select
import signal
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress

from lazyfs.ground.errors import LazyfsError
from lazyfs.lazypages.ending import end_tasks
from lazyfs.lazypages.uffd import userfaultfds

log = logging.getLogger(__name__)

_SLOTS = 16 * 1024
"""Tasks that can be guarded at a time."""
_SLOT = struct.Struct("=i")
_CLONE_FILES = 0x400
_CLONE3 = 435
_CLONE = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "loongarch64": 220}
"""Numbers of clone(2) where its arguments begin with flags and stack; for kernels, and filters of
system calls, without clone3."""
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}


class Guard:
    """The guard of this process. From `start`."""

    def __init__(self, pid: int, slots: mmap.mmap) -> None:
        self._pid = pid
        self._slots = slots
        self.pidfd = os.pidfd_open(pid)
        """Can be read when it has ended."""
        self._free = list(range(_SLOTS - 1, -1, -1))
        self._used: dict[int, int] = {}

    @classmethod
    def start(cls) -> "Guard":
        """Start it: before there is a second thread.

        Raises:
            LazyfsError: it cannot be started here.
        """
        if threading.active_count() != 1:
            raise AssertionError("the guard has to be started before there are threads")
        slots = mmap.mmap(-1, _SLOTS * _SLOT.size)
        server = os.pidfd_open(os.getpid())
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = _clone()
            if pid == 0:
                _live(server, slots)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return cls(pid, slots)

    @property
    def pid(self) -> int:
        """Its process id; 0 when it has been stopped."""
        return self._pid

    def protect(self, pidfd: int) -> None:
        """Have a task killed when this process ends."""
        if not self._free:
            raise LazyfsError(f"more than {_SLOTS} tasks at a time wait for their memory")
        slot = self._used[pidfd] = self._free.pop()
        _SLOT.pack_into(self._slots, slot * _SLOT.size, pidfd)

    def release(self, pidfd: int) -> None:
        """Take `protect` back; before the pidfd is closed, and after the userfaultfd is."""
        slot = self._used.pop(pidfd)
        _SLOT.pack_into(self._slots, slot * _SLOT.size, 0)
        self._free.append(slot)

    def stop(self) -> None:
        """End it; nothing may be left that it would have to guard."""
        pid, self._pid = self._pid, 0
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(self.pidfd)
            self._slots.close()


def _clone() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    arguments = struct.pack("=8Q", _CLONE_FILES, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    pid = libc.syscall(ctypes.c_long(_CLONE3), arguments, ctypes.c_size_t(len(arguments)))
    number = _CLONE.get(platform.machine())
    if pid < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM) and number is not None:
        flags = ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD)
        nothing = ctypes.c_ulong(0)
        pid = libc.syscall(ctypes.c_long(number), flags, nothing, nothing, nothing, nothing)
    if pid < 0:
        raise LazyfsError(
            "no guard can be started for the tasks whose memory comes later: "
            + os.strerror(ctypes.get_errno())
        )
    return int(pid)


def _live(server: int, slots: mmap.mmap) -> None:
    """Be the guard; never returns."""
    try:
        signal.set_wakeup_fd(-1)
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        with suppress(OSError), open("/proc/self/comm", "w") as comm:
            comm.write("lazyfs-guard")
        poll = select.poll()
        poll.register(server, select.POLLIN)
        while not poll.poll():
            pass
        uffds = _held()
        pidfds = [pidfd for (pidfd,) in _SLOT.iter_unpack(slots[:]) if pidfd > 0]
        _close_all_but({*uffds, *pidfds})
        if uffds:
            end_tasks(pidfds, uffds)
    finally:
        os._exit(0)


def _held() -> list[int]:
    """Return the userfaultfds of our table: what is there counts, not what somebody noted."""
    return userfaultfds(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208


def _close_all_but(kept: Iterable[int]) -> None:
    start = 0
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))

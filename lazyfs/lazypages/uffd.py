"""A task's userfaultfd: the few things that can be done with it, and what their errnos mean.

Only what is to be done at once is here: nothing waits. Source: Linux, fs/userfaultfd.c,
mm/userfaultfd.c, include/uapi/linux/userfaultfd.h, ioctl_userfaultfd(2); what CRIU takes for
recoverable: criu/uffd.c (uffd_check_op_error).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.lazypages.protocol import MESSAGE_BYTES

_MESSAGES_AT_ONCE = 64
_TYPE = 0xAA
_LINK = "anon_inode:[userfaultfd]"
_RANGE = struct.Struct("=QQ")
_COPY = struct.Struct("=QQQQq")
_ZERO = struct.Struct("=QQQq")


def _request(number: int, size_bytes: int, *, reads: bool, writes: bool) -> int:
    """Return the number of an ioctl: asm-generic/ioctl.h, and the machines that differ."""
    if platform.machine().startswith(("ppc", "mips", "sparc", "alpha")):
        read, write, size_bits = 2, 4, 13
    else:
        read, write, size_bits = 2, 1, 14
    direction = (read if reads else 0) | (write if writes else 0)
    return direction << (16 + size_bits) | size_bytes << 16 | _TYPE << 8 | number


_UNREGISTER = _request(0x01, _RANGE.size, reads=True, writes=False)
_WAKE = _request(0x02, _RANGE.size, reads=True, writes=False)
_UFFDIO_COPY = _request(0x03, _COPY.size, reads=True, writes=True)
_UFFDIO_ZEROPAGE = _request(0x04, _ZERO.size, reads=True, writes=True)


class Outcome(Enum):
    """How far it went."""

    DONE = "done"
    BUSY = "busy"
    """Memory is being changed: read what is told of that, and try again."""
    THERE = "there"
    """The next page is there already."""
    UNMAPPED = "unmapped"
    """The range is not wholly within one mapping that is registered."""
    GONE = "gone"
    """The process has exited, or has exec'ed."""
    FAILED = "failed"


class Copied(NamedTuple):
    """What came of an attempt to fill memory."""

    size_bytes: int
    """How much is filled, from the start on."""
    outcome: Outcome
    """Why not more."""
    errno: int = 0


_OUTCOMES = {
    errno.EAGAIN: Outcome.BUSY,
    errno.EEXIST: Outcome.THERE,
    errno.ENOENT: Outcome.UNMAPPED,
    errno.ESRCH: Outcome.GONE,
    errno.ENOSPC: Outcome.GONE,  # Linux before 4.13
}


def userfaultfds(descriptors: Iterable[int]) -> list[int]:
    """Return those of our descriptors that are userfaultfds."""
    found = []
    for each in descriptors:
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{each}") == _LINK:  # noqa: PTH115 - this is no path
                found.append(each)
    return found


class Userfaultfd:
    """One task's; owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = bytearray(MESSAGE_BYTES * _MESSAGES_AT_ONCE)
        self._view = memoryview(self._buffer)

    def read(self) -> memoryview:
        """Return messages, 32 bytes each, that are there; to be parsed before the next read.

        Faults come before other events, whatever was first; so those of one read have to be
        applied before its faults are served.

        Raises:
            LazyfsError: as a rule, since there is no descriptor left for a child.
        """
        try:
            count = os.readv(self.descriptor, [self._buffer])
        except BlockingIOError:
            count = 0
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise LazyfsError(f"what a task does with its memory cannot be told: {why}") from None
        return self._view[:count]

    def copy(self, to: int, data: Data) -> Copied:
        """Fill memory that is missing with bytes, and wake who waits for it."""
        with address_of(data) as source:
            fields = bytearray(_COPY.pack(to, source, len(data), 0, 0))
            return self._fill(_UFFDIO_COPY, fields, _COPY.size - 8, len(data))

    def zero(self, start: int, size_bytes: int) -> Copied:
        """Fill memory that is missing with zeros, and wake who waits for it."""
        fields = bytearray(_ZERO.pack(start, size_bytes, 0, 0))
        return self._fill(_UFFDIO_ZEROPAGE, fields, _ZERO.size - 8, size_bytes)

    def is_alive(self) -> bool:
        """Whether anybody still runs in the memory that this stands for; changes nothing there.

        Asked by an attempt to fill a page from one of ours that cannot be read.
        """
        return self._try(_lowest_page()).outcome is not Outcome.GONE

    def may_fill(self, page: int) -> bool:
        """Whether a page is of a mapping that is registered, as far as can be told now.

        Changes nothing: asked like `is_alive`. The kernel looks for the mapping first, and refuses
        before that while memory is being changed (mm/userfaultfd.c, mfill_atomic): asked twice,
        since in between that may have begun.
        """
        return any(self._try(page).outcome is not Outcome.UNMAPPED for _ in range(2))

    def _try(self, page: int) -> Copied:
        with address_of(_UNREADABLE) as source:
            fields = bytearray(_COPY.pack(page, source, mmap.PAGESIZE, 0, 0))
            return self._fill(_UFFDIO_COPY, fields, _COPY.size - 8, mmap.PAGESIZE)

    def wake(self, start: int, size_bytes: int) -> None:
        """Wake who waits for pages that are there, or will not come."""
        fcntl.ioctl(self.descriptor, _WAKE, _RANGE.pack(start, size_bytes))

    def unregister(self, start: int, size_bytes: int) -> bool:
        """Leave memory to the kernel: what is missing there reads as zeros. False: it cannot be."""
        try:
            fcntl.ioctl(self.descriptor, _UNREGISTER, _RANGE.pack(start, size_bytes))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Leave all of the task's memory to the kernel: what is missing reads as zeros."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def _fill(self, request: int, fields: bytearray, at: int, size_bytes: int) -> Copied:
        try:
            fcntl.ioctl(self.descriptor, request, fields)
        except OSError as error:
            (filled,) = struct.unpack_from("=q", fields, at)
            if filled > 0:  # what stopped it will be said of the rest
                return Copied(filled, Outcome.BUSY)
            number = error.errno or 0
            return Copied(0, _OUTCOMES.get(number, Outcome.FAILED), number)
        return Copied(size_bytes, Outcome.DONE)


_UNREADABLE = memoryview(mmap.mmap(-1, mmap.PAGESIZE, prot=0))


@cache
def _lowest_page() -> int:
    """Return the lowest address that memory can have. Source: sysctl vm.mmap_min_addr."""
    lowest = 1 << 16
    with suppress(OSError, ValueError):
        lowest = int(Path("/proc/sys/vm/mmap_min_addr").read_text())
    return max(-(-lowest // mmap.PAGESIZE), 1) * mmap.PAGESIZE


class _Buffer(ctypes.Structure):
    """Py_buffer. Source: CPython, Include/pybuffer.h; part of the stable ABI since 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_python = ctypes.PyDLL(None)  # its own: what a function takes is set for all who share it
_get_buffer = _python.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_release_buffer = _python.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None


@contextmanager
def address_of(data: Data) -> Iterator[int]:
    """Give the address of bytes, also of those that may only be read, for the length of a block."""
    buffer = _Buffer()
    _get_buffer(data, ctypes.byref(buffer), 0)
    try:
        yield buffer.buf or 0
    finally:
        _release_buffer(ctypes.byref(buffer))

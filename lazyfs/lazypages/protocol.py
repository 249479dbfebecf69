"""What CRIU and the kernel say of a task whose memory is still to come. Bytes in, values out.

On the socket `lazy-pages.socket` in its work directory `criu restore --lazy-pages` announces each
task, in any order, by an int32: its pid as in the images, after which a message of one byte
carries the task's userfaultfd; or, of a zombie, its pid negated, and nothing more. When all tasks
are ready to run the number `FINISHED` comes, and the connection is closed. It is the task itself
that announces itself, so the credentials of that message tell who it is on this host.

On a userfaultfd the kernel tells of faults, and, since CRIU asks for it, of all that moves memory.

Source: CRIU, criu/uffd.c (send_uffd, lazy_pages_setup_zombie, lazy_pages_finish_restore,
NEED_UFFD_API_FEATURES), the same in 4.1.1 and 4.2; Linux, include/uapi/linux/userfaultfd.h (struct
uffd_msg), PID_MAX_LIMIT in include/linux/threads.h.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from lazyfs.ground.errors import MalformedError

SOCKET_NAME = "lazy-pages.socket"
NUMBER_BYTES = 4
MESSAGE_BYTES = 32

FINISHED = 0x52535446
_PID_MOST = 1 << 22

_NUMBER = struct.Struct("=i")
_HEAD = struct.Struct("=B7x3Q")
_PAGEFAULT, _FORK, _REMAP, _REMOVE, _UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16


class Announced(NamedTuple):
    """A task whose userfaultfd comes next."""

    pid: int


class Zombie(NamedTuple):
    """A task that has no memory."""

    pid: int


class Finished(NamedTuple):
    """All tasks are about to run."""


Announcement: TypeAlias = Announced | Zombie | Finished


def parse_announcement(data: bytes) -> Announcement:
    """Read what CRIU says next.

    Raises:
        MalformedError: it is none of what it may say.
    """
    if len(data) != NUMBER_BYTES:
        raise MalformedError(f"a number on {SOCKET_NAME} is cut off: {data.hex(' ')}")
    (number,) = _NUMBER.unpack(data)
    if number == FINISHED:
        return Finished()
    if 0 < number <= _PID_MOST:
        return Announced(number)
    if -_PID_MOST <= number < 0:
        return Zombie(-number)
    raise MalformedError(f"no task of CRIU's: {number} on {SOCKET_NAME}")


class Fault(NamedTuple):
    """Somebody waits for the page that holds `address`."""

    address: int


class Forked(NamedTuple):
    """There is a child, which inherits what is missing; its descriptor is ours already."""

    descriptor: int


class Moved(NamedTuple):
    """Memory is now `to` where it was `source`."""

    source: int
    to: int
    length: int


class Zeroed(NamedTuple):
    """Memory from `start` to `stop` reads as zeros from now on."""

    start: int
    stop: int


class Unmapped(NamedTuple):
    """There is no memory from `start` to `stop` any more; or there was none, at some time."""

    start: int
    stop: int


Event: TypeAlias = Fault | Forked | Moved | Zeroed | Unmapped


def parse_messages(data: bytes | memoryview) -> Iterator[Event]:
    """Yield what a read of a userfaultfd has given.

    Raises:
        MalformedError: a message is cut off, or is of a kind that CRIU does not ask for.
    """
    if len(data) % MESSAGE_BYTES:
        raise MalformedError(f"a message of userfaultfd is cut off after {len(data)} bytes")
    for kind, first, second, third in _HEAD.iter_unpack(data):
        if kind == _PAGEFAULT:
            yield Fault(second)
        elif kind == _FORK:
            yield Forked(first & 0xFFFFFFFF)
        elif kind == _REMAP:
            yield Moved(first, second, third)
        elif kind == _REMOVE:
            yield Zeroed(first, second)
        elif kind == _UNMAP:
            yield Unmapped(first, second)
        else:
            raise MalformedError(f"unknown message of userfaultfd: {kind:#x}")

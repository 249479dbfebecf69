"""Connections to one host, shared by all daemons of one user on this machine.

A hundred mounts that each take what they may would be thousands of connections. So each has two
of its own, one for what a reader waits for and one for all else, and whatever is more needs one
of the slots that all share, of which background work may have two thirds. Nobody starves, as
nobody needs a slot to get on; nothing deadlocks, as nobody waits for a slot while his own two are
free; and a slot is only waited for as long as is reasonable (`_WAIT_MOST_S`).

A slot is a byte of a file in the run directory, taken by an open-file-description lock
(fcntl(2), F_OFD_SETLK): whoever dies has given it back. Such locks do not tell two holders of
one description apart, so which slots are ours is kept here. They are asked for without waiting,
on the trio thread; all state belongs to it.

Without a run directory that is ours alone nothing is shared: every daemon takes what its lanes
allow.
"""

import errno
import fcntl
import hashlib
import logging
import os
import random
import struct
import time

import trio

from lazyfs.transport.run_directory import open_run_directory

_log = logging.getLogger(__name__)

_WAIT_MOST_S = 30.0
"""Whoever has the slots may be stopped: then the limit is not kept, rather than nothing read."""
_LOOK_AGAIN_LEAST_S = 0.005
_LOOK_AGAIN_MOST_S = 0.08
_URGENT_SHARE = 3
"""One slot in so many is for what readers wait for."""


class Slot:
    """The right to one connection; a context."""

    def __init__(self, host: "_Host | None", urgent: bool, index: int | None) -> None:
        self._host = host
        self._urgent = urgent
        self._index = index

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Let others have it."""
        host, self._host = self._host, None
        if host is not None:
            host.give_back(self._urgent, self._index)


class Slots:
    """One daemon's part in the sharing."""

    def __init__(self, directory: str | None, shared: int) -> None:
        """Share `shared` connections to each host through `directory`."""
        self._directory = directory
        self._shared = shared
        self._hosts: dict[str, _Host] = {}

    def take_at_once(self, host: str, *, urgent: bool) -> Slot | None:
        """Return a slot for a connection to `host` if one is free."""
        if self._directory is None:
            return Slot(None, urgent, None)
        known = self._hosts.get(host)
        if known is None:
            descriptor = self._open(self._directory, host)
            if descriptor is None:
                self._directory = None
                return Slot(None, urgent, None)
            known = self._hosts[host] = _Host(descriptor, self._shared)
        return known.take(urgent)

    async def take(self, host: str, *, urgent: bool) -> Slot:
        """Return a slot for a connection to `host`, once one is free, or after a good while."""
        slot = self.take_at_once(host, urgent=urgent)
        if slot is not None:
            return slot
        known = self._hosts[host]
        began_s = time.monotonic()
        most_s = _LOOK_AGAIN_LEAST_S
        while time.monotonic() - began_s < _WAIT_MOST_S:
            with trio.move_on_after(random.uniform(most_s / 2, most_s)):  # noqa: S311
                await known.given_back.park()
            slot = known.take(urgent)
            if slot is not None:
                return slot
            most_s = min(_LOOK_AGAIN_MOST_S, most_s * 1.5)
        _log.debug("%s: no connection was free for %.0f s; taking one more", host, _WAIT_MOST_S)
        return Slot(None, urgent, None)

    def close(self) -> None:
        """Give everything back."""
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()
        self._directory = None

    def __del__(self) -> None:
        self.close()

    def _open(self, directory: str, host: str) -> int | None:
        """Open the file of a host's slots, in a directory that is nobody else's."""
        name = hashlib.sha256(host.encode()).hexdigest()[:32] + ".slots"
        try:
            parent = open_run_directory(directory)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                return os.open(name, flags, 0o600, dir_fd=parent)
            finally:
                os.close(parent)
        except OSError as problem:
            _log.debug("connections are not shared with other mounts: %s", problem)
            return None


class _Host:
    """The slots of one host, and which of them are ours."""

    def __init__(self, descriptor: int, shared: int) -> None:
        self._descriptor = descriptor
        self._urgent_slots = shared
        self._other_slots = shared - shared // _URGENT_SHARE
        self._own_in_use = {True: False, False: False}
        self._held: set[int] = set()
        self.given_back = trio.lowlevel.ParkingLot()

    def take(self, urgent: bool) -> Slot | None:
        if not self._own_in_use[urgent]:
            self._own_in_use[urgent] = True
            return Slot(self, urgent, None)
        slots = self._urgent_slots if urgent else self._other_slots
        if slots:
            first = random.randrange(slots)  # noqa: S311 - spreads, guards nothing
            for at in range(first, first + slots):
                index = at % slots
                if index not in self._held and self._lock(index, fcntl.F_WRLCK):
                    self._held.add(index)
                    return Slot(self, urgent, index)
        return None

    def give_back(self, urgent: bool, index: int | None) -> None:
        if index is None:
            self._own_in_use[urgent] = False
        elif index in self._held:
            self._held.remove(index)
            self._lock(index, fcntl.F_UNLCK)
        self.given_back.unpark()

    def close(self) -> None:
        self._held.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self, index: int, kind: int) -> bool:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid, which must be 0 (fcntl(2)).
        wish = struct.pack("hhqqi4x", kind, os.SEEK_SET, index, 1, 0)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, wish)
        except OSError as problem:
            if problem.errno in (errno.EAGAIN, errno.EACCES):
                return False
            _log.debug("connections cannot be shared with other mounts: %s", problem)
            return True  # a filesystem that knows no locks
        return True

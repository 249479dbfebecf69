"""Locks between the daemons of one host: ranges of a file's bytes, whether it has them or not.

They belong to the open file (`F_OFD_SETLK`: fcntl(2), "Open file description locks"), so two
contents in one process keep each other out as two daemons do, and the kernel takes them back
when their holder ends, however it does. Nothing here blocks: whoever waits, waits with a bound
of its own. Within one open file locks do not count; there `Holdings.claim` decides.

On a layer's `marks`, by number of chunk (part of the protocol: all daemons agree on them):

    STORE   8 x number                    looking at a mark and storing the chunk; short
    FETCH   2**40 + 2**36 x rank + number "I am fetching this"; a courtesy, on which no byte's
                                          rightness rests. Rank 0; who has waited in vain for the
                                          holder of one rank fetches under the next
    LEAD    2**41                         "I am proving the whole blob"; a courtesy
    BEAT    2**42 + number                taken and let go by turns, for as long as bytes come to
                                          whoever has locked the chunk to fetch it
"""

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator

STORE_BYTES = 8
RANKS = 8
_FETCH_BASE = 1 << 40
_FETCH_RANK = 1 << 36
_LEAD = 1 << 41
_BEAT_BASE = 1 << 42
_FLOCK = struct.Struct("@hhqqi4x")
"""Linux' struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for such locks)."""
_POLL_FIRST_S = 0.0005
_POLL_MOST_S = 0.02


class HostLocks:
    """The locks that one content takes on its layer's `marks`.

    With no file to lock, or one that cannot be written to, there is nobody to agree with:
    everything is granted, and nobody is in the way.
    """

    def __init__(self, fd: int | None) -> None:
        """`fd` is open for writing, and stays the caller's."""
        self._fd = fd

    def take_fetch(self, first: int, last: int, rank: int) -> bool:
        """Take the chunks from number `first` up to `last`, unless somebody has one of them."""
        return self._take(_fetch_byte(first, rank), last - first, if_unknown=True)

    def leave_fetch(self, first: int, last: int, rank: int) -> None:
        """Let go of chunks."""
        self._leave(_fetch_byte(first, rank), last - first)
        self._leave(_BEAT_BASE + first, last - first)

    def fetched_by_others(self, first: int, last: int, rank: int) -> tuple[int, int] | None:
        """Return which chunks (first, behind the last) somebody fetches who is in the way.

        It may reach beyond what was asked for. None: nobody is.
        """
        found = self._holder(_fetch_byte(first, rank), last - first)
        base = _fetch_byte(0, rank)
        return (found[0] - base, found[1] - base) if found is not None else None

    def beat(self, first: int, last: int, *, turn: bool) -> None:
        """Show others that bytes come; `turn` is another each time."""
        if turn:
            self._take(_BEAT_BASE + first, last - first, if_unknown=True)
        else:
            self._leave(_BEAT_BASE + first, last - first)

    def beat_of_others(self, index: int) -> bool:
        """Return what changes while bytes come to whoever fetches a chunk."""
        return self._holder(_BEAT_BASE + index, 1) is not None

    @contextlib.contextmanager
    def storing(self, first: int, last: int, patience_s: float) -> Iterator[bool]:
        """Hold the right to store chunks, and say so; False: it was not to be had. Blocks.

        To be called from worker threads, each for chunks that no other thread stores.
        """
        start, size = STORE_BYTES * first, STORE_BYTES * (last - first)
        has_it = self._take_soon(start, size, patience_s)
        try:
            yield has_it
        finally:
            if has_it:
                self._leave(start, size)

    def take_lead(self) -> bool:
        """Take the right to prove the blob, unless somebody has it."""
        return self._take(_LEAD, 1, if_unknown=True)

    def leave_lead(self) -> None:
        """Give it back."""
        self._leave(_LEAD, 1)

    def _holder(self, start: int, size: int) -> tuple[int, int] | None:
        """Return the bytes (first, behind the last) of a lock that is in the way."""
        if self._fd is None:
            return None
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, size, 0)
        try:
            answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        except OSError:
            return None
        kind, _, start, size, _ = _FLOCK.unpack(answer)
        return (start, start + size) if kind != fcntl.F_UNLCK else None

    def _take_soon(self, start: int, size: int, patience_s: float) -> bool:
        if self._take(start, size, if_unknown=False):
            return True
        deadline_s = time.monotonic() + patience_s
        pause_s = _POLL_FIRST_S
        while time.monotonic() < deadline_s:
            time.sleep(pause_s)
            if self._take(start, size, if_unknown=False):
                return True
            pause_s = min(2 * pause_s, _POLL_MOST_S)
        return False

    def _take(self, start: int, size: int, *, if_unknown: bool) -> bool:
        """Take bytes, unless somebody has one; `if_unknown`: the answer where nobody can tell."""
        if self._fd is None:
            return True
        try:
            self._set(fcntl.F_WRLCK, start, size)
        except OSError as problem:
            return if_unknown and problem.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def _leave(self, start: int, size: int) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                self._set(fcntl.F_UNLCK, start, size)

    def _set(self, kind: int, start: int, size: int) -> None:
        if self._fd is not None:
            lock = _FLOCK.pack(kind, os.SEEK_SET, start, size, 0)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)


def _fetch_byte(index: int, rank: int) -> int:
    return _FETCH_BASE + _FETCH_RANK * rank + index

"""Where a task's faults go on from one another, and how much is fetched ahead of them. Sans-I/O.

A *walk* is a place in a pages file that is read on from: memory that follows one another lies there
side by side, whatever is mapped between. A fault that belongs to none begins one, and has little
fetched: it may be the only one there. While a walk goes on, as much is fetched ahead of it as
keeps it from waiting; and a new one begins as large as the latest have come to be, so that who
walks through one region after the other waits for few round trips, and who jumps about pays for
few bytes.

Of what is fetched ahead only a part is filled in at a time, so that the next fault, which tells
that the walk goes on, comes while the rest of it is under way.
"""

from collections import deque

from lazyfs.ground.settings import KIB, MIB

LEAST_BYTES = 64 * KIB
FIRST_BYTES = 512 * KIB
MOST_FIRST_BYTES = 3 * MIB
"""Twice what is on its way at 1 Gbit/s and 10 ms: half of it is asked for at a time."""
MOST_BYTES = 16 * MIB
MOST_FILL_BYTES = MIB
"""At a time: a fault of another thread waits for the rest of it, 0.3 ms."""
PRECISE_BYTES = 16 * KIB
_WALKS_MOST = 32
_REACH_BYTES = MIB


class Walk:
    """One of them."""

    def __init__(self, file: int, offset: int, window_bytes: int) -> None:
        self.file = file
        self.began = offset
        self.position = offset
        """Up to where its memory has been filled: there the next fault is expected."""
        self.asked = offset
        """Up to where bytes have been asked for, or found."""
        self.window_bytes = window_bytes
        """How much from a fault on should be here or on its way."""
        self.is_first = True
        """Whether it has had one fault only."""

    @property
    def fill_bytes(self) -> int:
        """How much to fill at a time: whole pages."""
        size_bytes = min(self.window_bytes // 2, MOST_FILL_BYTES)
        return max(LEAST_BYTES, size_bytes // LEAST_BYTES * LEAST_BYTES)

    def wants(self, offset: int) -> tuple[int, int] | None:
        """Return what is to be fetched at a fault at `offset`, as (start, stop); then note it.

        Rather much at a time than often: a request costs more than its bytes.
        """
        start, stop = max(self.asked, offset), offset + self.window_bytes
        if stop - start < self.window_bytes // 2:
            return None
        self.asked = stop
        return start, stop

    def note_filled(self, stop: int) -> None:
        """Take note that memory is filled up to `stop`."""
        self.position = max(self.position, stop)

    def note_wait(self) -> None:
        """Take note that a fault has to wait: too little was fetched ahead, or too late.

        No more than half of what has been walked is asked for in vain, but for a little.
        """
        walked_bytes = self.position - self.began
        most_bytes = max(MOST_FIRST_BYTES, min(walked_bytes // 2, MOST_BYTES))
        if not self.is_first:
            self.window_bytes = max(self.window_bytes, min(2 * self.window_bytes, most_bytes))


class Walks:
    """Those of one task."""

    def __init__(self) -> None:
        """Nobody has been anywhere."""
        self._walks: deque[Walk] = deque(maxlen=_WALKS_MOST)
        self._first_bytes = FIRST_BYTES

    def note(self, file: int, offset: int) -> Walk:
        """Take note of a fault; return the walk that it belongs to."""
        for walk in reversed(self._walks):
            ahead_bytes = offset - walk.position
            reach_bytes = max(_REACH_BYTES, walk.window_bytes)
            if walk.file == file and -LEAST_BYTES <= ahead_bytes <= reach_bytes:
                if walk is not self._walks[-1]:
                    self._walks.remove(walk)
                    self._walks.append(walk)
                walk.is_first = False
                walk.note_filled(offset)
                return walk
        if self._walks:
            self._learn(self._walks[-1])
        walk = Walk(file, offset, self._first_bytes)
        self._walks.append(walk)
        return walk

    def _learn(self, walk: Walk) -> None:
        """Let new ones begin as the latest has turned out to be."""
        if walk.is_first:
            self._first_bytes = max(self._first_bytes // 2, LEAST_BYTES)
        elif walk.position - walk.began >= self._first_bytes:
            self._first_bytes = min(2 * self._first_bytes, MOST_FIRST_BYTES)

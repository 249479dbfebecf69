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
MOST_FIRST_BYTES = 2 * MIB
MOST_UNKNOWN_BYTES = 4 * MIB
"""Before it is known what the link gives: what one of 1 Gbit/s and 30 ms holds."""
MOST_BYTES = 32 * MIB
MOST_FILL_BYTES = MIB
"""At a time: a fault of another thread waits for the rest of it, 0.3 ms."""
PRECISE_BYTES = 16 * KIB
_WALKS_MOST = 32
_REACH_BYTES = MIB
_LATEST = 0.3
"""The share of the latest measurement in a mean."""
_ROUND_TRIPS = 2
"""What is under way for so many of them keeps the link busy."""


class Link:
    """What has been seen of the link: how soon an answer begins, and how fast it goes on."""

    def __init__(self) -> None:
        self._latency_s = float("inf")
        self._rate = 0.0

    def note_latency(self, seconds: float) -> None:
        """Take note of how long the first fault of a walk has waited."""
        self._latency_s = min(self._latency_s, seconds)

    def note_rate(self, size_bytes: int, seconds: float) -> None:
        """Take note of how much has come between the ends of two waits of one walk."""
        rate = size_bytes / max(seconds, 1e-6)
        self._rate += (rate - self._rate) * (_LATEST if self._rate else 1)

    @property
    def window_bytes(self) -> int:
        """How much may be under way at most, for what is more only delays what comes next."""
        if not self._rate or self._latency_s == float("inf"):
            return MOST_UNKNOWN_BYTES
        held_bytes = int(_ROUND_TRIPS * self._rate * self._latency_s)
        return max(FIRST_BYTES, min(held_bytes + FIRST_BYTES, MOST_BYTES))


class Walk:
    """One of them."""

    def __init__(self, file: int, offset: int, window_bytes: int, link: Link) -> None:
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
        self._link = link
        self._came = offset
        self._came_s: float | None = None

    @property
    def fill_bytes(self) -> int:
        """How much to fill at a time."""
        return max(LEAST_BYTES, min(self.window_bytes // 2, MOST_FILL_BYTES))

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
        """Take note that a fault has to wait: too little was fetched ahead, or too late."""
        if not self.is_first:
            self.window_bytes = min(2 * self.window_bytes, self._link.window_bytes)

    def note_came(self, offset: int, waited_s: float, now_s: float) -> None:
        """Take note of how long a fault at `offset` has waited."""
        if self._came_s is None:
            self._link.note_latency(waited_s)
        elif offset > self._came:
            self._link.note_rate(offset - self._came, now_s - self._came_s)
        self._came, self._came_s = offset, now_s


class Walks:
    """Those of one task."""

    def __init__(self) -> None:
        """Nobody has been anywhere."""
        self._walks: deque[Walk] = deque(maxlen=_WALKS_MOST)
        self._first_bytes = FIRST_BYTES
        self._link = Link()

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
        walk = Walk(file, offset, self._first_bytes, self._link)
        self._walks.append(walk)
        return walk

    def _learn(self, walk: Walk) -> None:
        """Let new ones begin as the latest has turned out to be."""
        if walk.is_first:
            self._first_bytes = max(self._first_bytes // 2, LEAST_BYTES)
        elif walk.position - walk.began >= self._first_bytes:
            most_bytes = min(MOST_FIRST_BYTES, self._link.window_bytes)
            self._first_bytes = min(2 * self._first_bytes, most_bytes)

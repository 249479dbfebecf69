"""What happened when, while somebody records: kept in memory, bounded, in plain tuples.

Added to from any thread (a list's append is one step under the GIL), read when recording has
ended. Times are of `time.monotonic`. Whoever records puts one into `Counters.journal`, which
reaches all floors; without one nothing is noted, and nothing is spent but the look.
"""

import time
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")

EVENTS_MOST = 500_000
"""Of each kind; what comes after is counted only."""
STEP_BYTES = 256 * 1024
"""What comes as a stream is noted in steps of so much, at least."""


class ReadNote(NamedTuple):
    """A read through the mount, or a fault of lazy pages."""

    path: str
    """In the image's tree."""
    offset: int
    size_bytes: int
    began_s: float
    ended_s: float
    is_fault: bool
    waited: bool
    """Whether its bytes were not here when it came."""


class FetchNote(NamedTuple):
    """A range of a blob that was fetched; of one that could not be, what had come of it."""

    blob: str
    """The blob's name, as messages have it."""
    start: int
    stop: int
    began_s: float
    first_s: float
    """When its first byte came; `ended_s` if none did."""
    ended_s: float
    why: str
    attempts: int


class ArrivalNote(NamedTuple):
    """Content of a layer that could be read from then on."""

    blob: str
    start: int
    """In the layer's content address space."""
    stop: int
    at_s: float


class Steps:
    """Notes how far content has come that comes from its start on, a step at a time."""

    def __init__(self, journal: "Journal", blob: str) -> None:
        """Nothing has come."""
        self._journal = journal
        self._blob = blob
        self._noted = 0

    def up_to(self, position: int, *, at_least_bytes: int = STEP_BYTES) -> None:
        """Note what has come since the last note, if it is so much. By one thread at a time."""
        if position - self._noted >= max(1, at_least_bytes):
            now_s = time.monotonic()
            self._journal.note_arrival(ArrivalNote(self._blob, self._noted, position, now_s))
            self._noted = position


class Journal:
    """The notes of one recording."""

    def __init__(self, *, is_precise: bool = True) -> None:
        """`is_precise`: nothing but what is asked for is to be brought meanwhile."""
        self.is_precise = is_precise
        self.reads: list[ReadNote] = []
        self.fetches: list[FetchNote] = []
        self.arrivals: list[ArrivalNote] = []
        self.marks: list[tuple[str, float]] = []
        self.dropped = 0
        """Notes that were too many."""
        self.has_ended = False

    def end(self) -> None:
        """Pass over whatever is noted from now on."""
        self.has_ended = True

    def forget(self) -> None:
        """Let go of what was noted, now that it has ended: a daemon may live for long."""
        for notes in (self.reads, self.fetches, self.arrivals, self.marks):
            notes.clear()

    def note_read(self, note: ReadNote) -> None:
        """Note a read or a fault that has been answered."""
        self._note(self.reads, note)

    def note_fetch(self, note: FetchNote) -> None:
        """Note a fetch that has ended."""
        self._note(self.fetches, note)

    def note_arrival(self, note: ArrivalNote) -> None:
        """Note content that has come."""
        self._note(self.arrivals, note)

    def mark(self, name: str, at_s: float) -> None:
        """Note a moment."""
        self._note(self.marks, (name, at_s))

    def _note(self, notes: list[_T], note: _T) -> None:
        if self.has_ended:
            return
        if len(notes) < EVENTS_MOST:
            notes.append(note)
        else:
            self.dropped += 1

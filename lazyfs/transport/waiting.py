"""Fetches that are under way: what each has come to, and what may be told of it."""

import time

import msgspec

from lazyfs.ground.journal import FetchNote
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Sink
from lazyfs.transport.lease import Lease


class Waiting(msgspec.Struct, frozen=True):
    """A fetch that somebody waits for."""

    blob: str
    byte_range: ByteRange
    """All that was asked for, of which `received_bytes` have come."""
    received_bytes: int
    why: str
    """The lane, or what else it is for; may be empty."""
    place: str
    """Whom it asks now, or asked last."""
    attempts: int
    since_s: float
    """Seconds since it began, time spent waiting for its turn included."""
    silent_s: float
    """Seconds since a byte last came."""
    last_error: str | None
    """Why its latest attempt failed."""


class Course:
    """One fetch, from its beginning to its end. Changed on the trio thread."""

    __slots__ = ("attempts", "began_s", "blob", "last_error", "lease", "place", "stalls", "why")

    def __init__(self, blob: str, wanted: ByteRange, sink: Sink, why: str) -> None:
        """Nobody is asked yet."""
        self.blob = blob
        self.why = why
        self.lease = Lease(sink, wanted)
        self.place = ""
        self.attempts = 0
        self.stalls = 0
        """Attempts that were silent for too long."""
        self.last_error: Exception | None = None
        self.began_s = time.monotonic()

    def note(self, now_s: float) -> FetchNote:
        """Return what a journal keeps of it, now that it has ended: of its range, what has come."""
        lease = self.lease
        return FetchNote(
            self.blob,
            lease.wanted.start,
            lease.position,
            self.began_s,
            lease.first_s if lease.first_s is not None else now_s,
            now_s,
            self.why,
            self.attempts,
        )

    def waiting(self, now_s: float) -> Waiting:
        """Return what may be told of it."""
        lease = self.lease
        return Waiting(
            blob=self.blob,
            byte_range=lease.wanted,
            received_bytes=lease.position - lease.wanted.start,
            why=self.why,
            place=self.place,
            attempts=self.attempts,
            since_s=now_s - self.began_s,
            silent_s=now_s - max(self.began_s, lease.heard_s),
            last_error=str(self.last_error) if self.last_error is not None else None,
        )

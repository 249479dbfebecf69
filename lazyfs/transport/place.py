"""A place that gives bytes (a mirror, the registry itself) and how it has behaved.

Sans-I/O: it is told what happened, and says whom to ask. State is shared by all fetches of one
mount and changed by several threads at once: every change is under the lock.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lazyfs.ground.errors import IntegrityError, LazyfsError
from lazyfs.transport.blob import Blob

_OBSERVED_MOST = 128
_REST_FIRST_S = 1.0
_REST_MOST_S = 60.0


class Latency:
    """How long a place took to begin an answer: the latest `_OBSERVED_MOST` times."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_OBSERVED_MOST)

    def observe(self, seconds: float) -> None:
        """Take note of an answer that began so many seconds after it was asked for."""
        self._times_s.append(seconds)

    def __len__(self) -> int:
        return len(self._times_s)

    def percentile_s(self, share: float) -> float | None:
        """Return what so large a share (0 to 1) of the answers did not exceed; None: no answers."""
        times_s = sorted(self._times_s)
        if not times_s:
            return None
        return times_s[min(len(times_s) - 1, int(share * len(times_s)))]


class Health:
    """How one place has behaved towards this mount."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`name`: as a person calls it: `mirror.example:5000/library`."""
        self.name = name
        self.latency = Latency()
        self.failures = 0
        """Attempts that failed since one last succeeded."""
        self.last_error: LazyfsError | None = None
        self.lie: IntegrityError | None = None
        """What it gave that contradicts a digest: it is never asked again."""
        self._rests_until_s = float("-inf")
        self._clock = clock
        self._lock = threading.Lock()

    def answered(self, first_byte_s: float) -> None:
        """Note an attempt that succeeded, and how long it took to begin."""
        with self._lock:
            self.latency.observe(first_byte_s)
            self.failures = 0
            self._rests_until_s = float("-inf")

    def failed(self, error: LazyfsError) -> None:
        """Note an attempt that failed: others are asked first for a while, longer each time."""
        with self._lock:
            self.last_error = error
            rest_s = min(_REST_MOST_S, _REST_FIRST_S * 2.0 ** min(self.failures, 10))
            self.failures += 1
            self._rests_until_s = self._clock() + rest_s

    def lied(self, error: IntegrityError) -> None:
        """Note that its bytes contradict their digest."""
        with self._lock:
            self.lie = self.last_error = error

    def snapshot(self) -> dict[str, Any]:
        """Return it all for a status: keys are kept, new ones may come."""
        with self._lock:
            half_s = self.latency.percentile_s(0.5)
            return {
                "name": self.name,
                "failures": self.failures,
                "resting": self.rests,
                "lied": self.lie is not None,
                "last_error": str(self.last_error)[:500] if self.last_error is not None else None,
                "first_byte_ms": round(half_s * 1000, 1) if half_s is not None else None,
            }

    @property
    def rests(self) -> bool:
        """Whether it failed so lately that another should be asked first."""
        return self._clock() < self._rests_until_s


class Place(NamedTuple):
    """One place, and the blob as it is there."""

    blob: Blob
    health: Health


class ManyPlaces(ABC):
    """A `Blob` that can be had in several places, which `retry` chooses among."""

    @abstractmethod
    def places(self) -> Sequence[Place]:
        """Return the places, the one to ask first first; those that lied are not among them.

        Raises:
            IntegrityError: all of them did.
        """


def in_order(places: Sequence[Place]) -> list[Place]:
    """Return places as they should be asked: in their order, those that rest behind the others.

    Raises:
        IntegrityError: there were some, and all of them lied.
    """
    honest = [place for place in places if place.health.lie is None]
    if not honest:
        lies = [place.health.lie for place in places if place.health.lie is not None]
        if lies:
            raise lies[-1].with_traceback(None)
    return sorted(honest, key=lambda place: place.health.rests)

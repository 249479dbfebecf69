"""A place that gives bytes (a mirror, the registry itself) and how it has behaved.

Sans-I/O: it is told what happened, and says whom to ask, for how long a silence is nothing odd,
and when asking twice is worth it. State is shared by all fetches of one mount and changed by
several threads at once: every change is under the lock.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError, OddAnswer, SourceError
from lazyfs.transport.blob import Blob

_OBSERVED_MOST = 128
_ODD_ANSWERS_MOST = 3
"""In one fetch; a server that answers so each time is no better for being asked again."""
_KNOWN = 8
"""So many answers tell what is usual."""
_REST_FIRST_S = 1.0
_REST_MOST_S = 60.0
_SILENCE_LEAST_S = 1.0
"""A lost packet is sent again within a second (RFC 6298): less says nothing."""
_SILENCE_FACTOR = 4.0
_HEDGE_LEAST_S = 0.05
_HEDGE_FACTOR = 2.5
_HEDGE_UNKNOWN_S = 1.0


class Latency:
    """How long a place took to begin an answer: the latest `_OBSERVED_MOST` times."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_OBSERVED_MOST)
        self._sorted_s: list[float] = []
        self._unsorted = 0

    def observe(self, seconds: float) -> None:
        """Take note of an answer that began so many seconds after it was asked for."""
        self._times_s.append(seconds)
        self._unsorted += 1

    def __len__(self) -> int:
        return len(self._times_s)

    def percentile_s(self, share: float) -> float | None:
        """Return what so large a share (0 to 1) of the answers did not exceed; None: no answers.

        Of many answers the latest few may not be counted in yet.
        """
        if self._unsorted * 16 >= len(self._times_s):
            self._sorted_s, self._unsorted = sorted(self._times_s), 0
        times_s = self._sorted_s
        if not times_s:
            return None
        return times_s[min(len(times_s) - 1, int(share * len(times_s)))]


class Health:
    """How one place has behaved towards this mount."""

    def __init__(
        self, name: str, clock: Callable[[], float] = time.monotonic, *, remote: bool = True
    ) -> None:
        """`name`: as a person calls it: `mirror.example:5000/library`.

        Not `remote`: a file, which is neither hurried nor asked twice, nor has connections.
        """
        self.name = name
        self.remote = remote
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
        """Note an attempt that failed: others are asked first for a while, longer each time.

        For long at once where asking again cannot help.
        """
        with self._lock:
            self.last_error = error
            rest_s = min(_REST_MOST_S, _REST_FIRST_S * 2.0 ** min(self.failures, 10))
            if not is_transient(error):
                rest_s = _REST_MOST_S
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

    @property
    def host(self) -> str:
        """Whom its connections lead to: the name without its path."""
        return self.name.partition("/")[0]

    def silence_most_s(self, most_s: float) -> float:
        """Return for how long an attempt may be silent before another is made; at most `most_s`.

        Four times what all but one in a hundred answers took to begin; `most_s` where too few are
        known, and a little more, so that the transport's own bound can say what it waited for.
        """
        if not self.remote:
            return math.inf
        usual_s = self.latency.percentile_s(0.99) if len(self.latency) >= _KNOWN else None
        if usual_s is None:
            return most_s + 0.5
        return min(most_s, max(_SILENCE_LEAST_S, _SILENCE_FACTOR * usual_s))

    def hedge_after_s(self) -> float:
        """Return after how long without a byte asking twice is worth it; infinite: it is not.

        Two and a half times what all but one in twenty answers took to begin. One that fails is
        not asked twice, it has enough to do. Source: Dean and Barroso, "The Tail at Scale", 2013.
        """
        if not self.remote or self.failures or self.rests:
            return math.inf
        usual_s = self.latency.percentile_s(0.95) if len(self.latency) >= _KNOWN else None
        if usual_s is None:
            return _HEDGE_UNKNOWN_S
        return max(_HEDGE_LEAST_S, _HEDGE_FACTOR * usual_s)


class Place(NamedTuple):
    """One place, and the blob as it is there."""

    blob: Blob
    health: Health


class PlaceLied(IntegrityError):
    """A place's bytes contradict their digest, and there is another to have them from."""

    def __init__(self, error: IntegrityError, place: str) -> None:
        super().__init__(str(error))
        self.place = place


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


def place_of(blob: Blob) -> Place:
    """Return the only place of a blob that is no `ManyPlaces`.

    What it has to say of its source is its attribute `health`; without one it is taken for local.
    """
    health: Health | None = getattr(blob, "health", None)
    return Place(blob, health if health is not None else Health(blob.name, remote=False))


def is_transient(error: LazyfsError) -> bool:
    """Whether asking the same place again may help."""
    return isinstance(error, FetchError) and error.transient


class Choice:
    """Whom one fetch asks next, by what the places have answered it so far."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._sole = None if isinstance(blob, ManyPlaces) else place_of(blob)
        self._failures: dict[Health, int] = {}
        self._errors: dict[Health, LazyfsError] = {}
        self._hopeless: set[Health] = set()

    @property
    def is_of_many(self) -> bool:
        """Whether the blob is a `ManyPlaces`."""
        return self._sole is None

    def next(self) -> Place:
        """Return the place to ask now.

        Raises:
            SourceError: none of them will ever give it; says why, each in its own words.
            IntegrityError: all of them lied.
        """
        places = self._open()
        if not places:
            raise self._refusal()
        if len(places) == 1:
            return places[0]
        return min(places, key=lambda each: (each.health.rests, self._failures.get(each.health, 0)))

    def other_than(self, place: Place) -> Place:
        """Return where to ask beside a place that is slow: another in good health, or itself."""
        for each in self._open():
            health = each.health
            if health is not place.health and not health.failures and not health.rests:
                return each
        return place

    def failed(self, place: Place, error: LazyfsError) -> None:
        """Take note of an attempt that failed there."""
        health, error = place.health, error.with_traceback(None)
        health.failed(error)
        self._failures[health] = self._failures.get(health, 0) + 1
        self._errors[health] = error
        mangled = isinstance(error, OddAnswer) and self._failures[health] < _ODD_ANSWERS_MOST
        if not (is_transient(error) or mangled):
            self._hopeless.add(health)

    def lied(self, place: Place, error: IntegrityError) -> bool:
        """Take note that a place's bytes were wrong; return whether there is another to ask."""
        place.health.lied(error)
        try:
            return self._sole is None and bool(self._open())
        except IntegrityError:
            return False

    def may_go_on_at_once(self) -> bool:
        """Whether there is a place that neither rests nor has failed this fetch yet."""
        places = self._open()
        return any(not each.health.rests and each.health not in self._failures for each in places)

    def wish_s(self, place: Place) -> float:
        """Return how long a place has asked to be left alone, when it last failed this fetch."""
        error = self._errors.get(place.health)
        return (error.retry_after_s or 0.0) if isinstance(error, FetchError) else 0.0

    def why(self, last: LazyfsError) -> str:
        """Return what the places answered last, in one line."""
        if len(self._errors) < 2:
            return str(last)
        return "; ".join(f"{health.name}: {error}" for health, error in self._errors.items())

    def _open(self) -> list[Place]:
        """Return the places that may yet give it, in order."""
        if self._sole is not None:
            places: Sequence[Place] = [self._sole]
        elif isinstance(self._blob, ManyPlaces):
            places = self._blob.places()
        return [each for each in places if each.health not in self._hopeless]

    def _refusal(self) -> LazyfsError:
        errors = list(self._errors.values())
        if len(errors) == 1:
            return errors[0]
        return SourceError(f"{self._blob.name} is to be had nowhere: {self.why(errors[-1])}")

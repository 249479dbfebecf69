"""Arithmetic of stretches: of time in milliseconds, of files in bytes. Sans-I/O.

All are half-open. What begins after it ends is taken for empty: a trace may be hostile.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

INSTANT_MS = 0.01
"""What came in no time at all came in this: a rate is finite."""


class Span(NamedTuple):
    """A stretch of time."""

    began_ms: float
    ended_ms: float

    @property
    def length_ms(self) -> float:
        """How long it is."""
        return self.ended_ms - self.began_ms


def union(spans: Iterable[tuple[float, float]]) -> list[Span]:
    """Return the time that any of them covers, in order, nothing of it twice."""
    merged: list[Span] = []
    for began_ms, ended_ms in sorted(spans):
        if ended_ms <= began_ms:
            continue
        if merged and began_ms <= merged[-1].ended_ms:
            merged[-1] = Span(merged[-1].began_ms, max(merged[-1].ended_ms, ended_ms))
        else:
            merged.append(Span(began_ms, ended_ms))
    return merged


def minus(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """Return what of `spans` no other covers. Both are in order and disjoint, as `union` has it."""
    left = []
    index = 0
    for span in spans:
        began_ms = span.began_ms
        while index < len(others) and others[index].ended_ms <= began_ms:
            index += 1
        look = index
        while look < len(others) and others[look].began_ms < span.ended_ms:
            if others[look].began_ms > began_ms:
                left.append(Span(began_ms, others[look].began_ms))
            began_ms = max(began_ms, others[look].ended_ms)
            look += 1
        if began_ms < span.ended_ms:
            left.append(Span(began_ms, span.ended_ms))
    return left


def common(spans: Iterable[Span], began_ms: float, ended_ms: float) -> list[Span]:
    """Return what of `spans` lies between two moments."""
    cut = (Span(max(item.began_ms, began_ms), min(item.ended_ms, ended_ms)) for item in spans)
    return [item for item in cut if item.ended_ms > item.began_ms]


def total_ms(spans: Iterable[Span]) -> float:
    """Return their lengths' sum."""
    return sum(span.length_ms for span in spans)


class Piece(NamedTuple):
    """A range of a file, and when something first happened to it."""

    start: int
    stop: int
    at_ms: float


def earliest(pieces: Iterable[Piece]) -> list[Piece]:
    """Return disjoint pieces, by offset, each with the first moment that any of `pieces` names."""
    waiting = sorted(piece for piece in pieces if piece.start < piece.stop)
    active: list[tuple[float, int]] = []
    found: list[Piece] = []
    position, index = 0, 0
    while active or index < len(waiting):
        if not active:
            position = max(position, waiting[index].start)
        while index < len(waiting) and waiting[index].start <= position:
            heappush(active, (waiting[index].at_ms, waiting[index].stop))
            index += 1
        while active and active[0][1] <= position:
            heappop(active)
        if not active:
            continue
        at_ms, stop = active[0]
        if index < len(waiting):
            stop = min(stop, waiting[index].start)
        if found and found[-1].stop == position and found[-1].at_ms == at_ms:
            found[-1] = Piece(found[-1].start, stop, at_ms)
        else:
            found.append(Piece(position, stop, at_ms))
        position = stop
    return found


class Fate(NamedTuple):
    """A range of a file, when it was needed and when it came; None: not at all."""

    start: int
    stop: int
    needed_ms: float | None
    arrived_ms: float | None

    @property
    def size_bytes(self) -> int:
        """How large it is."""
        return self.stop - self.start

    @property
    def is_late(self) -> bool:
        """Whether somebody needed it before it was there."""
        return (
            self.needed_ms is not None
            and self.arrived_ms is not None
            and self.arrived_ms > self.needed_ms
        )


def fates(needs: Sequence[Piece], arrivals: Sequence[Piece]) -> list[Fate]:
    """Lay needs over arrivals, both as `earliest` returns them; what is in neither is left out."""
    edges = sorted({edge for piece in (*needs, *arrivals) for edge in (piece.start, piece.stop)})
    result = []
    need, arrival = 0, 0
    for start, stop in pairwise(edges):
        while need < len(needs) and needs[need].stop <= start:
            need += 1
        while arrival < len(arrivals) and arrivals[arrival].stop <= start:
            arrival += 1
        needed = need < len(needs) and needs[need].start <= start
        arrived = arrival < len(arrivals) and arrivals[arrival].start <= start
        if needed or arrived:
            result.append(
                Fate(
                    start,
                    stop,
                    needs[need].at_ms if needed else None,
                    arrivals[arrival].at_ms if arrived else None,
                )
            )
    return result


class Flow:
    """How many bytes had come at any moment, if each lot came evenly over its time.

    Rates are added to and subtracted from each other, which leaves dust behind: what had come is
    never less than what is finished, nor more than what has begun.
    """

    def __init__(self, lots: Iterable[tuple[float, float, int]]) -> None:
        """`lots` are: when the first byte came, when the last, and how many."""
        changes: dict[float, tuple[float, int, int]] = {}
        for began_ms, ended_ms, size_bytes in lots:
            stop_ms = max(ended_ms, began_ms + INSTANT_MS)
            rate = size_bytes / (stop_ms - began_ms)
            for at_ms, more, begun, finished in (
                (began_ms, rate, size_bytes, 0),
                (stop_ms, -rate, 0, size_bytes),
            ):
                before = changes.get(at_ms, (0.0, 0, 0))
                changes[at_ms] = before[0] + more, before[1] + begun, before[2] + finished
        self._moments = sorted(changes)
        self._steps: list[tuple[float, float, int]] = []
        """From each moment on: what had come, the rate, and what had begun."""
        had, rate, begun, finished, before_ms = 0.0, 0.0, 0, 0, 0.0
        for moment_ms in self._moments:
            more, size_begun, size_finished = changes[moment_ms]
            finished += size_finished
            had = min(max(had + rate * (moment_ms - before_ms), finished), begun)
            begun += size_begun
            rate = max(0.0, rate + more) if finished < begun else 0.0
            before_ms = moment_ms
            self._steps.append((had, rate, begun))

    def at(self, moment_ms: float) -> float:
        """Return the bytes that had come by then."""
        index = bisect_right(self._moments, moment_ms) - 1
        if index < 0:
            return 0.0
        had, rate, begun = self._steps[index]
        return min(had + rate * (moment_ms - self._moments[index]), begun)

    def between(self, began_ms: float, ended_ms: float) -> float:
        """Return the bytes that came between two moments."""
        return max(0.0, self.at(ended_ms) - self.at(began_ms))

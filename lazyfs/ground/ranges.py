"""Half-open byte ranges. Only the writer of an HTTP header knows that HTTP's are closed."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class ByteRange(NamedTuple):
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """How many bytes lie in the range."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"bytes {self.start}..{self.stop}"


def coalesce(ranges: Iterable[ByteRange], gap_bytes: int = 0) -> Iterator[ByteRange]:
    """Yield the ranges in order, those that overlap or lie within `gap_bytes` made one."""
    pending: ByteRange | None = None
    for item in sorted(ranges):
        if pending is not None and item.start <= pending.stop + gap_bytes:
            pending = ByteRange(pending.start, max(pending.stop, item.stop))
            continue
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending


class Covered:
    """Ranges that do not touch, in order."""

    def __init__(self) -> None:
        """Nothing is covered."""
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cover a range; return the parts of it that were not covered."""
        if start >= stop:
            return []
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        fresh, position = [], start
        for begin, end in zip(self._starts[first:last], self._stops[first:last], strict=True):
            if position < begin:
                fresh.append((position, min(begin, stop)))
            position = max(position, end)
        if position < stop:
            fresh.append((position, stop))
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return fresh

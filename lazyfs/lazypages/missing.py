"""Which memory of a task is still missing, and what belongs there. Sans-I/O.

Ranges are half-open, by address as the task has it now. Each remembers its *origin*: the address
that its first byte had at the dump, by which the images know its bytes. Ranges are never joined:
where two meet there is the border of two mappings, over which nothing can be copied at once.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Range(NamedTuple):
    """Missing memory of one mapping, that follows one another in the dump too."""

    start: int
    stop: int
    origin: int


class Missing:
    """What is missing of one task."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        """Begin with disjoint ranges, in any order."""
        ordered = sorted(ranges)
        self._starts = [item.start for item in ordered]
        self._stops = [item.stop for item in ordered]
        self._origins = [item.origin for item in ordered]
        self.size_bytes = sum(self._stops) - sum(self._starts)
        """How much is missing."""

    def __iter__(self) -> Iterator[Range]:
        """Yield all ranges, by address."""
        return map(Range, self._starts, self._stops, self._origins)

    def __len__(self) -> int:
        return len(self._starts)

    def copy(self) -> "Missing":
        """Return the same for a child: what its parent misses, it misses too."""
        twin = Missing()
        twin._starts, twin._stops = self._starts[:], self._stops[:]
        twin._origins = self._origins[:]
        twin.size_bytes = self.size_bytes
        return twin

    def at(self, address: int) -> Range | None:
        """Return the range that holds an address, if it is missing."""
        index = bisect_right(self._starts, address) - 1
        if index < 0 or self._stops[index] <= address:
            return None
        return Range(self._starts[index], self._stops[index], self._origins[index])

    def after(self, address: int) -> Range | None:
        """Return what is missing first from an address on: all, or the rest, of a range."""
        index = bisect_right(self._stops, address)
        if index == len(self._starts):
            return None
        start = max(self._starts[index], address)
        return Range(start, self._stops[index], self._origins[index] + start - self._starts[index])

    def drop(self, start: int, stop: int) -> int:
        """Forget what is missing from `start` to `stop`; return how much that was, in bytes."""
        dropped = self._cut(start, stop)
        return sum(item.stop - item.start for item in dropped)

    def move(self, source: int, to: int, length: int) -> None:
        """Note that `length` bytes of memory have moved, over whatever was there."""
        moved = self._cut(source, source + length)
        self._cut(to, to + length)
        index = bisect_left(self._starts, to)
        shift = to - source
        self._starts[index:index] = [item.start + shift for item in moved]
        self._stops[index:index] = [item.stop + shift for item in moved]
        self._origins[index:index] = [item.origin for item in moved]
        self.size_bytes += sum(item.stop - item.start for item in moved)

    def _cut(self, start: int, stop: int) -> list[Range]:
        """Take out what is missing from `start` to `stop`, and return it."""
        if start >= stop:
            return []
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return []
        found = [
            Range(self._starts[index], self._stops[index], self._origins[index])
            for index in range(first, last)
        ]
        kept: list[Range] = []
        head, tail = found[0], found[-1]
        if tail.stop > stop:
            kept.append(Range(stop, tail.stop, tail.origin + stop - tail.start))
            found[-1] = tail._replace(stop=stop)
        if head.start < start:
            kept.insert(0, head._replace(stop=start))
            found[0] = Range(start, found[0].stop, head.origin + start - head.start)
        self._starts[first:last] = [item.start for item in kept]
        self._stops[first:last] = [item.stop for item in kept]
        self._origins[first:last] = [item.origin for item in kept]
        self.size_bytes -= sum(item.stop - item.start for item in found)
        return found

"""Which memory of a task is still missing, and what belongs there. Sans-I/O.

Ranges are half-open, by address as the task has it now. Each remembers its *origin*: the address
that its first byte had at the dump, by which the images know its bytes. Ranges are never joined:
where two meet there is the border of two mappings, over which nothing can be copied at once.

There may be millions of them, and each page that is filled takes one away: so they are kept in
*runs* of some hundred, and no change touches more than the runs that it is about.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

_RUN_RANGES = 256


class Range(NamedTuple):
    """Missing memory of one mapping, that follows one another in the dump too."""

    start: int
    stop: int
    origin: int


class Missing:
    """What is missing of one task."""

    def __init__(self, ranges: Iterable[Range] = (), run_ranges: int = _RUN_RANGES) -> None:
        """Begin with disjoint ranges, in any order. `run_ranges`: how many to keep together."""
        self._run_ranges = run_ranges
        self._runs = _Run(sorted(ranges)).split(run_ranges)
        self._firsts = [run.starts[0] for run in self._runs]
        self.size_bytes = sum(sum(run.stops) - sum(run.starts) for run in self._runs)
        """How much is missing."""

    def __iter__(self) -> Iterator[Range]:
        """Yield all ranges, by address."""
        for run in self._runs:
            yield from map(Range, run.starts, run.stops, run.origins)

    def __len__(self) -> int:
        return sum(len(run.starts) for run in self._runs)

    def copy(self) -> "Missing":
        """Return the same for a child: what its parent misses, it misses too."""
        for run in self._runs:
            run.is_shared = True
        twin = Missing(run_ranges=self._run_ranges)
        twin._runs = self._runs[:]
        twin._firsts = self._firsts[:]
        twin.size_bytes = self.size_bytes
        return twin

    def at(self, address: int) -> Range | None:
        """Return the range that holds an address, if it is missing."""
        found = self._last_from(address)
        if found is None or found.stop <= address:
            return None
        return found

    def after(self, address: int) -> Range | None:
        """Return what is missing first from an address on: all, or the rest, of a range."""
        for run in self._runs[self._run_of(address) :]:
            index = bisect_right(run.stops, address)
            if index < len(run.stops):
                found = run.at(index)
                start = max(found.start, address)
                return Range(start, found.stop, found.origin + start - found.start)
        return None

    def drop(self, start: int, stop: int) -> int:
        """Forget what is missing from `start` to `stop`; return how much that was, in bytes."""
        dropped = self._cut(start, stop)
        return sum(item.stop - item.start for item in dropped)

    def move(self, source: int, to: int, length: int) -> None:
        """Note that `length` bytes of memory have moved, over whatever was there."""
        moved = self._cut(source, source + length)
        self._cut(to, to + length)
        if not moved:
            return
        shift = to - source
        moved = [Range(item.start + shift, item.stop + shift, item.origin) for item in moved]
        self.size_bytes += sum(item.stop - item.start for item in moved)
        number = self._run_of(to)
        run = self._runs[number].own() if self._runs else _Run()
        index = bisect_left(run.starts, to)
        run.replace(index, index, moved)
        self._runs[number : number + 1] = runs = run.split(self._run_ranges)
        self._firsts[number : number + 1] = [each.starts[0] for each in runs]

    def _run_of(self, address: int) -> int:
        """Return which run holds, or would hold, an address."""
        return max(0, bisect_right(self._firsts, address) - 1)

    def _last_from(self, address: int) -> Range | None:
        """Return the last range that begins at an address or before."""
        if not self._runs:
            return None
        run = self._runs[self._run_of(address)]
        index = bisect_right(run.starts, address) - 1
        return run.at(index) if index >= 0 else None

    def _cut(self, start: int, stop: int) -> list[Range]:
        """Take out what is missing from `start` to `stop`, and return it."""
        found: list[Range] = []
        if start >= stop:
            return found
        first = last = self._run_of(start)
        left: list[_Run] = []
        while last < len(self._runs) and self._firsts[last] < stop:
            run = self._runs[last].own()
            found += run.cut(start, stop)
            left += run.split(self._run_ranges)
            last += 1
        self._runs[first:last] = left
        self._firsts[first:last] = [run.starts[0] for run in left]
        self.size_bytes -= sum(item.stop - item.start for item in found)
        return found


class _Run:
    """Ranges that follow one another."""

    __slots__ = ("is_shared", "origins", "starts", "stops")

    def __init__(self, ranges: Sequence[Range] = ()) -> None:
        self.starts = [item.start for item in ranges]
        self.stops = [item.stop for item in ranges]
        self.origins = [item.origin for item in ranges]
        self.is_shared = False
        """A child's memory begins with it, too: not to be changed any more."""

    def at(self, index: int) -> Range:
        return Range(self.starts[index], self.stops[index], self.origins[index])

    def own(self) -> "_Run":
        """Return one that may be changed."""
        return self._part(0, len(self.starts)) if self.is_shared else self

    def split(self, run_ranges: int) -> list["_Run"]:
        """Return what has grown in handy pieces; none if there is nothing."""
        count = len(self.starts)
        if 0 < count <= 2 * run_ranges:
            return [self]
        return [
            self._part(each, min(each + run_ranges, count)) for each in range(0, count, run_ranges)
        ]

    def replace(self, first: int, last: int, ranges: Sequence[Range]) -> None:
        self.starts[first:last] = [item.start for item in ranges]
        self.stops[first:last] = [item.stop for item in ranges]
        self.origins[first:last] = [item.origin for item in ranges]

    def cut(self, start: int, stop: int) -> list[Range]:
        """Take out what lies from `start` to `stop`, and return it."""
        first = bisect_right(self.stops, start)
        last = bisect_left(self.starts, stop)
        if first >= last:
            return []
        found = [self.at(index) for index in range(first, last)]
        kept: list[Range] = []
        head, tail = found[0], found[-1]
        if tail.stop > stop:
            kept.append(Range(stop, tail.stop, tail.origin + stop - tail.start))
            found[-1] = tail._replace(stop=stop)
        if head.start < start:
            kept.insert(0, head._replace(stop=start))
            found[0] = Range(start, found[0].stop, head.origin + start - head.start)
        self.replace(first, last, kept)
        return found

    def _part(self, first: int, last: int) -> "_Run":
        part = _Run()
        part.starts = self.starts[first:last]
        part.stops = self.stops[first:last]
        part.origins = self.origins[first:last]
        return part

"""Which memory a stretch of a pages file is: what was foreseen of files, by tasks. Sans-I/O.

The inverse of `TaskMemory.places`. A stretch may be of several tasks' memory, or of none: who made
the trace may have seen other reads of the file, and hostile pagemaps may share one.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lazyfs.checkpoint.plan import Stretch
from lazyfs.ground.ranges import Covered
from lazyfs.ground.settings import KIB
from lazyfs.lazypages.memory import TaskMemory

PART_BYTES = 256 * KIB
"""At most, so that one is here soon."""


class Part(NamedTuple):
    """Lazy memory of whoever was dumped with it: half-open, by addresses at the dump."""

    memory: TaskMemory
    start: int
    stop: int


class Where:
    """Which memory is in which pages file."""

    def __init__(self, memories: Iterable[tuple[TaskMemory, Sequence[str]]]) -> None:
        """Of each memory the paths of the pages files, by `Place.level`."""
        self._by_path: dict[str, list[_Shelf]] = {}
        for memory, paths in memories:
            for level, path in enumerate(paths):
                shelf = _Shelf(memory, level)
                if shelf.starts:
                    self._by_path.setdefault(path, []).append(shelf)

    def parts(self, stretch: Stretch) -> Iterator[Part]:
        """Yield what lies there: by offsets, of one memory after the other."""
        for shelf in self._by_path.get(stretch.path, ()):
            yield from shelf.parts(stretch.offset, stretch.offset + stretch.size_bytes)


class _Shelf:
    """What one memory has in one file, by offsets."""

    def __init__(self, memory: TaskMemory, level: int) -> None:
        self._memory = memory
        found = sorted(
            (place.offset, place.offset + place.size_bytes, origin)
            for origin, place in memory.all_places()
            if place.level == level
        )
        self.starts = [item[0] for item in found]
        self._found = found

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        index = max(0, bisect_right(self.starts, start) - 1)
        while index < len(self._found) and self._found[index][0] < stop:
            begin, end, origin = self._found[index]
            index += 1
            at, upto = max(begin, start), min(end, stop)
            while at < upto:
                each = min(upto, at - at % PART_BYTES + PART_BYTES)
                yield Part(self._memory, origin + at - begin, origin + each - begin)
                at = each


def in_order(
    stretches: Iterable[Stretch],
    memories: Iterable[tuple[TaskMemory, Sequence[str]]],
    page_bytes: int,
) -> list[Part]:
    """Return the whole pages of memory that stretches of files touch, each once, in their order."""
    where = Where(memories)
    covered: dict[str, Covered] = defaultdict(Covered)
    parts: list[Part] = []
    for path, offset, size_bytes in stretches:
        start = offset // page_bytes * page_bytes
        stop = -(-(offset + size_bytes) // page_bytes) * page_bytes
        for begin, end in covered[path].add(start, stop):
            parts += where.parts(Stretch(path, begin, end - begin))
    return parts

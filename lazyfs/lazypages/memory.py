"""Which memory of a task comes lazily, and where in the pages files its bytes are. Sans-I/O.

Lazy is what its pagemap says so of, page by page: as a rule all private anonymous memory. (CRIU
means to leave out the stack, but takes no page for one of it; or all, where a stack pointer happens
to be a multiple of the page size.) Everything else CRIU reads before the task runs. A page that a
checkpoint leaves to its parent is looked for there. Nothing is served by guessing: where a pagemap
has a form that is not known here, or contradicts the mappings or its pages file, the restore is
refused.

Source: CRIU, criu/mem.c (generate_iovs, is_stack, restore_priv_vma_content), criu/pagemap.c
(read_parent_page), criu/uffd.c (collect_iovs: ranges are split where mappings meet),
criu/pie/restorer.c (vma_remap: what is registered).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from lazyfs.checkpoint.criu_memory import PageFlags, Pagemap, Vma
from lazyfs.ground.errors import MalformedError
from lazyfs.lazypages.missing import Range

_RANGES_MOST = 4_000_000
"""As many as 16 GiB of single pages; each costs some hundred bytes."""


class Level(NamedTuple):
    """One images directory of a chain: what a task's memory is there."""

    pagemap: Pagemap
    pages_bytes: int
    """The size of its pages file."""


class Place(NamedTuple):
    """Bytes of memory that follow one another in a pages file."""

    level: int
    """In which images directory: 0 is the checkpoint itself, others are its parents."""
    offset: int
    size_bytes: int


class TaskMemory:
    """The lazy memory of a task, by its addresses at the dump."""

    def __init__(
        self, vmas: Sequence[Vma], levels: Sequence[Level], page_bytes: int, what: str = "task"
    ) -> None:
        """`levels`: the checkpoint's own first. `what`: whose memory, for messages.

        Raises:
            MalformedError: it cannot be told for sure where each lazy page is.
        """
        self._what = what
        self._page_bytes = page_bytes
        self._levels = [_Extents(level, page_bytes, f"{what}: {{}}") for level in levels]
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._level: list[int] = []
        self._offsets: list[int] = []
        lazy = sorted(
            (item.vaddr, item.vaddr + item.page_count * page_bytes)
            for item in levels[0].pagemap.extents
            if item.flags & PageFlags.LAZY and item.page_count
        )
        for start, stop in lazy:
            if start % page_bytes:
                raise MalformedError(f"{what}: pages at {start:#x}")
            self._find(start, stop, 0)
        self.ranges = tuple(_within(vmas, lazy, what))
        """What is missing before anything has come, split where mappings meet."""
        self.firsts = tuple(_firsts(vmas, self.ranges))
        """The first lazy page of each mapping that has any."""

    def all_places(self) -> Iterator[tuple[int, Place]]:
        """Yield all lazy memory, by address: where it begins, and the place of its bytes."""
        for start, stop, level, offset in zip(
            self._starts, self._stops, self._level, self._offsets, strict=True
        ):
            yield start, Place(level, offset, stop - start)

    def places(self, start: int, stop: int) -> Iterator[Place]:
        """Yield where the bytes of lazy memory from `start` to `stop` are, in order."""
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            if (
                index < 0
                or index >= len(self._starts)
                or not (self._starts[index] <= start < self._stops[index])
            ):
                raise AssertionError(f"{self._what}: {start:#x} is not lazy")
            end = min(stop, self._stops[index])
            offset = self._offsets[index] + start - self._starts[index]
            yield Place(self._level[index], offset, end - start)
            start = end
            index += 1

    def _find(self, start: int, stop: int, level: int) -> None:
        """Note where the pages from `start` to `stop` are, as `level` has them."""
        if level >= len(self._levels):
            raise MalformedError(f"{self._what}: pages at {start:#x} are in no parent")
        for begin, end, flags, offset in self._levels[level].parts(start, stop):
            if flags & PageFlags.IN_PARENT:
                self._find(begin, end, level + 1)
            elif offset is None:
                raise MalformedError(
                    f"{self._what}: the pages at {begin:#x} are not in the checkpoint (dumped with "
                    "--lazy-pages?)"
                )
            else:
                self._append(begin, end, level, offset)

    def _append(self, start: int, stop: int, level: int, offset: int) -> None:
        if self._stops and self._stops[-1] == start and self._level[-1] == level:
            before = self._offsets[-1] + self._stops[-1] - self._starts[-1]
            if before == offset:
                self._stops[-1] = stop
                return
        if len(self._starts) >= _RANGES_MOST:
            raise MalformedError(f"{self._what}: its pagemap is larger than is believed")
        self._starts.append(start)
        self._stops.append(stop)
        self._level.append(level)
        self._offsets.append(offset)


class _Extents:
    """The extents of one pagemap, by address."""

    def __init__(self, level: Level, page_bytes: int, what: str) -> None:
        pagemap, pages_bytes = level
        self._what = what.format(f"pages-{pagemap.pages_id}.img")
        if pagemap.compressed:
            raise MalformedError(
                f"{self._what} is compressed, or of a newer kind than is known here: restore "
                "without --lazy-pages"
            )
        size_bytes = pagemap.pages_size_bytes(page_bytes)
        if size_bytes is None or size_bytes > pages_bytes:
            raise MalformedError(
                f"{self._what} has {pages_bytes} bytes and should have {size_bytes}"
            )
        found = sorted(
            (item.vaddr, item.vaddr + item.page_count * page_bytes, item.flags, place)
            for item, place in zip(
                pagemap.extents,
                (place and place.start for place in pagemap.places(page_bytes)),
                strict=True,
            )
            if item.page_count
        )
        for before, after in pairwise(found):
            if after[0] < before[1]:
                raise MalformedError(f"{self._what}: two pages for {after[0]:#x}")
        self._starts = [item[0] for item in found]
        self._found = found

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int, PageFlags, int | None]]:
        """Yield start, stop, flags and offset in the pages file of what lies there."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            if index >= len(self._found):
                break
            begin, end, flags, offset = self._found[index]
            index += 1
            if end <= start:
                continue
            if begin > start:
                break
            upto = min(end, stop)
            yield start, upto, flags, None if offset is None else offset + start - begin
            start = upto
        if start < stop:
            raise MalformedError(f"{self._what}: no page at {start:#x}, where a child expects one")


def _within(vmas: Sequence[Vma], lazy: Sequence[tuple[int, int]], what: str) -> Iterator[Range]:
    """Yield lazy memory, joined within a mapping and split where two meet."""
    index = 0
    pending: Range | None = None
    for start, stop in lazy:
        while start < stop:
            while index < len(vmas) and vmas[index].stop <= start:
                index += 1
            if index == len(vmas) or vmas[index].start > start or not vmas[index].may_be_lazy:
                raise MalformedError(f"{what}: a lazy page at {start:#x}, in no such mapping")
            upto = min(stop, vmas[index].stop)
            if pending is not None and pending.stop == start > vmas[index].start:
                pending = pending._replace(stop=upto)
            else:
                if pending is not None:
                    yield pending
                pending = Range(start, upto, start)
            start = upto
    if pending is not None:
        yield pending


def _firsts(vmas: Sequence[Vma], ranges: Sequence[Range]) -> Iterator[int]:
    """Yield where each mapping's first range begins; all of these lie in mappings, in order."""
    stop = 0
    index = 0
    for found in ranges:
        if found.start < stop:
            continue
        while vmas[index].stop <= found.start:
            index += 1
        stop = vmas[index].stop
        yield found.start

"""All that a restore of an opened checkpoint reads, in CRIU's order: small files, then memory.

`criu_order.py` knows the order of files by what they say; here they are read, on the lane of what
nobody waits for. An order to fetch by: what of it cannot be parsed is left out, and its pages come
last.

Source of what a task reads of which directory: CRIU, criu/pagemap.c (read_pagemap_page,
read_parent_page): what is `in_parent` is had from the images directory that this one builds on.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import trio

from lazyfs.checkpoint import criu
from lazyfs.checkpoint.criu_memory import (
    PAGE_BYTES,
    PageFlags,
    Pagemap,
    Vma,
    parse_mm,
    parse_pagemap,
)
from lazyfs.checkpoint.criu_order import (
    PagesUse,
    metadata_in_read_order,
    pages_in_read_order,
    shmem_of,
)
from lazyfs.checkpoint.plan import Stretch
from lazyfs.checkpoint.tree import path_of
from lazyfs.content.lanes import Lane
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.model import EntryType

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node

log = logging.getLogger(__name__)

_READ_LIMIT_BYTES = 64 * MIB
"""Of small files that are read for the order, of a directory together; others come last."""
_BRIDGE_BYTES = 64 * KIB
"""Pages of a parent that lie so near to each other are one range."""

_Parsed = TypeVar("_Parsed")


def first_stretches(checkpoint: "OpenedCheckpoint") -> tuple[Stretch, ...]:
    """Return the pages files by their numbers: what can be told before anything is read."""
    if checkpoint.images is None:
        return ()
    return tuple(_pages_left(checkpoint.images.node, used=set()))


async def all_stretches(checkpoint: "OpenedCheckpoint") -> tuple[Stretch, ...]:
    """Return what CRIU reads, first read first.

    Raises:
        IntegrityError, FetchError, SourceError: the small files cannot be had.
    """
    if checkpoint.images is None:
        return ()
    levels = [
        _Level(checkpoint, node) for node in (checkpoint.images.node, *checkpoint.images.parents)
    ]
    for level in levels:
        await level.read()
    return await trio.to_thread.run_sync(_in_order, levels)


class _Level:
    """An images directory of the chain, and what its small files say."""

    def __init__(self, checkpoint: "OpenedCheckpoint", node: "Node") -> None:
        self.node = node
        self.processes: tuple[criu.Process, ...] = ()
        self.pagemaps: dict[str, Pagemap] = {}
        self.mappings: dict[int, tuple[Vma, ...]] = {}
        self._checkpoint = checkpoint
        self._left_bytes = _READ_LIMIT_BYTES

    async def read(self) -> None:
        """Read the tree of tasks, their mappings and all pagemaps."""
        found = await self._parsed(criu.PSTREE, lambda data, _: criu.parse_pstree(data))
        self.processes = tuple(found or ())
        for process in self.processes:
            vmas = await self._parsed(criu.task_image("mm", process.pid), parse_mm)
            if vmas is not None:
                self.mappings[process.pid] = vmas
        for name in filter(_is_pagemap, sorted(self.node.children)):  # a pre-dump has no tree
            pagemap = await self._parsed(name, parse_pagemap)
            if pagemap is not None:
                self.pagemaps[name] = pagemap

    async def _parsed(self, name: str, parse: Callable[[bytes, str], _Parsed]) -> _Parsed | None:
        node = self.node.children.get(name)
        if node is None or node.type is not EntryType.FILE or node.size_bytes > self._left_bytes:
            return None
        self._left_bytes -= node.size_bytes
        reader = self._checkpoint.reader(node)
        data = bytes(await reader.read(0, node.size_bytes, Lane.READAHEAD))
        try:
            return await trio.to_thread.run_sync(parse, data, name)
        except MalformedError as error:
            log.debug("what is read first cannot be told of it: %s", error)
            return None


def _is_pagemap(name: str) -> bool:
    return shmem_of(name) is not None or (criu.task_of(name) or ("",))[0] == "pagemap"


def _in_order(levels: Sequence[_Level]) -> tuple[Stretch, ...]:
    head, *parents = levels
    names = [name for name, node in head.node.children.items() if node.type is EntryType.FILE]
    found = [_whole(head.node, name) for name in metadata_in_read_order(names, head.processes)]
    uses = pages_in_read_order(names, head.processes, head.pagemaps, head.mappings)
    for use in uses:
        found.append(_whole(head.node, use.name))
        found += _of_parents(head, parents, use)
    found += _pages_left(head.node, used={use.name for use in uses})
    return tuple(stretch for stretch in found if stretch.size_bytes)


def _of_parents(head: _Level, parents: Sequence[_Level], use: PagesUse) -> Iterator[Stretch]:
    """Yield what a task's memory, or shared memory, has in earlier images directories."""
    if use.owner == "device":
        return
    name = criu.task_image("pagemap", use.owner_id)
    if use.owner == "shmem":
        name = f"pagemap-shmem-{use.owner_id}.img"
    missing = _addresses(head.pagemaps[name], PageFlags.IN_PARENT)
    for parent in parents:
        pagemap = parent.pagemaps.get(name)
        if pagemap is None or not missing:
            return
        pages = criu.pages_image(pagemap.pages_id)
        if pages in parent.node.children:
            for item in coalesce(_places(pagemap, missing), _BRIDGE_BYTES):
                size_bytes = parent.node.children[pages].size_bytes
                stop = min(item.stop, size_bytes)
                if item.start < stop:
                    path = _path(parent.node, pages)
                    yield Stretch(path, item.start, stop - item.start)
        further = _addresses(pagemap, PageFlags.IN_PARENT)
        missing = [part for item in further for part in _overlaps(item, missing)]


def _addresses(pagemap: Pagemap, flags: PageFlags) -> list[ByteRange]:
    """Return the memory that has all of `flags`, by address."""
    return list(
        coalesce(
            ByteRange(item.vaddr, item.vaddr + item.page_count * PAGE_BYTES)
            for item in pagemap.extents
            if flags & ~item.flags == 0
        )
    )


def _places(pagemap: Pagemap, wanted: Sequence[ByteRange]) -> Iterator[ByteRange]:
    """Yield where memory lies in the pages file; a compressed extent is taken whole."""
    for extent, place in zip(pagemap.extents, pagemap.places(), strict=True):
        if place is None:
            continue
        memory = ByteRange(extent.vaddr, extent.vaddr + extent.page_count * PAGE_BYTES)
        for part in _overlaps(memory, wanted):
            if extent.packed_bytes is not None:
                yield place
                break
            start = place.start + part.start - memory.start
            yield ByteRange(start, start + part.size_bytes)


def _overlaps(item: ByteRange, others: Sequence[ByteRange]) -> Iterator[ByteRange]:
    """Yield what an interval has in common with others, which are in order and apart."""
    for other in others[max(0, bisect_right(others, item) - 1) :]:
        if other.start >= item.stop:
            return
        start, stop = max(item.start, other.start), min(item.stop, other.stop)
        if start < stop:
            yield ByteRange(start, stop)


def _pages_left(directory: "Node", used: set[str]) -> list[Stretch]:
    """Return the pages files that are not `used`, by number."""
    names = [
        name
        for name, node in directory.children.items()
        if criu.is_pages(name) and node.type is EntryType.FILE and name not in used
    ]
    names.sort(key=lambda name: (len(name), name))
    return [_whole(directory, name) for name in names if directory.children[name].size_bytes]


def _whole(directory: "Node", name: str) -> Stretch:
    return Stretch(_path(directory, name), 0, directory.children[name].size_bytes)


def _path(directory: "Node", name: str) -> str:
    above = path_of(directory)
    return f"{above}/{name}" if above else name

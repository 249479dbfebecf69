"""A task's memory in CRIU's images: its mappings (mm) and where its pages are (pagemap).

A pages file is its pagemap's present extents one after the other, but a page's place in it is
not its index times the page size: since images version 3 pages may be compressed, and an extent
may begin at the next page boundary. `Pagemap.places` knows; what it does not know it says.

Source: CRIU, images/pagemap.proto, images/mm.proto, images/vma.proto, criu/include/pagemap.h,
criu/include/image.h (VMA_*), criu/include/vma.h (vma_entry_can_be_lazy), criu/pagemap.c
(init_compat_pagemap_entry for old entries). Compressed pages: criu-dev since pull requests 2895
(compressed_size, total_compressed_size) and 3115 (blocks), which no released CRIU writes yet.
"""

from collections.abc import Iterator, Sequence
from enum import Enum, IntFlag
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from lazyfs.checkpoint import criu_wire as wire
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange

_PAGEMAP_MAGIC = 0x56084025
_MM_MAGIC = 0x57492820

PAGE_BYTES = 4096
"""Of most machines. No image names its own: 16 or 64 KiB on some arm64, 64 KiB on most ppc64le."""

_ADDRESSES = 1 << 64

# ---- where pages are ----


class PageFlags(IntFlag):
    """Where the pages of an extent are."""

    IN_PARENT = 1
    LAZY = 2
    PRESENT = 4
    ALIGNED = 8
    """In the pages file they begin at the next multiple of the page size."""


_KNOWN_FLAGS = 0b1111


class PageExtent(NamedTuple):
    """Pages that follow one another in memory, and, if present, in the pages file."""

    vaddr: int
    page_count: int
    flags: PageFlags
    packed_bytes: int | None = None
    """What they take in the pages file, compressed; None where they lie there as they are."""


class Pagemap(msgspec.Struct, frozen=True):
    """pagemap-PID.img or pagemap-shmem-ID.img: what memory is in which pages file, in file order.

    Addresses of shared memory are offsets into it.
    """

    pages_id: int
    extents: tuple[PageExtent, ...]
    understood: bool = True
    """No field and no flag in it is unknown here: otherwise no place can be told."""
    wide_counts: bool = False
    """It counts pages where only CRIU 4.2 and later look; any other takes it for empty."""

    @property
    def compressed(self) -> bool:
        """Whether pages are, or may be, stored in another form than in memory."""
        return not self.understood or any(item.packed_bytes is not None for item in self.extents)

    def pages_with(self, flags: PageFlags) -> int:
        """How many pages have all of these flags."""
        return sum(item.page_count for item in self.extents if flags & ~item.flags == 0)

    def places(self, page_bytes: int = PAGE_BYTES) -> Iterator[ByteRange | None]:
        """Yield for each extent where its bytes lie in the pages file.

        None where there are none of it (it is not present), and for all extents of a pagemap
        that is not understood.
        """
        position = 0
        for item in self.extents:
            if not item.flags & PageFlags.PRESENT or not self.understood:
                yield None
                continue
            if item.flags & PageFlags.ALIGNED:
                position = -(-position // page_bytes) * page_bytes
            start = position
            position += _stored_bytes(item, page_bytes)
            yield ByteRange(start, position)

    def pages_size_bytes(self, page_bytes: int = PAGE_BYTES) -> int | None:
        """Return how large its pages file is; None if that cannot be told."""
        if not self.understood:
            return None
        return max((place.stop for place in self.places(page_bytes) if place), default=0)


def parse_pagemap(data: bytes, what: str = "pagemap") -> Pagemap:
    """Read a pagemap.

    Raises:
        MalformedError: it is not one, an extent ends beyond the address space, or compressed
            blocks contradict themselves.
    """
    first, *others = wire.records(data, _PAGEMAP_MAGIC, what)
    head = wire.parse("pagemap_head", first, what, "pages_id")
    extents = []
    understood, wide_counts = True, False
    for record in others:
        message = wire.parse("pagemap_entry", record, what, "vaddr")
        extents.append(_extent(message, what))
        understood = understood and _is_understood(message)
        wide_counts = wide_counts or message.nr_pages > message.compat_nr_pages
    return Pagemap(head.pages_id, tuple(extents), understood, wide_counts)


def _extent(message: Any, what: str) -> PageExtent:
    page_count = message.nr_pages if message.HasField("nr_pages") else message.compat_nr_pages
    if message.vaddr + page_count * PAGE_BYTES > _ADDRESSES:
        raise MalformedError(f"{what}: {page_count} pages from {message.vaddr:#x} on")
    flags = PageFlags(message.flags & _KNOWN_FLAGS)
    if message.in_parent:
        flags |= PageFlags.IN_PARENT
    elif not message.HasField("flags"):
        flags = PageFlags.PRESENT
    return PageExtent(message.vaddr, page_count, flags, _packed_bytes(message, page_count, what))


def _packed_bytes(message: Any, page_count: int, what: str) -> int | None:
    """Return what compressed pages take; blocks of no bytes are all zero, and are not stored."""
    if message.HasField("blocks"):
        blocks = message.blocks
        expected = -(-page_count // max(1, blocks.pages_per_block))
        if sum(blocks.block_sizes) > blocks.total_payload_size or (
            len(blocks.block_sizes) != expected
        ):
            raise MalformedError(
                f"{what}: {len(blocks.block_sizes)} blocks of {sum(blocks.block_sizes)} bytes "
                f"for {page_count} pages in {blocks.total_payload_size} bytes"
            )
        return int(blocks.total_payload_size)
    if message.HasField("total_compressed_size"):
        return int(message.total_compressed_size)
    return None


def _is_understood(message: Any) -> bool:
    if message.flags & ~_KNOWN_FLAGS:
        return False
    if message.HasField("total_compressed_size"):
        # Until pull request 3115 field 6 was the blocks' sizes, which the total sums up.
        return not message.HasField("blocks")
    return not wire.has_unknown(message) and not (
        message.HasField("blocks") and wire.has_unknown(message.blocks)
    )


def _stored_bytes(extent: PageExtent, page_bytes: int) -> int:
    if extent.packed_bytes is None:
        return extent.page_count * page_bytes
    return extent.packed_bytes


# ---- what memory is ----


class MemoryKind(Enum):
    """Where a mapping's bytes come from."""

    ANONYMOUS = "anonymous"
    """Private to the process; in its pages file."""
    FILE = "file"
    """A private mapping of a file; what was written to is in the pages file."""
    SHARED = "shared"
    """Anonymous shared memory, SysV segments and memfds; in pages files of their own."""
    SHARED_FILE = "shared file"
    """A file's own bytes; not in the images."""
    SPECIAL = "special"
    """The kernel's: vdso, vvar, vsyscall; or a device's."""


_SPECIAL_STATUS = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 16 | 1 << 17 | 1 << 27
"""VSYSCALL, VDSO, VVAR, GUARD, UPROBES, EXT_PLUGIN."""
_SHARED_STATUS = 1 << 8 | 1 << 10 | 1 << 14
"""ANON_SHARED, SYSVIPC, MEMFD."""
_MEMFD = 1 << 14
_FILE_PRIVATE, _FILE_SHARED, _SOCKET = 1 << 6, 1 << 7, 1 << 11
_MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS = 0x1, 0x2, 0x20
_MAP_LOCKED, _MAP_HUGETLB = 0x2000, 0x40000


class Vma(NamedTuple):
    """A mapping: what the kernel calls a virtual memory area."""

    start: int
    stop: int
    shmid: int
    """Of shared memory: pagemap-shmem-`shmid`.img. Of a file or memfd: its id in files.img."""
    prot: int
    flags: int
    """As for mmap(2), on x86 and everywhere else."""
    status: int
    """CRIU's VMA_*."""

    @property
    def kind(self) -> MemoryKind:
        """Where its bytes come from."""
        if self.status & (_SPECIAL_STATUS | _SOCKET):
            return MemoryKind.SPECIAL
        if self.status & _SHARED_STATUS:
            # A private mapping of a memfd has pages of its own, as that of a file.
            return MemoryKind.SHARED if not self.flags & _MAP_PRIVATE else MemoryKind.FILE
        if self.status & _FILE_SHARED:
            return MemoryKind.SHARED_FILE
        return MemoryKind.FILE if self.status & _FILE_PRIVATE else MemoryKind.ANONYMOUS

    @property
    def maps_memfd(self) -> bool:
        """Whether `shmid` is that of a memfd; anonymous shared memory is one for CRIU as well."""
        return bool(self.status & _MEMFD)

    @property
    def may_be_lazy(self) -> bool:
        """Whether `criu lazy-pages` may bring it; the stack is excepted, page by page."""
        return (
            self.flags & (_MAP_ANONYMOUS | _MAP_PRIVATE) == _MAP_ANONYMOUS | _MAP_PRIVATE
            and not self.flags & (_MAP_LOCKED | _MAP_HUGETLB)
            and not self.status & _SPECIAL_STATUS
        )


def parse_mm(data: bytes, what: str = "mm image") -> tuple[Vma, ...]:
    """Read the mappings of mm-PID.img, by address.

    Raises:
        MalformedError: it is not one, or mappings overlap.
    """
    message = wire.parse("mm_entry", wire.first(data, _MM_MAGIC, what), what)
    vmas = tuple(
        Vma(item.start, item.end, item.shmid, item.prot, item.flags, item.status)
        for item in message.vmas
    )
    if any(item.start > item.stop for item in vmas) or any(
        before.stop > after.start for before, after in pairwise(vmas)
    ):
        raise MalformedError(f"{what}: mappings overlap")
    return vmas


def pages_by_kind(
    vmas: Sequence[Vma], pagemap: Pagemap, page_bytes: int = PAGE_BYTES
) -> dict[MemoryKind, int]:
    """Count the present pages of a task by the kind of mapping that they are in.

    Pages outside of every mapping are not counted.
    """
    counts = dict.fromkeys(MemoryKind, 0)
    index = counted = 0
    for extent in sorted(item for item in pagemap.extents if item.flags & PageFlags.PRESENT):
        start = max(extent.vaddr, counted)
        counted = max(counted, extent.vaddr + extent.page_count * page_bytes)
        while start < counted and index < len(vmas):
            vma = vmas[index]
            if vma.stop <= start:
                index += 1
                continue
            if vma.start >= counted:
                break
            stop = min(counted, vma.stop)
            counts[vma.kind] += max(0, stop - max(start, vma.start)) // page_bytes
            start = stop
    return counts

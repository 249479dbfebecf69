import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint import criu
from lazyfs.checkpoint.criu import Process
from lazyfs.checkpoint.criu_cpu import DumpedCpu, parse_cpuinfo
from lazyfs.checkpoint.criu_memory import (
    MemoryKind,
    PageExtent,
    PageFlags,
    Pagemap,
    Vma,
    pages_by_kind,
    parse_mm,
    parse_pagemap,
)
from lazyfs.checkpoint.criu_order import (
    PagesUse,
    metadata_in_read_order,
    pages_in_read_order,
    shmem_of,
)
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.pagemap_hint import read_pagemap

from . import sample
from .test_criu import PAGEMAP, image, message, varint

IMAGES = sample.images()
MM, CPUINFO = 0x57492820, 0x61404013
PRESENT, LAZY, ALIGNED = PageFlags.PRESENT, PageFlags.LAZY, PageFlags.ALIGNED


def part(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes, or of a message."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def blocks(sizes: list[int], pages_per_block: int, total: int | None = None) -> bytes:
    """pagemap_entry.blocks, as criu-dev writes it."""
    total = sum(sizes) if total is None else total
    packed = b"".join(map(varint, sizes))
    return part(6, part(1, packed) + message(f2=total, f3=pages_per_block))


@pytest.mark.parametrize("pid", [1, 6])
def test_a_pagemap_accounts_for_its_pages_file(pid: int) -> None:
    pagemap = parse_pagemap(IMAGES[criu.task_image("pagemap", pid)])
    pages = IMAGES[criu.pages_image(pagemap.pages_id)]
    assert pagemap.pages_size_bytes() == pagemap.pages_with(PRESENT) * 4096 == len(pages)
    assert 0 < pagemap.pages_with(PRESENT | LAZY) < pagemap.pages_with(PRESENT)
    assert not pagemap.compressed
    assert not pagemap.wide_counts


def test_entries_of_old_versions() -> None:
    data = image(
        PAGEMAP,
        message(f1=3),
        message(f1=0x1000, f2=2),  # no flags: present
        message(f1=0x4000, f2=1, f3=1),  # in_parent
        message(f1=0x8000, f2=7, f4=6, f5=8),  # nr_pages wins over its narrow predecessor
    )
    pagemap = parse_pagemap(data)
    assert pagemap.extents == (
        PageExtent(0x1000, 2, PRESENT),
        PageExtent(0x4000, 1, PageFlags.IN_PARENT),
        PageExtent(0x8000, 8, PRESENT | LAZY),
    )
    assert pagemap.wide_counts
    assert list(pagemap.places()) == [ByteRange(0, 8192), None, ByteRange(8192, 8192 + 8 * 4096)]
    assert list(pagemap.places(65536))[2] == ByteRange(2 * 65536, 10 * 65536)


def test_compressed_pages_are_where_their_blocks_say() -> None:
    data = image(
        PAGEMAP,
        message(f1=1),
        message(f1=0x1000, f2=3, f4=4) + blocks([100, 0, 4096], 1),
        message(f1=0x9000, f2=2, f4=4),  # not compressed, and not aligned
        message(f1=0x10000, f2=1, f4=1),
        message(f1=0x20000, f2=65, f4=12) + blocks([9000, 17], 64),
    )
    pagemap = parse_pagemap(data)
    assert pagemap.compressed
    assert [item.packed_bytes for item in pagemap.extents] == [4196, None, None, 9017]
    assert list(pagemap.places()) == [
        ByteRange(0, 4196),
        ByteRange(4196, 4196 + 8192),
        None,
        ByteRange(16384, 16384 + 9017),
    ]
    assert pagemap.pages_size_bytes() == 16384 + 9017
    assert pagemap.pages_with(PRESENT) == 70
    assert read_pagemap(data) is None


def test_compressed_pages_as_criu_dev_first_wrote_them() -> None:
    sizes = b"".join(message(f6=size) for size in (100, 0, 4096))
    data = image(PAGEMAP, message(f1=1), message(f1=0, f2=3, f4=4) + sizes + message(f7=4196))
    assert list(parse_pagemap(data).places()) == [ByteRange(0, 4196)]
    assert read_pagemap(data) is None


@pytest.mark.parametrize(
    "entry",
    [
        message(f1=0, f2=3, f4=4 | 1 << 4),  # a flag of the future
        message(f1=0, f2=3, f4=4, f9=1),  # a field of the future
        message(f1=0, f2=3, f4=4, f6=100),  # sizes without their sum
        message(f1=0, f2=1, f4=4) + part(6, part(1, b"\x01") + message(f2=1, f3=1, f4=1)),
    ],
)
def test_what_is_not_understood_has_no_place(entry: bytes) -> None:
    data = image(PAGEMAP, message(f1=1), message(f1=0x9000, f2=1, f4=4), entry)
    pagemap = parse_pagemap(data)
    assert list(pagemap.places()) == [None, None]
    assert pagemap.pages_size_bytes() is None
    assert pagemap.compressed
    assert read_pagemap(data) is None


def test_no_prediction_where_pages_are_aligned() -> None:
    data = image(PAGEMAP, message(f1=1), message(f1=0, f2=3, f4=12))
    assert parse_pagemap(data).pages_size_bytes() == 3 * 4096
    assert read_pagemap(data) is None


@pytest.mark.parametrize(
    "entry",
    [
        message(f1=1 << 63, f5=1 << 63),
        message(f1=0, f2=3, f4=4) + blocks([1, 2], 1),
        message(f1=0, f2=3, f4=4) + blocks([1, 2, 3], 1, total=5),
        message(f1=0, f2=0, f4=4) + blocks([7], 0),
    ],
)
def test_a_pagemap_that_contradicts_itself(entry: bytes) -> None:
    with pytest.raises(MalformedError, match="pages"):
        parse_pagemap(image(PAGEMAP, message(f1=1), entry))


@given(
    st.lists(
        st.tuples(
            st.integers(1, 50),
            st.sampled_from([4, 6, 12, 1, 0]),
            st.none() | st.integers(1, 8),
        ),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_places_are_those_of_a_pages_file_made_from_them(
    entries: list[tuple[int, int, int | None]], chance: random.Random
) -> None:
    records, stored, expected, vaddr = [message(f1=1)], bytearray(), [], 0
    for count, flags, per_block in entries:
        entry = message(f1=vaddr, f2=count, f4=flags)
        vaddr += count * 4096
        if not flags & 4:
            expected.append(None)
            records.append(entry)
            continue
        if flags & 8:
            stored += bytes(-len(stored) % 4096)
        start = len(stored)
        if per_block is None:
            stored += bytes(count * 4096)
        else:
            sizes = [chance.randrange(4097) for _ in range(-(-count // per_block))]
            entry += blocks(sizes, per_block)
            stored += bytes(sum(sizes))
        expected.append(ByteRange(start, len(stored)))
        records.append(entry)
    pagemap = parse_pagemap(image(PAGEMAP, *records))
    assert list(pagemap.places()) == expected
    # Bytes that only align what follows are in the file with what follows.
    assert pagemap.pages_size_bytes() == len(stored)


# ---- mappings ----


def vma(start: int, stop: int, *, shmid: int = 0, flags: int = 0x22, status: int = 513) -> bytes:
    return part(14, message(f1=start, f2=stop, f3=0, f4=shmid, f5=3, f6=flags, f7=status))


def mm(*vmas: bytes) -> bytes:
    return image(MM, b"".join(vmas))


def test_the_mappings_of_the_sample() -> None:
    vmas = parse_mm(IMAGES["mm-1.img"])
    pagemap = parse_pagemap(IMAGES["pagemap-1.img"])
    kinds = {item.kind for item in vmas}
    assert {MemoryKind.ANONYMOUS, MemoryKind.FILE, MemoryKind.SPECIAL} <= kinds
    counts = pages_by_kind(vmas, pagemap)
    assert sum(counts.values()) == pagemap.pages_with(PRESENT)
    assert counts[MemoryKind.SHARED] == 0
    lazy = [item for item in pagemap.extents if item.flags & LAZY]
    for item in lazy:
        (holder,) = [one for one in vmas if one.start <= item.vaddr < one.stop]
        assert holder.may_be_lazy
        assert holder.kind is MemoryKind.ANONYMOUS


@pytest.mark.parametrize(
    ("flags", "status", "kind", "lazy"),
    [
        (0x22, 1 | 1 << 9, MemoryKind.ANONYMOUS, True),
        (0x22 | 0x2000, 1 | 1 << 9, MemoryKind.ANONYMOUS, False),
        (0x22 | 0x40000, 1 | 1 << 9, MemoryKind.ANONYMOUS, False),
        (0x02, 1 | 1 << 6, MemoryKind.FILE, False),
        (0x01, 1 | 1 << 7, MemoryKind.SHARED_FILE, False),
        (0x21, 1 | 1 << 8, MemoryKind.SHARED, False),
        (0x01, 1 | 1 << 8 | 1 << 10, MemoryKind.SHARED, False),
        (0x01, 1 | 1 << 7 | 1 << 14, MemoryKind.SHARED, False),
        (0x02, 1 | 1 << 6 | 1 << 14, MemoryKind.FILE, False),
        (0x22, 1 | 1 << 3 | 1 << 9, MemoryKind.SPECIAL, False),
    ],
)
def test_kinds_of_mappings(flags: int, status: int, kind: MemoryKind, lazy: bool) -> None:
    (found,) = parse_mm(mm(vma(0x1000, 0x2000, flags=flags, status=status)))
    assert (found.kind, found.may_be_lazy) == (kind, lazy)


def test_pages_across_mappings_count_once() -> None:
    vmas = (
        Vma(0x1000, 0x3000, 0, 3, 0x22, 513),
        Vma(0x3000, 0x5000, 0, 3, 0x02, 65),
        Vma(0x9000, 0xA000, 0, 3, 0x22, 513),
    )
    extents = (
        PageExtent(0x0000, 6, PRESENT),
        PageExtent(0x2000, 1, PRESENT),  # once more
        PageExtent(0x9000, 1, PageFlags.IN_PARENT),
    )
    counts = pages_by_kind(vmas, Pagemap(1, extents))
    assert (counts[MemoryKind.ANONYMOUS], counts[MemoryKind.FILE]) == (2, 2)


@pytest.mark.parametrize(
    "vmas",
    [
        [vma(0x2000, 0x1000)],
        [vma(0x1000, 0x3000), vma(0x2000, 0x4000)],
        [vma(0x3000, 0x4000), vma(0x1000, 0x2000)],
    ],
)
def test_mappings_that_are_none(vmas: list[bytes]) -> None:
    with pytest.raises(MalformedError, match="overlap"):
        parse_mm(mm(*vmas))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.sampled_from([0, 1, 4, 6]))),
    st.lists(st.integers(0, 50), max_size=12),
)
def test_no_page_is_counted_twice(extents: list[tuple[int, int, int]], bounds: list[int]) -> None:
    edges = sorted(set(bounds))
    vmas = [
        Vma(start * 4096, stop * 4096, 0, 3, 0x22, 513)
        for start, stop in zip(edges[::2], edges[1::2], strict=False)
    ]
    pagemap = Pagemap(
        1, tuple(PageExtent(at * 4096, count, PageFlags(flags)) for at, count, flags in extents)
    )
    pages = {page for at, count, flags in extents if flags & 4 for page in range(at, at + count)}
    mapped = {page for item in vmas for page in range(item.start // 4096, item.stop // 4096)}
    assert sum(pages_by_kind(vmas, pagemap).values()) == len(pages & mapped)


# ---- order ----


def test_metadata_in_the_order_of_a_restore() -> None:
    names = [name for name in IMAGES if name != "descriptors.json"]
    order = metadata_in_read_order(names, criu.parse_pstree(IMAGES["pstree.img"]))
    assert order[:4] == ("inventory.img", "pstree.img", "ids-1.img", "ids-6.img")
    assert order.index("cgroup.img") < order.index("mm-1.img") < order.index("mm-6.img")
    assert order.index("mm-6.img") < order.index("core-1.img") < order.index("pagemap-1.img")
    assert not [name for name in order if criu.is_pages(name)]
    assert set(order) == {name for name in names if not criu.is_pages(name)}
    assert metadata_in_read_order(["zzz", "inventory.img"]) == ("inventory.img", "zzz")


def test_shared_memory_comes_before_the_tasks() -> None:
    tree = (Process(5, 0, 5, 5, (5,)), Process(3, 5, 5, 5, (3,)))
    pagemaps = {
        "pagemap-3.img": Pagemap(1, ()),
        "pagemap-5.img": Pagemap(2, ()),
        "pagemap-shmem-7.img": Pagemap(3, ()),
        "pagemap-shmem-8.img": Pagemap(4, ()),
        "pagemap-shmem-9.img": Pagemap(5, ()),
        "pagemap-shmem-10.img": Pagemap(99, ()),
    }
    mappings = {
        5: (Vma(0, 1, 9, 3, 1, 1 << 8), Vma(1, 2, 7, 3, 1, 1 << 7)),
        3: (Vma(0, 1, 8, 3, 1, 1 << 8), Vma(1, 2, 9, 3, 1, 1 << 8)),
    }
    names = [f"pages-{number}.img" for number in range(1, 8)] + ["amdgpu-pages-1-0a2b.img"]
    assert pages_in_read_order(names, tree, pagemaps, mappings) == (
        PagesUse("pages-5.img", "shmem", 9),
        PagesUse("pages-4.img", "shmem", 8),
        PagesUse("pages-3.img", "shmem", 7),
        PagesUse("amdgpu-pages-1-0a2b.img", "device", 0),
        PagesUse("pages-2.img", "task", 5),
        PagesUse("pages-1.img", "task", 3),
    )


def test_the_order_of_the_sample() -> None:
    tree = criu.parse_pstree(IMAGES["pstree.img"])
    pagemaps = {
        name: parse_pagemap(data) for name, data in IMAGES.items() if name.startswith("pagemap-")
    }
    mappings = {process.pid: parse_mm(IMAGES[f"mm-{process.pid}.img"]) for process in tree}
    assert [
        (use.owner, use.owner_id) for use in pages_in_read_order(IMAGES, tree, pagemaps, mappings)
    ] == [("task", 1), ("task", 6)]


@pytest.mark.parametrize(
    ("name", "shmid"),
    [
        ("pagemap-shmem-18446744073709551615.img", (1 << 64) - 1),
        ("pagemap-1.img", None),
        ("pagemap-shmem-1.img\n", None),
    ],
)
def test_names_of_shared_memory(name: str, shmid: int | None) -> None:
    assert shmem_of(name) == shmid


# ---- CPU ----


def cpuinfo(version: int, words: list[int], **others: Any) -> bytes:
    entry = message(f1=1, f2=6, f3=1, f4=1, f5=version)
    entry += b"".join(message(f6=word) for word in words) + part(7, b"A CPU\0\0")
    return image(CPUINFO, part(1, entry))


def test_a_cpu() -> None:
    words = [0] * 19
    words[0], words[9], words[11] = 1 << 26, 1 << 5 | 1 << 16, 1 << 3
    assert parse_cpuinfo(cpuinfo(2, words)) == DumpedCpu("A CPU", ("avx2", "avx512f", "sse2"))
    assert parse_cpuinfo(image(CPUINFO, part(2, message(f1=1)))) is None


@pytest.mark.parametrize(("version", "words"), [(1, 19), (2, 12), (3, 19), (2, 0)])
def test_a_cpu_of_another_version(version: int, words: int) -> None:
    with pytest.raises(MalformedError, match="words of version"):
        parse_cpuinfo(cpuinfo(version, [0] * words))


@given(st.binary(max_size=120))
def test_hostile_bytes(data: bytes) -> None:
    for magic, parse in ((CPUINFO, parse_cpuinfo), (MM, parse_mm), (PAGEMAP, parse_pagemap)):
        for attempt in (image(magic, data), image(magic, message(f1=1), data), data):
            try:
                parsed: Any = parse(attempt)
            except MalformedError:
                continue
            if isinstance(parsed, Pagemap):
                assert len(list(parsed.places())) == len(parsed.extents)

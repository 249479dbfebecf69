"""Where a task's lazy pages are, against a search page by page."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.criu_memory import PageExtent, PageFlags, Pagemap, Vma
from lazyfs.ground.errors import MalformedError
from lazyfs.lazypages.memory import Level, Place, TaskMemory
from lazyfs.lazypages.missing import Range

PAGE = 4096
LAZY, PRESENT, IN_PARENT = PageFlags.LAZY, PageFlags.PRESENT, PageFlags.IN_PARENT
ANONYMOUS, LOCKED, HUGE = 0x22, 0x2022, 0x40022


def vma(start: int, stop: int, flags: int = ANONYMOUS) -> Vma:
    return Vma(start * PAGE, stop * PAGE, 0, 3, flags, 1 << 0 | 1 << 9)


def extent(at: int, count: int, flags: PageFlags = LAZY | PRESENT) -> PageExtent:
    return PageExtent(at * PAGE, count, flags)


def level(*extents: PageExtent, pages: int = 1000) -> Level:
    return Level(Pagemap(1, extents), pages * PAGE)


def places(memory: TaskMemory, start: int, stop: int) -> list[Place]:
    return list(memory.places(start * PAGE, stop * PAGE))


def test_only_lazy_pages_are_missing_and_each_is_found_in_the_file() -> None:
    memory = TaskMemory(
        [vma(0, 10), vma(10, 20)],
        [level(extent(2, 2), extent(4, 3, PRESENT), extent(8, 4), extent(15, 1))],
        PAGE,
    )
    assert memory.ranges == (
        Range(2 * PAGE, 4 * PAGE, 2 * PAGE),
        Range(8 * PAGE, 10 * PAGE, 8 * PAGE),
        Range(10 * PAGE, 12 * PAGE, 10 * PAGE),
        Range(15 * PAGE, 16 * PAGE, 15 * PAGE),
    )
    assert places(memory, 3, 4) == [Place(0, PAGE, PAGE)]
    assert places(memory, 8, 12) == [Place(0, 5 * PAGE, 4 * PAGE)]
    assert places(memory, 15, 16) == [Place(0, 9 * PAGE, PAGE)]


def test_extents_that_touch_are_one_range_of_two_places() -> None:
    memory = TaskMemory([vma(0, 9)], [level(extent(4, 2), extent(0, 4))], PAGE)
    assert memory.ranges == (Range(0, 6 * PAGE, 0),)
    assert places(memory, 3, 5) == [Place(0, 5 * PAGE, PAGE), Place(0, 0, PAGE)]


def test_a_page_may_be_in_a_parent_or_in_its_parent() -> None:
    memory = TaskMemory(
        [vma(0, 9)],
        [
            level(extent(0, 1), extent(1, 3, LAZY | IN_PARENT)),
            level(extent(0, 2, PRESENT), extent(2, 2, IN_PARENT)),
            level(extent(3, 1, PRESENT), extent(1, 2, PRESENT | LAZY)),
        ],
        PAGE,
    )
    assert places(memory, 0, 4) == [
        Place(0, 0, PAGE),
        Place(1, PAGE, PAGE),
        Place(2, 2 * PAGE, PAGE),
        Place(2, 0, PAGE),
    ]


@pytest.mark.parametrize(
    ("vmas", "levels", "said"),
    [
        ([vma(0, 9)], [level(extent(0, 2), extent(1, 2))], "two pages for"),
        ([vma(0, 9)], [level(extent(8, 2))], "no such mapping"),
        ([vma(1, 9)], [level(extent(0, 2))], "no such mapping"),
        ([], [level(extent(0, 2))], "no such mapping"),
        ([vma(0, 9, LOCKED)], [level(extent(0, 2))], "no such mapping"),
        ([vma(0, 9, HUGE)], [level(extent(0, 2))], "no such mapping"),
        ([vma(0, 9)], [level(extent(0, 2), pages=1)], "should have"),
        ([vma(0, 9)], [level(extent(0, 2, LAZY))], "not in the checkpoint"),
        ([vma(0, 9)], [level(extent(0, 2, LAZY | IN_PARENT))], "in no parent"),
        (
            [vma(0, 9)],
            [level(extent(0, 2, LAZY | IN_PARENT)), level(extent(0, 1, PRESENT))],
            "a child expects",
        ),
        (
            [vma(0, 9)],
            [level(extent(0, 2, LAZY | IN_PARENT)), level(extent(0, 2, LAZY))],
            "not in the checkpoint",
        ),
        ([vma(0, 9)], [level(PageExtent(0, 2, LAZY | PRESENT, 100))], "compressed"),
        ([vma(0, 9)], [level(PageExtent(100, 2, LAZY | PRESENT))], "pages at"),
    ],
)
def test_what_cannot_be_told_for_sure_is_refused(
    vmas: list[Vma], levels: list[Level], said: str
) -> None:
    with pytest.raises(MalformedError, match=said):
        TaskMemory(vmas, levels, PAGE)


extents = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.integers(0, 6),
        st.sampled_from([LAZY | PRESENT, PRESENT, LAZY | IN_PARENT, IN_PARENT, LAZY]),
    ),
    max_size=8,
)


def truth(levels: list[list[tuple[int, int, PageFlags]]], page: int, depth: int) -> Place | None:
    """Find a page as CRIU does: from the first extent that has it, down the parents."""
    if depth == len(levels):
        return None
    offset = 0
    for at, count, flags in levels[depth]:
        if at <= page < at + count:
            if flags & IN_PARENT:
                return truth(levels, page, depth + 1)
            if not flags & PRESENT:
                return None
            return Place(depth, (offset + page - at) * PAGE, PAGE)
        offset += count if flags & PRESENT else 0
    return None


@given(st.lists(extents, min_size=1, max_size=3), st.sets(st.integers(1, 39)))
def test_each_page_is_found_where_a_search_finds_it_or_all_is_refused(
    found: list[list[tuple[int, int, PageFlags]]], borders: set[int]
) -> None:
    edges = [0, *sorted(borders), 40]
    vmas = [vma(start, stop) for start, stop in itertools.pairwise(edges)]
    levels = [level(*(extent(*each) for each in extents)) for extents in found]
    try:
        memory = TaskMemory(vmas, levels, PAGE)
    except MalformedError:
        return
    lazy = [at + n for at, count, flags in found[0] if flags & LAZY for n in range(count)]
    missing = {
        page // PAGE: each for each in memory.ranges for page in range(each.start, each.stop, PAGE)
    }
    assert sorted(missing) == sorted(lazy)
    for page in lazy:
        of_file = places(memory, page, page + 1)
        assert of_file == [truth(found, page, 0)]
        each = missing[page]
        holder = next(item for item in vmas if item.start <= page * PAGE < item.stop)
        assert holder.start <= each.start < each.stop <= holder.stop

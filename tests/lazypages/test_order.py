"""Which memory a stretch of a file is, against a look at every page."""

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.criu_memory import PageExtent, PageFlags, Pagemap, Vma
from lazyfs.checkpoint.plan import Stretch
from lazyfs.lazypages.memory import Level, TaskMemory
from lazyfs.lazypages.order import PART_BYTES, Part, in_order

PAGE = 4096
LAZY, PRESENT, IN_PARENT = PageFlags.LAZY, PageFlags.PRESENT, PageFlags.IN_PARENT
NAMES = ("pages-1.img", "parent/pages-1.img")


@st.composite
def memories(draw: st.DrawFn) -> TaskMemory:
    """Of 40 pages: some lazy, some not, some in the parent, in extents of any order."""
    kinds = draw(st.lists(st.sampled_from("-LPI"), min_size=40, max_size=40))
    flags = {"L": LAZY | PRESENT, "P": PRESENT, "I": LAZY | IN_PARENT}
    extents = [
        PageExtent(page * PAGE, 1, flags[kind]) for page, kind in enumerate(kinds) if kind != "-"
    ]
    here = Pagemap(1, tuple(draw(st.permutations(extents))))
    parent = Pagemap(1, (PageExtent(0, 40, PRESENT),))
    vmas = [Vma(0, 20 * PAGE, 0, 3, 0x22, 0x201), Vma(20 * PAGE, 40 * PAGE, 0, 3, 0x22, 0x201)]
    return TaskMemory(vmas, [Level(here, 40 * PAGE), Level(parent, 40 * PAGE)], PAGE)


stretches = st.builds(
    Stretch,
    st.sampled_from([*NAMES, "pages-2.img"]),
    st.integers(0, 45 * PAGE),
    st.integers(1, 10 * PAGE),
)


@given(memories(), st.lists(stretches, max_size=8))
def test_it_is_as_if_each_page_were_looked_for_by_itself(
    memory: TaskMemory, wanted: list[Stretch]
) -> None:
    pages = {}
    for found in memory.ranges:
        for address in range(found.start, found.stop, PAGE):
            (place,) = memory.places(address, address + PAGE)
            pages[NAMES[place.level], place.offset] = address
    expected = {
        pages[each.path, offset]
        for each in wanted
        for offset in range(each.offset // PAGE * PAGE, each.offset + each.size_bytes, PAGE)
        if (each.path, offset) in pages
    }
    parts = in_order(wanted, [(memory, NAMES)], PAGE)
    assert {address for part in parts for address in range(part.start, part.stop, PAGE)} == expected
    assert all(part.memory is memory for part in parts)


def test_what_was_wanted_in_part_before_is_wanted_whole_all_the_same() -> None:
    memory = simple(64)
    wanted = [Stretch("pages-1.img", 8 * PAGE, 1), Stretch("pages-1.img", 8 * PAGE, 4 * PAGE)]
    assert in_order(wanted, [(memory, NAMES)], PAGE) == [
        Part(memory, 24 * PAGE, 25 * PAGE),
        Part(memory, 25 * PAGE, 28 * PAGE),
    ]


def simple(pages: int) -> TaskMemory:
    pagemap = Pagemap(1, (PageExtent(16 * PAGE, pages, LAZY | PRESENT),))
    vmas = [Vma(0, (pages + 32) * PAGE, 0, 3, 0x22, 1)]
    return TaskMemory(vmas, [Level(pagemap, pages * PAGE)], PAGE)


def test_the_order_is_that_of_the_need_in_parts_that_are_soon_here() -> None:
    memory = simple(256)
    wanted = [Stretch("p", 700 * 1024, 4096), Stretch("p", 0, 600 * 1024)]
    parts = in_order(wanted, [(memory, ["p"])], PAGE)
    first = 16 * PAGE
    assert parts == [
        Part(memory, first + 700 * 1024, first + 704 * 1024),
        Part(memory, first, first + PART_BYTES),
        Part(memory, first + PART_BYTES, first + 2 * PART_BYTES),
        Part(memory, first + 2 * PART_BYTES, first + 600 * 1024),
    ]


def test_a_file_may_be_of_several_tasks() -> None:
    memories_ = [simple(16), simple(16)]
    parts = in_order([Stretch("p", 0, PAGE)], [(each, ["p"]) for each in memories_], PAGE)
    assert [part.memory for part in parts] == memories_

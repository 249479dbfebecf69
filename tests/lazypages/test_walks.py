"""How much is fetched ahead of faults that follow one another, and of those that do not."""

import random

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.settings import KIB, MIB
from lazyfs.lazypages.walks import (
    FIRST_BYTES,
    LEAST_BYTES,
    MOST_BYTES,
    MOST_FIRST_BYTES,
    Walks,
)

PAGE = 4096


def walked(walks: Walks, start: int, size_bytes: int, *, slow: bool = True) -> tuple[int, int]:
    """Go through a region, a fill at a time; return how often it was waited, and the bytes asked.

    `slow`: nothing is here before it is asked for.
    """
    offset, waits, asked_bytes = start, 0, 0
    while offset < start + size_bytes:
        walk = walks.note(0, offset)
        if slow and offset >= walk.asked:
            waits += 1
            walk.note_wait()
        wanted = walk.wants(offset)
        if wanted is not None:
            asked_bytes += wanted[1] - wanted[0]
        offset += walk.fill_bytes
        walk.note_filled(offset)
    return waits, asked_bytes


def test_who_walks_through_a_region_waits_for_few_round_trips() -> None:
    walks = Walks()
    for region in range(8):
        waits, asked_bytes = walked(walks, region << 27, 27 * MIB // 4)
        assert waits <= (3 if region else 5)
        assert asked_bytes <= 27 * MIB // 4 + 5 * MIB


def test_who_jumps_about_pays_for_little() -> None:
    walks = Walks()
    jumps = random.Random(1)
    asked_bytes = sum(
        walked(walks, jumps.randrange(1 << 20) * PAGE * 16, PAGE)[1] for _ in range(1000)
    )
    assert asked_bytes <= 1000 * 2 * LEAST_BYTES


def test_two_threads_that_walk_do_not_disturb_each_other() -> None:
    walks = Walks()
    offsets = [0, 1 << 30]
    waits = 0
    for _ in range(30):
        for thread, offset in enumerate(offsets):
            walk = walks.note(0, offset)
            if offset >= walk.asked:
                waits += 1
                walk.note_wait()
            walk.wants(offset)
            offsets[thread] = offset + walk.fill_bytes
            walk.note_filled(offsets[thread])
    assert waits <= 10


def test_a_walk_goes_on_where_something_has_been_filled_meanwhile() -> None:
    walks = Walks()
    first = walks.note(0, 0)
    first.note_filled(256 * KIB)
    assert walks.note(0, 600 * KIB) is first
    assert walks.note(1, 600 * KIB) is not first
    assert walks.note(0, 1 << 30) is not first


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.one_of(st.integers(0, 64), st.integers(0, 1 << 24)),
            st.booleans(),
        ),
        max_size=200,
    )
)
def test_whatever_faults_come_what_is_asked_for_is_bounded_and_what_is_filled_is_whole_pages(
    faults: list[tuple[int, int, bool]],
) -> None:
    walks = Walks()
    for file, page, waits in faults:
        offset = page * PAGE
        walk = walks.note(file, offset)
        if waits:
            walk.note_wait()
        wanted = walk.wants(offset)
        if wanted is not None:
            start, stop = wanted
            assert offset <= start < stop <= offset + MOST_BYTES
        walked_bytes = walk.position - walk.began
        assert walk.window_bytes <= max(MOST_FIRST_BYTES, FIRST_BYTES, walked_bytes)
        assert walk.fill_bytes % PAGE == 0
        assert LEAST_BYTES <= walk.fill_bytes <= MIB
        walk.note_filled(offset + walk.fill_bytes)

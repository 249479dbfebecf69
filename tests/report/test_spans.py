from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.report.spans import (
    Fate,
    Flow,
    Piece,
    Span,
    common,
    earliest,
    fates,
    minus,
    total_ms,
    union,
)

WHOLE = st.integers(0, 60)
SPANS = st.lists(st.tuples(WHOLE, WHOLE), max_size=12)
PIECES = st.lists(
    st.tuples(WHOLE, WHOLE, st.integers(0, 9).map(float)).map(lambda each: Piece(*each)),
    max_size=12,
)


def covered(spans: list[tuple[int, int]]) -> set[int]:
    return {unit for began, ended in spans for unit in range(began, ended)}


def units(spans: list[Span]) -> set[int]:
    found = [unit for span in spans for unit in range(int(span.began_ms), int(span.ended_ms))]
    assert len(found) == len(set(found))
    return set(found)


@given(SPANS)
def test_a_union_is_what_any_covers_and_nothing_twice(spans: list[tuple[int, int]]) -> None:
    assert units(union(spans)) == covered(spans)
    assert total_ms(union(spans)) == len(covered(spans))


@given(SPANS, SPANS)
def test_a_difference_is_what_no_other_covers(
    spans: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    assert units(minus(union(spans), union(others))) == covered(spans) - covered(others)


@given(SPANS, WHOLE, WHOLE)
def test_what_is_common_lies_between(spans: list[tuple[int, int]], began: int, ended: int) -> None:
    found = units(common(union(spans), began, ended))
    assert found == covered(spans) & set(range(began, ended))


def first_moments(pieces: list[Piece]) -> dict[int, float]:
    found: dict[int, float] = {}
    for piece in pieces:
        for unit in range(piece.start, piece.stop):
            found[unit] = min(piece.at_ms, found.get(unit, piece.at_ms))
    return found


@given(PIECES)
def test_of_overlapping_pieces_the_earliest_moment_counts(pieces: list[Piece]) -> None:
    found = earliest(pieces)
    assert first_moments(found) == first_moments(pieces)
    assert all(before.stop <= after.start for before, after in pairwise(found))
    assert all(piece.start < piece.stop for piece in found)


@given(PIECES, PIECES)
def test_fates_tell_of_each_byte_when_it_was_needed_and_when_it_came(
    needs: list[Piece], arrivals: list[Piece]
) -> None:
    found = fates(earliest(needs), earliest(arrivals))
    needed, came = first_moments(needs), first_moments(arrivals)
    told = {unit: fate for fate in found for unit in range(fate.start, fate.stop)}
    assert sum(fate.size_bytes for fate in found) == len(told)
    assert told.keys() == needed.keys() | came.keys()
    for unit, fate in told.items():
        assert (fate.needed_ms, fate.arrived_ms) == (needed.get(unit), came.get(unit))


def test_late_is_what_came_after_it_was_needed() -> None:
    assert Fate(0, 1, 5.0, 6.0).is_late
    assert not Fate(0, 1, 5.0, 5.0).is_late
    assert not Fate(0, 1, None, 6.0).is_late
    assert not Fate(0, 1, 5.0, None).is_late


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 1 << 40)), max_size=12),
    st.floats(0, 2e6),
    st.floats(0, 2e6),
)
def test_a_flow_only_grows_and_carries_all_in_the_end(
    lots: list[tuple[float, float, int]], one: float, other: float
) -> None:
    flow = Flow(lots)
    whole = sum(size for *_, size in lots)
    assert abs(flow.at(3e6) - whole) <= 1e-6 * whole + 1
    early, late = sorted((one, other))
    slack = 1e-6 * whole + 1
    assert 0 <= flow.at(early) <= flow.at(late) + slack
    assert flow.at(late) <= whole + slack
    assert flow.between(late, early) == 0 or early == late or flow.between(late, early) <= slack

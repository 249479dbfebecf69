from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest import approx

from lazyfs.report.analysis import FileFates, analyse
from lazyfs.report.bins import (
    BARS_MOST,
    STROKES_MOST,
    Item,
    address_map,
    cumulative,
    edges,
    packed,
    rates,
)
from lazyfs.report.spans import Fate, Flow
from tests.report.recordings_at_random import traces

ITEMS = st.lists(
    st.tuples(st.floats(0, 1e4), st.floats(0, 1e4), st.sampled_from("ab"), st.integers(0, 99)),
    max_size=30,
).map(lambda found: [Item(*each, number) for number, each in enumerate(found)])


@given(ITEMS, st.floats(0, 1e4), st.integers(1, 4))
def test_bars_tell_of_every_thing_once(items: list[Item], view_ms: float, lanes: int) -> None:
    found = packed(items, view_ms, lanes)
    assert sum(bar.things for bar in found.bars) == len(items)
    assert sum(bar.size_bytes for bar in found.bars) == sum(item.size_bytes for item in items)
    assert found.lanes <= lanes
    for bar in found.bars:
        assert 0 <= bar.lane < found.lanes
        assert bar.began_ms <= bar.ended_ms
        assert items[bar.number].kind == bar.kind


def test_what_overlaps_is_in_lanes_of_its_own() -> None:
    items = [Item(0, 100, "a", 1, 0), Item(50, 150, "a", 1, 1), Item(100, 200, "a", 1, 2)]
    found = packed(items, 1000.0, 8)
    assert [(bar.lane, bar.number) for bar in found.bars] == [(0, 0), (0, 2), (1, 1)]


def test_however_many_things_there_are_a_browser_can_draw_them() -> None:
    items = [
        Item(number * 10.0, number * 10.0 + (number % 7) * 5, "abcd"[number % 4], 1, number)
        for number in range(30_000)
    ]
    found = packed(items, 100.0, 8)
    assert len(found.bars) <= BARS_MOST
    assert sum(bar.things for bar in found.bars) == 30_000


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.integers(2, 300))
def test_moments_rise_and_reach_the_end(view_ms: float, length_ms: float, bins: int) -> None:
    moments = edges(view_ms, length_ms, bins)
    assert moments[0] == 0
    assert 2 <= len(moments) <= bins + bins // 2 + 1
    assert (
        all(before < after for before, after in pairwise(moments))
        or min(view_ms, length_ms) < 1e-290
    )
    if min(view_ms, length_ms) > 0:
        assert moments[-1] == approx(length_ms)


@given(st.lists(st.tuples(st.floats(0, 2e3), st.integers(0, 1 << 40)), max_size=20))
def test_sums_over_time_end_with_all_of_it(events: list[tuple[float, int]]) -> None:
    moments = edges(500.0, 1000.0, 50)
    found = cumulative(events, moments)
    assert found[-1] == sum(size for _, size in events)
    assert all(before <= after for before, after in pairwise(found))
    for moment, had in list(zip(moments, found, strict=True))[:-1]:
        assert had == sum(size for at_ms, size in events if at_ms <= moment)


def test_rates_are_what_came_by_the_time_it_took() -> None:
    moments = [0.0, 100.0, 200.0]
    assert rates(Flow([(50.0, 150.0, 10_000)]), moments) == approx([50_000.0, 50_000.0])


@given(traces())
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_a_map_s_columns_add_up_to_the_file(trace: object) -> None:
    found = analyse(trace)  # type: ignore[arg-type]
    for file in found.files:
        grid = address_map(file, edges(1000.0, 5000.0, 20), columns=50)
        assert sum(column.needed_bytes for column in grid.columns) == file.needed_bytes
        assert sum(column.late_bytes for column in grid.columns) == file.late_bytes
        assert sum(column.arrived_bytes for column in grid.columns) == file.arrived_bytes
        strokes = (*grid.arrivals, *grid.in_time, *grid.late)
        assert all(0 <= stroke.start <= stroke.stop for stroke in strokes)
        assert all(stroke.stop <= 50 * grid.column_bytes for stroke in strokes)


def test_a_map_of_many_ranges_is_no_larger_than_a_browser_can_draw() -> None:
    page = 4096
    fates = [
        Fate(number * page, (number + 1) * page, number * 7919 % 900.0, 450.0)
        for number in range(50_000)
    ]
    file = FileFates(0, "pages-1.img", 50_000 * page, fates, 0, 0, 0, 0)
    grid = address_map(file, edges(900.0, 900.0, 100), columns=360)
    assert max(map(len, (grid.late, grid.in_time, grid.arrivals))) <= STROKES_MOST
    assert 100 < len(grid.columns) < 360
    assert grid.arrivals[0][:2] == (0, approx(50_000 * page))

"""What is drawn, in numbers that a browser can bear, however many events there were. Sans-I/O."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import msgspec

from lazyfs.report.analysis import FileFates
from lazyfs.report.spans import INSTANT_MS, Fate, Flow

BARS_MOST = 1000
"""Of one row: a browser draws so many in a fraction of a second."""
STROKES_MOST = 5000
"""Of a kind in a map: where there are more, the grid is made coarser."""
_GRAINS = 1200
"""A picture is so many dots wide; what is shorter is drawn together with what is beside it."""


class Item(NamedTuple):
    """A thing that took time."""

    began_ms: float
    ended_ms: float
    kind: str
    size_bytes: int
    number: int
    """Of whoever made it, who says more of it if it is drawn alone."""


class Bar(NamedTuple):
    """One thing, or several of a kind that are too short to be told apart."""

    lane: int
    began_ms: float
    ended_ms: float
    kind: str
    size_bytes: int
    things: int
    number: int
    """Of the first of them."""
    busy_ms: float
    """Their lengths' sum."""


class Packed(NamedTuple):
    """Bars in lanes: two that overlap are not in one, while there are lanes."""

    bars: Sequence[Bar]
    lanes: int


def packed(items: Iterable[Item], view_ms: float, lanes_most: int) -> Packed:
    """Put things into lanes, each in the lowest that is free; in the last one if none is.

    `view_ms` is how much of the time is looked at first.
    """
    lanes = _in_lanes(items, lanes_most)
    grain_ms = max(view_ms / _GRAINS, INSTANT_MS)
    while True:
        bars = [
            bar
            for number, members in enumerate(lanes)
            for bar in _merged(number, members, grain_ms)
        ]
        if len(bars) <= BARS_MOST:
            return Packed(bars, len(lanes))
        grain_ms *= max(2.0, 2 * len(bars) / BARS_MOST)


def _in_lanes(items: Iterable[Item], lanes_most: int) -> list[list[Item]]:
    lanes: list[list[Item]] = []
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for item in sorted(items):
        while busy and busy[0][0] <= item.began_ms:
            heappush(free, heappop(busy)[1])
        if free:
            lane = heappop(free)
        elif len(lanes) < lanes_most:
            lane = len(lanes)
            lanes.append([])
        else:
            lanes[-1].append(item)
            continue
        lanes[lane].append(item)
        heappush(busy, (max(item.began_ms, item.ended_ms), lane))
    return lanes


def _merged(lane: int, items: Sequence[Item], grain_ms: float) -> list[Bar]:
    bars: list[Bar] = []
    last_of: dict[str, int] = {}
    for item in items:
        length_ms = max(0.0, item.ended_ms - item.began_ms)
        last = bars[last_of[item.kind]] if item.kind in last_of else None
        if (
            last is not None
            and item.began_ms - last.ended_ms < grain_ms
            and length_ms < 4 * grain_ms
            and last.busy_ms < 4 * grain_ms * last.things
        ):
            bars[last_of[item.kind]] = last._replace(
                ended_ms=max(last.ended_ms, item.began_ms + length_ms),
                size_bytes=last.size_bytes + item.size_bytes,
                things=last.things + 1,
                busy_ms=last.busy_ms + length_ms,
            )
            continue
        last_of[item.kind] = len(bars)
        ended_ms = item.began_ms + length_ms
        bars.append(
            Bar(
                lane, item.began_ms, ended_ms, item.kind, item.size_bytes, 1, item.number, length_ms
            )
        )
    return bars


def edges(view_ms: float, length_ms: float, bins: int) -> list[float]:
    """Return moments: `bins` equal parts of what is looked at first, and half as many of the rest.

    At least one part; all of them longer than nothing.
    """
    view_ms = min(view_ms, length_ms)
    if view_ms <= 0:
        return [0.0, 1.0]
    made = [view_ms * index / bins for index in range(bins + 1)]
    rest_ms, half = length_ms - view_ms, bins // 2
    if rest_ms > view_ms / bins:
        made += [view_ms + rest_ms * index / half for index in range(1, half + 1)]
    else:
        made[-1] = length_ms
    return made


def rates(flow: Flow, moments: Sequence[float]) -> list[float]:
    """Return bytes a second between each two moments."""
    return [
        flow.between(began_ms, ended_ms) / (ended_ms - began_ms) * 1000
        for began_ms, ended_ms in pairwise(moments)
    ]


def cumulative(events: Iterable[tuple[float, int]], moments: Sequence[float]) -> list[int]:
    """Return how many bytes there were at each moment, of lots with their times."""
    had = [0] * len(moments)
    for at_ms, size_bytes in events:
        had[min(len(had) - 1, bisect_left(moments, at_ms))] += size_bytes
    for index in range(1, len(had)):
        had[index] += had[index - 1]
    return had


class Column(msgspec.Struct):
    """A part of a file."""

    needed_bytes: int = 0
    late_bytes: int = 0
    arrived_bytes: int = 0
    needed_ms: float | None = None
    """When something of it was first needed."""
    arrived_ms: float | None = None
    """When something of it first came."""


class Stroke(NamedTuple):
    """What is drawn of an address map: from one corner of a cell to another."""

    start: float
    """Offset in the file."""
    stop: float
    began_ms: float
    ended_ms: float


class AddressMap(msgspec.Struct, frozen=True):
    """A file by columns, and by columns and time."""

    column_bytes: float
    columns: Sequence[Column]
    arrivals: Sequence[Stroke]
    """When ranges came: level."""
    in_time: Sequence[Stroke]
    """When ranges were needed that were there, or that came nobody knows when: level."""
    late: Sequence[Stroke]
    """From when a column was needed to when it came: upright; the longest of those in a cell."""


def address_map(file: FileFates, moments: Sequence[float], columns: int = 360) -> AddressMap:
    """Lay what became of a file over a grid, whose rows are the times between two moments."""
    made = _laid(file, moments, columns)
    while max(map(len, (made.arrivals, made.in_time, made.late))) > STROKES_MOST:
        moments = [*moments[:-1:2], moments[-1]]
        columns = columns * 3 // 4
        made = _laid(file, moments, columns)
    return made


def _laid(file: FileFates, moments: Sequence[float], columns: int) -> AddressMap:
    width = max(1.0, file.size_bytes / columns)
    made = [Column() for _ in range(columns)]
    came: set[tuple[int, int]] = set()
    used: set[tuple[int, int]] = set()
    late: dict[tuple[int, int], tuple[float, float]] = {}
    for fate in file.fates:
        first = min(columns - 1, int(fate.start / width))
        last = min(columns - 1, int((fate.stop - 1) / width))
        for index in range(first, last + 1):
            _count(made[index], fate, _overlap(fate, index, first, last, width))
            if fate.arrived_ms is not None:
                came.add((_row(fate.arrived_ms, moments), index))
            if fate.needed_ms is None:
                continue
            cell = (_row(fate.needed_ms, moments), index)
            if fate.arrived_ms is not None and fate.is_late:
                longest = late.get(cell)
                if longest is None or longest[1] - longest[0] < fate.arrived_ms - fate.needed_ms:
                    late[cell] = (fate.needed_ms, fate.arrived_ms)
            else:
                used.add(cell)
    return AddressMap(
        width,
        made,
        _level(came, width, moments),
        _level(used, width, moments),
        [
            Stroke((column + 0.5) * width, (column + 0.5) * width, began_ms, at_ms)
            for (_, column), (began_ms, at_ms) in sorted(late.items())
        ],
    )


def _row(at_ms: float, moments: Sequence[float]) -> int:
    return min(len(moments) - 2, max(0, bisect_right(moments, at_ms) - 1))


def _overlap(fate: Fate, index: int, first: int, last: int, width: float) -> int:
    """Return how many of a range's bytes are in a column; all columns' sum is its size."""
    start = fate.start if index == first else round(index * width)
    stop = fate.stop if index == last else round((index + 1) * width)
    return max(0, min(stop, fate.stop) - max(start, fate.start))


def _count(column: Column, fate: Fate, size_bytes: int) -> None:
    if fate.needed_ms is not None:
        column.needed_bytes += size_bytes
        column.late_bytes += size_bytes if fate.is_late else 0
        if column.needed_ms is None or fate.needed_ms < column.needed_ms:
            column.needed_ms = fate.needed_ms
    if fate.arrived_ms is not None:
        column.arrived_bytes += size_bytes
        if column.arrived_ms is None or fate.arrived_ms < column.arrived_ms:
            column.arrived_ms = fate.arrived_ms


def _level(cells: set[tuple[int, int]], width: float, moments: Sequence[float]) -> list[Stroke]:
    """Return strokes along the rows, those that touch made one."""
    strokes: list[tuple[int, int, int]] = []
    for row, column in sorted(cells):
        if strokes and strokes[-1][0] == row and strokes[-1][2] == column:
            strokes[-1] = (row, strokes[-1][1], column + 1)
        else:
            strokes.append((row, column, column + 1))
    middles = [(began + ended) / 2 for began, ended in pairwise(moments)]
    return [
        Stroke(start * width, stop * width, middles[row], middles[row])
        for row, start, stop in strokes
    ]

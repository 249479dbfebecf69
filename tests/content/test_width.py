"""Readahead finds the number of connections that its link wants, and keeps to it."""

from collections.abc import Callable

import pytest

from lazyfs.content.width import Width


def follow(width: Width, rate_of: Callable[[int], float], seconds: float) -> list[int]:
    """Let bytes come at `rate_of(connections)`; return the connections over time."""
    now_s, total, seen = 100.0, 0.0, []
    while now_s < 100 + seconds:
        width.observe(now_s, int(total))
        seen.append(width.connections)
        now_s += 0.05
        total += 0.05 * rate_of(width.connections)
    return seen


def test_a_full_link_keeps_few() -> None:
    seen = follow(Width(2, 8), lambda connections: 120e6, 60)
    assert max(seen) == 3
    assert seen.count(3) < len(seen) * 0.1


@pytest.mark.parametrize("most", [4, 8])
def test_throttled_connections_become_many(most: int) -> None:
    seen = follow(Width(2, most), lambda connections: 15e6 * connections, 10)
    assert seen[-1] == most


def test_it_stops_where_the_link_is_full() -> None:
    seen = follow(Width(2, 8), lambda connections: min(100e6, 25e6 * connections), 60)
    assert max(seen) <= 5
    assert seen[-1] >= 4


def test_idle_times_are_not_judged() -> None:
    width = Width(2, 8)
    for step in range(1000):
        width.observe(step * 0.3, step)
        width.idle()
    assert width.connections == 2

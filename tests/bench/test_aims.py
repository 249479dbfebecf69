"""What the benchmark of peers says of figures: verdicts, medians, tables."""

import io
from typing import Any

import pytest
from aims import Aim, Conditions, aims_of, crowd_aims, judge, middle, profile, table
from measuring import together
from rich.console import Console
from rich.table import Table

ALONE = Conditions(1024, "regions", "1gbit", 1)
TRACED = "lazyfs uncompressed, lazy, trace"


def rows(**seconds: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {way: [{"first_loop_s": each} for each in found] for way, found in seconds.items()}


def shown(made: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(made)
    return out.getvalue()


def test_an_aim_in_seconds_is_compared_with_the_median() -> None:
    aim = Aim("way", "first_loop_s", 1.0, words="first loop, s")
    (met,) = judge([aim], rows(way=[0.5, 9.0, 0.9]), {})
    (missed,) = judge([aim], rows(way=[0.5, 9.0, 1.1]), {})
    assert met.met and met.value == 0.9
    assert not missed.met
    assert missed.as_json() == {
        "way": "way",
        "what": "first loop, s",
        "limit": 1.0,
        "measured": 1.1,
        "met": False,
    }


def test_an_aim_that_is_a_ratio_is_of_another_ways_median() -> None:
    aim = Aim("many", "first_loop_s", 1.5, ("one", "first_loop_s"))
    (verdict,) = judge([aim], rows(many=[3.0]), rows(one=[2.0]))
    assert verdict.met and verdict.value == 1.5


def test_what_was_not_measured_or_failed_has_no_verdict() -> None:
    failed = {TRACED: [{"failed": "criu ended with code 1"}]}
    assert judge(aims_of(ALONE), failed, failed) == []
    ratio = Aim("many", "first_loop_s", 1.5, ("one", "first_loop_s"))
    assert judge([ratio], rows(many=[1.0]), {}) == []


@pytest.mark.parametrize(
    ("conditions", "has"),
    [
        (ALONE, True),
        (Conditions(1024, "regions", "unshaped", 1), False),
        (Conditions(100, "regions", "1gbit", 1), False),
    ],
)
def test_seconds_are_aimed_at_for_one_gibibyte_over_the_link(
    conditions: Conditions, has: bool
) -> None:
    assert any(aim.way == TRACED and aim.of is None for aim in aims_of(conditions)) is has


def test_several_at_once_are_compared_with_one_alone() -> None:
    (way,) = {aim.of and aim.way == aim.of[0] for aim in crowd_aims()}
    assert way


def test_a_crowds_row_has_the_latests_seconds_and_all_bytes() -> None:
    made = together(
        [
            {"first_loop_s": 1.0, "fetched_bytes": 5, "cpu_s": 0.5},
            {"first_loop_s": 2.0, "fetched_bytes": 7, "cpu_s": None},
        ]
    )
    assert made["first_loop_s"] == 2.0
    assert made["fetched_bytes"] == 12
    assert made["cpu_s"] == 0.5
    assert len(made["each"]) == 2


def test_the_table_tells_what_failed_and_what_was_missed() -> None:
    found = rows(**{TRACED: [1.2]}) | {"pull, gzip": [{"failed": "[Errno 28] No space\nmore"}]}
    verdicts = judge(aims_of(ALONE), found, found)
    text = shown(table(ALONE, found, verdicts, 8.6))
    assert "MISSED first loop, s: 1.20, aim 1" in text
    assert "[Errno 28] No space" in text
    assert "more" not in text
    why = profile(found, verdicts)
    assert why is not None and TRACED in shown(why)


def test_there_is_no_profile_where_no_aim_was_missed() -> None:
    found = rows(**{TRACED: [0.9]})
    assert profile(found, judge(aims_of(ALONE), found, found)) is None


def test_the_median_of_nothing_is_none() -> None:
    assert middle([], "first_loop_s") is None
    assert middle([{"failed": "x"}, {"first_loop_s": None}], "first_loop_s") is None

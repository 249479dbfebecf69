"""Places remember how they behave, and a fetch chooses among them by that."""

import math
import random

import pytest

from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.transport.patience import HedgeBudget
from lazyfs.transport.place import Choice, Health, Latency, in_order, place_of
from tests.blobs import MemoryBlob, Mirrored

RESET = FetchError("reset", transient=True)
ABSENT = SourceError("404")
LIE = IntegrityError("wrong")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def known(name: str = "there", first_byte_s: float = 0.02) -> Health:
    """Return the health of a place that has answered often."""
    health = Health(name)
    for _ in range(20):
        health.answered(first_byte_s)
    return health


def test_percentiles_are_those_of_the_latest_answers() -> None:
    latency = Latency()
    assert latency.percentile_s(0.5) is None
    for _ in range(200):
        latency.observe(9.0)
    times = list(range(128))
    random.Random(1).shuffle(times)
    for each in times:
        latency.observe(each)
    assert latency.percentile_s(1.0) == pytest.approx(127, abs=9)
    for _ in range(8):  # the latest few may come to be counted later
        latency.observe(0)
    assert len(latency) == 128
    assert latency.percentile_s(0.0) == 0


def test_how_long_a_silence_may_last_follows_the_place() -> None:
    unknown = Health("x")
    assert unknown.silence_most_s(10) > 10, "the transport's own bound tells more"
    assert unknown.hedge_after_s() == 1
    assert known(first_byte_s=0.02).silence_most_s(10) == 1
    assert known(first_byte_s=0.02).hedge_after_s() == pytest.approx(0.05)
    assert known(first_byte_s=0.5).silence_most_s(10) == pytest.approx(2)
    assert known(first_byte_s=0.5).hedge_after_s() == pytest.approx(1.25)
    assert known(first_byte_s=8).silence_most_s(10) == 10
    assert known(first_byte_s=0.02).silence_most_s(0.3) == 0.3


def test_a_file_is_not_hurried() -> None:
    health = place_of(MemoryBlob(b"x")).health
    assert not health.remote
    assert health.silence_most_s(10) == health.hedge_after_s() == math.inf


def test_what_fails_is_not_asked_twice() -> None:
    health = known()
    health.failed(RESET)
    assert health.hedge_after_s() == math.inf
    health.answered(0.02)
    assert health.hedge_after_s() < math.inf


def test_a_place_rests_longer_each_time_and_long_where_it_refuses() -> None:
    clock = Clock()
    health = Health("x", clock)
    health.failed(RESET)
    clock.now_s += 0.9
    assert health.rests
    clock.now_s += 0.2
    assert not health.rests
    health.failed(RESET)
    clock.now_s += 1.5
    assert health.rests
    health.answered(0.1)
    assert not health.rests
    health.failed(ABSENT)
    clock.now_s += 50
    assert health.rests


def test_places_are_asked_in_order_and_those_that_rest_last() -> None:
    blob = Mirrored(*(MemoryBlob(b"x", name) for name in "abc"))
    assert [each.health.name for each in in_order(blob.all)] == ["a", "b", "c"]
    blob.all[0].health.failed(RESET)
    assert [each.health.name for each in in_order(blob.all)] == ["b", "c", "a"]
    blob.all[1].health.lied(LIE)
    assert [each.health.name for each in in_order(blob.all)] == ["c", "a"]
    blob.all[0].health.lied(LIE)
    blob.all[2].health.lied(LIE)
    with pytest.raises(IntegrityError, match="wrong"):
        in_order(blob.all)


def test_a_fetch_goes_through_all_places_before_it_pauses() -> None:
    blob = Mirrored(*(MemoryBlob(b"x", name) for name in "abc"))
    choice = Choice(blob)
    asked = []
    for _ in range(3):
        assert choice.may_go_on_at_once()
        place = choice.next()
        asked.append(place.health.name)
        choice.failed(place, RESET)
        place.health.answered(0.1)  # to somebody else: it does not rest
    assert asked == ["a", "b", "c"]
    assert not choice.may_go_on_at_once()
    assert choice.next().health.name == "a"


def test_a_place_that_refuses_is_left_for_good() -> None:
    blob = Mirrored(*(MemoryBlob(b"x", name) for name in "ab"))
    choice = Choice(blob)
    choice.failed(choice.next(), ABSENT)
    assert choice.next().health.name == "b"
    choice.failed(choice.next(), RESET)
    assert choice.next().health.name == "b", "a will never have it"
    choice.failed(choice.next(), SourceError("403"))
    with pytest.raises(SourceError, match="the blob is to be had nowhere: a: 404; b: 403"):
        choice.next()


def test_beside_a_slow_place_another_is_asked_if_it_is_well() -> None:
    blob = Mirrored(*(MemoryBlob(b"x", name) for name in "ab"))
    choice = Choice(blob)
    first, second = blob.all
    assert choice.other_than(first) == second
    second.health.failed(RESET)
    assert choice.other_than(first) == first


def test_the_budget_of_hedges() -> None:
    budget = HedgeBudget()
    assert [budget.spend() for _ in range(6)] == [True] * 5 + [False]
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 95 <= spent <= 101
    for _ in range(100):
        budget.earn()
    assert budget.spend()
    for _ in range(10):
        budget.lose()
    assert not budget.spend()

"""For how long the background makes room: while another fault is likely."""

import time

import trio

from lazyfs.content.lanes import Lanes
from lazyfs.ground.settings import ContentSettings


async def test_nobody_makes_room_before_there_is_a_fault() -> None:
    lanes = Lanes(ContentSettings())
    assert not lanes.is_gentle
    lanes.note_demand(out_of_the_blue=False)
    assert not lanes.is_gentle


async def test_room_is_made_after_a_fault_and_before_tasks_run() -> None:
    for make_room in (
        lambda lanes: lanes.note_demand(out_of_the_blue=True),
        lambda lanes: lanes.expect_faults(),
    ):
        lanes = Lanes(ContentSettings(yield_s=60.0))
        make_room(lanes)
        assert lanes.is_gentle


async def test_faults_that_follow_each_other_at_once_are_soon_over() -> None:
    lanes = Lanes(ContentSettings(yield_s=600.0))
    for _ in range(100):
        lanes.note_demand(out_of_the_blue=True)
    until_s = time.monotonic() + 30
    while lanes.is_gentle:
        assert time.monotonic() < until_s
        await trio.sleep(0.01)


async def test_who_walks_and_waits_has_the_link_for_himself_until_one_of_the_two_is_over() -> None:
    lanes = Lanes(ContentSettings())
    lone_bytes = lanes.gentle_bytes
    lanes.note_walk()
    assert not lanes.is_walked  # all that he wants comes in time
    walked = False, lone_bytes
    with trio.fail_after(30):
        while not walked[0] or walked[1] == lone_bytes:  # it lasts no longer than a slow machine
            lanes.note_walk()
            lanes.note_demand(out_of_the_blue=True)
            walked = lanes.is_walked, lanes.gentle_bytes
            await trio.lowlevel.checkpoint()
        assert walked[1] < lone_bytes
        await lanes.wait_walked()
    assert not lanes.is_walked
    lanes.note_demand(out_of_the_blue=True)
    assert not lanes.is_walked


async def test_a_fault_before_a_trace_was_known_is_no_surprise_to_it() -> None:
    lanes = Lanes(ContentSettings(yield_s=60.0))
    lanes.expect_faults()
    assert not lanes.is_surprised(time.monotonic())
    lanes.note_demand(out_of_the_blue=True)
    known_at_s = time.monotonic()
    assert lanes.is_surprised(0.0)
    assert not lanes.is_surprised(known_at_s)
    lanes.note_demand(out_of_the_blue=False)
    assert not lanes.is_surprised(known_at_s)
    lanes.note_demand(out_of_the_blue=True)
    assert lanes.is_surprised(known_at_s)

"""The sink is one attempt's at a time, and nobody's once it has been taken back."""

import pytest

from lazyfs.ground.errors import FetchError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.lease import Attempt, Detached, Lease
from lazyfs.transport.place import place_of
from tests.blobs import MemoryBlob
from tests.transport.gather import Gather

DATA = bytes(range(256)) * 20
WHOLE = ByteRange(0, len(DATA))
PLACE = place_of(MemoryBlob(DATA))


def lease_and_sink(wanted: ByteRange = WHOLE) -> tuple[Lease, Gather]:
    sink = Gather()
    return Lease(sink, wanted), sink


def deliver(attempt: Attempt, start: int, stop: int) -> None:
    while start < stop:
        room = attempt.space()
        count = min(len(room), stop - start)
        room[:count] = DATA[start : start + count]
        attempt.advance(count)
        start += count


def test_the_first_to_have_bytes_gets_it() -> None:
    lease, sink = lease_and_sink()
    one, other = Attempt(lease, PLACE, 1), Attempt(lease, PLACE, 1)
    deliver(other, 0, 10)
    with pytest.raises(Detached):
        one.space()
    deliver(other, 10, len(DATA))
    assert sink.data == DATA
    assert lease.is_filled
    assert (one.first_byte_s, one.delivered_bytes) == (None, 0)
    assert other.first_byte_s is not None


async def test_what_was_taken_back_is_gone() -> None:
    lease, sink = lease_and_sink()
    idle, busy = Attempt(lease, PLACE, 1), Attempt(lease, PLACE, 1)
    await idle.take_back()
    with pytest.raises(Detached):
        idle.space()
    deliver(busy, 0, 1000)
    await busy.take_back()
    with pytest.raises(Detached):
        busy.space()
    assert sink.data == DATA[:1000]
    deliver(Attempt(lease, PLACE, 1), 1000, len(DATA))
    assert sink.data == DATA


async def test_who_began_elsewhere_has_nothing_to_give() -> None:
    """Two began at the same byte, one delivered some and ended: the other's come too late."""
    lease, sink = lease_and_sink()
    one, other = Attempt(lease, PLACE, 1), Attempt(lease, PLACE, 1)
    deliver(one, 0, 10)
    await one.take_back()
    with pytest.raises(Detached):
        other.space()
    deliver(Attempt(lease, PLACE, 1), 10, len(DATA))
    assert sink.data == DATA


def test_no_more_than_was_asked_for() -> None:
    lease, sink = lease_and_sink(ByteRange(100, 1500))
    attempt = Attempt(lease, PLACE, 1)
    assert attempt.wanted == ByteRange(100, 1500)
    deliver(attempt, 100, 1100)
    assert len(attempt.space()) == 400
    deliver(attempt, 1100, 1500)
    with pytest.raises(FetchError, match="more bytes"):
        attempt.space()
    assert sink.data == DATA[100:1500]


def test_an_attempt_runs_to_its_end_and_tells_how() -> None:
    lease, sink = lease_and_sink()
    blob = MemoryBlob(DATA)
    blob.cut_after = 2000
    attempt = Attempt(lease, place_of(blob), 1)
    attempt.run()
    assert isinstance(attempt.error, FetchError)
    assert attempt.delivered_bytes == lease.position == len(sink.data) == 2000

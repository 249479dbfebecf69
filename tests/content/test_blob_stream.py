"""A blob comes in order, whole and once, however its pieces arrive."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.content.blob_stream import BlobStream, Stopped
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.transport.retry import Fetcher
from tests.blobs import Gate, MemoryBlob
from tests.streams import FAST, SETTINGS

DATA = random.Random(1).randbytes(9 * MIB + 12345)


class Reading:
    """A stream with readers that collect what they get."""

    def __init__(
        self,
        blob: MemoryBlob,
        *,
        readers: int = 1,
        ring_bytes: int = 4 * MIB,
        on_trouble: Callable[[SourceError], None] = lambda error: None,
        may_use: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.counters = Counters()
        self.got = [bytearray() for _ in range(readers)]
        self.stopped = [False] * readers
        self.stream = BlobStream(
            blob,
            Fetcher(FAST, self.counters),
            SETTINGS,
            readers=readers,
            on_trouble=on_trouble,
            may_use=may_use,
            ring_bytes=ring_bytes,
        )

    def read(self, reader: int) -> None:
        try:
            for part in self.stream.parts(reader):
                self.got[reader] += part
        except Stopped:
            self.stopped[reader] = True

    async def run(self) -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.stream.run)
                for reader in range(len(self.got)):
                    nursery.start_soon(trio.to_thread.run_sync, self.read, reader)
        self.stream.close()


@pytest.mark.parametrize("ring_bytes", [4096, 1_000_003, 3 * MIB, 64 * MIB])
async def test_every_reader_gets_everything(ring_bytes: int) -> None:
    data = DATA[: ring_bytes * 100]
    reading = Reading(MemoryBlob(data), readers=2, ring_bytes=ring_bytes)
    await reading.run()
    assert reading.got == [data, data]
    assert reading.counters.bytes_fetched == len(data)


@given(
    size=st.integers(0, 20_000),
    ring_bytes=st.integers(1, 30_000),
    piece_bytes=st.integers(1, 5_000),
    cut_after=st.none() | st.integers(1, 9_000),
)
def test_any_sizes(size: int, ring_bytes: int, piece_bytes: int, cut_after: int | None) -> None:
    blob = MemoryBlob(DATA[:size])
    blob.piece_bytes = max(piece_bytes, size // 50)
    blob.cut_after = cut_after and max(cut_after, size // 20)

    async def run() -> None:
        reading = Reading(blob, ring_bytes=max(ring_bytes, size // 20 + 1))
        await reading.run()
        assert reading.got == [blob.data]

    trio.run(run)


async def test_parts_are_handed_on_as_they_land() -> None:
    half = threading.Event()

    class Halting(MemoryBlob):
        sent = 0

        def read_into(self, byte_range: ByteRange, sink: object) -> None:
            super().read_into(ByteRange(byte_range.start, byte_range.start + 1000), sink)  # type: ignore[arg-type]
            assert half.wait(10)
            super().read_into(ByteRange(byte_range.start + 1000, byte_range.stop), sink)  # type: ignore[arg-type]

    reading = Reading(Halting(DATA[: MIB // 2]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading.run)
        with trio.fail_after(10):
            while len(reading.got[0]) < 1000:  # noqa: ASYNC110 - a thread's
                await trio.sleep(0.01)
        half.set()
    assert reading.got == [DATA[: MIB // 2]]


async def test_a_slow_reader_holds_the_fetches_back() -> None:
    gate = threading.Event()
    reading = Reading(MemoryBlob(DATA), readers=2, ring_bytes=2 * MIB)

    def slow() -> None:
        parts = reading.stream.parts(1)
        next(parts)
        assert gate.wait(10)
        for _ in parts:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading.stream.run)
        nursery.start_soon(trio.to_thread.run_sync, reading.read, 0)
        nursery.start_soon(trio.to_thread.run_sync, slow)
        with trio.fail_after(10):
            while len(reading.got[0]) < 2 * MIB:  # noqa: ASYNC110 - a thread's
                await trio.sleep(0.01)
        await trio.sleep(0.05)
        assert len(reading.got[0]) == 2 * MIB
        gate.set()
    assert reading.got[0] == DATA


async def test_several_are_fetched_at_once() -> None:
    blob = MemoryBlob(DATA)
    gate = blob.before = Gate()
    reading = Reading(blob)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading.run)
        for _ in range(2):
            await trio.to_thread.run_sync(gate.wait_entered)
        gate.open()
    assert reading.got == [DATA]


async def test_a_source_that_fails_is_told_and_asked_again() -> None:
    blob = MemoryBlob(DATA)
    errors: list[SourceError] = []
    healed = False

    def dead(wanted: ByteRange) -> None:
        if wanted.start >= 3 * MIB and not healed:
            raise FetchError("connection refused", transient=True)

    def trouble(error: SourceError) -> None:
        nonlocal healed
        errors.append(error)
        healed = len(errors) == 3
        token.run_sync_soon(reading.stream.ask_again)

    token = trio.lowlevel.current_trio_token()
    blob.before = dead
    reading = Reading(blob, on_trouble=trouble)
    await reading.run()
    assert reading.got == [DATA]
    assert len(errors) == 3
    assert reading.counters.bytes_fetched == len(DATA)


async def test_whoever_hears_of_trouble_may_end_it() -> None:
    blob = MemoryBlob(DATA)

    def dead(_: ByteRange) -> None:
        raise SourceError("no such blob")

    def give_up(error: SourceError) -> None:
        raise error

    blob.before = dead
    reading = Reading(blob, readers=2, on_trouble=give_up)
    with pytest.raises(ExceptionGroup) as caught:
        await reading.run()
    assert caught.value.split(SourceError)[1] is None
    assert reading.stopped == [True, True]


async def test_a_blob_that_changed_ends_it() -> None:
    blob = MemoryBlob(DATA)

    def changed(_: ByteRange) -> None:
        raise IntegrityError("it was replaced")

    blob.before = changed
    reading = Reading(blob)
    with pytest.raises(ExceptionGroup) as caught:
        await reading.run()
    assert caught.value.split(IntegrityError)[1] is None
    assert reading.stopped == [True]


async def test_cancelling_lets_the_readers_go() -> None:
    blob = MemoryBlob(DATA)
    gate = blob.before = Gate()
    reading = Reading(blob, readers=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading.run)
        await trio.to_thread.run_sync(gate.wait_entered)
        nursery.cancel_scope.cancel()
    assert reading.stopped == [True, True]
    gate.open()


async def test_nothing_is_fetched_while_it_may_not() -> None:
    blob = MemoryBlob(DATA)
    allowed = 0
    reading = Reading(blob, may_use=lambda: allowed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reading.run)
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert blob.asked == []
        allowed = 1
    assert reading.got == [DATA]


async def test_stopping_one_that_was_never_run() -> None:
    reading = Reading(MemoryBlob(DATA))
    reading.stream.stop()
    with suppress(Stopped):
        next(reading.stream.parts(0))
        raise AssertionError("a part came")
    reading.stream.close()

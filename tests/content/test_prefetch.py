"""What is foreseen is fetched before it is asked for: in which order, how far, and until when."""

import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.prefetch import BATCH_BYTES, PrefetchState, batched
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import KIB, MIB, ContentSettings, TransportSettings
from lazyfs.layers.chunks import FixedChunks
from lazyfs.transport.blob import Sink
from lazyfs.transport.retry import Fetcher
from tests.blobs import Gate, MemoryBlob

CHUNK = 256 * KIB
DATA = random.Random(1).randbytes(40 * MIB + 12345)
FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.2)
ONE_BY_ONE = ContentSettings(idle_s=3600.0, readahead_connections_least=1, readahead_connections=1)
"""As where one connection is all there is: what is asked for first is fetched first."""


class WatchedLanes(Lanes):
    """Lanes that remember which demand came out of the blue."""

    def __init__(self, settings: ContentSettings) -> None:
        super().__init__(settings)
        self.blue: list[bool] = []

    def note_demand(self, *, out_of_the_blue: bool) -> None:
        self.blue.append(out_of_the_blue)
        super().note_demand(out_of_the_blue=out_of_the_blue)


class Opened:
    """A content with a readahead, which begins to run when it is told to."""

    def __init__(
        self, directory: Path | None, settings: ContentSettings, blob: MemoryBlob | None
    ) -> None:
        self.blob = blob or MemoryBlob(DATA)
        chunks = FixedChunks(len(DATA))
        cache = None
        if directory is not None:
            cache = open_cache_file(Cache(directory), Digest.of(DATA), "t", len(DATA), len(chunks))
        self.counters = Counters()
        self.lanes = WatchedLanes(settings)
        fetcher = Fetcher(FAST, self.counters)
        self.content = LayerContent(self.blob, chunks, cache, self.lanes, fetcher, settings)
        self.readahead = Readahead(self.content)
        self.prefetch = self.readahead.prefetch

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        self.readahead.expect(self.prefetch.placed(ranges))

    def file(self) -> FileReader:
        return FileReader(self.content, self.readahead, 0, len(DATA))

    async def settle(self) -> None:
        """Come back when nothing more is asked for."""
        with trio.fail_after(30):
            while True:
                before = len(self.blob.asked)
                await trio.testing.wait_all_tasks_blocked(0.01)
                if not self.content.is_fetching and len(self.blob.asked) == before:
                    return
                await trio.sleep(0.001)


@asynccontextmanager
async def opened(
    directory: Path | None,
    settings: ContentSettings = ONE_BY_ONE,
    blob: MemoryBlob | None = None,
) -> AsyncIterator[Opened]:
    it = Opened(directory, settings, blob)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.readahead.run)
        try:
            yield it
        finally:
            nursery.cancel_scope.cancel()
    it.content.close()


def chunk(*numbers: int) -> list[ByteRange]:
    return [ByteRange(number * CHUNK, (number + 1) * CHUNK) for number in numbers]


async def test_what_was_needed_first_is_fetched_first_and_once(tmp_path: Path) -> None:
    far = [*range(100, 116), *range(3, 19)]  # each 4 MiB: two batches
    async with opened(tmp_path) as it:
        it.expect([each for item in chunk(*far) for each in (item, item)])
        await it.settle()
        assert [each.start for each in it.blob.asked] == [
            *range(100 * CHUNK, 116 * CHUNK, MIB),
            *range(3 * CHUNK, 19 * CHUNK, MIB),
        ]
        assert sum(each.size_bytes for each in it.blob.asked) == len(far) * CHUNK
        assert it.prefetch.state is PrefetchState.DONE
        assert it.prefetch.traced_bytes == it.prefetch.traced_here_bytes() == len(far) * CHUNK
        for item in chunk(*far):
            assert bytes(it.content.peek(item) or b"") == DATA[item.start : item.stop]


async def test_the_rest_is_fetched_once_nobody_walks_any_more(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as it:
        it.lanes.note_walk()
        it.lanes.note_demand(out_of_the_blue=True)
        while_walked = []
        it.readahead.follow([ByteRange(0, len(DATA))])
        while it.lanes.is_walked:
            while_walked = it.blob.asked[:]
            await trio.sleep(0.001)
        assert not while_walked
        with trio.fail_after(30):
            while not it.content.is_here(ByteRange(0, len(DATA))):
                await it.content.wait_news()


async def test_what_nobody_waits_for_lets_a_trace_go_first(tmp_path: Path) -> None:
    far = [*range(100, 116), *range(3, 19)]
    async with opened(tmp_path) as it:
        it.expect(chunk(*far))
        (other,) = chunk(60)
        with trio.fail_after(30):
            await it.readahead.wait_replayed(other)
            await it.content.read(other, Lane.READAHEAD)
        assert it.blob.asked[-1] == other
        assert len(it.blob.asked) == 9
        it.expect(chunk(90))
        await it.readahead.wait_replayed(other)
        assert it.prefetch.is_replaying, "it is here: whoever wants it has nothing to wait for"


async def test_nobody_waits_for_a_trace_that_does_not_come(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        gate = Gate()
        it.blob.before = gate
        it.expect(chunk(100, 3))
        try:
            with trio.fail_after(30):
                await it.readahead.wait_replayed(chunk(60)[0])
            assert it.prefetch.is_replaying
        finally:
            gate.open()


async def test_what_lies_together_is_one_request(tmp_path: Path) -> None:
    """Needed alternately, from two places; a page at a time."""
    pages = [
        ByteRange(start + offset, start + offset + 4096)
        for offset in range(0, 4 * CHUNK, 8192)
        for start in (80 * CHUNK, 10 * CHUNK)
    ]
    async with opened(tmp_path) as it:
        it.expect(pages)
        await it.settle()
        assert it.blob.asked == [
            ByteRange(10 * CHUNK, 14 * CHUNK),
            ByteRange(80 * CHUNK, 84 * CHUNK),
        ]


async def test_the_rest_comes_behind_it_in_its_own_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        rest = [ByteRange(20 * MIB, len(DATA)), ByteRange(0, 20 * MIB)]
        it.readahead.follow(rest)
        it.expect(chunk(7, 120))
        await it.settle()
        starts = [each.start for each in it.blob.asked]
        assert starts[:2] == [7 * CHUNK, 120 * CHUNK]
        assert starts[2] == 20 * MIB
        assert starts[2:] == sorted(starts[2:], key=lambda at: (at < 20 * MIB, at))
        assert sum(each.size_bytes for each in it.blob.asked) == len(DATA)
        assert bytes(it.content.peek(ByteRange(0, len(DATA))) or b"") == DATA


async def test_the_first_requests_of_the_rest_are_small(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.readahead.follow([ByteRange(0, len(DATA))])
        await it.settle()
        sizes = [each.size_bytes for each in it.blob.asked]
        assert sizes[:4] == [MIB, MIB, 2 * MIB, 4 * MIB]
        assert max(sizes) == 8 * MIB


async def test_a_trace_that_comes_late_goes_before_the_rest(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        gate = it.blob.before = Gate()
        it.readahead.follow([ByteRange(0, len(DATA))])
        await trio.to_thread.run_sync(gate.wait_entered)
        it.expect(chunk(150, 140))
        gate.open()
        await it.settle()
        assert [each.start for each in it.blob.asked[1:3]] == [140 * CHUNK, 150 * CHUNK]


async def test_a_reader_overtakes_what_is_prefetched(tmp_path: Path) -> None:
    """All that is prefetched is held up: a demand read has its own connection."""
    async with opened(tmp_path) as it:
        gate = it.blob.before = Gate()
        it.expect(chunk(*range(64)))
        await trio.to_thread.run_sync(gate.wait_entered)
        it.blob.before = None
        with trio.fail_after(20):
            assert (
                bytes(await it.file().read(150 * CHUNK, 4096))
                == (DATA[150 * CHUNK : 150 * CHUNK + 4096])
            )
        assert not it.content.is_here(ByteRange(0, 4096))
        gate.open()


async def test_a_fault_on_what_is_traced_does_not_slow_the_background(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        gate = it.blob.before = Gate()
        it.expect(chunk(*range(64)))
        await trio.to_thread.run_sync(gate.wait_entered)
        it.blob.before = None
        await it.file().read(40 * CHUNK, 4096)  # not on its way yet
        await it.file().read(100 * CHUNK, 4096)
        assert it.lanes.blue == [False, True]
        gate.open()


@pytest.mark.parametrize(("is_named", "most_bytes"), [(True, 4 * MIB), (False, MIB)])
async def test_beside_a_fault_on_what_is_not_traced_little_of_the_trace_is_on_its_way(
    tmp_path: Path, is_named: bool, most_bytes: int
) -> None:
    settings = ContentSettings(idle_s=3600.0, yield_s=600.0)
    async with opened(tmp_path, settings) as it:
        gate = it.blob.before = Gate()
        it.lanes.note_demand(out_of_the_blue=True)  # nothing was known then
        it.expect(chunk(*range(64)))
        it.lanes.note_demand(out_of_the_blue=not is_named)
        it.readahead.follow([ByteRange(0, len(DATA))])
        with trio.fail_after(30):
            while sum(each.size_bytes for each in it.blob.asked) < most_bytes:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert sum(each.size_bytes for each in it.blob.asked) == most_bytes
        gate.open()
        await it.settle()
        assert it.prefetch.state is PrefetchState.DONE


async def test_a_trace_of_something_else_is_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        gate = it.blob.before = Gate()
        it.expect(chunk(*range(100)))
        await trio.to_thread.run_sync(gate.wait_entered)
        for number in range(101, 133):
            assert it.prefetch.is_replaying
            it.prefetch.note_wait(chunk(number)[0])
        assert it.prefetch.state is PrefetchState.DROPPED
        gate.open()
        await it.settle()
        assert not it.content.is_here(ByteRange(90 * CHUNK, 91 * CHUNK))


async def test_one_that_is_often_right_is_kept(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.expect(chunk(*range(100)))
        for turn in range(200):
            it.prefetch.note_wait(chunk(turn % 100 if turn % 3 == 0 else 120)[0])
        assert it.prefetch.is_replaying


async def test_without_a_disk_no_more_is_prefetched_than_is_kept() -> None:
    settings = replace(ONE_BY_ONE, memory_cache_bytes=8 * MIB)
    async with opened(None, settings) as it:
        it.readahead.follow([ByteRange(0, len(DATA))])
        it.expect(chunk(*range(10, 100)))
        await it.settle()
        assert sum(each.size_bytes for each in it.blob.asked) == 4 * MIB
        assert it.blob.asked[0].start == 10 * CHUNK


async def test_where_the_source_is_gone_nothing_is_asked_for_again_and_again(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as it:
        it.blob.cut_after = 0
        it.expect(chunk(*range(10, 100)))
        it.readahead.follow([ByteRange(0, len(DATA))])
        await it.settle()
        asked = {each.start for each in it.blob.asked}
        assert len(asked) == 1
        it.blob.cut_after = None
        assert bytes(await it.file().read(0, 4096)) == DATA[:4096]


async def test_ranges_that_do_not_exist_are_passed_over(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        beyond = len(DATA)
        it.expect(
            [
                ByteRange(beyond, beyond + 1),
                ByteRange(beyond - 1, beyond + 1),
                ByteRange(-5, 5),
                ByteRange(7, 7),
                ByteRange(9, 8),
                ByteRange(beyond - 1, beyond),
            ]
        )
        await it.settle()
        assert [each.stop for each in it.blob.asked] == [beyond]


_RANGES = st.lists(
    st.tuples(st.integers(0, 1 << 26), st.integers(1, 1 << 21)).map(
        lambda item: ByteRange(item[0], item[0] + item[1])
    ),
    max_size=50,
)


@given(_RANGES)
def test_batches_lose_nothing_and_keep_the_order_of_need(ranges: list[ByteRange]) -> None:
    found = list(batched(ranges))
    passed_bytes = 0
    for item in ranges:
        assert any(each.start <= item.start and item.stop <= each.stop for each in found)
        passed_bytes += item.size_bytes
    if passed_bytes < BATCH_BYTES:
        assert found == sorted(found)


def test_a_great_many_ranges_that_lie_far_apart_are_put_in_order_soon() -> None:
    """If all that is left were looked at for each batch this would take an hour."""
    numbers = list(range(0, 1_500_000, 10))
    random.Random(3).shuffle(numbers)
    began_s = time.monotonic()
    assert len(list(batched(chunk(*numbers)))) > len(numbers) // 2
    assert time.monotonic() - began_s < 30


class HeldAtItsEnd(MemoryBlob):
    """A blob whose first range stops before its last bytes, until it may go on."""

    def __init__(self, data: bytes, left_bytes: int) -> None:
        super().__init__(data)
        self.may_end = threading.Event()
        self._left_bytes = left_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        if self.asked:
            super().read_into(byte_range, sink)
            return
        middle = byte_range.stop - self._left_bytes
        super().read_into(ByteRange(byte_range.start, middle), sink)
        self.may_end.wait(30)
        super().read_into(ByteRange(middle, byte_range.stop), sink)


@pytest.mark.parametrize(("left_bytes", "goes_on"), [(CHUNK // 2, True), (3 * CHUNK, False)])
async def test_the_next_request_is_made_while_the_last_bytes_of_one_come(
    tmp_path: Path, left_bytes: int, goes_on: bool
) -> None:
    one_and_its_end = replace(ONE_BY_ONE, readahead_connections=2, readahead_request_bytes=MIB)
    async with opened(tmp_path, one_and_its_end, HeldAtItsEnd(DATA, left_bytes)) as it:
        assert isinstance(it.blob, HeldAtItsEnd)
        it.readahead.follow([ByteRange(0, 4 * MIB)])
        with trio.fail_after(20):
            come = ByteRange(0, MIB - max(left_bytes, CHUNK))
            while not it.content.is_here(come):  # noqa: ASYNC110 - who waits for it asks for it
                await trio.sleep(0.001)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert (len(it.blob.asked) > 1) is goes_on
        it.blob.may_end.set()
        await it.settle()
        assert it.content.is_here(ByteRange(0, 4 * MIB))
        assert sum(each.size_bytes for each in it.blob.asked) == 4 * MIB


def test_what_is_needed_all_over_is_fetched_by_address() -> None:
    """A request for each chunk would cost more than the bytes between them."""
    numbers = list(range(0, 400, 2))
    random.Random(2).shuffle(numbers)
    found = list(batched(chunk(*numbers)))
    assert len(found) < len(numbers) // 2
    assert list(coalesce(found, CHUNK)) == [ByteRange(0, 399 * CHUNK)]


def test_what_lies_far_apart_is_fetched_in_the_order_of_need() -> None:
    numbers = list(range(0, 4000, 10))
    random.Random(3).shuffle(numbers)
    found = list(batched(chunk(*numbers)))
    per_batch = BATCH_BYTES // CHUNK
    assert {each.start // CHUNK for each in found[:per_batch]} == set(numbers[:per_batch])

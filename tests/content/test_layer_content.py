"""Chunks are fetched once, served whole and never wrong, whatever happens to disk and source."""

import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import CacheFile, open_cache_file
from lazyfs.content.completion import Completion
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB, ContentSettings, TransportSettings
from lazyfs.layers.chunks import FixedChunks
from lazyfs.transport.place import Health
from lazyfs.transport.retry import Fetcher
from tests.blobs import Gate, MemoryBlob

TAG = "test"
DATA = random.Random(1).randbytes(5 * MIB + 12345)
FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.3)
SETTINGS = ContentSettings(idle_s=0.0)


class Setup:
    """A content over `blob`, and what it was made of."""

    def __init__(
        self,
        blob: MemoryBlob,
        cache: CacheFile | None,
        settings: ContentSettings = SETTINGS,
        transport: TransportSettings = FAST,
    ) -> None:
        self.blob = blob
        self.counters = Counters()
        self.content = LayerContent(
            blob,
            FixedChunks(len(blob.data)),
            cache,
            Lanes(settings),
            Fetcher(transport, self.counters),
            settings,
        )
        self.readahead = Readahead(self.content)

    def file(self) -> FileReader:
        return FileReader(self.content, self.readahead, 0, len(self.blob.data))

    def completion(self, digest: Digest) -> Completion:
        return Completion(self.content, self.readahead, digest, "the blob")


@contextmanager
def cached(
    directory: Path, data: bytes = DATA, settings: ContentSettings = SETTINGS
) -> Iterator[Setup]:
    chunks = FixedChunks(len(data))
    cache = open_cache_file(Cache(directory), Digest.of(DATA), TAG, len(data), len(chunks))
    setup = Setup(MemoryBlob(data), cache, settings)
    try:
        yield setup
    finally:
        setup.content.close()


async def test_reads_are_exact(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        file = setup.file()
        dice = random.Random(2)
        for _ in range(200):
            offset = dice.randrange(len(DATA) + 10)
            size = dice.choice([1, 4096, 128 * KIB, MIB, 3 * MIB])
            assert bytes(await file.read(offset, size)) == DATA[offset : offset + size]
        assert setup.counters.bytes_fetched <= len(DATA)


async def test_one_fetch_for_many_readers(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        gate = setup.blob.before = Gate()
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await setup.content.read(ByteRange(100, 200))))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read)
            await trio.to_thread.run_sync(gate.wait_entered)
            gate.open()
        assert got == [DATA[100:200]] * 20
        assert len(setup.blob.asked) == 1


async def test_a_file_is_kept_when_none_of_it_has_to_be_fetched(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        file = setup.file()
        assert not file.is_kept()
        gate = setup.blob.before = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect, setup, ByteRange(0, len(DATA)))
            await trio.to_thread.run_sync(gate.wait_entered)
            assert not file.is_kept(), "it is on its way"
            gate.open()
        assert file.is_kept()
    with cached(tmp_path) as setup:
        assert setup.file().is_kept(), "it is to be checked"
        await _expect(setup, ByteRange(0, len(DATA)))
        assert setup.counters.bytes_fetched == 0


async def test_what_only_memory_holds_is_not_kept() -> None:
    setup = Setup(MemoryBlob(DATA), None)
    await _expect(setup, ByteRange(0, len(DATA)))
    whole = ByteRange(0, len(DATA))
    assert setup.content.is_here(whole)
    assert not setup.content.is_kept(whole), "others may need the room"


async def test_what_is_only_to_be_checked_is_checked_at_large(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, len(DATA)))
    with cached(tmp_path) as setup:
        first = setup.content.next_run(ByteRange(0, KIB), KIB)
        assert first == (0, len(setup.content.chunks)), "not by the chunk, as a window moves on"


async def test_a_waiter_leads_when_the_leader_is_cancelled(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        gate = setup.blob.before = Gate()
        scope = trio.CancelScope()

        async def lead() -> None:
            with scope:
                await setup.content.read(ByteRange(0, 10))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lead)
            await trio.to_thread.run_sync(gate.wait_entered)
            nursery.start_soon(_expect, setup, ByteRange(0, 10))
            await trio.testing.wait_all_tasks_blocked(0.01)
            scope.cancel()
            gate.open()


async def _expect(setup: Setup, wanted: ByteRange) -> None:
    assert bytes(await setup.content.read(wanted)) == DATA[wanted.start : wanted.stop]


async def test_a_stalled_background_fetch_does_not_hold_a_reader(tmp_path: Path) -> None:
    settings = replace(SETTINGS, patience_s=0.02)
    with cached(tmp_path, settings=settings) as setup:
        gate = setup.blob.before = Gate()
        async with trio.open_nursery() as nursery:
            run = setup.content.next_run(ByteRange(0, MIB), MIB)
            assert run is not None
            flight = setup.content.take_off(run, Lane.READAHEAD)
            nursery.start_soon(setup.content.conduct, flight)
            await trio.to_thread.run_sync(gate.wait_entered)
            setup.blob.before = None  # later requests are answered
            await _expect(setup, ByteRange(300 * KIB, 301 * KIB))
            gate.open()
        await _expect(setup, ByteRange(0, MIB))


async def test_resumes_where_a_reply_broke_off(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        setup.blob.cut_after = 128 * KIB
        await _expect(setup, ByteRange(0, 2 * MIB))
        assert setup.counters.retries > 5
        assert setup.counters.bytes_fetched < 2 * MIB + 512 * KIB


async def test_a_dead_source_is_an_error_and_recovers(tmp_path: Path) -> None:
    def dead(_: ByteRange) -> None:
        raise FetchError("connection refused", transient=True)

    with cached(tmp_path) as setup:
        setup.blob.before = dead
        with pytest.raises(FetchError, match="refused"):
            await setup.content.read(ByteRange(0, 10))
        setup.blob.before = None
        await _expect(setup, ByteRange(0, 10))


async def test_readahead_fetches_before_it_is_asked(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.readahead.run)
            await setup.file().read(0, MIB)
            with trio.fail_after(10):
                whole = ByteRange(0, len(DATA))
                while setup.content.peek(whole) is None:
                    await setup.content.wait_change(whole)
            nursery.cancel_scope.cancel()
        assert setup.counters.reads_waited <= 1


async def test_small_scattered_reads_are_not_read_ahead(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.readahead.run)
            for offset in (3 * MIB, MIB, 4 * MIB, 0):
                await setup.file().read(offset, 4096)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.cancel_scope.cancel()
        assert setup.counters.bytes_fetched == 4 * SETTINGS.demand_least_bytes


async def test_a_later_mount_finds_what_was_fetched(tmp_path: Path) -> None:
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, MIB))
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, MIB))
        assert setup.blob.asked == []
        assert setup.counters.chunks_from_cache == 4


def damage_cache(directory: Path, offset: int, damage: bytes) -> None:
    (content,) = directory.glob("layers/*/content")
    with content.open("r+b") as file:
        file.seek(offset)
        file.write(damage)


@pytest.mark.parametrize("damage", [b"\0", b"x" * 4096])
async def test_a_changed_cache_costs_a_fetch_and_no_wrong_byte(
    tmp_path: Path, damage: bytes
) -> None:
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, MIB))
    damage_cache(tmp_path, 300 * KIB, damage)
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, MIB))
        assert setup.counters.cache_refused == 1


@pytest.mark.parametrize("damage", [[], [10, 300 * KIB, MIB, 5 * MIB]])
async def test_who_wants_a_little_of_what_is_cached_waits_for_little_of_its_check(
    tmp_path: Path, damage: Sequence[int]
) -> None:
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, len(DATA)))
    for offset in damage:
        damage_cache(tmp_path, offset, b"x" * 4096)
    with cached(tmp_path) as setup:
        async with trio.open_nursery() as nursery:
            run = setup.content.next_run(ByteRange(0, KIB), KIB)
            assert run == (0, len(setup.content.chunks))
            nursery.start_soon(setup.content.conduct, setup.content.take_off(run, Lane.DEMAND))
            await _expect(setup, ByteRange(0, KIB))
            assert setup.content.is_fetching == (not damage), "the rest is still looked at"
            await _expect(setup, ByteRange(0, len(DATA)))
        assert setup.counters.cache_refused == len(damage)


@pytest.mark.parametrize("eager", [True, False])
async def test_a_whole_blob_is_proven_and_sealed(tmp_path: Path, eager: bool) -> None:
    with cached(tmp_path) as setup:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.readahead.run)
            await setup.completion(Digest.of(DATA)).prove(eager=eager)
            nursery.cancel_scope.cancel()
        assert setup.content.holdings.sealed
        assert setup.counters.bytes_fetched == len(DATA)
    with cached(tmp_path) as setup:
        assert setup.content.holdings.sealed


async def test_a_blob_that_lies_is_condemned(tmp_path: Path) -> None:
    lie = bytearray(DATA)
    lie[4 * MIB] ^= 1
    with cached(tmp_path, bytes(lie)) as setup:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.readahead.run)
            with pytest.raises(IntegrityError, match="does not match its digest"):
                await setup.completion(Digest.of(DATA)).prove(eager=True)
            nursery.cancel_scope.cancel()
        with pytest.raises(IntegrityError):
            await setup.content.read(ByteRange(0, 10))
        assert setup.content.peek(ByteRange(0, 10)) is None
    with cached(tmp_path) as setup:
        await _expect(setup, ByteRange(0, len(DATA)))
        assert setup.counters.chunks_from_cache == 0


class FullDisk(CacheFile):
    """A cache file on a disk that fills up after so many writes."""

    writes_left = 3

    def write(self, content_start: int, pieces: object) -> None:
        if self.writes_left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes_left -= 1
        super().write(content_start, pieces)  # type: ignore[arg-type]


def full_disk(path: Path) -> FullDisk:
    with path.open("w+b") as file:
        file.truncate(len(DATA))
        return FullDisk(os.dup(file.fileno()), len(DATA), Cache(path.parent))


@pytest.mark.parametrize("writes_left", [0, 3])
async def test_a_full_disk_is_gone_on_without(tmp_path: Path, writes_left: int) -> None:
    cache = full_disk(tmp_path / "content")
    cache.writes_left = writes_left
    setup = Setup(MemoryBlob(DATA), cache, replace(SETTINGS, memory_cache_bytes=MIB))
    await _expect(setup, ByteRange(0, len(DATA)))
    await _expect(setup, ByteRange(MIB - 5, 4 * MIB + 5))
    assert setup.counters.cache_write_errors > 0
    setup.content.close()


async def test_without_a_disk_the_source_must_not_change_its_mind() -> None:
    setup = Setup(MemoryBlob(DATA), None, replace(SETTINGS, memory_cache_bytes=MIB))
    await _expect(setup, ByteRange(0, 4 * MIB))
    setup.blob.data = bytes(len(DATA))
    with pytest.raises(IntegrityError, match="other bytes than before"):
        await setup.content.read(ByteRange(0, 10))


async def test_without_a_disk_a_blob_is_proven_too() -> None:
    setup = Setup(MemoryBlob(DATA), None, replace(SETTINGS, memory_cache_bytes=2 * MIB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.readahead.run)
        await setup.completion(Digest.of(DATA)).prove(eager=True)
        nursery.cancel_scope.cancel()
    assert setup.content.holdings.sealed


async def test_after_giving_up_a_read_still_outlives_a_lost_connection() -> None:
    transport = replace(FAST, brief_deadline_s=0.0)
    setup = Setup(MemoryBlob(DATA), None, transport=transport)
    lost = FetchError("connection reset", transient=True)
    errors: list[FetchError] = []

    def fail(_: ByteRange) -> None:
        if errors:
            raise errors.pop()

    setup.blob.before = fail
    for attempts in (2, 1, 1):
        before = len(setup.blob.asked)
        errors = [lost] * 1000
        with pytest.raises(FetchError, match=f"{FAST.deadline_s if attempts == 2 else 0:.0f} s"):
            await setup.content.read(ByteRange(0, 10))
        assert (len(setup.blob.asked) - before == 1) == (attempts == 1)
    setup = Setup(setup.blob, None)
    errors = [lost] * 1000
    with pytest.raises(FetchError, match="gave up"):
        await setup.content.read(ByteRange(0, 10))
    errors = [lost]
    await _expect(setup, ByteRange(0, 10))


@pytest.mark.parametrize("lane", [Lane.DEMAND, Lane.READAHEAD])
async def test_only_what_a_reader_waits_for_is_asked_for_twice(lane: Lane) -> None:
    blob = MemoryBlob(DATA, health=Health("registry.example"))
    assert blob.health is not None
    for _ in range(10):
        blob.health.answered(0.001)
    gate = Gate()
    waits = [gate]
    blob.before = lambda wanted: waits.pop()(wanted) if waits else None
    setup = Setup(blob, None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.content.read, ByteRange(0, 10), lane)
        await trio.to_thread.run_sync(gate.wait_entered)
        if lane is Lane.DEMAND:
            with trio.fail_after(20):
                while setup.content.is_fetching:  # noqa: ASYNC110
                    await trio.sleep(0.005)
        else:
            await trio.sleep(0.2)
        gate.open()
    assert setup.counters.hedges == (lane is Lane.DEMAND)


async def test_faults_all_over_have_the_file_swept(tmp_path: Path) -> None:
    data = random.Random(9).randbytes(64 * MIB)
    chunks = FixedChunks(len(data))
    cache = open_cache_file(Cache(tmp_path), None, TAG, len(data), len(chunks))
    setup = Setup(MemoryBlob(data), cache)
    file = setup.file()
    offsets = random.Random(10).sample(range(0, len(data), MIB), 40)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.readahead.run)
        for offset in offsets:
            assert bytes(await file.read(offset, 4096)) == data[offset : offset + 4096]
        whole = ByteRange(0, len(data))
        with trio.fail_after(20):
            while setup.content.peek(whole) is None:
                await setup.content.wait_change(whole)
        nursery.cancel_scope.cancel()
    assert setup.counters.bytes_fetched <= len(data)
    setup.content.close()


def family_of(tmp_path: Path, settings: ContentSettings) -> tuple[Setup, list[FileReader], bytes]:
    """Eight files side by side, of 4 MiB each, and readers of them."""
    data = random.Random(11).randbytes(32 * MIB)
    cache = open_cache_file(Cache(tmp_path), None, TAG, len(data), len(FixedChunks(len(data))))
    setup = Setup(MemoryBlob(data), cache, settings)
    whole = ByteRange(0, len(data))
    files = [
        FileReader(setup.content, setup.readahead, start, 4 * MIB, whole)
        for start in range(0, len(data), 4 * MIB)
    ]
    return setup, files, data


async def test_files_read_side_by_side_are_swept_together(tmp_path: Path) -> None:
    setup, files, data = family_of(tmp_path, ContentSettings())
    whole = ByteRange(0, len(data))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.readahead.run)
        for number in (6, 3, 5):
            start = number * 4 * MIB
            assert bytes(await files[number].read(0, MIB)) == data[start : start + MIB]
        with trio.fail_after(20):
            while setup.content.peek(whole) is None:
                await setup.content.wait_change(whole)
        nursery.cancel_scope.cancel()
    assert setup.counters.bytes_fetched <= len(data)
    setup.content.close()


async def test_two_files_are_no_restore(tmp_path: Path) -> None:
    setup, files, data = family_of(tmp_path, ContentSettings())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.readahead.run)
        for number in (6, 3):
            start = number * 4 * MIB
            assert bytes(await files[number].read(0, MIB)) == data[start : start + MIB]
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    assert setup.counters.bytes_fetched <= 8 * MIB
    setup.content.close()


def failing(times: int) -> Callable[[ByteRange], None]:
    """Return what fails so many attempts, and lets all later ones be."""
    left = [FetchError("gone", transient=False)] * times

    def before(_: ByteRange) -> None:
        if left:
            raise left.pop()

    return before


async def test_a_sweep_that_fails_holds_nobody_up(tmp_path: Path) -> None:
    setup, files, data = family_of(tmp_path, ContentSettings())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.readahead.run)
        for number in (1, 2):
            await files[number].read(0, MIB)
        setup.blob.before = failing(3)
        with trio.fail_after(20):
            for number in (5, 6, 7, 0):
                start = number * 4 * MIB
                while True:
                    try:
                        got = bytes(await files[number].read(0, 4 * MIB))
                    except FetchError:
                        continue
                    assert got == data[start : start + 4 * MIB]
                    break
        nursery.cancel_scope.cancel()
    setup.content.close()

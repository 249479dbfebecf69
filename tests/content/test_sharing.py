"""Several daemons, one cache: each chunk is fetched once, and nobody ever sees a wrong byte.

A `LayerContent` has files and locks of its own, so two in one process are to each other what two
daemons are.
"""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import CacheFile, open_cache_file
from lazyfs.content.completion import Completion
from lazyfs.content.fill import fill
from lazyfs.content.host_locks import HostLocks
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.content.room import Room
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB, ContentSettings, TransportSettings
from lazyfs.layers.chunks import FixedChunks
from lazyfs.layers.model import ChunkMap
from lazyfs.transport.retry import Fetcher
from tests.blobs import Gate, MemoryBlob
from tests.images import zstd_chunked
from tests.layers.driving import open_layer

TAG = "test"
CHUNK = 256 * KIB
DATA = random.Random(21).randbytes(6 * MIB + 777)
WHOLE = ByteRange(0, len(DATA))
FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.3)
SETTINGS = ContentSettings(idle_s=0.0)
HASTY = replace(SETTINGS, patience_s=0.05)


class Daemon:
    """What one daemon has of the layer."""

    def __init__(
        self,
        directory: Path,
        blob: MemoryBlob | None = None,
        settings: ContentSettings = SETTINGS,
        chunks: ChunkMap | None = None,
        cache: CacheFile | None = None,
    ) -> None:
        self.blob = blob or MemoryBlob(DATA)
        self.counters = Counters()
        chunks = chunks or FixedChunks(len(self.blob.data))
        self.cache: CacheFile = cache or open_cache_file(
            Cache(directory), Digest.of(DATA), TAG, chunks.content_size_bytes, len(chunks)
        )
        assert self.cache.persistent
        self.content = LayerContent(
            self.blob,
            chunks,
            self.cache,
            Lanes(settings),
            Fetcher(FAST, self.counters),
            settings,
        )
        self.readahead = Readahead(self.content)

    async def read(self, start: int, stop: int) -> bytes:
        return bytes(await self.content.read(ByteRange(start, stop)))

    async def expect(self, start: int = 0, stop: int = len(DATA)) -> None:
        assert await self.read(start, stop) == DATA[start:stop]

    def completion(self, digest: Digest | None = None) -> Completion:
        return Completion(self.content, self.readahead, digest or Digest.of(DATA), "the blob")


@contextmanager
def daemons(
    directory: Path, count: int = 2, settings: ContentSettings = SETTINGS
) -> Iterator[list[Daemon]]:
    with ExitStack() as stack:
        made = [Daemon(directory, settings=settings) for _ in range(count)]
        for daemon in made:
            stack.callback(daemon.content.close)
        yield made


def fetched(made: list[Daemon]) -> int:
    return sum(daemon.counters.bytes_fetched for daemon in made)


def homes_in(directory: Path) -> list[Path]:
    return list(directory.glob("layers/*"))


def home_of(directory: Path) -> Path:
    (home,) = homes_in(directory)
    return home


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not true():  # noqa: ASYNC110 - of another daemon there is no event
            await trio.sleep(0.005)


def poke(directory: Path, name: str, offset: int, data: bytes) -> None:
    with open(home_of(directory) / name, "r+b") as file:
        file.seek(offset)
        file.write(data)


# -- fetched once -------------------------------------------------------------------------------


async def test_what_one_has_fetched_the_other_finds(tmp_path: Path) -> None:
    with daemons(tmp_path) as (one, two):
        await one.expect(0, 2 * MIB)
        await two.expect(0, 3 * MIB)
        await one.expect(0, 3 * MIB)
        assert fetched([one, two]) == 3 * MIB
        assert two.counters.chunks_shared == 8
        assert one.counters.chunks_shared == 4


async def test_what_one_is_fetching_the_others_wait_for(tmp_path: Path) -> None:
    patient = replace(SETTINGS, patience_s=30.0)
    with daemons(tmp_path, 3, patient) as made:
        gate = made[0].blob.before = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made[0].expect, 0, MIB)
            await trio.to_thread.run_sync(gate.wait_entered)
            for daemon in made[1:]:
                nursery.start_soon(daemon.expect, 0, MIB)
                nursery.start_soon(daemon.expect, 100, 200)
            await trio.sleep(0.05)
            gate.open()
        assert [len(daemon.blob.asked) for daemon in made] == [1, 0, 0]


async def test_readers_are_let_in_chunk_by_chunk(tmp_path: Path) -> None:
    """The second has its bytes while the first is still fetching what lies behind them."""
    patient = replace(SETTINGS, patience_s=30.0)
    with daemons(tmp_path, 2, patient) as (one, two):
        one.blob.cut_after = CHUNK
        gate = Gate()

        def later(wanted: ByteRange) -> None:
            if wanted.start:
                gate(wanted)

        one.blob.before = later
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.expect, 0, MIB)
            await trio.to_thread.run_sync(gate.wait_entered)
            with trio.fail_after(10):
                await two.expect(0, CHUNK)
            assert two.counters.bytes_fetched == 0
            gate.open()


async def test_they_divide_what_both_want(tmp_path: Path) -> None:
    """What is free is fetched while the rest is awaited."""
    patient = replace(SETTINGS, patience_s=30.0)
    with daemons(tmp_path, 2, patient) as (one, two):
        gate = one.blob.before = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.expect, MIB, 2 * MIB)
            await trio.to_thread.run_sync(gate.wait_entered)
            nursery.start_soon(two.expect, 0, 4 * MIB)
            await until(lambda: two.counters.bytes_fetched >= 3 * MIB)
            gate.open()
        assert fetched([one, two]) == 4 * MIB


async def test_many_at_random_fetch_each_byte_once(tmp_path: Path) -> None:
    patient = replace(SETTINGS, patience_s=30.0)
    with daemons(tmp_path, 5, patient) as made:

        async def roam(daemon: Daemon, seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(30):
                start = dice.randrange(len(DATA))
                await daemon.expect(start, min(len(DATA), start + dice.choice([1, 5000, MIB])))
            await daemon.expect()

        async with trio.open_nursery() as nursery:
            for daemon in made:
                nursery.start_soon(daemon.readahead.run)
            async with trio.open_nursery() as readers:
                for seed, daemon in enumerate(made):
                    readers.start_soon(roam, daemon, seed)
                    readers.start_soon(roam, daemon, 100 + seed)
            nursery.cancel_scope.cancel()
        assert fetched(made) == len(DATA)


async def test_readahead_of_two_shares_the_work(tmp_path: Path) -> None:
    patient = replace(SETTINGS, patience_s=30.0)
    with daemons(tmp_path, 2, patient) as made:
        async with trio.open_nursery() as nursery:
            for daemon in made:
                nursery.start_soon(daemon.readahead.run)

            async def forward(daemon: Daemon) -> None:
                file = FileReader(daemon.content, daemon.readahead, 0, len(DATA))
                for offset in range(0, len(DATA), 128 * KIB):
                    got = bytes(await file.read(offset, 128 * KIB))
                    assert got == DATA[offset : offset + 128 * KIB]
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as readers:
                for daemon in made:
                    readers.start_soon(forward, daemon)
            nursery.cancel_scope.cancel()
        assert fetched(made) == len(DATA)


# -- those who do not bring it ------------------------------------------------------------------


async def test_one_that_ends_in_mid_fetch_is_followed_at_once(tmp_path: Path) -> None:
    patient = replace(SETTINGS, patience_s=30.0)
    with daemons(tmp_path, 2, patient) as (one, two):
        gate = one.blob.before = Gate()
        scope = trio.CancelScope()

        async def doomed() -> None:
            with scope:
                await one.expect(0, MIB)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(doomed)
            await trio.to_thread.run_sync(gate.wait_entered)
            nursery.start_soon(two.expect, 0, MIB)
            await trio.sleep(0.02)
            scope.cancel()
            await until(lambda: two.content.peek(ByteRange(0, MIB)) is not None)
            gate.open()
        assert two.counters.bytes_fetched == MIB


async def test_one_that_fails_leaves_it_to_the_other(tmp_path: Path) -> None:
    def dead(_: ByteRange) -> None:
        raise FetchError("connection refused", transient=False)

    with daemons(tmp_path) as (one, two):
        one.blob.before = dead
        with pytest.raises(FetchError):
            await one.expect(0, MIB)
        await two.expect(0, MIB)
        await one.expect(0, MIB)


@pytest.mark.parametrize("lane", [Lane.DEMAND, Lane.COMPLETION])
async def test_one_that_stalls_is_not_waited_for_for_ever(tmp_path: Path, lane: Lane) -> None:
    with daemons(tmp_path, 2, HASTY) as (one, two):
        gate = one.blob.before = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.expect, 0, 2 * MIB)
            await trio.to_thread.run_sync(gate.wait_entered)
            with trio.fail_after(20):
                await two.content.ensure(ByteRange(0, 2 * MIB), lane)
            await two.expect(0, 2 * MIB)
            gate.open()
        await one.expect(0, 2 * MIB)
        assert one.counters.cache_refused == two.counters.cache_refused == 0


async def test_a_stalled_one_costs_patience_once_not_for_each_read(tmp_path: Path) -> None:
    settings = replace(SETTINGS, patience_s=1.0)
    with daemons(tmp_path, 2, settings) as (one, two):
        gate = one.blob.before = Gate()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.expect, 0, 2 * MIB)
            await trio.to_thread.run_sync(gate.wait_entered)
            await two.expect(0, 10)
            with trio.fail_after(5):  # not a second each
                for start in range(CHUNK, 2 * MIB, CHUNK):
                    await two.expect(start, start + 10)
            gate.open()


async def test_one_to_whom_bytes_come_slowly_is_waited_for(tmp_path: Path) -> None:
    """A chunk takes longer than anybody is patient, but the bytes of it come."""
    settings = replace(SETTINGS, patience_s=1.2)
    with daemons(tmp_path, 2, settings) as (one, two):
        one.blob.cut_after = one.blob.piece_bytes
        one.blob.before = lambda _: time.sleep(0.4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.expect, 0, CHUNK)
            await until(lambda: len(one.blob.asked) > 0)
            await two.expect(0, CHUNK)
        assert two.blob.asked == []


async def test_of_many_who_waited_in_vain_one_asks(tmp_path: Path) -> None:
    settings = replace(SETTINGS, patience_s=1.0)
    with daemons(tmp_path, 6, settings) as (stalled, *rest):
        gate, second = Gate(), Gate()
        stalled.blob.before = gate
        for daemon in rest:
            daemon.blob.before = second
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stalled.expect, 0, CHUNK)
            await trio.to_thread.run_sync(gate.wait_entered)
            for daemon in rest:
                nursery.start_soon(daemon.expect, 0, CHUNK)
            await trio.to_thread.run_sync(second.wait_entered)
            second.open()
            for daemon in rest:
                await daemon.expect(0, CHUNK)
            gate.open()
        assert sum(len(daemon.blob.asked) for daemon in rest) == 1


async def test_one_that_is_stopped_while_it_stores_holds_nobody_up(tmp_path: Path) -> None:
    """Its lock is not to be had: the others keep their bytes in memory."""
    with daemons(tmp_path, 1) as (two,):
        cache = open_cache_file(
            Cache(tmp_path), Digest.of(DATA), TAG, len(DATA), len(two.content.chunks)
        )
        with cache.locks.storing(0, 2, 1.0) as held:
            assert held
            with trio.fail_after(10):
                await two.expect(0, MIB)
                await two.expect(0, MIB)
            assert cache.marks(0, 2) == bytes(16)
        cache.close()
        assert two.counters.cache_write_errors == 0
        assert two.counters.bytes_fetched == MIB


# -- damage -------------------------------------------------------------------------------------


async def test_a_bit_flipped_under_two_mounts(tmp_path: Path) -> None:
    """Who has not looked at the chunk yet notices, and puts it right."""
    with daemons(tmp_path) as (one, two):
        await one.expect(0, MIB)
        poke(tmp_path, "content", 300 * KIB, bytes([DATA[300 * KIB] ^ 1]))
        await two.expect(0, MIB)
        assert two.counters.cache_refused == 1
        await one.expect(0, MIB)
        assert two.counters.bytes_fetched == CHUNK
    with daemons(tmp_path, 1) as (three,):
        await three.expect(0, MIB)
        assert (three.counters.cache_refused, three.counters.bytes_fetched) == (0, 0)


@pytest.mark.parametrize("mark", [b"\0" * 8, b"x" * 8])
async def test_a_mark_damaged_under_two_mounts(tmp_path: Path, mark: bytes) -> None:
    with daemons(tmp_path) as (one, two):
        await one.expect(0, MIB)
        poke(tmp_path, "marks", 8, mark)
        await two.expect(0, MIB)
        await one.expect(0, MIB)
    with daemons(tmp_path, 1) as (three,):
        await three.expect(0, MIB)
        assert (three.counters.cache_refused, three.counters.bytes_fetched) == (0, 0)


async def test_what_is_damaged_past_telling_stays_as_it_is(tmp_path: Path) -> None:
    """Neither its bytes nor its mark are ours, and nothing proves ours: others may serve it."""
    with daemons(tmp_path) as (one, two):
        await one.expect(0, MIB)
        poke(tmp_path, "content", 300 * KIB, b"\1\2\3\4")
        poke(tmp_path, "marks", 8, b"x" * 8)
        before = (home_of(tmp_path) / "content").read_bytes()
        await two.expect(0, MIB)
        await two.expect(0, MIB)
        assert (home_of(tmp_path) / "content").read_bytes() == before
        assert two.counters.cache_refused == 1
        assert two.content.poison is None


async def test_a_chunk_with_a_digest_is_put_right_whatever_is_there(tmp_path: Path) -> None:
    layer = zstd_chunked({"pages-1.img": DATA})
    chunks = open_layer(layer).chunks
    first = Daemon(tmp_path, MemoryBlob(layer.blob), chunks=chunks)
    await first.expect()
    first.content.close()
    poke(tmp_path, "content", 300 * KIB, b"\1\2\3\4")
    poke(tmp_path, "marks", 0, b"x" * 8 * len(chunks))
    for refused in (True, False):
        later = Daemon(tmp_path, MemoryBlob(layer.blob), chunks=chunks)
        await later.expect()
        assert (later.counters.cache_refused > 0) == refused
        later.content.close()


async def test_a_directory_with_a_file_of_another_size_is_made_anew(tmp_path: Path) -> None:
    with daemons(tmp_path, 1) as (one,):
        await one.expect(0, MIB)
        os.truncate(home_of(tmp_path) / "marks", 5)
        with daemons(tmp_path, 1) as (two,):
            await two.expect(0, MIB)
            assert two.counters.bytes_fetched == MIB
            await one.expect(0, 2 * MIB)
            await two.expect(0, 2 * MIB)
            assert two.counters.bytes_fetched == 2 * MIB, "they have parted"


# -- a source of two minds ----------------------------------------------------------------------


async def test_a_source_that_tells_two_daemons_two_things(tmp_path: Path) -> None:
    """The second is told so as soon as both have asked for the same chunk; the first goes on."""
    lie = MemoryBlob(bytes(len(DATA)))
    one, two = Daemon(tmp_path, settings=HASTY), Daemon(tmp_path, lie, HASTY)
    gate = one.blob.before = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_refused, one)
        await trio.to_thread.run_sync(gate.wait_entered)
        assert await two.read(0, 10) == bytes(10)  # having waited in vain
        gate.open()
    assert await two.read(0, 10) == bytes(10)
    assert not homes_in(tmp_path), "later mounts find neither"
    one.content.close()
    two.content.close()


async def _refused(daemon: Daemon) -> None:
    with pytest.raises(IntegrityError, match="other bytes than before"):
        await daemon.read(0, 10)


async def test_a_failed_proof_takes_the_layer_away_and_no_readers_bytes(tmp_path: Path) -> None:
    with daemons(tmp_path) as (one, two):
        await one.expect(0, 2 * MIB)
        await two.expect(0, MIB)
        one.content.condemn(IntegrityError("a test"))
        assert not homes_in(tmp_path)
        await two.expect(0, 3 * MIB)
        with daemons(tmp_path, 1) as (three,):
            await three.expect(0, MIB)
            assert three.counters.chunks_from_cache == 0
            two.content.condemn(IntegrityError("a test"))
            assert home_of(tmp_path).exists(), "that is another's"


# -- the proof of the whole ---------------------------------------------------------------------


async def test_one_proves_the_whole_for_all(tmp_path: Path) -> None:
    with daemons(tmp_path, 4) as made:
        completions = [daemon.completion() for daemon in made]
        async with trio.open_nursery() as nursery:
            for daemon, completion in zip(made, completions, strict=True):
                nursery.start_soon(daemon.readahead.run)
                nursery.start_soon(completion.run)
            await until(lambda: all(daemon.content.holdings.sealed for daemon in made))
            nursery.cancel_scope.cancel()
        assert fetched(made) == len(DATA)
        assert sorted(completion.hashed_bytes for completion in completions)[:3] == [0, 0, 0]
        for daemon in made:
            await daemon.expect()
            assert daemon.content.proven


async def test_a_proof_is_not_believed_of_other_bytes(tmp_path: Path) -> None:
    """One that has served otherwise does not take over what another has proven."""
    lie = bytearray(DATA)
    lie[10] ^= 1
    one, two = Daemon(tmp_path), Daemon(tmp_path, MemoryBlob(bytes(lie)))
    with one.cache.locks.storing(0, 1, 1.0):  # so its bytes go nowhere but to its memory
        assert await two.read(0, 20) == lie[:20]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.readahead.run)
        await one.completion().prove(eager=True)
        nursery.cancel_scope.cancel()
    assert one.content.holdings.sealed
    assert not two.content.note_seal()
    assert not two.content.proven
    assert await two.read(0, 20) == lie[:20]
    one.content.close()
    two.content.close()


async def test_who_learns_of_a_proof_keeps_to_it(tmp_path: Path) -> None:
    with daemons(tmp_path) as (one, two):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.readahead.run)
            await one.completion().prove(eager=True)
            nursery.cancel_scope.cancel()
        assert two.content.note_seal()
        assert not two.content.note_seal(), "that is no news any more"
        assert two.content.proven
        await two.expect()
        assert two.counters.bytes_fetched == 0


async def test_who_has_found_damage_proves_for_himself(tmp_path: Path) -> None:
    with daemons(tmp_path) as (one, two):
        await one.expect(0, MIB)
        poke(tmp_path, "content", 10, bytes([DATA[10] ^ 1]))
        assert await two.read(0, MIB) == DATA[:MIB]
        assert two.counters.cache_refused == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.readahead.run)
            nursery.start_soon(two.readahead.run)
            await one.completion().prove(eager=True)
            assert not two.content.note_seal()
            await two.completion().prove(eager=True)
            nursery.cancel_scope.cancel()
        assert two.content.proven


async def test_what_was_proven_binds_the_source_when_the_disk_loses_it(tmp_path: Path) -> None:
    """Once sealed, a damaged chunk is fetched anew; other bytes for it are never served."""
    with daemons(tmp_path, 1) as (one,):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.readahead.run)
            await one.completion().prove(eager=True)
            nursery.cancel_scope.cancel()
    poke(tmp_path, "content", 10, bytes([DATA[10] ^ 1]))
    with daemons(tmp_path, 1) as (two,):
        assert two.content.proven
        await two.expect()
        assert (two.counters.cache_refused, two.counters.bytes_fetched) == (1, CHUNK)
    poke(tmp_path, "content", 10, bytes([DATA[10] ^ 1]))
    liar = Daemon(tmp_path, MemoryBlob(bytes(len(DATA))))
    assert liar.content.proven
    await _refused(liar)
    liar.content.close()


@pytest.mark.parametrize("seed", [b"", b"another!"])
async def test_without_the_seed_nothing_is_proven_and_all_is_fetched_anew(
    tmp_path: Path, seed: bytes
) -> None:
    with daemons(tmp_path, 1) as (one,):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.readahead.run)
            await one.completion().prove(eager=True)
            nursery.cancel_scope.cancel()
    (tmp_path / "seed").unlink()
    if seed:
        (tmp_path / "seed").write_bytes(seed)
    with daemons(tmp_path, 1) as (two,):
        assert not two.content.proven
        await two.expect()
        assert two.counters.bytes_fetched == len(DATA)


async def test_a_proof_learnt_of_binds_the_source_when_the_disk_loses_it(tmp_path: Path) -> None:
    one, liar = Daemon(tmp_path), Daemon(tmp_path, MemoryBlob(bytes(len(DATA))))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.readahead.run)
        await one.completion().prove(eager=True)
        nursery.cancel_scope.cancel()
    assert liar.content.note_seal()
    poke(tmp_path, "content", 10, bytes([DATA[10] ^ 1]))
    await _refused(liar)
    one.content.close()
    liar.content.close()


class NoRoom(Room):
    """A cache at its bound, until there is room."""

    full = True

    def take(self, count: int) -> None:
        if self.full:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


async def test_without_room_nothing_is_written_and_all_is_served(tmp_path: Path) -> None:
    with daemons(tmp_path, 1) as (before,):
        await before.expect(0, MIB)
    cache = Cache(tmp_path)
    cache.room = NoRoom()
    chunks = FixedChunks(len(DATA))
    file = open_cache_file(cache, Digest.of(DATA), TAG, len(DATA), len(chunks))
    blob, fetcher = MemoryBlob(DATA), Fetcher(FAST, Counters())
    content = LayerContent(blob, chunks, file, Lanes(SETTINGS), fetcher, SETTINGS)
    assert bytes(await content.read(WHOLE)) == DATA
    assert content.counters.chunks_from_cache == 4
    assert content.counters.cache_write_errors > 0
    content.close()


async def test_once_there_is_room_all_is_kept_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.room = room = NoRoom()
    file = open_cache_file(cache, Digest.of(DATA), TAG, len(DATA), len(FixedChunks(len(DATA))))
    with ExitStack() as stack:
        one = Daemon(tmp_path, cache=file)
        stack.callback(one.content.close)
        await one.expect(0, MIB)
        assert not one.content.holdings.keeps_all
        room.full = False
        await until(lambda: one.content.holdings.keeps_all)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.readahead.run)
            await one.completion().prove(eager=True)
            await fill(one.content, one.readahead, eager=True)
            nursery.cancel_scope.cancel()
        with daemons(tmp_path, 1) as (two,):
            await two.expect(MIB)
            assert two.counters.bytes_fetched == 0


async def test_when_the_leader_ends_another_goes_on(tmp_path: Path) -> None:
    with daemons(tmp_path) as (one, two):
        assert one.cache.locks.take_lead()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.readahead.run)
            nursery.start_soon(two.completion().run)
            await trio.sleep(0.1)
            assert two.counters.bytes_fetched == 0
            one.cache.locks.leave_lead()
            await until(lambda: two.content.proven)
            nursery.cancel_scope.cancel()


# -- locks --------------------------------------------------------------------------------------


def test_locks_are_the_files_and_go_with_it(tmp_path: Path) -> None:
    path = tmp_path / "marks"
    path.touch()
    with ExitStack() as files:
        fds = [files.enter_context(open(path, "r+b", buffering=0)) for _ in range(2)]
        one, two = (HostLocks(file.fileno()) for file in fds)
        assert one.take_fetch(3, 7, 0)
        assert not two.take_fetch(6, 9, 0)
        assert two.fetched_by_others(0, 100, 0) == (3, 7)
        assert one.fetched_by_others(0, 100, 0) is None
        assert two.take_fetch(7, 9, 0)
        assert two.take_fetch(3, 7, 1), "that is for who has waited in vain"
        one.beat(3, 7, turn=True)
        assert two.beat_of_others(6)
        assert not two.beat_of_others(7)
        one.leave_fetch(3, 5, 0)
        assert two.fetched_by_others(0, 100, 0) == (5, 7)
        assert not two.beat_of_others(3)
        with one.storing(5, 6, 0.1) as has_it, two.storing(5, 6, 0.01) as has_it_too:
            assert (has_it, has_it_too) == (True, False)
        assert one.take_lead()
        assert not two.take_lead()
        fds[0].close()
        assert two.take_lead()
        assert two.take_fetch(0, 100, 0)


def test_without_a_file_there_is_nobody_to_ask() -> None:
    locks = HostLocks(None)
    assert locks.take_fetch(0, 5, 0)
    assert locks.fetched_by_others(0, 5, 0) is None
    locks.beat(0, 5, turn=True)
    assert not locks.beat_of_others(0)
    assert locks.take_lead()
    with locks.storing(0, 1, 0.0) as has_it:
        assert has_it
    locks.leave_fetch(0, 5, 0)
    locks.leave_lead()

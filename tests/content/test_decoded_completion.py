"""A decoded blob is proven beside its readers, by what they were served."""

import random
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.decoded_completion import DecodedCompletion
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.marks import Marker
from lazyfs.content.readahead import Readahead
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import FixedChunks
from lazyfs.layers.model import ChunkMap
from lazyfs.transport.retry import Fetcher
from tests.blobs import MemoryBlob
from tests.content.collide import collide
from tests.streams import FAST, SETTINGS, TAG, Zlib, stream_index

DATA = random.Random(1).randbytes(5 * MIB) + bytes(MIB) + random.Random(2).randbytes(12345)
WHOLE = ByteRange(0, len(DATA))
CHUNK_BYTES = 300_000


class Parts(FixedChunks):
    """Even chunks of `DATA`, each packed by itself: for random access. The blob is those packed
    parts one after the other, behind the whole as one stream."""

    def __init__(self, data: bytes, parts: list[bytes], start: int) -> None:
        super().__init__(len(data), CHUNK_BYTES)
        self._ranges = []
        for part in parts:
            self._ranges.append(ByteRange(start, start + len(part)))
            start += len(part)

    def blob_range(self, index: int) -> ByteRange:
        return self._ranges[index]

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        yield zlib.decompress(data)


class First(Zlib):
    """Decodes the stream that the blob begins with; what follows is for `Parts`."""

    def decode(self, data: Data) -> Iterator[Data]:
        if not self._zlib.eof:
            yield from super().decode(data)


def make(data: bytes, random_access: bytes | None = None) -> tuple[MemoryBlob, ChunkMap]:
    """Return a blob of `data`, and chunks that say `random_access` instead, if that is given."""
    other = random_access if random_access is not None else data
    parts = [
        zlib.compress(other[at : at + CHUNK_BYTES], 1) for at in range(0, len(other), CHUNK_BYTES)
    ]
    packed = zlib.compress(data, 1)
    return MemoryBlob(packed + b"".join(parts)), Parts(other, parts, len(packed))


@contextmanager
def content_of(
    directory: Path | None, blob: MemoryBlob, chunks: ChunkMap, digest: Digest | None = None
) -> Iterator[tuple[LayerContent, DecodedCompletion]]:
    digest = digest or Digest.of(blob.data)
    cache = None
    if directory is not None:
        cache = open_cache_file(
            Cache(directory), digest, TAG, chunks.content_size_bytes, len(chunks)
        )
    content = LayerContent(
        blob, chunks, cache, Lanes(SETTINGS), Fetcher(FAST, Counters()), SETTINGS
    )
    try:
        yield content, DecodedCompletion(content, stream_index(First), digest, "the blob")
    finally:
        content.close()


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("read_before", [True, False])
async def test_a_blob_is_proven_and_stored(tmp_path: Path, eager: bool, read_before: bool) -> None:
    blob, chunks = make(DATA)
    told: list[tuple[int, int]] = []
    with content_of(tmp_path, blob, chunks) as (content, completion):
        if read_before:
            part = ByteRange(MIB, 4 * MIB)
            assert bytes(await content.read(part)) == DATA[MIB : 4 * MIB]
        with trio.fail_after(30):
            await completion.prove(eager=eager, on_progress=lambda *now: told.append(now))
        assert content.proven
        assert content.peek(WHOLE) == DATA
        assert told[-1] == (len(blob.data), len(blob.data)) == (completion.hashed_bytes,) * 2
    with content_of(tmp_path, blob, chunks) as (content, _):
        assert content.proven
        fetched = len(blob.asked)
        assert bytes(await content.read(WHOLE)) == DATA
        assert len(blob.asked) == fetched
        assert content.counters.cache_refused == 0


async def test_readers_beside_it_are_right(tmp_path: Path) -> None:
    blob, chunks = make(DATA)
    with content_of(tmp_path, blob, chunks) as (content, completion):
        readahead = Readahead(content)

        async def read(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(20):
                start = dice.randrange(len(DATA))
                stop = min(len(DATA), start + dice.choice([1, 5000, MIB]))
                assert bytes(await content.read(ByteRange(start, stop))) == DATA[start:stop]
                await trio.sleep(dice.random() / 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(readahead.run)
            async with trio.open_nursery() as readers:
                for seed in range(8):
                    readers.start_soon(read, seed)
                readers.start_soon(lambda: completion.prove(eager=True))
            nursery.cancel_scope.cancel()
        assert content.proven


async def test_without_a_disk_it_is_proven_too() -> None:
    blob, chunks = make(DATA)
    with content_of(None, blob, chunks) as (content, completion):
        await content.read(ByteRange(0, MIB))
        await completion.prove(eager=True)
        assert content.proven
        assert content.here_bytes() <= 2 * MIB, "nobody asked for the rest"


async def test_an_index_that_lies_is_found_out(tmp_path: Path) -> None:
    lie = bytearray(DATA)
    lie[3 * MIB] ^= 1
    blob, chunks = make(DATA, bytes(lie))
    with content_of(tmp_path, blob, chunks) as (content, completion):
        served = await content.read(ByteRange(3 * MIB, 3 * MIB + 1))
        assert bytes(served) != DATA[3 * MIB : 3 * MIB + 1]
        with pytest.raises(IntegrityError, match="other bytes than before"):
            await completion.prove(eager=True)
        with pytest.raises(IntegrityError):
            await content.read(ByteRange(0, 1))
    with content_of(tmp_path, blob, chunks) as (content, _):
        await content.read(ByteRange(0, 1))
        assert content.counters.chunks_from_cache == 0


async def test_a_lie_is_found_out_after_the_proof_too(tmp_path: Path) -> None:
    lie = bytearray(DATA)
    lie[3 * MIB] ^= 1
    blob, chunks = make(DATA, bytes(lie))
    with content_of(None, blob, chunks) as (content, completion):
        await completion.prove(eager=True)
        assert bytes(await content.read(ByteRange(0, MIB))) == DATA[:MIB]
        with pytest.raises(IntegrityError):
            await content.read(ByteRange(3 * MIB, 3 * MIB + 1))


@pytest.mark.parametrize("on_disk", [True, False])
async def test_a_lie_that_has_the_same_hash_is_found_out(tmp_path: Path, on_disk: bool) -> None:
    """Whoever knows the seed of the marks can make such bytes; sources do not."""
    lie = collide(DATA, b"A lie!!!")
    assert lie != DATA
    assert Marker(0).of(lie[:CHUNK_BYTES]) == Marker(0).of(DATA[:CHUNK_BYTES])
    blob, chunks = make(DATA, lie)
    with content_of(tmp_path if on_disk else None, blob, chunks) as (content, completion):
        assert bytes(await content.read(ByteRange(0, 8))) == b"A lie!!!"
        with pytest.raises(IntegrityError, match="other bytes than before"):
            await completion.prove(eager=True)


async def test_a_lie_of_before_that_is_being_checked_is_never_served(tmp_path: Path) -> None:
    """The pass comes by while what an earlier mount was told is looked at."""
    truth, lie = (bytes([version]) * CHUNK_BYTES for version in range(2))
    blob, chunks = make(truth, lie)
    with content_of(tmp_path, blob, chunks) as (content, _):
        assert bytes(await content.read(ByteRange(0, 10))) == lie[:10]
    with content_of(tmp_path, blob, chunks) as (content, _):
        flight = content.take_off((0, 1), Lane.DEMAND)
        content.witness(0, [content.holdings.marker.of(truth)])
        await content.conduct(flight)
        with pytest.raises(IntegrityError, match="other bytes than before"):
            await content.read(ByteRange(0, 10))


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, len(DATA) + CHUNK_BYTES])
async def test_an_index_of_another_size_is_found_out(tmp_path: Path, size: int) -> None:
    blob, chunks = make(DATA, DATA.ljust(size, b"x")[:size])
    with content_of(tmp_path, blob, chunks) as (content, completion):
        with pytest.raises(IntegrityError, match="index promises"):
            await completion.prove(eager=True)
        assert content.poison is not None


async def test_a_wrong_digest_condemns(tmp_path: Path) -> None:
    blob, chunks = make(DATA)
    with content_of(tmp_path, blob, chunks, Digest.of(b"other")) as (content, completion):
        with pytest.raises(IntegrityError, match="does not match its digest"):
            await completion.prove(eager=False)
        assert content.condemned.is_set()


async def test_a_broken_stream_condemns(tmp_path: Path) -> None:
    blob, chunks = make(DATA)
    broken = bytearray(blob.data)
    broken[MIB] ^= 1
    with content_of(tmp_path, MemoryBlob(bytes(broken)), chunks) as (content, completion):
        with pytest.raises(IntegrityError):
            await completion.prove(eager=True)
        assert content.condemned.is_set()


async def test_a_dead_source_ends_it_only_if_eager(tmp_path: Path) -> None:
    blob, chunks = make(DATA)

    def dead(_: ByteRange) -> None:
        raise FetchError("connection refused", transient=True)

    blob.before = dead
    with content_of(tmp_path, blob, chunks) as (content, completion):
        with pytest.raises(FetchError, match="refused"):
            await completion.prove(eager=True)
        with trio.move_on_after(1.0) as scope:
            await completion.prove(eager=False)
        assert scope.cancelled_caught
        assert content.poison is None


async def test_it_ends_when_the_content_is_condemned(tmp_path: Path) -> None:
    blob, chunks = make(DATA)
    with content_of(tmp_path, blob, chunks) as (content, completion):
        blob.before = lambda _: time.sleep(0.1)

        async def condemn() -> None:
            await trio.sleep(0.05)
            content.condemn(IntegrityError("a test"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(condemn)
            with trio.fail_after(10), pytest.raises(IntegrityError, match="a test"):
                await completion.prove(eager=True)

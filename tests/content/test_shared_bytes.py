"""Neighbours in the blob that share a byte, as the spans of a gzip blob do."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import CacheFile, open_cache_file
from lazyfs.content.landing import Landing
from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import FixedChunks
from lazyfs.transport.retry import Fetcher
from tests.blobs import MemoryBlob
from tests.streams import FAST, SETTINGS, TAG

CHUNK_BYTES = 1000


class Sharing(FixedChunks):
    """Chunks of 1,000 bytes of content; chunk i is made of any number of blob bytes."""

    def __init__(self, blob: bytes, ranges: list[ByteRange]) -> None:
        super().__init__(len(ranges) * CHUNK_BYTES, CHUNK_BYTES)
        self._blob = blob
        self._ranges = ranges
        self.content = b"".join(self._made_of(blob[start:stop]) for start, stop in ranges)

    def blob_range(self, index: int) -> ByteRange:
        return self._ranges[index]

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        start, stop = self._ranges[index]
        assert bytes(data) == self._blob[start:stop]
        yield self._made_of(data)

    @staticmethod
    def _made_of(data: Data) -> bytes:
        return random.Random(bytes(data)).randbytes(CHUNK_BYTES)


def sharing(sizes: Sequence[tuple[int, bool]]) -> tuple[MemoryBlob, Sharing]:
    """Make chunks of (blob bytes, whether the first of them is the last of the one before)."""
    ranges, stop = [], 7
    for size, shares in sizes:
        start = stop - 1 if shares and ranges else stop
        stop = start + size
        ranges.append(ByteRange(start, stop))
    blob = random.Random(1).randbytes(stop + 7)
    return MemoryBlob(blob), Sharing(blob, ranges)


def content_of(blob: MemoryBlob, chunks: Sharing, cache: CacheFile | None) -> LayerContent:
    return LayerContent(blob, chunks, cache, Lanes(SETTINGS), Fetcher(FAST, Counters()), SETTINGS)


def alternating(count: int) -> tuple[MemoryBlob, Sharing]:
    dice = random.Random(2)
    return sharing([(dice.choice([1, 2, 700, 5000]), dice.random() < 0.7) for _ in range(count)])


async def test_neighbours_come_in_one_request() -> None:
    blob, chunks = alternating(1000)
    content = content_of(blob, chunks, None)
    whole = ByteRange(0, len(chunks.content))
    assert bytes(await content.read(whole)) == chunks.content
    assert len(blob.asked) == 1 + blob.size_bytes // SETTINGS.demand_most_bytes
    assert content.counters.bytes_fetched <= blob.size_bytes + len(blob.asked)
    content.close()


async def test_what_is_here_between_them_is_passed_over(tmp_path: Path) -> None:
    blob, chunks = alternating(300)
    cache = open_cache_file(Cache(tmp_path), None, TAG, len(chunks.content), 300)
    content = content_of(blob, chunks, cache)
    content.settings = type(SETTINGS)(demand_least_bytes=1)
    for index in range(0, 300, 7):
        part = ByteRange(index * CHUNK_BYTES, index * CHUNK_BYTES + 1)
        assert bytes(await content.read(part)) == chunks.content[part.start : part.stop]
    asked = len(blob.asked)
    assert bytes(await content.read(ByteRange(0, len(chunks.content)))) == chunks.content
    assert len(blob.asked) == asked + 1
    content.close()


async def test_readahead_goes_through_them(tmp_path: Path) -> None:
    blob, chunks = alternating(5000)
    cache = open_cache_file(Cache(tmp_path), None, TAG, len(chunks.content), 5000)
    content = content_of(blob, chunks, cache)
    readahead = Readahead(content)
    file = FileReader(content, readahead, 0, len(chunks.content))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(readahead.run)
        for offset in range(0, len(chunks.content), 300_000):
            got = bytes(await file.read(offset, 300_000))
            assert got == chunks.content[offset : offset + 300_000]
        nursery.cancel_scope.cancel()
    assert content.counters.bytes_fetched <= blob.size_bytes + len(blob.asked)
    content.close()


class Collecting:
    """A shore that keeps what lands."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.got: dict[int, bytes] = {}

    def moved(self) -> None:
        pass

    def claim(self, index: int) -> bool:
        return True

    def store(self, first: int, pieces: Sequence[Data]) -> None:
        for index, piece in enumerate(pieces, first):
            assert index not in self.got
            self.got[index] = bytes(piece)

    def store_large(self, index: int, decode: object) -> None:
        raise AssertionError("no chunk is large")


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 1000, 300_000, 2 * MIB]), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    steps=st.lists(st.integers(1, 400_000), min_size=1, max_size=5),
)
def test_a_landing_decodes_them_however_they_come(
    sizes: list[tuple[int, bool]], steps: list[int]
) -> None:
    blob, chunks = sharing(sizes)
    shore = Collecting(0, len(sizes))
    landing = Landing(chunks, shore, lambda: None)
    at, stop = landing.byte_range
    turn = 0
    while at < stop:
        room = landing.space()
        count = min(len(room), steps[turn % len(steps)], stop - at)
        if not turn % 3:
            count = min(len(room), stop - at)
        assert count, "there must always be room"
        room[:count] = blob.data[at : at + count]
        room.release()
        landing.advance(count)
        at += count
        turn += 1
    landing.close()
    made = b"".join(shore.got[index] for index in range(len(sizes)))
    assert made == chunks.content

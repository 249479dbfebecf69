"""A place that gives wrong bytes is left; its readers get the right ones from another, or EIO."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.content.cache_file import CacheFile
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import ContentSettings, TransportSettings
from lazyfs.layers.chunks import FixedChunks
from lazyfs.transport.retry import Fetcher
from tests.blobs import MemoryBlob, Mirrored
from tests.content.test_proven_chunks import cache_for
from tests.images import zstd_chunked
from tests.layers.driving import open_layer

FILES = {f"pages-{n}.img": random.Random(n).randbytes(200_000) for n in range(1, 6)}
LAYER = zstd_chunked(FILES)
INDEX = open_layer(LAYER)
DATA = b"".join(data + bytes(-len(data) % 4096) for data in FILES.values())
SETTINGS = ContentSettings()
FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.3)


def flipped(*positions: int) -> bytes:
    """Return the blob with bits flipped."""
    data = bytearray(LAYER.blob)
    for position in positions:
        data[position] ^= 4
    return bytes(data)


def chunk_at(content: int) -> ByteRange:
    """Return where the chunk that holds a content byte lies in the blob."""
    return INDEX.chunks.blob_range(INDEX.chunks.index_at(content))


@contextmanager
def content_from(
    blob: Mirrored, cache: CacheFile | None = None
) -> Iterator[tuple[LayerContent, Counters]]:
    counters = Counters()
    fetcher = Fetcher(FAST, counters)
    content = LayerContent(blob, INDEX.chunks, cache, Lanes(SETTINGS), fetcher, SETTINGS)
    try:
        yield content, counters
    finally:
        content.close()


async def read_all(content: LayerContent) -> dict[str, bytes]:
    start, got = 0, {}
    for name, data in FILES.items():
        got[name] = bytes(await content.read(ByteRange(start, start + len(data))))
        start += len(data) + -len(data) % 4096
    return got


@pytest.mark.parametrize("on_disk", [True, False])
async def test_the_flight_lands_anew_from_another_place(
    tmp_path: Path, on_disk: bool, caplog: pytest.LogCaptureFixture
) -> None:
    liar = MemoryBlob(flipped(chunk_at(450_000).start + 9), "liar")
    honest = MemoryBlob(LAYER.blob, "honest")
    blob = Mirrored(liar, honest)
    cache = cache_for(tmp_path, FILES) if on_disk else None
    with content_from(blob, cache) as (content, counters):
        assert await read_all(content) == FILES
        assert counters.places_refused == 1
        assert content.poison is None
        asked = len(liar.asked)
        assert await read_all(content) == FILES
        assert len(liar.asked) == asked, "it is never asked again"
    warnings = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("liar gave wrong bytes and is asked no more: ")


@pytest.mark.parametrize("lie_at", [9, 300])
async def test_who_lies_and_hangs_up_is_not_believed_over_who_goes_on(lie_at: int) -> None:
    """The first part of a chunk is wrong, and the connection ends: the next place is honest."""
    chunk = chunk_at(450_000)
    liar = MemoryBlob(flipped(chunk.start + lie_at), "liar")
    honest = MemoryBlob(LAYER.blob, "honest")
    blob = Mirrored(liar, honest)

    def until_within_the_chunk(wanted: ByteRange) -> None:
        liar.cut_after = chunk.start + 500 - wanted.start

    liar.before = until_within_the_chunk
    liar.piece_bytes = 100
    with content_from(blob) as (content, counters):
        assert await read_all(content) == FILES
        assert content.poison is None
        assert all(each.health.lie is None for each in blob.all if each.blob is honest)
        assert counters.places_refused == 0, "of what it gave nothing was used"


async def test_when_all_lie_the_layer_is_condemned(caplog: pytest.LogCaptureFixture) -> None:
    at = chunk_at(0).start + 20
    blob = Mirrored(MemoryBlob(flipped(at), "one"), MemoryBlob(flipped(at + 1), "other"))
    with content_from(blob) as (content, counters):
        with pytest.raises(IntegrityError):
            await content.read(ByteRange(0, 10))
        assert counters.places_refused == 2
        assert content.poison is not None
        with pytest.raises(IntegrityError):
            await content.read(ByteRange(800_000, 800_010))


async def test_readers_beside_each_other_all_get_right_bytes() -> None:
    liar = MemoryBlob(flipped(*range(100, len(LAYER.blob) // 2, 1000)), "liar")
    blob = Mirrored(liar, MemoryBlob(LAYER.blob, "honest"))
    with content_from(blob) as (content, counters):

        async def read(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(20):
                start = dice.randrange(len(DATA) - 5000)
                lane = dice.choice([Lane.DEMAND, Lane.READAHEAD])
                index = INDEX.chunks.index_at(start)
                stop = INDEX.chunks.content_start(index) + INDEX.chunks.content_size(index)
                got = bytes(await content.read(ByteRange(start, stop), lane))
                assert got == DATA[start:stop]

        async with trio.open_nursery() as nursery:
            for seed in range(12):
                nursery.start_soon(read, seed)
        assert content.poison is None
        assert 1 <= counters.places_refused <= 12


async def test_a_condemned_layer_blames_no_place() -> None:
    """Its landings end for a reason that the place they fetch from has not given."""
    data = random.Random(1).randbytes(2_000_000)
    blob = Mirrored(MemoryBlob(data, "one"), MemoryBlob(data, "other"))
    fetcher = Fetcher(FAST, Counters())
    chunks = FixedChunks(len(data))
    content = LayerContent(blob, chunks, None, Lanes(SETTINGS), fetcher, SETTINGS)
    blob.all[0].blob.before = lambda _: content.condemn(  # type: ignore[attr-defined]
        IntegrityError("another layer is wrong"), guilty=False
    )
    with pytest.raises(IntegrityError, match="another layer"):
        await content.read(ByteRange(0, 10))
    assert all(place.health.lie is None for place in blob.all)


@settings(max_examples=60)
@given(
    lies=st.lists(
        st.lists(st.integers(0, len(LAYER.blob) - 1), max_size=3), min_size=1, max_size=4
    ),
    reads=st.lists(st.integers(0, len(FILES) - 1), min_size=1, max_size=6),
)
def test_no_wrong_byte_from_any_places(lies: list[list[int]], reads: list[int]) -> None:
    blob = Mirrored(*(MemoryBlob(flipped(*each), f"p{n}") for n, each in enumerate(lies)))
    names = list(FILES)

    async def main() -> None:
        with content_from(blob) as (content, _):
            for number in reads:
                start = number * (200_000 + -200_000 % 4096)
                try:
                    got = await content.read(ByteRange(start, start + 200_000))
                except IntegrityError:
                    assert all(place.health.lie is not None for place in blob.all)
                    assert all(lies)
                else:
                    assert got == FILES[names[number]]

    trio.run(main)

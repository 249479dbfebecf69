"""Chunks with digests, through the content: large ones, zeros, no disk, images of another mind."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import CacheFile, open_cache_file
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.content.shelf import memory_bytes
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB, ContentSettings, TransportSettings
from lazyfs.layers.model import LayerIndex
from lazyfs.transport.retry import Fetcher
from tests.blobs import MemoryBlob
from tests.images import zstd_chunked
from tests.layers.driving import open_layer

LARGE = bytes(range(256)) * (3 * MIB // 256)
"""One chunk of 3 MiB: larger than what is decoded in one piece."""
ZEROS = bytes(2 * MIB)
FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.3)


@contextmanager
def content_of(
    files: dict[str, bytes], cache: CacheFile | None, settings: ContentSettings | None = None
) -> Iterator[tuple[LayerContent, MemoryBlob, LayerIndex]]:
    layer = zstd_chunked(files)
    index = open_layer(layer)
    blob = MemoryBlob(layer.blob)
    settings = settings or ContentSettings()
    content = LayerContent(
        blob, index.chunks, cache, Lanes(settings), Fetcher(FAST, Counters()), settings
    )
    try:
        yield content, blob, index
    finally:
        content.close()


def cache_for(directory: Path, files: dict[str, bytes]) -> CacheFile:
    layer = zstd_chunked(files)
    index = open_layer(layer)
    return open_cache_file(
        Cache(directory),
        Digest.parse(layer.digest),
        index.cache_tag,
        index.chunks.content_size_bytes,
        len(index.chunks),
    )


async def whole(content: LayerContent, size: int) -> bytes:
    return bytes(await content.read(ByteRange(0, size)))


async def test_a_large_chunk_without_a_disk_is_right() -> None:
    with content_of({"pages-1.img": LARGE}, None) as (content, _, _):
        assert await whole(content, len(LARGE)) == LARGE


async def test_a_large_chunk_on_disk_is_right(tmp_path: Path) -> None:
    files = {"pages-1.img": LARGE}
    with content_of(files, cache_for(tmp_path, files)) as (content, _, _):
        assert await whole(content, len(LARGE)) == LARGE


async def test_another_toc_finds_nothing_of_ours(tmp_path: Path) -> None:
    good, evil = {"pages-1.img": b"good" * 1000}, {"pages-1.img": b"evil" * 1000}
    assert open_layer(zstd_chunked(good)).cache_tag != open_layer(zstd_chunked(evil)).cache_tag


async def test_a_cancelled_check_of_the_cache_is_made_again(tmp_path: Path) -> None:
    files = {"pages-1.img": random.Random(3).randbytes(MIB) + ZEROS}
    data = files["pages-1.img"]
    with content_of(files, cache_for(tmp_path, files)) as (content, _, _):
        assert await whole(content, len(data)) == data
    with content_of(files, cache_for(tmp_path, files)) as (content, blob, _):

        def dead(_: ByteRange) -> None:
            raise FetchError("the source is down", transient=True)

        blob.before = dead
        with trio.CancelScope() as scope:
            scope.cancel()
            await content.ensure(ByteRange(0, len(data)), Lane.DEMAND)
        assert scope.cancelled_caught
        with trio.fail_after(10):
            assert await whole(content, len(data)) == data


async def test_readahead_without_a_disk_comes_to_rest() -> None:
    data = random.Random(4).randbytes(12 * MIB)
    settings = ContentSettings(memory_cache_bytes=2 * MIB)
    with content_of({"pages-1.img": data}, None, settings) as (content, _, _):
        readahead = Readahead(content)
        file = FileReader(content, readahead, 0, len(data))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readahead.run)
            for offset in range(0, 6 * MIB, MIB):
                assert bytes(await file.read(offset, MIB)) == data[offset : offset + MIB]
            with trio.fail_after(20):
                await trio.testing.wait_all_tasks_blocked(0.2)
            nursery.cancel_scope.cancel()
        assert content.counters.bytes_fetched < len(data)


@pytest.mark.parametrize("settle", [True, False])
async def test_a_bug_in_a_fetch_is_one_error(settle: bool) -> None:
    data = random.Random(5).randbytes(4 * MIB)
    with content_of({"pages-1.img": data}, None) as (content, blob, _):

        def broken(_: ByteRange) -> None:
            raise RuntimeError("can't start new thread")

        blob.before = broken
        readahead = Readahead(content)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readahead.run)
            readahead.fill(ByteRange(0, len(data)), eager=settle)
            await trio.testing.wait_all_tasks_blocked(0.05)
            blob.before = None
            assert await whole(content, len(data)) == data
            nursery.cancel_scope.cancel()


async def test_zeros_do_not_cut_a_request(tmp_path: Path) -> None:
    dice = random.Random(6)
    block = 64 * 1024
    data = b"".join(dice.randbytes(block) if n % 3 else bytes(block) for n in range(48))
    with content_of({"pages-1.img": data}, None) as (content, blob, index):
        assert len(index.chunks.zero_chunks()) > 5
        assert await whole(content, len(data)) == data
        assert len(blob.asked) <= 2


async def test_looking_at_zeros_takes_no_memory() -> None:
    """In memory a hole that is looked at is a page, and where there is none for it a SIGBUS."""
    data = ZEROS + random.Random(7).randbytes(MIB)
    files = {"pages-1.img": data}
    index = open_layer(zstd_chunked(files))
    size_bytes = index.chunks.content_size_bytes
    cache = open_cache_file(Cache.memory(), None, "it", size_bytes, len(index.chunks))
    with content_of(files, cache) as (content, _, _):
        before_bytes = memory_bytes()
        assert await whole(content, len(ZEROS)) == ZEROS
        assert memory_bytes() - before_bytes < MIB
        assert await whole(content, len(data)) == data

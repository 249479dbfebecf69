"""All of a layer brought here because somebody asked for it, behind those who read."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.completion import Completion
from lazyfs.content.fill import fill
from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import Readahead
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB, ContentSettings, TransportSettings
from lazyfs.layers.chunks import FixedChunks
from lazyfs.transport.retry import Fetcher
from tests.blobs import Gate, MemoryBlob

DATA = random.Random(1).randbytes(20 * MIB + 12345)
FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.2)
BUSY = ContentSettings(idle_s=3600.0)
"""As where readers never rest: what is done at leisure is never done."""


class Opened:
    """A content with its readahead running."""

    def __init__(self, blob: MemoryBlob, directory: Path | None, settings: ContentSettings) -> None:
        self.blob = blob
        chunks = FixedChunks(len(DATA))
        cache = None
        if directory is not None:
            home = Cache(directory)
            cache = open_cache_file(home, Digest.of(DATA), "t", len(DATA), len(chunks))
        self.counters = Counters()
        fetcher = Fetcher(FAST, self.counters)
        self.content = LayerContent(blob, chunks, cache, Lanes(settings), fetcher, settings)
        self.readahead = Readahead(self.content)


@asynccontextmanager
async def opened(
    directory: Path | None, data: bytes = DATA, settings: ContentSettings = BUSY
) -> AsyncIterator[Opened]:
    it = Opened(MemoryBlob(data), directory, settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.readahead.run)
        try:
            yield it
        finally:
            nursery.cancel_scope.cancel()
    it.content.close()


@pytest.mark.parametrize("eager", [False, True])
async def test_all_of_it_is_here_afterwards(tmp_path: Path, eager: bool) -> None:
    told: list[tuple[int, int]] = []
    async with opened(tmp_path) as it:
        with trio.fail_after(60):
            await fill(
                it.content, it.readahead, eager=eager, on_progress=lambda *each: told.append(each)
            )
        assert it.content.here_bytes() == len(DATA)
        assert bytes(it.content.peek(ByteRange(0, len(DATA))) or b"") == DATA
        assert sum(each.size_bytes for each in it.blob.asked) == len(DATA)
    assert told[-1] == (len(DATA), len(DATA))
    assert told == sorted(told)
    async with opened(tmp_path) as it:
        await fill(it.content, it.readahead, eager=eager)
        assert (it.blob.asked, it.content.here_bytes()) == ([], len(DATA))
        assert it.counters.chunks_from_cache > 0


async def test_a_reader_does_not_wait_for_it(tmp_path: Path) -> None:
    """All that is asked for in the background is held up: a demand read has its own connection."""
    async with opened(tmp_path) as it:
        gate = it.blob.before = Gate()
        async with trio.open_nursery() as nursery:

            async def whole() -> None:
                await fill(it.content, it.readahead, eager=True)

            nursery.start_soon(whole)
            await trio.to_thread.run_sync(gate.wait_entered)
            it.blob.before = None
            with trio.fail_after(20):
                last = ByteRange(len(DATA) - 4096, len(DATA))
                assert bytes(await it.content.read(last)) == DATA[-4096:]
            assert not it.content.is_here(ByteRange(0, 4096))
            gate.open()
        assert it.content.here_bytes() == len(DATA)


async def test_where_the_source_is_gone_it_is_said_and_can_be_asked_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.blob.cut_after = 0
        with pytest.raises(FetchError), trio.fail_after(60):
            await fill(it.content, it.readahead, eager=False)
        it.blob.cut_after = None
        with trio.fail_after(60):
            while it.content.is_fetching:
                await it.content.wait_news()
            await fill(it.content, it.readahead, eager=False)


async def test_what_memory_cannot_hold_is_not_begun() -> None:
    few = ContentSettings(idle_s=3600.0, memory_cache_bytes=8 * MIB)
    async with opened(None, settings=few) as it:
        with pytest.raises(LazyfsError, match="does not take all of its"):
            await fill(it.content, it.readahead, eager=True)
        assert it.blob.asked == []
    async with opened(None) as it:
        await fill(it.content, it.readahead, eager=True)
        assert it.content.here_bytes() == len(DATA)


async def test_a_proof_that_somebody_waits_for_hurries(tmp_path: Path) -> None:
    """At leisure it would begin once readers rest."""
    told: list[tuple[int, int]] = []
    async with opened(tmp_path) as it, trio.open_nursery() as nursery:
        proof = Completion(it.content, it.readahead, Digest.of(DATA), "the blob")
        nursery.start_soon(proof.run)
        await trio.testing.wait_all_tasks_blocked()
        assert it.blob.asked == []
        with trio.fail_after(60):
            await proof.hurry(lambda *each: told.append(each))
        assert it.content.proven
        assert told[-1][1] == len(DATA)
        nursery.cancel_scope.cancel()


async def test_a_hurried_proof_fails_as_any_other(tmp_path: Path) -> None:
    wrong = bytearray(DATA)
    wrong[MIB] ^= 1
    async with opened(tmp_path, bytes(wrong)) as it, trio.open_nursery() as nursery:
        proof = Completion(it.content, it.readahead, Digest.of(DATA), "the blob")
        nursery.start_soon(proof.run)
        with pytest.raises(IntegrityError, match="does not match its digest"), trio.fail_after(60):
            await proof.hurry()
        nursery.cancel_scope.cancel()

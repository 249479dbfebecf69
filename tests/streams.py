"""Toy decoders of streams, and contents made of them."""

import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from lazyfs.content.cache import Cache
from lazyfs.content.lanes import Lanes
from lazyfs.content.streamed import StreamedContent
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import MIB, ContentSettings, TransportSettings
from lazyfs.layers.chunks import FixedChunks
from lazyfs.layers.model import LayerIndex, StreamDecoder, StreamIndex
from lazyfs.layers.tar import walk_tar
from lazyfs.transport.retry import Fetcher
from tests.blobs import MemoryBlob

FAST = TransportSettings(backoff_first_s=0.001, backoff_most_s=0.01, deadline_s=0.3)
SETTINGS = ContentSettings(idle_s=0.0)
TAG = "toy"


class Identity:
    """Content and blob are the same; a piece is good until the next, as the model says."""

    def __init__(self, piece_bytes: int = 64 * 1024, indexed: bool = False) -> None:
        self._buffer = bytearray(piece_bytes)
        self._size_bytes = 0
        self._indexed = indexed

    def decode(self, data: Data) -> Iterator[Data]:
        view = memoryview(data)
        for start in range(0, len(view), len(self._buffer)):
            piece = view[start : start + len(self._buffer)]
            self._buffer[: len(piece)] = piece
            yield memoryview(self._buffer)[: len(piece)]
        self._size_bytes += len(view)

    def finish(self) -> None:
        pass

    def restart_index(self) -> bytes | None:
        return str(self._size_bytes).encode() if self._indexed else None


class Zlib:
    """One zlib stream."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj()

    def decode(self, data: Data) -> Iterator[Data]:
        try:
            while data and not self._zlib.eof:
                piece = self._zlib.decompress(bytes(data), MIB)
                data = self._zlib.unconsumed_tail
                if piece:
                    yield piece
        except zlib.error as error:
            raise MalformedError(f"not zlib: {error}") from error

    def finish(self) -> None:
        if not self._zlib.eof:
            raise MalformedError("the zlib stream is cut off")

    def restart_index(self) -> None:
        return None


def reopen(data: Data) -> LayerIndex:
    """Open what `Identity` gave as its index."""
    if not bytes(data).isdigit():
        raise MalformedError("no index")
    size_bytes = int(bytes(data))
    entries: list[object] = []
    return LayerIndex(
        "toy",
        TAG,
        FixedChunks(size_bytes, 100_000),
        entries,  # type: ignore[arg-type]
        walk_tar(size_bytes, entries),  # type: ignore[arg-type]
    )


def stream_index(decoder: Callable[[], StreamDecoder] = Identity) -> StreamIndex:
    return StreamIndex("toy", TAG, decoder)


def indexed_stream() -> StreamIndex:
    return StreamIndex("toy", TAG, partial(Identity, indexed=True), reopen)


class Setup:
    """A streamed content, and what it was made of."""

    def __init__(
        self,
        blob: MemoryBlob,
        cache: Path | Cache,
        digest: Digest | None,
        stream: StreamIndex,
        transport: TransportSettings = FAST,
        settings: ContentSettings = SETTINGS,
        source_key: str | None = "here",
    ) -> None:
        self.blob = blob
        self.counters = Counters()
        self.ended = False
        self.content = StreamedContent(
            blob,
            stream,
            digest,
            cache if isinstance(cache, Cache) else Cache(cache),
            Lanes(settings),
            Fetcher(transport, self.counters),
            settings,
            source_key=source_key,
        )

    async def run(self) -> None:
        await self.content.run()
        self.ended = True


@asynccontextmanager
async def streamed(
    cache: Path | Cache,
    blob: MemoryBlob | bytes,
    stream: StreamIndex | None = None,
    digest: Digest | str | None = "right",
    **more: Any,
) -> AsyncIterator[Setup]:
    """Run a streamed content; what is not said is as it should be."""
    blob = blob if isinstance(blob, MemoryBlob) else MemoryBlob(blob)
    if isinstance(digest, str):
        digest = Digest.of(blob.data)
    setup = Setup(blob, cache, digest, stream or stream_index(), **more)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(setup.run)
            with trio.fail_after(30):
                yield setup
            nursery.cancel_scope.cancel()
    finally:
        setup.content.close()


async def whole_run(cache_dir: Path, blob: MemoryBlob | bytes, stream: StreamIndex) -> Counters:
    """Have all of a content, and if that took a pass, have it left for later mounts."""
    async with streamed(cache_dir, blob, stream) as setup:
        await setup.content.prove()
        while setup.counters.bytes_fetched and not setup.ended:  # noqa: ASYNC110 - for a test
            await trio.sleep(0.01)
    return setup.counters


def growing_in(cache_dir: Path) -> list[Path]:
    """List the directories of passes that have not left anything yet."""
    return [path.parent for path in cache_dir.glob("incoming/*/content")]


def kept_in(cache_dir: Path) -> list[Path]:
    """List what later mounts will find."""
    return list(cache_dir.glob("layers/*"))


async def wait_kept(cache_dir: Path) -> None:
    """Come back when there is something that later mounts will find."""
    with trio.fail_after(10):
        while not kept_in(cache_dir):  # noqa: ASYNC110 - a file
            await trio.sleep(0.01)

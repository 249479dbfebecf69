"""From a reference to a tree whose files can be read: all floors below, put together once."""

import logging
import mmap
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from lazyfs.checkpoint import image as images
from lazyfs.checkpoint.engines import origin_of
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.checkpoint.tree import Node, Tree
from lazyfs.content.cache_file import CacheFile, open_cache_file
from lazyfs.content.completion import Completion
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.layer_content import LayerContent, at_once
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    MalformedError,
    NotACheckpoint,
    SourceError,
    UnsupportedLayer,
    raise_sole_error,
)
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import MIB, ContentSettings, TransportSettings
from lazyfs.layers import table
from lazyfs.layers.model import Entry, EntryType, LayerDescriptor, LayerIndex
from lazyfs.transport import retry
from lazyfs.transport.blob import Blob

log = logging.getLogger(__name__)

INVENTORY = "inventory.img"
"""Every CRIU images directory holds one, and CRIU reads it first."""

_STEP_BYTES = MIB
_COALESCE_BYTES = MIB
_CONTENT_LIMIT_BYTES = 1 << 44
_LARGE_TABLE_CHUNKS = 50_000
"""From here on a chunk table goes into a file: the daemon stays small whatever the image is."""


@dataclass(frozen=True)
class OpenConfig:
    """What opening a checkpoint takes beside its reference."""

    cache_dir: Path
    transport: TransportSettings = field(default_factory=TransportSettings)
    content: ContentSettings = field(default_factory=ContentSettings)
    on_proof: Callable[[int, int], None] | None = None
    """Told how many bytes of how many are hashed, while a whole layer is proven beforehand."""


class OpenedCheckpoint:
    """A checkpoint that is being read. From `open_checkpoint`."""

    def __init__(
        self,
        image: ResolvedImage,
        layer: LayerDescriptor,
        index: LayerIndex,
        content: LayerContent,
        tree: Tree,
    ) -> None:
        """`content` is closed by whoever opened it."""
        self.image = image
        self.layer = layer
        self.index = index
        self.content = content
        self.tree = tree
        self.readahead = Readahead(content)
        self.counters = content.counters
        self.images_directory = find_images_directory(tree)
        self.completion: Completion | None = None
        if layer.digest is not None and not index.chunks.proven:
            self.completion = Completion(
                content, self.readahead, layer.digest, f"layer {layer.digest}"
            )

    @property
    def reference(self) -> str:
        """What was opened, pinned by digest where it has one."""
        return self.image.reference

    def reader(self, node: Node) -> FileReader:
        """Return a reader of a file of the tree."""
        return FileReader(self.content, self.readahead, node.content_start, node.size_bytes)

    async def read_file(self, path: str, limit_bytes: int) -> bytes:
        """Return a small file whole.

        Raises:
            NotACheckpoint: there is no such file.
            MalformedError: it is larger than `limit_bytes`.
            IntegrityError, FetchError, SourceError: it cannot be read.
        """
        node = self._file(path)
        if node.size_bytes > limit_bytes:
            raise MalformedError(
                f"{path!r} is {node.size_bytes} bytes; at most {limit_bytes} are believed"
            )
        return bytes(await self.reader(node).read(0, node.size_bytes))

    async def stream_file(self, path: str) -> AsyncIterator[Data]:
        """Yield a file's bytes in order, fetched ahead."""
        node = self._file(path)
        reader = self.reader(node)
        for offset in range(0, node.size_bytes, _STEP_BYTES):
            yield await reader.read(offset, _STEP_BYTES)

    async def prefetch(self, paths: Iterable[str]) -> None:
        """Fetch files at once, neighbours in one request; names that are not there are not."""
        nodes = [self.tree.find(path) for path in paths]
        ranges = [
            ByteRange(node.content_start, node.content_start + node.size_bytes)
            for node in nodes
            if node is not None and node.type is EntryType.FILE and node.size_bytes
        ]
        await _ensure(self.content, ranges, Lane.READAHEAD)

    async def prove(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Prove the whole layer, if its chunks do not prove themselves.

        Raises:
            IntegrityError: it is not what its digest promises.
            FetchError, SourceError: it could not be had.
        """
        if self.completion is not None and not self.content.holdings.sealed:
            await self.completion.prove(eager=True, on_progress=on_progress)
        elif self.layer.digest is None:
            log.warning("%s has no digest that it could be verified by", self.reference)

    def _file(self, path: str) -> Node:
        node = self.tree.find(path)
        if node is None:
            raise NotACheckpoint(f"there is no {path!r} in {self.reference}")
        if node.type is not EntryType.FILE:
            raise NotACheckpoint(f"{path!r} in {self.reference} is a {node.type.value}, no file")
        return node


@asynccontextmanager
async def open_checkpoint(
    reference: str, config: OpenConfig, counters: Counters | None = None
) -> AsyncIterator[OpenedCheckpoint]:
    """Resolve `reference`, open its layer, find its files; readahead runs until the exit.

    Raises:
        UsageError: the reference is none.
        SourceError: the image cannot be had.
        NotACheckpoint, UnsupportedLayer, MalformedError: it is nothing that can be shown.
        IntegrityError: bytes contradict their digest.
    """
    counters = counters if counters is not None else Counters()
    parsed = parse_reference(reference)
    image = await trio.to_thread.run_sync(
        images.resolve, parsed, config.transport, counters, abandon_on_cancel=True
    )
    content: LayerContent | None = None
    try:
        with _named(image.reference):
            layer, index, blob = await _open_layer(image, config, counters)
        cache = _open_cache(config.cache_dir, image.reference, layer, index)
        content = LayerContent(
            blob,
            index.chunks,
            cache,
            Lanes(config.content),
            counters,
            config.content,
            config.transport,
        )
        with _named(image.reference):
            tree = Tree(await _entries(index, content))
        checkpoint = OpenedCheckpoint(image, layer, index, content, tree)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(checkpoint.readahead.run)
            if config.content.verify_full:
                await checkpoint.prove(config.on_proof)
            yield checkpoint
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise_sole_error(group)
    finally:
        if content is not None:
            content.close()
        image.close()


@contextmanager
def _named(reference: str) -> Iterator[None]:
    """Say of which image it is that a format finds fault with the bytes."""
    try:
        yield
    except MalformedError as error:
        raise MalformedError(f"{reference}: {error}") from error


def find_images_directory(tree: Tree) -> str | None:
    """Return the path of CRIU's images directory: that of the inventory nearest to the root.

    Of several at one depth `checkpoint`, as Podman, CRI-O and containerd name it, then the
    first by name. None if there is none.
    """
    found = [
        path.rpartition("/")[0]
        for path, node in tree.walk(tree.root)
        if node.name == INVENTORY and node.type is EntryType.FILE
    ]
    return min(found, key=lambda path: (_depth(path), path != "checkpoint", path), default=None)


def _depth(path: str) -> int:
    return path.count("/") + 1 if path else 0


async def _open_layer(
    image: ResolvedImage, config: OpenConfig, counters: Counters
) -> tuple[LayerDescriptor, LayerIndex, Blob]:
    try:
        layer = image.sole_layer()
        layer_format = table.choose(layer)
    except UnsupportedLayer as error:
        media_types = [item.media_type for item in image.layers]
        if origin_of(image.annotations, {}, media_types, ()).recognised_by is not None:
            raise
        described = await trio.to_thread.run_sync(image.describe)
        message = f"{image.reference} does not look like a checkpoint: it is {described}"
        if not image.artifact_type:
            message += f". If it is one all the same: {error}"
        raise NotACheckpoint(message) from error
    blob = image.open_blob(layer)
    prelude = await _read_ranges(blob, layer_format.prelude(layer), config, counters)
    index = await trio.to_thread.run_sync(layer_format.open, layer, prelude)
    if len(index.chunks) > _LARGE_TABLE_CHUNKS:
        with suppress(OSError):
            index.chunks.relocate(partial(_keep_in_file, config.cache_dir))
    if index.chunks.content_size_bytes > _CONTENT_LIMIT_BYTES:
        raise MalformedError(f"a layer of {index.chunks.content_size_bytes} bytes is not believed")
    return layer, index, blob


def _open_cache(
    cache_dir: Path, reference: str, layer: LayerDescriptor, index: LayerIndex
) -> CacheFile | None:
    chunks = index.chunks
    tag = index.cache_tag
    if not chunks.proven:
        source = reference.partition("@")[0]
        tag += "-" + Digest.of(source.encode()).hex[:16]
    try:
        return open_cache_file(cache_dir, layer.digest, tag, chunks.content_size_bytes, len(chunks))
    except OSError as error:
        log.warning("no cache in %s (%s): what is read is kept in memory", cache_dir, error)
        return None


async def _entries(index: LayerIndex, content: LayerContent) -> list[Entry]:
    """Drive a format's walk: fetch what it wants to see, all of one round at once."""
    walk = index.walk
    try:
        wanted = next(walk)
        while True:
            await _ensure(content, wanted, Lane.DEMAND)
            wanted = walk.send([bytes(await content.read(item)) for item in wanted])
    except StopIteration as stop:
        entries: list[Entry] = stop.value
        return entries
    finally:
        walk.close()


async def _ensure(content: LayerContent, ranges: Iterable[ByteRange], lane: Lane) -> None:
    """Have ranges fetched at once, as few requests as their distances allow."""
    merged = list(coalesce(ranges, _COALESCE_BYTES))
    if merged:
        await at_once([partial(content.ensure, item, lane) for item in merged])


class _Collector:
    """A sink that keeps what comes, in a mapped file if it can be.

    An index may be large, and a file's pages are not the daemon's own memory.
    """

    def __init__(self, size_bytes: int, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, max(1, size_bytes))
                self._map = mmap.mmap(file.fileno(), max(1, size_bytes))
        except OSError:
            self._map = mmap.mmap(-1, max(1, size_bytes))
        self.data = memoryview(self._map)[:size_bytes]
        self._fill = 0

    def space(self) -> memoryview:
        return self.data[self._fill :]

    def advance(self, count: int) -> None:
        self._fill += count


def _keep_in_file(directory: Path, data: Data) -> memoryview:
    """Return a copy of `data` that lies in a nameless file and is mapped for reading."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += file.write(view[written:])
        return memoryview(mmap.mmap(file.fileno(), len(view), prot=mmap.PROT_READ))


async def _read_ranges(
    blob: Blob, ranges: Sequence[ByteRange], config: OpenConfig, counters: Counters
) -> list[Data]:
    """Fetch blob ranges whole, at once."""
    limiter = trio.CapacityLimiter(max(1, len(ranges)))
    if any(item.stop > blob.size_bytes for item in ranges):
        raise SourceError(f"{blob.name} is smaller than its own index says")
    sinks = [_Collector(item.size_bytes, config.cache_dir) for item in ranges]
    fetches = [
        partial(
            retry.fetch,
            blob,
            item,
            sink,
            settings=config.transport,
            limiter=limiter,
            counters=counters,
        )
        for item, sink in zip(ranges, sinks, strict=True)
    ]
    if fetches:
        await at_once(fetches)
    return [sink.data for sink in sinks]

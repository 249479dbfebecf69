"""What will be asked of an image's layers as it is opened, asked for before that begins.

Decides which ranges: the table of contents that annotations name, a plain tar's headers, else the
first bytes, by which a format is told. Whoever opens the layer asks for the same ranges in its own
way, and is given what has come (`transport/begun.py`); where the guess was wrong, or the range
failed, it asks the source. So nothing here is ever an error, and nothing is believed.

Nothing is begun for a layer of which the cache has something, for a stub, which will not be read,
and for what cannot be begun: files.

Blocks, in the thread of `ahead.py`. Imports no trio, and nothing that does.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress

from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.stub import ANNOTATION
from lazyfs.content.cache import Cache
from lazyfs.content.documents import name_of
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import MIB
from lazyfs.layers import table
from lazyfs.layers.chunks import FIXED_CHUNK_BYTES
from lazyfs.layers.model import HEAD_BYTES, Entry, LayerDescriptor
from lazyfs.layers.tar import Tar, looks_like_tar, walk_tar
from lazyfs.transport.begun import BeginsRanges, result_of

_LAYERS_MOST = 4
_BYTES_MOST = 16 * MIB
"""Of all layers; begun ranges are in memory until they are asked for."""
_RANGES_MOST = 16
_GAP_BYTES = MIB
"""As whoever walks a layer bridges gaps."""
_PATIENCE_S = 5.0


def begin_layers(image: ResolvedImage, cache: Cache) -> None:
    """Begin what will be asked of the layers first; come back when there is no more to foretell."""
    if not image.is_remote or ANNOTATION in image.annotations:
        return
    budget = _Budget()
    walks: list[tuple[LayerDescriptor, BeginsRanges, Future[bytes]]] = []
    with suppress(LazyfsError):
        for placed in image.placed_layers()[:_LAYERS_MOST]:
            layer = placed.descriptor
            if placed.kind != "layer" or _is_known(image, layer, cache):
                continue
            blob = image.open_blob(layer)
            if not isinstance(blob, BeginsRanges):
                continue
            named = _named_by_words(layer)
            for item in named:
                budget.begin(blob, item)
            if not named:
                head = budget.begin(blob, _first_range(layer))
                if head is not None and table.label_of(layer) == Tar.name:
                    walks.append((layer, blob, head))
        for each in walks:
            _walk(*each, budget)


class _Budget:
    """How much may still be begun."""

    def __init__(self) -> None:
        self._left_bytes = _BYTES_MOST
        self._left_ranges = _RANGES_MOST

    def begin(self, blob: BeginsRanges, byte_range: ByteRange) -> "Future[bytes] | None":
        if byte_range.size_bytes > self._left_bytes or not self._left_ranges:
            return None
        self._left_bytes -= byte_range.size_bytes
        self._left_ranges -= 1
        return blob.begin(byte_range)


def _is_known(image: ResolvedImage, layer: LayerDescriptor, cache: Cache) -> bool:
    if layer.digest is None or not layer.size_bytes:
        return True
    source_name = image.reference.partition("@")[0]
    if cache.documents.has(name_of(layer.digest, "index", source_name)):
        return True
    return cache.has_of(layer.digest)


def _named_by_words(layer: LayerDescriptor) -> Sequence[ByteRange]:
    """Return where annotations say that a layer's table of contents is."""
    words = table.choose_by_words(layer)
    if words is None:
        return ()
    opening = words.open(layer, b"")
    try:
        return next(opening)
    except StopIteration:
        return ()
    finally:
        opening.close()


def _first_range(layer: LayerDescriptor) -> ByteRange:
    """Return a layer's first bytes: of a tar its first chunk, by which it is looked at."""
    head_bytes = FIXED_CHUNK_BYTES if table.label_of(layer) == Tar.name else HEAD_BYTES
    return ByteRange(0, min(head_bytes, layer.size_bytes))


def _walk(
    layer: LayerDescriptor, blob: BeginsRanges, head: "Future[bytes]", budget: _Budget
) -> None:
    """Go from header to header of a tar, as far as the budget and patience last."""
    until_s = time.monotonic() + _PATIENCE_S
    entries: list[Entry] = []
    first = result_of(head, _PATIENCE_S)
    if first is None or not looks_like_tar(first):
        return
    walk = walk_tar(layer.size_bytes, entries, head=first)
    with suppress(StopIteration):
        wanted = next(walk)
        while True:
            pieces = []
            for item in coalesce(wanted, _GAP_BYTES):
                chunks = _chunks_of(item, layer)
                future = budget.begin(blob, chunks)
                if future is None:
                    return
                pieces.append((chunks, future))
            come = [
                (chunks, result_of(future, max(0.0, until_s - time.monotonic())))
                for chunks, future in pieces
            ]
            if any(data is None for _, data in come):
                return
            wanted = walk.send([_cut(item, come) for item in wanted])


def _chunks_of(item: ByteRange, layer: LayerDescriptor) -> ByteRange:
    """Return the whole chunks in which a range lies."""
    start = item.start // FIXED_CHUNK_BYTES * FIXED_CHUNK_BYTES
    stop = -(-item.stop // FIXED_CHUNK_BYTES) * FIXED_CHUNK_BYTES
    return ByteRange(start, min(stop, layer.size_bytes))


def _cut(item: ByteRange, come: Sequence[tuple[ByteRange, bytes | None]]) -> bytes:
    for chunks, data in come:
        if data is not None and chunks.start <= item.start and item.stop <= chunks.stop:
            return data[item.start - chunks.start : item.stop - chunks.start]
    raise ValueError(f"{item} was not asked for")

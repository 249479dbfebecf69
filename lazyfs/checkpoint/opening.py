"""From a layer's descriptor to a layer that can be read: which format, which index.

What is known without asking anybody comes first: annotations that name a table of contents, an
index that an earlier mount has made. Then the blob's first bytes, and, for gzip, an index that
somebody has published beside the image.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import trio
from msgspec.structs import replace

from lazyfs.checkpoint.desk import Desk, read_ranges
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.opened_layer import OpenedLayer
from lazyfs.checkpoint.placed import PlacedLayer
from lazyfs.checkpoint.remembered import IndexMemory
from lazyfs.checkpoint.soci_index import ZtocRef, find_ztocs
from lazyfs.content.cache import Cache
from lazyfs.content.kept import find_restart_index, forget
from lazyfs.content.layer_content import at_once
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    IntegrityError,
    LazyfsError,
    MalformedError,
    UnsupportedLayer,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers import raw, table
from lazyfs.layers.gzip import Gzip
from lazyfs.layers.model import (
    HEAD_BYTES,
    LayerDescriptor,
    LayerIndex,
    Opening,
    StreamIndex,
)
from lazyfs.layers.tar import Tar, looks_like_tar
from lazyfs.transport.blob import Blob

log = logging.getLogger(__name__)

_CONTENT_LIMIT_BYTES = 1 << 44
_ZTOC_MOST_BYTES = 1 << 30
_LARGE_ZTOC_BYTES = 1 << 20
_LARGE_TABLE_CHUNKS = 50_000
"""From here on a chunk table goes into a file: the daemon stays small whatever the image is."""


class Ztocs:
    """The SOCI indexes of an image's layers, looked for when the first gzip layer wants one."""

    def __init__(self, image: ResolvedImage, *, referrers: bool) -> None:
        """Ask nobody yet. `referrers`: take those too that only refer to the image."""
        self._image = image
        self._referrers = referrers
        self._lock = trio.Lock()
        self._found: Mapping[Digest, ZtocRef] | None = None

    async def of(self, layer: LayerDescriptor) -> ZtocRef | None:
        """Return where the index of a layer is, if there is one."""
        if layer.digest is None:
            return None
        async with self._lock:
            if self._found is None:
                self._found = await self._find()
        return self._found.get(layer.digest)

    async def _find(self) -> Mapping[Digest, ZtocRef]:
        image = self._image
        if image.source is None or image.digest is None:
            return {}
        annotations = image.manifest.annotations  # those that its digest proves
        referrers = image.referrals.of if image.referrals and self._referrers else None
        find = partial(find_ztocs, referrers=referrers)
        return await trio.to_thread.run_sync(
            find, image.source, image.digest, annotations, image.layers, abandon_on_cancel=True
        )


async def open_layer(
    image: ResolvedImage, item: PlacedLayer, ztocs: Ztocs, desk: Desk
) -> OpenedLayer:
    """Open one layer of an image.

    Raises:
        UnsupportedLayer: nothing here reads it.
        IntegrityError, MalformedError: an index of it contradicts its digest, or lies.
        FetchError, SourceError: it cannot be had.
    """
    layer = item.descriptor
    blob = image.open_blob(layer)
    if item.kind == "file" and item.names_a_tar:
        item = await _as_it_is(item, blob, desk)
    if item.kind == "file":
        return OpenedLayer(item, raw.open_file(item.place, layer.size_bytes), blob, desk)
    kept, memory = await trio.to_thread.run_sync(_look_back, image, layer, desk)
    if kept is not None:
        return OpenedLayer(item, kept, blob, desk)
    if memory is None:
        return await _open_anew(image, item, ztocs, desk, blob, None)
    try:
        opened = await _open_anew(image, item, ztocs, desk, blob, memory)
    except (IntegrityError, MalformedError, UnsupportedLayer):
        if not memory.used:
            raise
        await trio.to_thread.run_sync(memory.forget)
        opened = await _open_anew(image, item, ztocs, desk, blob, memory)
    opened.memory = memory
    return opened


async def _open_anew(
    image: ResolvedImage,
    item: PlacedLayer,
    ztocs: Ztocs,
    desk: Desk,
    blob: Blob,
    memory: IndexMemory | None,
) -> OpenedLayer:
    """Open a layer by what the blob says of itself, or by what is said of it."""
    layer = item.descriptor
    tar: OpenedLayer | None = None
    head = b""

    async def look() -> None:
        nonlocal tar, head
        tar, head = await _open_tar(item, blob, desk, memory)

    async def ask() -> None:  # beside it: who says what an index is, is a round trip or two away
        await ztocs.of(layer)

    if table.choose_by_words(layer) is None:
        await at_once([look, ask] if table.label_of(layer) == Gzip.name else [look])
        if tar is not None:
            return tar
    index = await find_index(blob, layer, head, desk, memory)
    if isinstance(index, StreamIndex) and index.format_name == Gzip.name:
        spans = await _by_ztoc(image, layer, head, ztocs, desk)
        by_spans = OpenedLayer(item, spans, blob, desk) if spans is not None else None
        if by_spans is not None and await _is_sound(by_spans):
            return by_spans
    return OpenedLayer(item, index, blob, desk)


def _look_back(
    image: ResolvedImage, layer: LayerDescriptor, desk: Desk
) -> tuple[LayerIndex | StreamIndex | None, IndexMemory | None]:
    """Return what earlier mounts have left of a layer: its index, or what they were told. Blocks.

    Neither, where no digest could prove it; what lies on this machine is not asked for, but read.
    """
    if layer.digest is None:
        return None, None
    kept = _reopen_kept(layer, desk.config.cache)
    if kept is not None or not image.is_remote:
        return kept, None
    memory = IndexMemory(desk.config.cache.documents, layer.digest, desk.source_name)
    memory.load()
    return None, memory


async def _is_sound(layer: OpenedLayer) -> bool:
    """Whether a layer that is read by an unproven index makes sense as far as its names go.

    If not, it is closed.
    """
    try:
        if layer.proof != "chunk":
            await layer.walker.run()
    except (MalformedError, UnsupportedLayer, IntegrityError) as error:
        log.warning("an index published for %s is not used: %s", layer.descriptor.digest, error)
        layer.content.close()
        return False
    except BaseException:
        layer.content.close()
        raise
    return True


async def _open_tar(
    item: PlacedLayer, blob: Blob, desk: Desk, memory: IndexMemory | None
) -> tuple[OpenedLayer | None, bytes]:
    """Open what is labelled as an uncompressed tar, if it is one; return its first bytes anyhow.

    They are read by way of the cache: a tar's first chunk is wanted again at once.
    """
    layer = item.descriptor
    if table.label_of(layer) != Tar.name or not blob.size_bytes:
        return None, await read_head(blob, desk, memory)
    index, _ = _send(Tar().open(layer, b""), None)
    opened = OpenedLayer(item, index, blob, desk) if index is not None else None
    head = b""
    try:
        if opened is not None:
            wanted = ByteRange(0, min(HEAD_BYTES, blob.size_bytes))
            head = bytes(await opened.content.read(wanted))
            if looks_like_tar(head):
                tar, opened = opened, None
                return tar, head
    finally:
        if opened is not None:
            opened.content.close()
    return None, head


async def _as_it_is(item: PlacedLayer, blob: Blob, desk: Desk) -> PlacedLayer:
    """Return a file that calls itself a tar as a layer, if it is one: an archive, as it was."""
    try:
        await find_index(blob, item.descriptor, await read_head(blob, desk), desk)
    except UnsupportedLayer:
        return item
    return replace(item, kind="layer", place="")


async def read_head(blob: Blob, desk: Desk, memory: IndexMemory | None = None) -> bytes:
    """Return the first bytes of a blob, for `find_index`."""
    wanted = ByteRange(0, min(HEAD_BYTES, blob.size_bytes))
    (data,) = await _read(blob, [wanted], desk, memory)
    return bytes(data)


async def _read(
    blob: Blob, ranges: Sequence[ByteRange], desk: Desk, memory: IndexMemory | None
) -> list[Data]:
    """Return ranges that an earlier mount has kept, or else fetch them."""
    known = memory.recall(ranges) if memory is not None else None
    if known is not None:
        return known
    replies = await read_ranges(blob, ranges, desk)
    if memory is not None:
        memory.note(ranges, replies)
    return replies


async def find_index(
    blob: Blob,
    layer: LayerDescriptor,
    head: bytes,
    desk: Desk,
    memory: IndexMemory | None = None,
) -> LayerIndex | StreamIndex:
    """Open a layer by its annotations or, which needs its first bytes, by what it is made of.

    Raises:
        as `open_layer`.
    """
    layer_format = table.choose_by_words(layer) or table.choose(layer, head)
    return await _drive(blob, layer_format.open(layer, head), desk, memory)


async def _drive(
    blob: Blob, opening: Opening, desk: Desk, memory: IndexMemory | None
) -> LayerIndex | StreamIndex:
    """Fetch what the opening of a format asks for, to its end; parse in a worker thread."""
    replies: list[Data] | None = None
    while True:
        index, wanted = await trio.to_thread.run_sync(_send, opening, replies)
        if index is not None:
            await trio.to_thread.run_sync(_check_size, index, desk)
            return index
        replies = await _read(blob, wanted, desk, memory)


def _send(
    opening: Opening, replies: list[Data] | None
) -> tuple[LayerIndex | StreamIndex | None, Sequence[ByteRange]]:
    try:
        return None, next(opening) if replies is None else opening.send(replies)
    except StopIteration as stop:
        index: LayerIndex | StreamIndex = stop.value
        return index, ()


def _check_size(index: LayerIndex | StreamIndex, desk: Desk) -> None:
    if isinstance(index, StreamIndex):
        return
    if len(index.chunks) > _LARGE_TABLE_CHUNKS:
        with suppress(OSError):
            index.chunks.relocate(desk.config.cache.keep)
    if index.chunks.content_size_bytes > _CONTENT_LIMIT_BYTES:
        raise MalformedError(f"a layer of {index.chunks.content_size_bytes} bytes is not believed")


def _reopen_kept(layer: LayerDescriptor, cache: Cache) -> LayerIndex | StreamIndex | None:
    """Open a gzip layer at random, if an earlier mount has decoded it to its end. Blocks."""
    stream, _ = _send(Gzip().open(layer, b""), None)
    if not isinstance(stream, StreamIndex) or stream.reopen is None or layer.digest is None:
        return None
    kept = find_restart_index(cache, layer.digest, stream.cache_tag)
    if kept is None:
        return None
    try:
        return stream.reopen(kept)
    except UnsupportedLayer as error:  # nothing is wrong with the index
        log.info("the index that an earlier mount made is not used: %s", error)
        return None
    except MalformedError as error:
        log.warning("the index that an earlier mount made is not used: %s", error)
        home = cache.home(layer.digest, stream.cache_tag)
        if home is not None:
            forget(home)
        return None


async def _by_ztoc(
    image: ResolvedImage, layer: LayerDescriptor, head: bytes, ztocs: Ztocs, desk: Desk
) -> LayerIndex | None:
    """Open a gzip layer by its SOCI index, if there is one that can be used.

    An index that the manifest names has to be right. One that anybody may have put beside the
    image is a hint: if it is not right, it is as if it were not there.

    Raises:
        as `open_layer`, for an index that the manifest names.
    """
    found = await ztocs.of(layer)
    if found is None or found.descriptor.digest is None:
        return None
    try:
        return await _open_ztoc(image, layer, head, found, desk)
    except UnsupportedLayer as error:
        log.info("the SOCI index of %s is not used: %s", layer.digest, error)
    except LazyfsError as error:
        if found.pinned:
            raise
        log.warning("a SOCI index published for %s is not used: %s", layer.digest, error)
    return None


async def _open_ztoc(
    image: ResolvedImage, layer: LayerDescriptor, head: bytes, found: ZtocRef, desk: Desk
) -> LayerIndex:
    from lazyfs.layers.soci import open_soci  # flatbuffers: only who needs it pays for it

    descriptor = found.descriptor
    if descriptor.digest is None or descriptor.size_bytes > _ZTOC_MOST_BYTES:
        raise MalformedError(f"a zTOC of {descriptor.size_bytes} bytes is not believed")
    ztoc = await _read_ztoc(image, descriptor, descriptor.digest, desk)
    if len(ztoc) > _LARGE_ZTOC_BYTES:  # it is kept, for the windows in it
        with suppress(OSError):
            ztoc = desk.config.cache.keep(ztoc)
    return await trio.to_thread.run_sync(
        partial(open_soci, layer, ztoc, pinned=found.pinned, head=head)
    )


async def _read_ztoc(
    image: ResolvedImage, descriptor: LayerDescriptor, digest: Digest, desk: Desk
) -> Data:
    """Return a zTOC, proven, as an earlier mount has kept it or from its source."""
    memory = IndexMemory(desk.config.cache.documents, digest, desk.source_name)
    await trio.to_thread.run_sync(memory.load)
    wanted, what = [ByteRange(0, descriptor.size_bytes)], f"the zTOC {digest}"
    (ztoc,) = await _read(image.open_blob(descriptor), wanted, desk, memory)
    try:
        await trio.to_thread.run_sync(digest.check, ztoc, what)
    except IntegrityError:
        if not memory.used:
            raise
        await trio.to_thread.run_sync(memory.forget)
        (ztoc,) = await _read(image.open_blob(descriptor), wanted, desk, memory)
        await trio.to_thread.run_sync(digest.check, ztoc, what)
    await trio.to_thread.run_sync(memory.save)
    return ztoc

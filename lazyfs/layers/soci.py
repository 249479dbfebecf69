"""A gzip layer with SOCI's index: an unchanged layer, and a zTOC beside it.

The zTOC is a blob of its own, found by `lazyfs.checkpoint.soci_index`; so this is no format that
a layer is recognised as, but what a gzip layer is opened with when there is one. Whatever is
wrong with it, the layer can still be read as plain gzip.

Content layout "soci": the tar's own offsets. Chunks are the zTOC's spans. Each is proven by its
digest over the compressed bytes. Where the manifest names the index by digest, that is proof;
where somebody with the right to push has merely added a referrer, it is not: then the zTOC's
list of files is not looked at, the tar is walked instead, and the whole blob is decoded and
compared behind what is read.

Source: soci-snapshotter, `ztoc/`; its README and `docs/soci-index-manifest-v2.md`.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.layers.gzip import Gzip
from lazyfs.layers.model import (
    Entry,
    LayerDescriptor,
    LayerIndex,
    StreamDecoder,
    StreamIndex,
    no_walk,
)
from lazyfs.layers.names import decode_name
from lazyfs.layers.soci_checkpoints import read_checkpoints
from lazyfs.layers.spans import GzipSpans
from lazyfs.layers.tar import looks_like_tar, walk_tar
from lazyfs.layers.tar_header import BLOCK_BYTES, sparse_error
from lazyfs.layers.toc_json import TocEntries, TocEntry
from lazyfs.layers.ztoc import GZIP, UNCOMPRESSED, Ztoc, ZtocFile, read_files, read_ztoc

FORMAT_NAME = "soci"

_VERSION = re.compile(rb"[01]\.[0-9]{1,9}")
"""0.9 is what every release has written; the schema's example is 1.0."""
_SPARSE = b"GNU.sparse."
_RAW_DEFLATE = -15


def open_soci(layer: LayerDescriptor, ztoc: Data, *, pinned: bool, head: bytes = b"") -> LayerIndex:
    """Open a gzip layer by its zTOC, which has been compared with its digest.

    `pinned`: whether the manifest names the index by digest. `head`: the layer's first bytes, if
    they are here: then it is seen that the first checkpoint fits them. `ztoc` is kept, all of it,
    and not copied: it may be a mapping of a file.

    Raises:
        MalformedError: the zTOC lies, or was made for another layer.
        UnsupportedLayer: it is not of gzip, of another version, or has no use here.
    """
    index = read_ztoc(ztoc)
    _check(index, layer)
    points = read_checkpoints(index.checkpoints)
    points.check(layer.size_bytes, index.uncompressed_bytes)
    if len(points) != index.max_span_id + 1:
        raise MalformedError(
            f"the zTOC has {len(points)} checkpoints for {index.max_span_id + 1} spans"
        )
    if points.first_is_assumed and not _begins(head, points.blob_starts[0]):
        raise UnsupportedLayer("a zTOC of a soci that took gzip headers to be 10 bytes long")
    if head and not _begins(head, points.blob_starts[0]):
        raise MalformedError(f"no tar begins where the zTOC says, at byte {points.blob_starts[0]}")
    chunks = SociSpans(
        blob_starts=points.blob_starts,
        bits=points.bits,
        content_starts=points.content_starts,
        blob_stop=layer.size_bytes,
        content_size_bytes=index.uncompressed_bytes,
        digests=index.span_digests,
        window=points.window,
        proven=pinned,
    )
    entries: list[Entry] = []
    if pinned:
        entries = read_entries(read_files(ztoc), index.uncompressed_bytes)
    return LayerIndex(
        format_name=FORMAT_NAME,
        cache_tag=f"soci-1-{hashlib.sha256(ztoc).hexdigest()}",
        chunks=chunks,
        entries=entries,
        walk=no_walk() if pinned else walk_tar(index.uncompressed_bytes, entries),
        stream=None if pinned else _stream(layer, head, index.uncompressed_bytes),
    )


class SociSpans(GzipSpans):
    """Spans of a zTOC: the last may hold more than the zTOC counts.

    SOCI counts as far as its tar reader gets, and that stops at the archive's end: zeros that fill
    a record (GNU tar, Python's tarfile: up to 10 KiB) follow it.
    """

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield the span's content; of the last, what is counted. See `GzipSpans.decode`."""
        pieces = super().decode(index, data)
        if index < len(self) - 1:
            yield from pieces
            return
        left_bytes = self.content_size(index)
        for piece in pieces:
            left_bytes -= len(piece)
            yield piece
            if not left_bytes:
                return


def read_entries(files: Iterable[ZtocFile], archive_bytes: int) -> list[Entry]:
    """Make entries of a zTOC's files, which must follow each other as in a tar.

    Raises:
        MalformedError: they overlap, lie outside of the archive, or have impossible names,
            types, links or times.
        UnsupportedLayer: sparse files.
    """
    found = TocEntries()
    stop = 0
    for file in files:
        if any(key.startswith(_SPARSE) for key in file.pax_keys):
            raise sparse_error(file.name)
        # Only files have data, whatever size is written for others.
        size_bytes = file.size_bytes if file.type == b"reg" else 0
        if file.offset % BLOCK_BYTES or not (
            stop + BLOCK_BYTES <= file.offset <= file.offset + size_bytes <= archive_bytes
        ):
            raise MalformedError(
                f"the zTOC has {file.name[:200]!r} of {size_bytes} bytes at {file.offset}, in "
                f"{archive_bytes} bytes of archive, of which {stop} are taken"
            )
        found.add(_toc_entry(file, size_bytes), file.offset)
        stop = -(-(file.offset + size_bytes) // BLOCK_BYTES) * BLOCK_BYTES
    return found.entries


def _toc_entry(file: ZtocFile, size_bytes: int) -> TocEntry:
    """Say it in the words of the other TOCs; the types have the same names."""
    return TocEntry(
        type=file.type.decode("ascii", "replace"),
        name=decode_name(file.name),
        link_name=decode_name(file.link),
        mode=file.mode,
        size=size_bytes,
        uid=file.uid,
        gid=file.gid,
        modtime=file.modified.decode("ascii", "replace") or None,
    )


def _check(index: Ztoc, layer: LayerDescriptor) -> None:
    if not _VERSION.fullmatch(index.version):
        raise UnsupportedLayer(f"a zTOC of version {index.version[:40]!r} is not known")
    if index.algorithm == UNCOMPRESSED:
        raise UnsupportedLayer("a zTOC of an uncompressed layer says no more than the tar")
    if index.algorithm != GZIP:
        raise UnsupportedLayer(f"a zTOC for compression {index.algorithm} is not known")
    if index.compressed_bytes != layer.size_bytes:
        raise MalformedError(
            f"the zTOC was made for another layer: one of {index.compressed_bytes} bytes, not "
            f"{layer.size_bytes}"
        )


def _begins(head: bytes, start: int) -> bool:
    """Whether there is deflate at `start` in the blob, of what begins as a tar does."""
    try:
        block = zlib.decompressobj(_RAW_DEFLATE).decompress(head[start:], BLOCK_BYTES)
    except zlib.error:
        return False
    return len(block) == BLOCK_BYTES and looks_like_tar(block)


class _CountedDecoder:
    """A `StreamDecoder` that gives what the zTOC counts, and sees that only zeros follow that.

    Somebody who leaves more out would hide files.
    """

    def __init__(self, whole: StreamDecoder, content_bytes: int) -> None:
        self._whole = whole
        self._left_bytes = content_bytes

    def decode(self, data: Data) -> Iterator[Data]:
        for piece in self._whole.decode(data):
            counted = min(len(piece), self._left_bytes)
            self._left_bytes -= counted
            if counted == len(piece):
                yield piece
                continue
            view = memoryview(piece)
            if view[counted:] != bytes(len(view) - counted):
                raise MalformedError("the layer goes on where its zTOC has it end")
            if counted:
                yield view[:counted]

    def finish(self) -> None:
        self._whole.finish()
        if self._left_bytes:
            raise MalformedError(f"the layer ends {self._left_bytes} bytes before its zTOC does")

    def restart_index(self) -> bytes | None:
        return self._whole.restart_index()


def _stream(layer: LayerDescriptor, head: bytes, content_bytes: int) -> StreamIndex:
    opening = Gzip().open(layer, head)
    try:
        next(opening)
    except StopIteration as stop:
        if isinstance(stop.value, StreamIndex):
            whole = stop.value
            return replace(whole, decoder=lambda: _CountedDecoder(whole.decoder(), content_bytes))
    raise UnsupportedLayer("the layer cannot be decoded as gzip")

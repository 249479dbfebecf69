"""The restart points of a gzip blob as bytes, noted while it was decoded from its start.

    magic | count, blob bytes, blob stop, content bytes (u64) | blob starts (u64 each)
    | content starts (u64) | stops of packed windows (u64) | bits (u8) | sha256 values
    | packed windows | xxh3_128 of all before

All little-endian. Each window is one zstd frame, unpacked when its span is decoded; what is not
a window takes 57 bytes a span. The format is this project's own, and only its own cache holds
it: another version is another magic, and a file that is not read back is built anew.
"""

import hashlib
import struct
import sys
from array import array

import xxhash
import zstandard

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.layers.chunks import DIGEST_BYTES
from lazyfs.layers.model import ChunkMap, Entry, LayerIndex
from lazyfs.layers.restart import WINDOW_BYTES, RestartPoint
from lazyfs.layers.spans import GzipSpans
from lazyfs.layers.tar import walk_tar

FORMAT_NAME = "gzip"
CACHE_TAG = "gzip-spans-1"
"""Spans begin at the first block at least `SPACING_BYTES` of content behind the one before."""

_MAGIC = b"lazyfs gzip 1\n\0\0"
_HEAD = struct.Struct("<16s4Q")
_SEAL_BYTES = 16
_ROW_BYTES = 3 * 8 + 1 + DIGEST_BYTES
_PACKED_MOST_BYTES = 2 * WINDOW_BYTES
_WINDOW_LEVEL = 3


class SpanRecorder:
    """Notes restart points, and hashes what lies between them, as a blob is decoded."""

    def __init__(self) -> None:
        self._blob = array("Q")
        self._content = array("Q")
        self._stops = array("Q")
        self._bits = bytearray()
        self._digests = bytearray()
        # One object each, but a few thousand at most: there is one in 4 MiB of content.
        self._windows: list[bytes] = []
        self._windows_end = 0
        self._hasher = hashlib.sha256()
        self._packer = zstandard.ZstdCompressor(level=_WINDOW_LEVEL)

    def begin(self, point: RestartPoint, before: Data) -> None:
        """Begin a span; `before`: at least the last byte seen, if some of its bits are the span's.

        Points come in order, each with more content than the one before.
        """
        if self._blob:
            self._digests += self._hasher.digest()
        self._hasher = hashlib.sha256(before[-1:] if point.bits else b"")
        packed = self._packer.compress(point.window) if point.window else b""
        self._windows.append(packed)
        self._windows_end += len(packed)
        self._stops.append(self._windows_end)
        self._blob.append(point.blob_offset)
        self._content.append(point.content_offset)
        self._bits.append(point.bits)

    def see(self, data: Data) -> None:
        """Take compressed bytes, in order; those before the first point belong to no span."""
        if self._blob:
            self._hasher.update(data)

    def finish(self, blob_bytes: int, content_bytes: int) -> bytes | None:
        """Return the index; None if the blob is no good for one: no content, or a giant block."""
        blob_stop = blob_bytes
        if self._blob and self._content[-1] == content_bytes:
            # What follows the last point is nothing but ends of blocks and members.
            blob_stop = self._blob.pop()
            self._drop_last()
        elif self._blob:
            self._digests += self._hasher.digest()
        parts = [
            _HEAD.pack(_MAGIC, len(self._blob), blob_bytes, blob_stop, content_bytes),
            *map(_little_endian, (self._blob, self._content, self._stops)),
            bytes(self._bits),
            bytes(self._digests),
            *self._windows,
        ]
        seal = xxhash.xxh3_128()
        for part in parts:
            seal.update(part)
        sealed = b"".join((*parts, seal.digest()))
        try:
            open_restart_index(sealed, blob_bytes)
        except MalformedError:
            return None
        return sealed

    def _drop_last(self) -> None:
        for column in (self._content, self._stops, self._bits, self._windows):
            column.pop()


def open_restart_index(data: Data, blob_bytes: int) -> LayerIndex:
    """Open a gzip layer of `blob_bytes` by what `SpanRecorder.finish` gave once.

    `data` must stay as it is for as long as the layer is used: windows are read out of it.

    Raises:
        MalformedError: it is not that, torn, or of another version.
        UnsupportedLayer: it is of another blob, or nothing here can restart.
    """
    view = memoryview(data).cast("B")
    sealed, seal = view[:-_SEAL_BYTES], view[-_SEAL_BYTES:]
    if len(sealed) < _HEAD.size or xxhash.xxh3_128_digest(sealed) != seal:
        raise MalformedError("the restart index is torn")
    magic, count, whole, blob_stop, content_bytes = _HEAD.unpack_from(sealed)
    if magic != _MAGIC or blob_stop > whole:
        raise MalformedError("the restart index is of another version")
    if whole != blob_bytes:
        raise UnsupportedLayer(f"the restart index is of a blob of {whole} bytes, not {blob_bytes}")
    if count > (len(sealed) - _HEAD.size) // _ROW_BYTES:
        raise MalformedError(f"the restart index is too short for {count} points")
    at = _HEAD.size
    columns = []
    for width in (8, 8, 8, 1, DIGEST_BYTES):
        columns.append(sealed[at : at + width * count])
        at += width * count
    blob_starts, content_starts, stops = map(_numbers, columns[:3])
    entries: list[Entry] = []
    return LayerIndex(
        format_name=FORMAT_NAME,
        cache_tag=CACHE_TAG,
        chunks=GzipSpans(
            blob_starts=blob_starts,
            bits=bytes(columns[3]),
            content_starts=content_starts,
            blob_stop=blob_stop,
            content_size_bytes=content_bytes,
            digests=bytes(columns[4]),
            window=_Windows(sealed[at:], stops),
            proven=True,
        ),
        entries=entries,
        walk=walk_tar(content_bytes, entries),
    )


def chunks_in(data: Data) -> ChunkMap:
    """Return how a restart index cuts its content, of whatever blob it is.

    Raises:
        MalformedError: it is no index, torn, or of another version.
        UnsupportedLayer: nothing here can restart.
    """
    if len(data) < _HEAD.size:
        raise MalformedError("the restart index is torn")
    _, _, blob_bytes, _, _ = _HEAD.unpack_from(data)
    return open_restart_index(data, blob_bytes).chunks


class _Windows:
    """Windows by the number of their point."""

    def __init__(self, packed: memoryview, stops: "array[int]") -> None:
        starts = (0, *stops)
        if starts[-1] != len(packed) or any(
            not 0 <= stop - start <= _PACKED_MOST_BYTES
            for start, stop in zip(starts, stops, strict=False)
        ):
            raise MalformedError("the restart index does not hold the windows that it tells of")
        self._packed = packed
        self._stops = stops

    def __call__(self, index: int) -> bytes:
        packed = self._packed[self._stops[index - 1] if index else 0 : self._stops[index]]
        if not packed:
            return b""
        try:
            # A decompressor of its own for each call: they must not be shared by threads.
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=WINDOW_BYTES)
        except zstandard.ZstdError as err:
            raise IntegrityError(f"window {index} of the restart index is damaged: {err}") from err


def _numbers(column: memoryview) -> "array[int]":
    numbers = array("Q")
    numbers.frombytes(column)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _little_endian(numbers: "array[int]") -> bytes:
    if sys.byteorder == "big":
        numbers = array("Q", numbers)
        numbers.byteswap()
    return numbers.tobytes()

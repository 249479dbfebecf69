"""Seekable zstd: a tar in many zstd frames, and a table of their sizes behind them.

The table is a skippable frame at the blob's end: for each frame u32le packed size, u32le plain
size and, if bit 7 of the descriptor says so, the low half of the plain bytes' XXH64; then u32le
number of frames, the descriptor, a magic. Nothing in a manifest tells of it, nor the blob's
beginning: so every zstd layer is asked, and one without a table is plain zstd.

The table is vouched for by nothing but the blob's digest: it is a hint. What it says of a
frame must be true of that frame, and the blob as a whole is proven by its stream.

Content layout "zstd-seekable-1": the tar's own addresses. Chunks are the frames that are not
empty.

Source: facebook/zstd, `contrib/seekable_format/zstd_seekable_compression_format.md`, 0.1.0.
"""

import hashlib
import logging
import struct
import threading
from collections.abc import Generator, Iterator, Sequence

import xxhash
import zstandard

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.chunks import BLOB_CHUNK_MOST_BYTES, PIECE_BYTES, ChunkTable, TableBuilder
from lazyfs.layers.deflate import Buffer
from lazyfs.layers.model import Entry, LayerDescriptor, LayerIndex, Opening, StreamIndex
from lazyfs.layers.plain_zstd import WINDOW_MOST_BYTES, PlainZstd
from lazyfs.layers.tar import walk_tar
from lazyfs.layers.unzstd import Unzstd

log = logging.getLogger(__name__)

TAIL_BYTES = 64 * KIB
"""Fetched to find the table: that of half a gigabyte in frames of 64 KiB comes along."""
FRAMES_MOST = 8_000_000
FRAME_CONTENT_MOST_BYTES = 1024 * MIB
"""A frame is decompressed whole before a byte of it can be read."""

_FRAME_HEADER = struct.Struct("<II")
_SKIPPABLE_MAGIC = 0x184D2A5E
_FOOTER = struct.Struct("<IBI")
_SEEKABLE_MAGIC = 0x8F92EAB1
_HAS_CHECKSUMS = 0x80
_RESERVED_BITS = 0x7C
_PLAIN_ROW = struct.Struct("<II")
_CHECKED_ROW = struct.Struct("<II4s")
_CHECKSUM_BYTES = 4


class SeekableZstd:
    """zstd layers, read at random if a seek table is at their end, else as plain zstd."""

    name = "zstd:seekable"

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether the layer is zstd."""
        return PlainZstd().recognises(layer, head)

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Open the layer as plain zstd, and on top of it by its table, if there is a good one."""
        plain = yield from PlainZstd().open(layer, head)
        if not isinstance(plain, StreamIndex):
            return plain
        try:
            table = yield from _fetch_table(layer.size_bytes)
            if table is None:
                return plain
            chunks = SeekableChunks(table, layer.size_bytes)
        except MalformedError as err:
            log.info("layer %s has a seek table that is not used: %s", layer.digest, err)
            return plain
        entries: list[Entry] = []
        return LayerIndex(
            format_name=self.name,
            cache_tag=f"zstd-seekable-1-{hashlib.sha256(table).hexdigest()}",
            chunks=chunks,
            entries=entries,
            walk=walk_tar(chunks.content_size_bytes, entries),
            stream=plain,
        )


def _fetch_table(
    blob_bytes: int,
) -> Generator[Sequence[ByteRange], Sequence[Data], bytes | None]:
    """Return the frame that holds the table, or None if the blob does not end in one.

    Raises:
        MalformedError: there is one, of a size that cannot be.
    """
    least = _FRAME_HEADER.size + _FOOTER.size
    if blob_bytes < least:
        return None
    tail_start = max(0, blob_bytes - TAIL_BYTES)
    (fetched,) = yield [ByteRange(tail_start, blob_bytes)]
    tail = bytes(fetched)
    count, descriptor, magic = _FOOTER.unpack(tail[-_FOOTER.size :])
    if magic != _SEEKABLE_MAGIC:
        return None
    size_bytes = least + count * _row(descriptor).size
    if count > FRAMES_MOST or size_bytes > blob_bytes:
        raise MalformedError(f"{count} frames are more than a blob of {blob_bytes} bytes can have")
    if size_bytes > len(tail):
        (before,) = yield [ByteRange(blob_bytes - size_bytes, tail_start)]
        tail = bytes(before) + tail
    return tail[-size_bytes:]


def _row(descriptor: int) -> struct.Struct:
    return _CHECKED_ROW if descriptor & _HAS_CHECKSUMS else _PLAIN_ROW


class SeekableChunks(ChunkTable):
    """The frames of a seek table that are not empty.

    They are checked against the table, which nothing proves.
    """

    proven = False

    def __init__(self, table: bytes, blob_bytes: int) -> None:
        """Read a table, given as the frame that holds it.

        Raises:
            MalformedError: it does not follow its format, does not tell of every byte before
                it, or tells of giant frames.
        """
        magic, frame_bytes = _FRAME_HEADER.unpack_from(table)
        if magic != _SKIPPABLE_MAGIC or frame_bytes != len(table) - _FRAME_HEADER.size:
            raise MalformedError("the seek table's frame is not as large as its number of frames")
        _, descriptor, _ = _FOOTER.unpack(table[-_FOOTER.size :])
        if descriptor & _RESERVED_BITS:
            raise MalformedError(f"the seek table's descriptor is {descriptor:#04x}: not known")
        self._has_checksums = bool(descriptor & _HAS_CHECKSUMS)
        rows = memoryview(table)[_FRAME_HEADER.size : -_FOOTER.size]
        super().__init__(_read_rows(rows, _row(descriptor), blob_bytes - len(table)))

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield the frame's content in pieces of at most `PIECE_BYTES`.

        Raises:
            IntegrityError: it is not what the table says.
        """
        self.check_length(index, data)
        what = f"zstd frame {index} ({self.blob_range(index)})"
        hasher = xxhash.xxh64()
        for piece in _decompress(data, self.content_size(index), what):
            if self._has_checksums:
                hasher.update(piece)
            yield piece
        checksum = hasher.intdigest() & 0xFFFFFFFF
        if self._has_checksums and checksum.to_bytes(4, "little") != self.digest(index):
            raise IntegrityError(f"{what} does not match its checksum in the seek table")


def _read_rows(rows: memoryview, row: struct.Struct, blob_stop: int) -> TableBuilder:
    builder = TableBuilder(blob_stop, _CHECKSUM_BYTES)
    nothing = bytes(_CHECKSUM_BYTES)
    position = 0
    for packed_bytes, plain_bytes, *checksum in row.iter_unpack(rows):
        blob = ByteRange(position, position + packed_bytes)
        position = blob.stop
        if not plain_bytes:
            continue
        if packed_bytes > BLOB_CHUNK_MOST_BYTES or plain_bytes > FRAME_CONTENT_MOST_BYTES:
            raise MalformedError(f"the seek table has a frame of {plain_bytes} bytes at {blob}")
        builder.add(plain_bytes, blob, checksum[0] if checksum else nothing)
    if position != blob_stop:
        raise MalformedError(f"the seek table tells of {position} bytes, {blob_stop} are before it")
    return builder


def _decompress(data: Data, size_bytes: int, what: str) -> Iterator[Data]:
    """Decompress what holds exactly `size_bytes`, and nothing else than frames."""
    if size_bytes <= PIECE_BYTES:
        yield _decompress_small(data, size_bytes, what)
        return
    source = Unzstd(data)
    out = Buffer(PIECE_BYTES)
    left = size_bytes
    while left:
        got = source.unpack(out, 0, min(left, PIECE_BYTES))
        if not got:
            raise IntegrityError(f"{what} should hold {size_bytes} bytes; {left} of them lack")
        left -= got
        yield out.view[:got]
    if source.unpack(out, 0, 1):
        raise IntegrityError(f"{what} should hold {size_bytes} bytes, and holds more")


def _decompress_small(data: Data, size_bytes: int, what: str) -> bytes:
    try:
        declared = zstandard.frame_content_size(data)
        if declared not in (-1, size_bytes):
            raise IntegrityError(f"{what} should hold {size_bytes} bytes, and declares {declared}")
        content = _thread.decompressor.decompress(
            data, max_output_size=size_bytes, allow_extra_data=False
        )
    except zstandard.ZstdError as err:
        raise IntegrityError(f"{what} does not decompress: {err}") from err
    if len(content) != size_bytes:
        raise IntegrityError(f"{what} should hold {size_bytes} bytes, and holds {len(content)}")
    return content


class _Thread(threading.local):
    """What each thread has for itself: zstd contexts must not be shared."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MOST_BYTES)


_thread = _Thread()

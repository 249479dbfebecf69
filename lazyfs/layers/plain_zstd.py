"""Plain zstd: decoded from its start, in bounded memory.

A blob is one frame or many, with skippable frames among them. The library decodes; what is
read here is only where frames and blocks end, since a block holds at most 128 KiB of content:
given few enough blocks at a time, the library cannot give more than a piece. Content addresses
are those of the uncompressed tar.

Source: RFC 8878, section 3.1.
"""

from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.chunks import PIECE_BYTES
from lazyfs.layers.model import LayerDescriptor, Opening, StreamIndex

MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGIC = b"\x2a\x4d\x18"
"""What follows the first byte, which is 0x50 to 0x5f. LZ4 has the same."""
WINDOW_MOST_BYTES = 128 * MIB
"""The largest that decoders accept unasked (`ZSTD_WINDOWLOG_LIMIT_DEFAULT`)."""
BLOCK_MOST_BYTES = 128 * KIB
"""Content of a block, at most: section 3.1.1.2.4."""

_MAGIC_BYTES = 4
_SKIPPABLE_HEADER_BYTES = 8
_BLOCK_HEADER_BYTES = 3
_CHECKSUM_BYTES = 4
_HEADER_MOST_BYTES = 18
_BLOCKS_MOST = PIECE_BYTES // BLOCK_MOST_BYTES
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3
_DICTIONARY_FIELD_BYTES = (0, 1, 2, 4)
_SIZE_FIELD_BYTES = (0, 2, 4, 8)


class FrameHeader(NamedTuple):
    """What a frame's first bytes say (section 3.1.1.1)."""

    size_bytes: int
    """Of the header itself, with its magic."""
    window_bytes: int
    needs_dictionary: bool
    has_checksum: bool

    @classmethod
    def parse(cls, data: Data) -> "FrameHeader | None":
        """Read a header that begins with `MAGIC`; None if there is more to it than `data`."""
        if len(data) <= _MAGIC_BYTES:
            return None
        flags = data[_MAGIC_BYTES]
        single = bool(flags & 0x20)
        dictionary_bytes = _DICTIONARY_FIELD_BYTES[flags & 3]
        size_field_bytes = _SIZE_FIELD_BYTES[flags >> 6] or int(single)
        at = _MAGIC_BYTES + 1 + (not single)
        stop = at + dictionary_bytes + size_field_bytes
        if len(data) < stop:
            return None
        if single:
            window = int.from_bytes(data[stop - size_field_bytes : stop], "little")
            window += 256 * (size_field_bytes == 2)
        else:
            exponent, mantissa = divmod(data[at - 1], 8)
            base = 1 << (10 + exponent)
            window = base + base // 8 * mantissa
        dictionary = any(data[at : at + dictionary_bytes])
        return cls(stop, window, dictionary, bool(flags & 4))

    def check(self) -> None:
        """Raise UnsupportedLayer if the frame cannot be decoded here."""
        if self.needs_dictionary:
            raise UnsupportedLayer("the zstd data needs a dictionary; compress it without one")
        if self.window_bytes > WINDOW_MOST_BYTES:
            raise UnsupportedLayer(
                f"the zstd data needs a window of {self.window_bytes // MIB} MiB, and "
                f"{WINDOW_MOST_BYTES // MIB} MiB is the most; compress it without --ultra --long"
            )


class PlainZstd:
    """Layers whose first bytes are those of a zstd frame, or of a skippable one."""

    name = "zstd"

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether the blob begins as zstd, as far as the head tells."""
        at = 0
        while _is_skippable(head[at : at + _MAGIC_BYTES]):
            at += _SKIPPABLE_HEADER_BYTES + int.from_bytes(head[at + 4 : at + 8], "little")
            if at >= len(head):
                return True
        return head.startswith(MAGIC, at)

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Return the stream; nothing has to be fetched for it.

        Raises:
            UnsupportedLayer: its first frame cannot be decoded here.
        """
        yield from ()
        header = FrameHeader.parse(head[:_HEADER_MOST_BYTES]) if head.startswith(MAGIC) else None
        if header is not None:
            header.check()
        return StreamIndex(format_name=self.name, cache_tag="zstd-stream-1", decoder=ZstdDecoder)


class ZstdDecoder:
    """A `StreamDecoder` of zstd frames."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=WINDOW_MOST_BYTES)
        self._frame = self._new_frame()
        self._has_checksum = False
        self._is_last = False
        # The beginning of a header whose end was not given yet.
        self._pending = b""
        # How far the next header is: a block, a checksum, or a skippable frame lies before it.
        self._skip = 0
        self._in_frame = False
        # Blocks that the library is to be given with the next bytes.
        self._blocks = 0
        self._blob_offset = 0

    def decode(self, data: Data) -> Iterator[Data]:
        """Yield what `data` completes; see `StreamDecoder`."""
        self._blob_offset += len(data)
        # Headers have a few bytes, and the border between two pieces of data seldom cuts one.
        view = memoryview(b"".join((self._pending, data)) if self._pending else data).cast("B")
        self._pending = b""
        at = given = 0
        while True:
            passed = min(self._skip, len(view) - at)
            self._skip -= passed
            at += passed
            if not self._in_frame:
                given = at
            if self._skip:
                break
            if self._in_frame and (self._is_last or self._blocks == _BLOCKS_MOST):
                yield from self._give(view[given:at])
                given = at
            header_bytes = self._header(view[at : at + _HEADER_MOST_BYTES])
            if not header_bytes:
                self._pending = bytes(view[at:])
                break
            at += header_bytes
        if given < at:
            yield from self._give(view[given:at])

    def finish(self) -> None:
        """Say that the blob has ended; see `StreamDecoder`."""
        if self._in_frame or self._skip or self._pending or not self._blob_offset:
            raise MalformedError(f"the zstd data is cut off after {self._blob_offset} bytes")

    def restart_index(self) -> None:
        """None: nothing is known of the inside of a frame."""
        return

    def _give(self, data: memoryview) -> Iterator[Data]:
        """Have the library decode at most `_BLOCKS_MOST` blocks; at its end leave the frame."""
        self._blocks = int(self._skip > 0)
        try:
            content = self._frame.decompress(data)
        except zstandard.ZstdError as err:
            raise MalformedError(f"the zstd data is damaged: {err}") from err
        if self._is_last and not self._skip:
            if not self._frame.eof:
                raise MalformedError("a zstd frame goes on behind its last block")
            self._in_frame = self._is_last = False
            self._blocks = 0
        if content:
            yield content

    def _header(self, data: memoryview) -> int:
        """Read the header that `data` begins with, and return its size; 0 if it is cut off."""
        if self._in_frame:
            return self._block_header(data)
        if len(data) < _MAGIC_BYTES:
            return 0
        if _is_skippable(data):
            if len(data) < _SKIPPABLE_HEADER_BYTES:
                return 0
            self._skip = int.from_bytes(data[_MAGIC_BYTES:_SKIPPABLE_HEADER_BYTES], "little")
            return _SKIPPABLE_HEADER_BYTES
        if data[:_MAGIC_BYTES] != MAGIC:
            raise MalformedError("what should be the next zstd frame is none")
        header = FrameHeader.parse(data)
        if header is None:
            return 0
        header.check()
        self._has_checksum = header.has_checksum
        self._in_frame = True
        self._frame = self._new_frame()
        return header.size_bytes

    def _block_header(self, data: memoryview) -> int:
        """Read a block's header (section 3.1.1.2)."""
        if len(data) < _BLOCK_HEADER_BYTES:
            return 0
        header = int.from_bytes(data[:_BLOCK_HEADER_BYTES], "little")
        size_bytes, kind = header >> 3, header >> 1 & 3
        if size_bytes > BLOCK_MOST_BYTES or kind == _RESERVED_BLOCK:
            raise MalformedError(f"a zstd block of type {kind} has {size_bytes} bytes")
        self._is_last = bool(header & 1)
        self._skip = 1 if kind == _RLE_BLOCK else size_bytes
        self._skip += _CHECKSUM_BYTES * (self._is_last and self._has_checksum)
        self._blocks += 1
        return _BLOCK_HEADER_BYTES

    def _new_frame(self) -> "zstandard.ZstdDecompressionObj":
        return self._zstd.decompressobj(write_size=PIECE_BYTES)


def _is_skippable(data: Data) -> bool:
    return len(data) >= _MAGIC_BYTES and data[0] >> 4 == 5 and data[1:4] == SKIPPABLE_MAGIC

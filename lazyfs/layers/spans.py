"""Chunks of a gzip blob: what lies between two restart points, proven by its compressed bytes.

A span's blob range begins one byte early where the block before it ends within a byte, and
ends where the next span's first whole byte is: neighbours may share one byte. That is SOCI's
convention too, for its digests (soci-snapshotter, `ztoc/compression/gzip_zinfo.go`:
`StartCompressedOffset`, `EndCompressedOffset`; `ztoc/zinfo_builder.go`: `getPerSpanDigests`).
The last span ends with the blob, so trailers and padding belong to it.

Immutable once built, and may be used from several threads at once.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import BLOB_CHUNK_MOST_BYTES, DIGEST_BYTES, PIECE_BYTES
from lazyfs.layers.deflate import (
    GZIP,
    RAW,
    Buffer,
    Engine,
    RestartInflater,
    Source,
    best_engine,
)

CONTENT_SPAN_MOST_BYTES = 1024 * MIB
"""A span is decoded whole before a byte of it can be read."""
OFFSET_MOST = 2**62
"""No blob and no content is larger."""
TRAILER_BYTES = 8
"""CRC32 and ISIZE behind each member (RFC 1952, section 2.3)."""


class GzipSpans:
    """A `ChunkMap` over restart points.

    `blob_starts`, `bits`, `content_starts`: of each point, as in `RestartPoint`.
    `blob_stop`: where the last span ends in the blob. `digests`: the sha256 values of each
    span's compressed bytes, one behind the other. `window`: gives the content before the point
    of a number, at most 32 KiB; several threads may call it at once. `proven`: whether the
    manifest vouches for the digests.

    Raises:
        MalformedError: points out of order or outside the blob, or giant spans.
        UnsupportedLayer: nothing here can restart.
    """

    def __init__(
        self,
        *,
        blob_starts: Sequence[int],
        bits: Sequence[int],
        content_starts: Sequence[int],
        blob_stop: int,
        content_size_bytes: int,
        digests: bytes,
        window: Callable[[int], Data],
        proven: bool,
        engine: Engine | None = None,
    ) -> None:
        engine = engine or best_engine()
        if engine is None:
            raise UnsupportedLayer(
                "gzip cannot be read at random here: install the Python package zlib-ng, or zlib"
            )
        count = len(blob_starts)
        if not 0 < count == len(bits) == len(content_starts) or len(digests) != (
            count * DIGEST_BYTES
        ):
            raise MalformedError(f"the restart index of {count} points is not whole")
        _check_points((*blob_starts, blob_stop), bits, (*content_starts, content_size_bytes))
        self._engine = engine
        self._blob = memoryview(array("Q", (*blob_starts, blob_stop)))
        self._content = memoryview(array("Q", (*content_starts, content_size_bytes)))
        self._bits = bytes(bits)
        self._digests = memoryview(digests)
        self._window = window
        self._proven = proven

    @property
    def proven(self) -> bool:
        """Whether the digests that `decode` compares are vouched for by the manifest."""
        return self._proven

    def relocate(self, keep: Callable[[Data], memoryview]) -> None:
        """Move what is large into memory that `keep` gives: a read-only copy of its argument."""
        self._blob = keep(self._blob).cast("Q")
        self._content = keep(self._content).cast("Q")
        self._digests = keep(self._digests)

    @property
    def content_size_bytes(self) -> int:
        """Size of the content address space."""
        return self._content[-1]

    def zero_chunks(self) -> Sequence[int]:
        """None: every span has bytes in the blob."""
        return ()

    def __len__(self) -> int:
        return len(self._bits)

    def index_at(self, content_offset: int) -> int:
        """Number of the span that holds the byte at `content_offset` (0 <= it < size)."""
        return bisect_right(self._content, content_offset) - 1

    def content_start(self, index: int) -> int:
        """Address of the span's first byte; for `index == len(self)`, the end of the space."""
        return self._content[index]

    def content_size(self, index: int) -> int:
        """How many bytes `decode` gives."""
        return self._content[index + 1] - self._content[index]

    def blob_range(self, index: int) -> ByteRange:
        """The bytes from which the span is decoded; may share one with each neighbour."""
        return ByteRange(self._blob[index] - bool(self._bits[index]), self._blob[index + 1])

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield the span's content in pieces of at most 1 MiB.

        Nothing is decoded of bytes that do not match their digest.

        Raises:
            IntegrityError: `data` is not what the digest promised, or not so much content.
        """
        blob = self.blob_range(index)
        promised = self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        received = hashlib.sha256(data)
        if len(data) != blob.size_bytes or received.digest() != promised:
            raise IntegrityError(
                f"span {index} ({blob}) does not match its digest: promised "
                f"sha256:{promised.hex()}, received {len(data)} bytes of "
                f"sha256:{received.hexdigest()}"
            )
        try:
            yield from self._inflate(index, data)
        except MalformedError as err:
            raise IntegrityError(f"span {index} ({blob}) does not decompress: {err}") from err

    def _inflate(self, index: int, data: Data) -> Iterator[Data]:
        bits = self._bits[index]
        size_bytes = left = self.content_size(index)
        buffer = Buffer(min(size_bytes, PIECE_BYTES))
        inflater = RestartInflater(self._engine, RAW)
        with Source(data) as source:
            inflater.restart(bits, source.view[0] if bits else 0, self._window(index))
            source.position = bool(bits)
            members = _Members(inflater, source)
            while left:
                room = min(left, PIECE_BYTES)
                if members.fill(buffer, room) < room:
                    raise MalformedError(f"it holds less than {size_bytes} bytes")
                left -= room
                yield buffer.view[:room]
            if members.fill(Buffer(1), 1):
                raise MalformedError(f"it holds more than {size_bytes} bytes")
        inflater.close()


class _Members:
    """Decodes over the borders of members."""

    def __init__(self, inflater: RestartInflater, source: Source) -> None:
        self._inflater = inflater
        self._source = source
        self._at_border = False

    def fill(self, out: Buffer, room: int) -> int:
        """Decode `room` bytes, or as many as there are."""
        source, filled = self._source, 0
        while filled < room:
            # Behind the last member there may be zeros.
            if self._at_border and source.left and not source.view[source.position]:
                break
            step = self._inflater.inflate(source, out, filled, room)
            filled += step.produced
            self._at_border = step.ended
            if step.ended:
                if self._inflater.window_bits == RAW:
                    source.position = min(source.position + TRAILER_BYTES, len(source.view))
                self._inflater.reset(GZIP)
            if not source.left:
                break
        return filled


def _check_points(blob: Sequence[int], bits: Sequence[int], content: Sequence[int]) -> None:
    if content[0] or blob[0] < bool(bits[0]) or max(blob[-1], content[-1]) > OFFSET_MOST:
        raise MalformedError("the restart index does not begin or end where a blob does")
    for index, unused in enumerate(bits):
        blob_bytes = blob[index + 1] - blob[index]
        content_bytes = content[index + 1] - content[index]
        if not 0 <= unused < 8 or blob_bytes <= 0 or content_bytes <= 0:
            raise MalformedError(f"restart point {index} is out of order")
        if blob_bytes >= BLOB_CHUNK_MOST_BYTES or content_bytes > CONTENT_SPAN_MOST_BYTES:
            raise MalformedError(
                f"span {index} of {blob_bytes} bytes says that it holds {content_bytes}"
            )

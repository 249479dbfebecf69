"""Chunk maps: an even grid over bytes that are their own content, and tables.

A table holds no Python object per chunk: 44 bytes each, so that 700,000 chunks (a 16 GiB
image) are 31 MB. Starts are 32-bit distances from the start of their *stretch*; a new stretch
begins where a distance would not fit, every 4 GiB or so.

Both are immutable once built, and may be used from several threads at once.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, cast

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB

if TYPE_CHECKING:
    from hashlib import _Hash

FIXED_CHUNK_BYTES = 256 * KIB
"""What a lone fault fetches (`ContentSettings.demand_least_bytes`); part of the cache tag."""

PIECE_BYTES = MIB
"""Content larger than this is decoded in pieces of this size, other content in one."""

DIGEST_BYTES = 32
"""Size of a sha256 value."""

BLOB_CHUNK_MOST_BYTES = 64 * MIB
"""A chunk is fetched whole before a byte of it can be read: more is nobody's good will."""

CONTENT_CHUNK_MOST_BYTES = 16 * 1024 * MIB
"""Writers set no bound: memory filled with one byte becomes one chunk."""

_DISTANCE_MOST = 2**32 - 1
_PADDING_MOST = 2**16 - 1
_ZEROS = bytes(PIECE_BYTES)
# Array types by size, not by letter: C promises only lower bounds for "I" and "Q".
_U16, _U32, _U64 = (
    next(code for code in "HILQ" if array(code).itemsize == size) for size in (2, 4, 8)
)


class FixedChunks:
    """A blob whose bytes are its content, cut into equal chunks (the last may be shorter).

    Nothing promises digests for pieces of a plain blob: `proven` is False, and whoever wants
    proof hashes the whole blob.
    """

    proven = False

    def __init__(self, size_bytes: int, chunk_size: int = FIXED_CHUNK_BYTES) -> None:
        self._size_bytes = size_bytes
        self._chunk_size = chunk_size

    def relocate(self, keep: Callable[[Data], memoryview]) -> None:
        """Do nothing: an even grid takes no memory."""

    @property
    def content_size_bytes(self) -> int:
        """Size of the content address space; the blob's own."""
        return self._size_bytes

    def zero_chunks(self) -> Sequence[int]:
        """None: every byte is in the blob."""
        return ()

    def __len__(self) -> int:
        return -(-self._size_bytes // self._chunk_size)

    def index_at(self, content_offset: int) -> int:
        """Number of the chunk that holds the byte at `content_offset` (0 <= it < size)."""
        return content_offset // self._chunk_size

    def content_start(self, index: int) -> int:
        """Address of the chunk's first byte; for `index == len(self)`, the end of the space."""
        return min(index * self._chunk_size, self._size_bytes)

    def content_size(self, index: int) -> int:
        """How many bytes the chunk has: all alike but the last."""
        return min(self._chunk_size, self._size_bytes - index * self._chunk_size)

    def blob_range(self, index: int) -> ByteRange:
        """The chunk's bytes of the blob: the same as of the content."""
        start = index * self._chunk_size
        return ByteRange(start, min(start + self._chunk_size, self._size_bytes))

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield `data` itself.

        Raises:
            IntegrityError: it is not as long as the chunk.
        """
        _check_length(index, self.blob_range(index), data)
        yield data


class Decompress(Protocol):
    """Decompress one chunk; safe to call from several threads."""

    def __call__(self, data: Data, size_bytes: int, /) -> Iterator[Data] | tuple[Data, ...]:
        """Yield exactly `size_bytes`: up to `PIECE_BYTES` in one piece, else in such pieces.

        A piece may be a view of a buffer that the next one fills anew.

        Raises:
            IntegrityError: `data` is no compressed form of so many bytes.
        """


class ChunkTable:
    """Where chunks of any size lie, each with its own blob range; made by a `TableBuilder`.

    What all tables share; a format's own adds how its chunks are decoded and proven. Where the
    content layout aligns what comes next, a chunk is followed by padding: addresses that belong
    to no file, up to 65,535 of them.
    """

    def __init__(self, builder: "TableBuilder") -> None:
        self._digest_bytes = builder.digest_bytes
        self._stretch_rows = builder.stretch_rows
        self._stretch_content = builder.stretch_content
        self._stretch_blob = builder.stretch_blob
        self._content = memoryview(builder.content)
        self._blob = memoryview(builder.blob)
        self._blob_sizes = memoryview(builder.blob_sizes)
        self._digests = memoryview(builder.digests)
        self._padded_rows = builder.padded_rows
        self._paddings = builder.paddings
        self._content_end = builder.content_end

    def relocate(self, keep: Callable[[Data], memoryview]) -> None:
        """Move what is large into memory that `keep` gives: a read-only copy of its argument."""
        self._content = _u32(keep(self._content))
        self._blob = _u32(keep(self._blob))
        self._blob_sizes = _u32(keep(self._blob_sizes))
        self._digests = keep(self._digests)

    @property
    def content_size_bytes(self) -> int:
        """Size of the content address space."""
        return self._content_end

    def zero_chunks(self) -> Sequence[int]:
        """Numbers of the chunks of zeros, which have no bytes in the blob."""
        return [index for index, size_bytes in enumerate(self._blob_sizes) if not size_bytes]

    def __len__(self) -> int:
        return len(self._content)

    def index_at(self, content_offset: int) -> int:
        """Number of the chunk that holds the byte at `content_offset` (0 <= it < size)."""
        stretch = bisect_right(self._stretch_content, content_offset) - 1
        stop = len(self._content)
        if stretch + 1 < len(self._stretch_rows):
            stop = self._stretch_rows[stretch + 1]
        distance = content_offset - self._stretch_content[stretch]
        return bisect_right(self._content, distance, self._stretch_rows[stretch], stop) - 1

    def content_start(self, index: int) -> int:
        """Address of the chunk's first byte; for `index == len(self)`, the end of the space."""
        if index == len(self._content):
            return self._content_end
        return self._stretch_content[self._stretch(index)] + self._content[index]

    def content_size(self, index: int) -> int:
        """How many bytes `decode` gives; the next chunk may start a padding later."""
        size_bytes = self.content_start(index + 1) - self.content_start(index)
        at = bisect_right(self._padded_rows, index) - 1
        if at >= 0 and self._padded_rows[at] == index:
            size_bytes -= self._paddings[at]
        return size_bytes

    def blob_range(self, index: int) -> ByteRange:
        """The bytes of the blob from which the chunk is decoded; empty for a chunk of zeros."""
        start = self._stretch_blob[self._stretch(index)] + self._blob[index]
        return ByteRange(start, start + self._blob_sizes[index])

    def digest(self, index: int) -> bytes:
        """Return what the builder was given as the chunk's digest."""
        at = index * self._digest_bytes
        return bytes(self._digests[at : at + self._digest_bytes])

    def check_length(self, index: int, data: Data) -> None:
        """See that `data` is as long as the chunk's blob range.

        Raises:
            IntegrityError: it is not.
        """
        _check_length(index, self.blob_range(index), data)

    def _stretch(self, index: int) -> int:
        return bisect_right(self._stretch_rows, index) - 1


class TableChunks(ChunkTable):
    """Chunks that are nothing but their compressed content, each proven by its sha256."""

    proven = True

    def __init__(self, builder: "TableBuilder", decompress: Decompress) -> None:
        super().__init__(builder)
        self._decompress = decompress

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield the chunk's content in pieces of at most `PIECE_BYTES`.

        Raises:
            IntegrityError: the content is not what the digest promised, or not as long.
        """
        self.check_length(index, data)
        if not self._blob_sizes[index]:
            yield from _zeros(self.content_size(index))
            return
        hasher = hashlib.sha256()
        for piece in self._decompress(data, self.content_size(index)):
            hasher.update(piece)
            yield piece
        check_sha256(f"chunk {index} ({self.blob_range(index)})", self.digest(index), hasher)


class TableBuilder:
    """Columns of a `ChunkTable`, filled in content order.

    `digest_bytes`: size of what stands for a chunk's digest, a sha256 value unless told.
    """

    def __init__(self, blob_stop: int, digest_bytes: int = DIGEST_BYTES) -> None:
        self.digest_bytes = digest_bytes
        self._blob_stop = blob_stop
        self._blob_end = 0
        self._content_base = 0
        self._blob_base = 0
        self.content_end = 0
        self.stretch_rows = array(_U32)
        self.stretch_content = array(_U64)
        self.stretch_blob = array(_U64)
        self.content = array(_U32)
        self.blob = array(_U32)
        self.blob_sizes = array(_U32)
        self.digests = bytearray()
        self.padded_rows = array(_U32)
        self.paddings = array(_U16)

    def __len__(self) -> int:
        return len(self.content)

    def add(self, size_bytes: int, blob: ByteRange, digest: bytes | None) -> None:
        """Append a chunk: its content's size, where it is in the blob, its digest.

        Without a digest it is a chunk of zeros: never fetched, but its blob range is checked.

        Raises:
            MalformedError: an empty or giant chunk, one outside the blob, or blob ranges out
                of order.
        """
        start, stop = blob
        fetched = stop - start if digest is not None else 0
        if not (self._blob_end <= start <= stop <= self._blob_stop and size_bytes > 0):
            raise MalformedError(
                f"chunk of {size_bytes} bytes at {blob} lies outside what is left of the blob: "
                f"{ByteRange(self._blob_end, self._blob_stop)}"
            )
        if digest is not None and size_bytes > CONTENT_CHUNK_MOST_BYTES:
            raise MalformedError(f"chunk at {blob} says that it holds {size_bytes} bytes")
        if digest is not None and not 0 < fetched <= BLOB_CHUNK_MOST_BYTES:
            raise MalformedError(f"chunk at {blob} is empty or larger than {BLOB_CHUNK_MOST_BYTES}")
        content = self.content_end - self._content_base
        distance = start - self._blob_base
        if content > _DISTANCE_MOST or distance > _DISTANCE_MOST or not self.stretch_rows:
            self._content_base = self.content_end
            self._blob_base = start
            self.stretch_rows.append(len(self.content))
            self.stretch_content.append(self.content_end)
            self.stretch_blob.append(start)
            content = distance = 0
        self.content.append(content)
        self.blob.append(distance)
        self.blob_sizes.append(fetched)
        self.digests += bytes(self.digest_bytes) if digest is None else digest
        self.content_end += size_bytes
        self._blob_end = stop

    def align(self, alignment_bytes: int) -> None:
        """Leave addresses out, so that the next chunk begins at a multiple of the alignment."""
        padding = -self.content_end % alignment_bytes
        if not padding:
            return
        if padding > _PADDING_MOST or not self.content:
            raise ValueError(f"{padding} bytes of padding after {len(self)} chunks")
        self.padded_rows.append(len(self.content) - 1)
        self.paddings.append(padding)
        self.content_end += padding


def check_sha256(what: str, promised: bytes, hasher: "_Hash") -> None:
    """Compare a sha256 value with what was hashed.

    Raises:
        IntegrityError: they differ; the message begins with `what`.
    """
    if hasher.digest() != promised:
        raise IntegrityError(
            f"{what} does not match its digest: promised sha256:{promised.hex()}, "
            f"received sha256:{hasher.hexdigest()}"
        )


def _u32(column: memoryview) -> memoryview:
    return column.cast(cast('Literal["I"]', _U32))


def _check_length(index: int, blob: ByteRange, data: Data) -> None:
    if len(data) != blob.size_bytes:
        raise IntegrityError(
            f"chunk {index} ({blob}) should be {blob.size_bytes} bytes, received {len(data)}"
        )


def _zeros(size_bytes: int) -> Iterator[Data]:
    whole, rest = divmod(size_bytes, PIECE_BYTES)
    for _ in range(whole):
        yield _ZEROS
    if rest:
        yield memoryview(_ZEROS)[:rest]

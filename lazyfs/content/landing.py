"""From a stream of blob bytes to stored chunks, in the worker thread that receives them.

A `Landing` is the sink of one fetch. It lends its buffer to the transport, decodes each chunk as
soon as its last byte is there (the digest is compared before anybody hears of it), stores it and
says so. Bytes between chunks (tar headers within a zstd:chunked blob) are passed over.

The buffer is an anonymous mapping: page-aligned memory receives several times faster than the
allocator's on the processors where this was measured.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from lazyfs.ground.data import Data
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import ChunkMap

_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 4 << 20
"""So much content at most is held before it is stored and readers are let in."""
LARGE_BYTES = 1 << 20
"""Content of a chunk up to this size is decoded in one piece (`ChunkMap.decode`)."""


_SPARES_MOST = 8
_spares: list[mmap.mmap] = []
"""Buffers to use again: fresh pages cost as much as receiving into them. `append` and `pop` of
a list are atomic."""


def _take_buffer(size_bytes: int) -> mmap.mmap:
    if size_bytes <= _BUFFER_BYTES:
        with suppress(IndexError):
            return _spares.pop()
    return mmap.mmap(-1, max(_BUFFER_BYTES, size_bytes))


def _give_buffer(buffer: mmap.mmap) -> None:
    if len(buffer) == _BUFFER_BYTES and len(_spares) < _SPARES_MOST:
        _spares.append(buffer)
    else:
        buffer.close()


class Shore(Protocol):
    """Who keeps the chunks. Called in the worker thread; may raise IntegrityError."""

    first: int
    last: int
    """Which chunks are fetched: from number `first` up to, not including, `last`."""

    def moved(self) -> None:
        """Note that bytes have come."""

    def claim(self, index: int) -> bool:
        """Whether this landing is the one to store the chunk; at most one is told so."""

    def store(self, first: int, pieces: Sequence[Data]) -> None:
        """Keep claimed chunks from number `first` on, neighbours, a piece each."""

    def store_large(self, index: int, decode: Callable[[], Iterator[Data]]) -> None:
        """Keep a claimed chunk that is too large to be held whole.

        `decode()` gives it in pieces, anew each time, and raises at its end if it is wrong.
        """


class Landing:
    """The sink of one fetch: of the chunks that its shore names.

    They must lie in order in the blob. The first and the last are fetched; of those between them,
    zeros have no bytes there, and what is here already is passed over.
    """

    def __init__(self, chunks: ChunkMap, shore: Shore, check: Callable[[], None]) -> None:
        """`check` is called ahead of all pieces, and for each; it may raise to end the fetch."""
        first, last = shore.first, shore.last
        self._chunks = chunks
        self._next = first
        self._last = last
        self._shore = shore
        self._check = check
        self._range = chunks.blob_range(first)
        self._base = self._range.start
        self._fill = 0
        largest = max(chunks.blob_range(index).size_bytes for index in range(first, last))
        self._buffer = _take_buffer(largest)
        self._view = memoryview(self._buffer)

    @property
    def byte_range(self) -> ByteRange:
        """The blob bytes that are still wanted."""
        return ByteRange(self._base + self._fill, self._chunks.blob_range(self._last - 1).stop)

    def begin(self) -> None:
        """See `WishingSink`."""
        self._check()

    def space(self) -> memoryview:
        """Room for the next bytes."""
        return self._view[self._fill :]

    def advance(self, count: int) -> None:
        """Take in `count` bytes; decode and store what is whole by now."""
        self._check()
        self._shore.moved()
        self._fill += count
        end = self._base + self._fill
        first = self._next
        while self._next < self._last and self._range.stop <= end:
            self._next += 1
            if self._next < self._last:
                self._range = self._chunks.blob_range(self._next)
        if first < self._next:
            self._land(first, self._next)
        self._make_room()

    def rewind(self) -> int:
        """Forget what has come of a chunk that is not whole. See `RewindingSink`."""
        start = self._range.start if self._next < self._last else self._base + self._fill
        count = max(0, self._base + self._fill - start)
        self._fill -= count
        return count

    def close(self) -> None:
        """Give the buffer back, when nobody will look at a piece of it any more."""
        with suppress(BufferError):
            self._view.release()
            _give_buffer(self._buffer)

    def _make_room(self) -> None:
        """Drop what is done; bring the rest to the front when the next chunk needs the room."""
        start = self._range.start if self._next < self._last else self._base + self._fill
        if start >= self._base + self._fill:
            self._base += self._fill
            self._fill = 0
        elif self._range.stop - self._base > len(self._view) or self._fill == len(self._view):
            kept = self._base + self._fill - start
            self._buffer.move(0, start - self._base, kept)
            self._base, self._fill = start, kept

    def _land(self, first: int, last: int) -> None:
        """Decode whole chunks; neighbours in the content are stored in one go."""
        chunks = self._chunks
        run_first, end = first, chunks.content_start(first)
        pieces: list[Data] = []

        def flush(next_first: int) -> None:
            nonlocal run_first, end
            if pieces:
                self._shore.store(run_first, pieces[:])
                pieces.clear()
            run_first, end = next_first, chunks.content_start(next_first)

        for index in range(first, last):
            source = chunks.blob_range(index)
            if not source.size_bytes or not self._shore.claim(index):
                flush(index + 1)
                continue
            if chunks.content_start(index) != end:
                flush(index)
            data = self._view[source.start - self._base : source.stop - self._base]
            if chunks.content_size(index) > LARGE_BYTES:
                flush(index)
                self._shore.store_large(index, partial(chunks.decode, index, data))
                flush(index + 1)
                continue
            (piece,) = chunks.decode(index, data)
            pieces.append(piece)
            end += len(piece)
            if end - chunks.content_start(run_first) >= _BATCH_BYTES:
                flush(index + 1)
        flush(last)

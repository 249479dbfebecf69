"""Putting chunks into a layer's cache file, which other daemons use at the same time.

What is on disk under a mark may be in somebody's reply at any moment. So bytes under a mark that
they give are never replaced by others, but for one case: where a chunk's own digest has proven
ours, theirs cannot have been right. Under the chunk's STORE lock it is looked at first:

    no mark                          ours are written, then their mark
    the file already has our bytes   nothing is written but the mark, if that was damaged
    the mark is ours, the bytes not  damage: ours put it right
    another mark                     with a digest ours are right and are written; else, if the
                                     file gives that mark, the source has said two things (an
                                     IntegrityError); if not, the file is damaged past telling, and
                                     as others may have served it before, ours stay in memory

Who cannot have the lock within a second (its holder was stopped) keeps his bytes in memory too.

Every method blocks; they are called in worker threads, several at once, each for chunks that it
has claimed (`Holdings.claim`).
"""

import logging
import mmap
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from lazyfs.content.cache_file import CacheFile, little_endian
from lazyfs.content.marks import Marker, mark_from
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import ChunkMap

log = logging.getLogger(__name__)

_PATIENCE_S = 1.0
_SLOWEST_BYTES_PER_S = 50e6
"""No decoder and no disk is slower: who holds the lock of a large chunk may take so long."""
_TRY_AGAIN_FIRST_S = 0.5
_TRY_AGAIN_MOST_S = 10.0
_PIECE_BYTES = 1 << 20
_ZEROS = bytes(_PIECE_BYTES)


class ChunkStore:
    """The chunks of one layer on disk."""

    def __init__(
        self, chunks: ChunkMap, cache: CacheFile | None, counters: Counters, source_name: str
    ) -> None:
        """Without a `cache` nothing is ever kept."""
        self._chunks = chunks
        self._cache = cache
        self._counters = counters
        self._source_name = source_name
        self._spare = threading.local()
        self.marker = cache.marker if cache is not None else Marker()
        """What marks the chunks."""
        self._refusing_until_s = float("-inf")
        self._pause_s = _TRY_AGAIN_FIRST_S

    @property
    def takes_all(self) -> bool:
        """Whether what is put stays; not for a while after the disk has refused something.

        For longer each time, as long as it goes on refusing.
        """
        cache = self._cache
        return cache is not None and cache.writable and time.monotonic() >= self._refusing_until_s

    def put(self, first: int, marks: Sequence[int], pieces: Sequence[Data]) -> Sequence[bool]:
        """Store neighbours, a piece each; say of each whether the file has it now.

        Raises:
            IntegrityError: another daemon was given other bytes by the same source.
        """
        cache, last = self._cache, first + len(pieces)
        if cache is None:
            return [False] * len(pieces)
        with cache.locks.storing(first, last, _PATIENCE_S) as may:
            there = self._marks(first, last) if may else None
            if there is None:
                return [False] * len(pieces)
            if not any(there):
                start = self._chunks.content_start(first)
                stored = self._write(start, pieces) and self._record(first, marks)
                return [stored] * len(pieces)
            return [
                self._settle(index, mark, there[index - first], partial(list, [piece]))
                for index, mark, piece in zip(range(first, last), marks, pieces, strict=True)
            ]

    def put_large(
        self,
        index: int,
        decode: Callable[[], Iterator[Data]],
        compare: Callable[[int, int], None],
    ) -> tuple[int, bool]:
        """Store a chunk that comes in pieces; return its mark and whether the file has it now.

        `compare` is told the number and the mark, and may raise, before anything is recorded.

        Raises:
            IntegrityError: as `decode` does at its end, or `compare`, or `put`.
        """
        size_bytes = self._chunks.content_size(index)
        patience_s = _PATIENCE_S + size_bytes / _SLOWEST_BYTES_PER_S
        cache = self._cache
        if cache is None:
            return self._hash(index, decode, None, compare), False
        with cache.locks.storing(index, index + 1, patience_s) as may:
            there = self._marks(index, index + 1) if may else None
            stored = [there is not None and not there[0]]
            mark = self._hash(index, decode, stored if stored[0] else None, compare)
            if there is None:
                return mark, False
            if there[0]:
                return mark, self._settle(index, mark, there[0], decode)
            return mark, stored[0] and self._record(index, [mark])

    def is_good(self, index: int, mark: int) -> bool:
        """Whether the file holds a chunk as its mark says."""
        zeros = not self._chunks.blob_range(index).size_bytes
        return self._mark_in_file(index, zeros=zeros) in ((0,) if zeros else (mark,))

    def contradiction(self, first: int, last: int) -> IntegrityError:
        """Return what there is to say if chunks `first` up to `last` are not what they were."""
        start, stop = self._chunks.blob_range(first).start, self._chunks.blob_range(last - 1).stop
        return IntegrityError(
            f"{self._source_name}: the source gave other bytes than before for "
            f"{ByteRange(start, stop)}"
        )

    def _settle(
        self, index: int, mark: int, theirs: int, decode: Callable[[], Iterable[Data]]
    ) -> bool:
        """Store a chunk where there may be one already; the lock is held."""
        start = self._chunks.content_start(index)
        if theirs:
            held = self._mark_in_file(index)
            if held == mark:
                return theirs == mark or self._record(index, [mark])
            if theirs != mark and not self._chunks.proven:
                if held == theirs:
                    raise self.contradiction(index, index + 1)
                return False
        for piece in decode():
            if not self._write(start, [piece]):
                return False
            start += len(piece)
        return theirs == mark or self._record(index, [mark])

    def _hash(
        self,
        index: int,
        decode: Callable[[], Iterator[Data]],
        stored: list[bool] | None,
        compare: Callable[[int, int], None],
    ) -> int:
        """Return the mark of what is decoded; write it too, and note if that worked."""
        hasher = self.marker.hasher()
        start = self._chunks.content_start(index)
        for piece in decode():
            hasher.update(piece)
            if stored is not None:
                stored[0] = stored[0] and self._write(start, [piece])
            start += len(piece)
        mark = mark_from(hasher)
        compare(index, mark)
        return mark

    def _marks(self, first: int, last: int) -> "array[int] | None":
        if self._cache is None:
            return None
        try:
            return little_endian(array("Q", self._cache.marks(first, last)))
        except OSError as problem:
            self._complain(problem)
            return None

    def _mark_in_file(self, index: int, *, zeros: bool = False) -> int | None:
        """Return the mark of the bytes in the file; None: they cannot be read.

        `zeros`: return 0 if they are nothing but zeros.
        """
        if self._cache is None:
            return None
        hasher = self.marker.hasher()
        start = self._chunks.content_start(index)
        stop = start + self._chunks.content_size(index)
        buffer = self._buffer()
        try:
            while start < stop:
                count = self._cache.read_into(start, buffer[: stop - start])
                if count <= 0 or (zeros and buffer[:count] != _ZEROS[:count]):
                    return None
                hasher.update(buffer[:count])
                start += count
        except OSError as problem:
            log.warning("cached chunk %d cannot be read: %s", index, problem)
            return None
        return 0 if zeros else mark_from(hasher)

    def _buffer(self) -> memoryview:
        """Return memory of this thread's; page-aligned, which is read into much faster."""
        if not hasattr(self._spare, "view"):
            self._spare.view = memoryview(mmap.mmap(-1, _PIECE_BYTES))
        view: memoryview = self._spare.view
        return view

    def _write(self, content_start: int, pieces: Sequence[Data]) -> bool:
        if self._cache is None:
            return False
        try:
            self._cache.write(content_start, pieces)
        except OSError as problem:
            self._complain(problem)
            return False
        return True

    def _record(self, first: int, marks: Sequence[int]) -> bool:
        """Vouch for what was written; unless others are told of it, it is not to be relied on."""
        if self._cache is None:
            return False
        try:
            self._cache.record(first, marks)
        except OSError as problem:
            self._complain(problem)
            return False
        if time.monotonic() >= self._refusing_until_s:
            self._pause_s = _TRY_AGAIN_FIRST_S
        return True

    def _complain(self, problem: OSError) -> None:
        if not self._counters.cache_write_errors:
            said = problem.strerror or problem
            log.warning("the cache takes no more (%s); going on without it", said)
        self._counters.cache_write_errors += 1
        now_s = time.monotonic()
        if now_s >= self._refusing_until_s:
            self._refusing_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, _TRY_AGAIN_MOST_S)

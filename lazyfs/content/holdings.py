"""What is held of one layer: a state and a mark for each chunk, on disk or else in memory.

States change only on the trio thread, between two checkpoints, so no reader sees half a change.
Worker threads take the right to store a chunk (`claim`, the one lock here), store it, and hand
the rest to `publish` on the trio thread. Whoever claims a chunk stores it or gives it back.
"""

import logging
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import xxhash

from lazyfs.content.cache_file import CacheFile, little_endian, mark_of
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import FetchError, IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import ChunkMap

log = logging.getLogger(__name__)

ABSENT, UNCHECKED, FLYING, READY, IN_MEMORY = range(5)
"""States of a chunk, the last two being here. UNCHECKED: an earlier mount left it in the cache.
FLYING: somebody is fetching or checking it. READY: in the cache file. IN_MEMORY: the disk would
not take it."""

_PIECE_BYTES = 1 << 20
_MEMORY_CHUNK_MOST_BYTES = 256 << 20
_ZEROS = bytes(_PIECE_BYTES)


class Holdings:
    """Chunks that are here, and where."""

    def __init__(
        self,
        chunks: ChunkMap,
        cache: CacheFile | None,
        counters: Counters,
        memory_limit_bytes: int,
        source_name: str,
    ) -> None:
        """Without a `cache` everything is kept in memory, the latest `memory_limit_bytes`."""
        self.state = bytearray(len(chunks))
        self._map = cache.view if cache is not None else memoryview(b"")
        self._chunks = chunks
        self._cache = cache
        self._counters = counters
        self._source_name = source_name
        self._memory: OrderedDict[int, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._memory_limit_bytes = memory_limit_bytes
        self._purged = False
        self._holes_left = False
        self._lock = threading.Lock()
        self._claimed = bytearray(len(chunks))
        self._served = bytearray(len(chunks))
        """Whether readers have been let in at a chunk, ever."""
        marks = cache.marks(len(chunks)) if cache is not None else bytes(8 * len(chunks))
        self._marks = little_endian(array("Q", marks))
        self.sealed = cache is not None and cache.is_sealed(marks)
        """Whether an earlier mount found the whole blob, chunk by chunk as held, to match."""
        fresh = not any(marks)
        if not fresh:
            for index, mark in enumerate(self._marks):
                self.state[index] = UNCHECKED if mark else ABSENT
        on_disk = READY if fresh else UNCHECKED
        for index in chunks.zero_chunks():
            self.state[index] = IN_MEMORY if cache is None else on_disk

    # -- on the trio thread -----------------------------------------------------------------

    @property
    def keeps_all(self) -> bool:
        """Whether what lands stays; no longer so once the disk has refused something."""
        return self._cache is not None and not self._counters.cache_write_errors

    def all_on_disk(self, first: int, last: int) -> bool:
        """Whether the chunks `first` up to `last` may be read through `view`."""
        return self.state.count(READY, first, last) == last - first

    def view(self, content: ByteRange) -> memoryview:
        """Return a slice of the cache's mapping; only where `all_on_disk`."""
        return self._map[content.start : content.stop]

    def part(self, index: int, content: ByteRange) -> Data | None:
        """Return the bytes of a chunk that lie in `content`, if the chunk is here."""
        start = self._chunks.content_start(index)
        wanted = ByteRange(
            max(start, content.start), min(start + self._chunks.content_size(index), content.stop)
        )
        if self.state[index] == READY:
            return self.view(wanted)
        if self.state[index] != IN_MEMORY:
            return None
        if self._is_zeros(index):
            return bytes(max(0, wanted.size_bytes))
        self._memory.move_to_end(index)
        return memoryview(self._memory[index])[wanted.start - start : wanted.stop - start]

    def publish(self, first: int, marks: Sequence[int], memory: Sequence[bytes] | None) -> bool:
        """Let readers at chunks that have been stored. Must not raise.

        Returns False, and lets nobody at it, if one is other than it was or must be.
        """
        for offset, mark in enumerate(marks):
            index = first + offset
            if self._marks[index] not in (0, mark):
                return False
            self._marks[index] = mark
            self._served[index] = 1
            if memory is None:
                self.state[index] = READY
            else:
                self._remember(index, memory[offset])
        if memory is not None and not self._holes_left:
            self._leave_holes()
        return True

    def witness(self, first: int, marks: Sequence[int]) -> bool:
        """Note which marks chunks from number `first` on must have, wherever they come from.

        Returns False if one has been served that was otherwise.
        """
        for index, mark in enumerate(marks, first):
            if self._marks[index] not in (0, mark):
                if self._served[index]:
                    return False
                if self.state[index] == UNCHECKED:
                    self.refuse(index)
            self._marks[index] = mark  # whoever is checking the chunk compares it with this now
        return True

    def contradiction(self, first: int, last: int) -> IntegrityError:
        """Return what there is to say if chunks `first` up to `last` are not what they were."""
        start, stop = self._chunks.blob_range(first).start, self._chunks.blob_range(last - 1).stop
        return IntegrityError(
            f"{self._source_name}: the source gave other bytes than before for "
            f"{ByteRange(start, stop)}"
        )

    def _leave_holes(self) -> None:
        """Read chunks of zeros from the file no more: on a full tmpfs a hole is a SIGBUS."""
        self._holes_left = True
        for index in self._chunks.zero_chunks():
            if self.state[index] == READY:
                self.state[index] = IN_MEMORY

    def accept(self, index: int) -> None:
        """Believe a chunk of an earlier mount: `verify` found it as it was."""
        self._claimed[index] = 1
        self._served[index] = 1
        self.state[index] = READY
        self._counters.chunks_from_cache += 1

    def refuse(self, index: int) -> None:
        """Forget a chunk of an earlier mount: its bytes have changed."""
        log.warning("cached chunk %d has changed on disk; fetching it anew", index)
        self._counters.cache_refused += 1
        self._marks[index] = 0
        self.sealed = False
        self.state[index] = IN_MEMORY if self._is_zeros(index) else ABSENT

    def here_bytes(self) -> int:
        """How much content is here, give or take a chunk's size."""
        chunks = len(self.state)
        if not chunks:
            return 0
        here = self.state.count(READY) + self.state.count(IN_MEMORY)
        return self._chunks.content_size_bytes * here // chunks

    def seal(self) -> None:
        """Note for later mounts that the whole blob matches its digest."""
        self.sealed = True
        if self._cache is not None:
            try:
                self._cache.seal(little_endian(self._marks[:]).tobytes())
            except OSError as problem:
                log.warning("the cache could not be sealed: %s", problem)

    def purge(self) -> None:
        """Leave nothing of this layer for later mounts to find."""
        with self._lock:  # nobody may be between a look at `_purged` and a mark
            self._purged = True
            if self._cache is not None:
                try:
                    self._cache.purge()
                except OSError as problem:
                    log.warning("the cache could not be cleared: %s", problem)

    def close(self) -> None:
        """Let go of the cache file."""
        self._memory.clear()
        self._map = memoryview(b"")
        if self._cache is not None:
            self._cache.close()

    def _remember(self, index: int, data: bytes) -> None:
        self._memory[index] = data
        self._memory_bytes += len(data)
        self.state[index] = IN_MEMORY
        while self._memory_bytes > self._memory_limit_bytes and len(self._memory) > 1:
            oldest, dropped = self._memory.popitem(last=False)
            self._memory_bytes -= len(dropped)
            self.state[oldest] = IN_MEMORY if self._is_zeros(oldest) else ABSENT
            self.unclaim(oldest)

    def _is_zeros(self, index: int) -> bool:
        return not self._chunks.blob_range(index).size_bytes

    # -- in worker threads ------------------------------------------------------------------

    def claim(self, index: int) -> bool:
        """Take the right to store a chunk; at most one gets it."""
        with self._lock:
            if self._claimed[index]:
                return False
            self._claimed[index] = 1
            return True

    def unclaim(self, index: int) -> None:
        """Give the right back. Also from the trio thread."""
        with self._lock:
            self._claimed[index] = 0

    def store(
        self, first: int, pieces: Sequence[Data]
    ) -> tuple[Sequence[int], Sequence[bytes] | None]:
        """Store claimed neighbours, a piece each; return what `publish` wants.

        Raises:
            IntegrityError: a chunk was here before (in memory) and was different.
        """
        marks = [mark_of(piece) for piece in pieces]
        for index, mark in enumerate(marks, first):
            self._compare(index, mark)
        if self._write(self._chunks.content_start(first), pieces):
            self._record(first, marks)
            return marks, None
        return marks, [bytes(piece) for piece in pieces]

    def store_large(
        self, index: int, decode: Callable[[], Iterator[Data]]
    ) -> tuple[Sequence[int], Sequence[bytes] | None]:
        """Store a claimed chunk that comes in pieces; return what `publish` wants.

        Raises:
            IntegrityError: as `decode` does at its end; nothing is recorded then.
        """
        hasher = xxhash.xxh3_64()
        start = self._chunks.content_start(index)
        stored = True
        for piece in decode():
            hasher.update(piece)
            stored = stored and self._write(start, [piece])
            start += len(piece)
        mark = hasher.intdigest() or 1
        self._compare(index, mark)
        if stored:
            self._record(index, [mark])
            return [mark], None
        size_bytes = self._chunks.content_size(index)
        if size_bytes > _MEMORY_CHUNK_MOST_BYTES:
            raise FetchError(
                f"{self._source_name}: a chunk of {size_bytes} bytes is too large for memory, and "
                "the cache takes no more: make room in the cache directory",
                transient=False,
            )
        whole = bytearray()
        for piece in decode():  # a piece is good only until the next
            whole += piece
        return [mark], [bytes(whole)]

    def verify(self, index: int) -> bool:
        """Whether the cache file still holds what the chunk's mark says."""
        if self._cache is None:
            return False
        hasher = xxhash.xxh3_64()
        start = self._chunks.content_start(index)
        stop = start + self._chunks.content_size(index)
        zeros = self._is_zeros(index)
        buffer = memoryview(bytearray(min(_PIECE_BYTES, stop - start)))
        try:
            while start < stop:
                count = self._cache.read_into(start, buffer[: stop - start])
                if count <= 0 or (zeros and buffer[:count] != _ZEROS[:count]):
                    return False
                hasher.update(buffer[:count])
                start += count
        except OSError as problem:
            log.warning("cached chunk %d cannot be read: %s", index, problem)
            return False
        return zeros or (hasher.intdigest() or 1) == self._marks[index]

    def _compare(self, index: int, mark: int) -> None:
        if self._marks[index] not in (0, mark):
            raise self.contradiction(index, index + 1)

    def _write(self, content_start: int, pieces: Sequence[Data]) -> bool:
        if self._cache is None:
            return False
        try:
            self._cache.write(content_start, pieces)
        except OSError as problem:
            if not self._counters.cache_write_errors:
                log.warning("the cache takes no more (%s); going on without it", problem)
            self._counters.cache_write_errors += 1
            return False
        return True

    def _record(self, first: int, marks: Sequence[int]) -> None:
        with self._lock:
            if self._cache is None or self._purged:
                return
            try:
                self._cache.record(first, marks)
            except OSError:
                self._counters.cache_write_errors += 1

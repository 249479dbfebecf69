"""What is held of one layer: a state and a mark for each chunk, on disk or else in memory.

States change only on the trio thread, between two checkpoints, so no reader sees half a change.
Worker threads take the right to store a chunk (`claim`, the one lock here), store it, and hand
the rest to `publish` on the trio thread. Whoever claims a chunk stores it or gives it back.

A mark is *hearsay* while it is only what the disk says, of an earlier mount or of another daemon.
It binds once the chunk has been served, or proven: other bytes are then an error.
"""

import logging
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from lazyfs.content.cache_file import CacheFile, little_endian
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.host_locks import HostLocks
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import FetchError, IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import ChunkMap

log = logging.getLogger(__name__)

ABSENT, UNCHECKED, FLYING, READY, IN_MEMORY = range(5)
"""States of a chunk, the last two being here. UNCHECKED: an earlier mount or another daemon has
put it into the cache. FLYING: somebody is fetching or checking it. READY: in the cache file.
IN_MEMORY: the disk would not take it, or it is zeros."""

_IS_HERE = bytes(state >= READY for state in range(256))
_MEMORY_CHUNK_MOST_BYTES = 256 << 20


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
        self._store = ChunkStore(chunks, cache, counters, source_name)
        self.marker = self._store.marker
        self.locks = cache.locks if cache is not None else HostLocks(None)
        self._memory: OrderedDict[int, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._memory_limit_bytes = memory_limit_bytes
        self._holes_left = cache is None or not cache.holes_are_free
        self._lock = threading.Lock()
        self._claimed = bytearray(len(chunks))
        self._served = bytearray(len(chunks))
        """Whether readers have been let in at a chunk, ever."""
        self._hearsay = bytearray(len(chunks))
        """Whether a chunk's mark does not bind yet."""
        self._shared = bytearray(len(chunks))
        """Whether another daemon has stored a chunk since this began."""
        self._refused: dict[int, int] = {}
        """Marks of chunks on disk whose bytes were found to be otherwise."""
        self._seen_stamp = cache.seal_stamp() if cache is not None else 0
        marks = cache.marks(0, len(chunks)) if cache is not None else bytes(8 * len(chunks))
        self._marks = little_endian(array("Q", marks))
        self.sealed = cache is not None and cache.is_sealed(marks)
        """Whether the whole blob, chunk by chunk as held, was found to match its digest."""
        fresh = not any(marks)
        if not fresh:
            for index, mark in enumerate(self._marks):
                if mark:
                    self.state[index] = UNCHECKED
                    self._hearsay[index] = not self.sealed
        on_disk = READY if fresh else UNCHECKED
        for index in chunks.zero_chunks():
            self.state[index] = IN_MEMORY if self._holes_left else on_disk

    # -- on the trio thread -----------------------------------------------------------------

    @property
    def keeps_all(self) -> bool:
        """Whether what lands stays; not for a while after the disk has refused something."""
        return self._store.takes_all

    @property
    def is_found(self) -> bool:
        """Whether others find what is kept here, now and later."""
        return self._cache is not None and self._cache.is_found

    def all_on_disk(self, first: int, last: int) -> bool:
        """Whether the chunks `first` up to `last` may be read through `view`."""
        return self.state.count(READY, first, last) == last - first

    def may_lose(self, first: int, last: int) -> bool:
        """Whether any of the chunks is held in memory, until others need the room."""
        return any(first <= index < last for index in self._memory)

    def here_flags(self) -> bytes:
        """Return a byte for each chunk: 1 if it is here."""
        return bytes(self.state).translate(_IS_HERE)

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

    def publish(
        self, first: int, marks: Sequence[int], memory: Sequence[bytes | None] | None
    ) -> bool:
        """Let readers at chunks that have been stored. Must not raise.

        Returns False, and lets nobody at it, if one is other than it was or must be.
        """
        for offset, mark in enumerate(marks):
            index = first + offset
            if not self._agrees(index, mark):
                return False
            self._bind(index, mark)
            self._served[index] = 1
            kept = memory[offset] if memory is not None else None
            if kept is None:
                self.state[index] = READY
            else:
                self._remember(index, kept)
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
                    self.refuse(index, self._marks[index])
            self._bind(index, mark)  # whoever is checking the chunk compares it with this now
        return True

    def contradiction(self, first: int, last: int) -> IntegrityError:
        """Return what there is to say if chunks `first` up to `last` are not what they were."""
        return self._store.contradiction(first, last)

    def refresh(self, first: int, last: int) -> bool:
        """Look at what other daemons have stored since: absent chunks of it are unchecked now.

        Of chunks that fly nothing is said. Returns whether there is anything new.
        """
        news = self._news(first, last, ABSENT)
        for index, mark in news:
            if self._marks[index] != mark:
                self._marks[index] = mark
                self._hearsay[index] = 1
            self.state[index] = UNCHECKED
        return bool(news)

    def landed_elsewhere(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the chunks that fly here and that others have stored: number and mark."""
        return self._news(first, last, FLYING)

    def _news(self, first: int, last: int, state: int) -> list[tuple[int, int]]:
        if self._cache is None or not self._cache.persistent:
            return []
        try:
            packed = self._cache.marks(first, last)
        except OSError:
            return []
        if packed == bytes(len(packed)):
            return []
        marks = little_endian(array("Q", packed))
        news = []
        index = self.state.find(state, first, last)
        while index >= 0:
            mark = marks[index - first]
            if mark and self._agrees(index, mark) and self._refused.get(index) != mark:
                self._shared[index] = not self._served[index]
                news.append((index, mark))
            index = self.state.find(state, index + 1, last)
        return news

    def _agrees(self, index: int, mark: int) -> bool:
        return self._marks[index] in (0, mark) or bool(self._hearsay[index])

    def _bind(self, index: int, mark: int) -> None:
        self._marks[index] = mark
        self._hearsay[index] = 0

    def _leave_holes(self) -> None:
        """Read chunks of zeros from the file no more: on a full disk a hole may be a SIGBUS."""
        self._holes_left = True
        for index in self._chunks.zero_chunks():
            if self.state[index] == READY:
                self.state[index] = IN_MEMORY

    def mark(self, index: int) -> int:
        """Return the mark that a chunk has or must have; 0 if none is known."""
        return self._marks[index]

    def accept(self, index: int, mark: int) -> bool:
        """Believe a chunk that this daemon did not store: `verify` found it as `mark` says.

        Returns False, and lets nobody at it, if it must be otherwise by now.
        """
        if not self._agrees(index, mark):
            return False
        self._bind(index, mark)
        self._claimed[index] = 1
        self._served[index] = 1
        self.state[index] = READY
        self._counters.chunks_from_cache += 1
        self._counters.chunks_shared += self._shared[index]
        return True

    def refuse(self, index: int, mark: int) -> None:
        """Forget a chunk that this daemon did not store: its bytes are not those of `mark`."""
        log.warning("cached chunk %d has changed on disk; fetching it anew", index)
        self._counters.cache_refused += 1
        self._refused[index] = mark
        if self._hearsay[index]:  # one that has been proven binds whoever fetches the chunk
            self._marks[index] = self._hearsay[index] = 0
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
                self._seen_stamp = self._cache.seal_stamp()
            except OSError as problem:
                log.warning("the cache could not be sealed: %s", problem)

    def learn_seal(self) -> bool:
        """Whether another daemon has proven the whole blob, chunk by chunk as it is held here.

        Asks the disk only if somebody has sealed the layer since it was last asked.
        """
        if self._cache is None or (stamp := self._cache.seal_stamp()) == self._seen_stamp:
            return False
        self._seen_stamp = stamp
        try:
            packed = self._cache.marks(0, len(self.state))
        except OSError:
            return False
        if self.sealed or self._refused or not self._cache.is_sealed(packed):
            return False  # who has found damage proves for himself what he has fetched instead
        marks = little_endian(array("Q", packed))
        if any(not self._agrees(index, mark) for index, mark in enumerate(marks)):
            return False
        for index, mark in enumerate(marks):
            if self.state[index] == ABSENT and mark:
                self.state[index] = UNCHECKED
                self._shared[index] = 1
            self._bind(index, mark)
        self.sealed = True
        return True

    def marks_changed_ns(self) -> int:
        """Return when any daemon last stored a chunk of the layer."""
        return self._cache.marks_changed_ns() if self._cache is not None else 0

    def purge(self) -> None:
        """Leave nothing of this layer for later mounts to find."""
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
    ) -> tuple[Sequence[int], Sequence[bytes | None] | None]:
        """Store claimed neighbours, a piece each; return what `publish` wants.

        Raises:
            IntegrityError: a chunk was here before, or with another daemon, and was different.
        """
        marks = [self.marker.of(piece) for piece in pieces]
        for index, mark in enumerate(marks, first):
            self._compare(index, mark)
        stored = self._store.put(first, marks, pieces)
        if all(stored):
            return marks, None
        return marks, [
            None if is_there else bytes(piece)
            for is_there, piece in zip(stored, pieces, strict=True)
        ]

    def store_large(
        self, index: int, decode: Callable[[], Iterator[Data]]
    ) -> tuple[Sequence[int], Sequence[bytes | None] | None]:
        """Store a claimed chunk that comes in pieces; return what `publish` wants.

        Raises:
            IntegrityError: as `decode` does at its end, or `store`; nothing is recorded then.
        """
        mark, stored = self._store.put_large(index, decode, self._compare)
        if stored:
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

    def verify(self, index: int, mark: int) -> bool:
        """Whether the cache file holds a chunk as `mark` says."""
        return self._store.is_good(index, mark)

    def _compare(self, index: int, mark: int) -> None:
        if not self._agrees(index, mark):
            raise self.contradiction(index, index + 1)

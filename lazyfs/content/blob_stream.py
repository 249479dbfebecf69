"""A blob's bytes in order, several pieces of it fetched at once.

They pass through a ring of memory: byte n of the blob lies at n modulo the ring's size, so what
is in the ring is a window of the blob, and bytes are fetched as far ahead as the slowest reader
lets the window move. Within a piece bytes are handed on as they land. The ring is an anonymous
mapping: page-aligned memory receives several times faster than the allocator's on the
processors where this was measured.

Readers are threads, each going through the whole blob at its own pace; fetches are tasks. The
pieces and the readers' positions are guarded by `_changed`, a condition that readers wait on;
all else belongs to the trio thread. A fetch that has given up rests, with what it has received,
until somebody asks again or `REST_S` have passed: nothing is fetched twice.
"""

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

import trio

from lazyfs.content.width import Width
from lazyfs.ground.errors import SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB, ContentSettings
from lazyfs.transport.blob import Blob
from lazyfs.transport.retry import Fetcher

RING_BYTES = 16 * MIB
_PIECE_MOST_BYTES = 2 * MIB
_PIECE_LEAST_BYTES = MIB
_CONNECTIONS = 4
"""With pieces of this size they keep 1 Gbit/s full at 10 ms, as a single endless transfer does
(120 MB/s; two connections with 4 MiB each: 105), and what is on its way fits the link's queues."""
_SLOW_BYTES_PER_S = 16e6
"""Connections that are slower than this may be held back by themselves: more are tried."""
_LOOK_AGAIN_S = 0.25
REST_S = 5.0
"""A source that has failed is asked again after so long, if nobody asks before."""


class Stopped(Exception):
    """To a reader: no more bytes will come, for a reason that others tell."""


class _Piece:
    """A stretch of the blob that one fetch brings; the sink of that fetch."""

    def __init__(
        self, wanted: ByteRange, room: memoryview, landed: "Callable[[_Piece, int], None]"
    ) -> None:
        self.start, self.stop = wanted
        self.filled = self.start
        """The bytes up to here have landed."""
        self.gave_up = False
        self._room = room
        self._landed = landed

    def space(self) -> memoryview:
        return self._room[self.filled - self.start :]

    def advance(self, count: int) -> None:
        self._landed(self, count)


class BlobStream:
    """One pass over a blob; `run` fetches, `parts` is for each of its readers' threads."""

    def __init__(
        self,
        blob: Blob,
        fetcher: Fetcher,
        settings: ContentSettings,
        *,
        readers: int = 1,
        on_trouble: Callable[[SourceError], None],
        may_use: Callable[[], int | None] = lambda: None,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        """Let a number of `readers` go through `blob`.

        `on_trouble` is told, on the trio thread, that what a reader needs next cannot be had now;
        it may raise, which ends `run`. `may_use` is asked how many connections are allowed now;
        None: as many as fill the link.
        """
        self._blob = blob
        self._fetcher = fetcher
        self._source_answers = True
        """As of `LayerContent`: once a fetch has given up, later ones ask just once."""
        self._on_trouble = on_trouble
        self._may_use = may_use
        self._most = settings.readahead_connections
        self._width = Width(min(_CONNECTIONS, self._most), self._most)
        self._slow = False
        self._limiter = trio.CapacityLimiter(self._most)
        self._ring = mmap.mmap(-1, min(ring_bytes, max(mmap.PAGESIZE, blob.size_bytes)))
        self._ring_bytes = len(self._ring)
        self._view = memoryview(self._ring)
        self._changed = threading.Condition()
        self._pieces: deque[_Piece] = deque()
        self._positions = [0] * readers
        self._stopped = False
        self._begun_bytes = 0
        self._active = 0
        self._token = trio.lowlevel.current_trio_token()
        self._wanted = trio.Event()
        self._asked_again = trio.Event()
        self.received_bytes = 0

    # -- fetching, on the trio thread -------------------------------------------------------

    async def run(self) -> None:
        """Fetch the whole blob; come back when all of it has landed.

        However it ends but well, the readers are stopped.

        Raises:
            IntegrityError: the blob is not what it was.
            Whatever `on_trouble` raises.
        """
        try:
            async with trio.open_nursery() as nursery:
                while self._begun_bytes < self._blob.size_bytes:
                    piece = self._begin()
                    if piece is not None:
                        nursery.start_soon(self._obtain, piece)
                        continue
                    with trio.move_on_after(_LOOK_AGAIN_S):
                        await self._wanted.wait()
                    self._wanted = trio.Event()
        except BaseException:
            self.stop()
            raise

    def ask_again(self) -> None:
        """Have fetches that rest tried once more, now."""
        self._asked_again.set()

    def stop(self) -> None:
        """Let the readers' threads go. Also when the stream will not be run."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give the memory back, when no reader is left."""
        self._pieces.clear()
        with suppress(BufferError):
            self._view.release()
            self._ring.close()

    def _begin(self) -> _Piece | None:
        """Reserve the next piece, if there is a connection and room for it."""
        connections = self._connections()
        if self._active >= connections:
            return None
        start = self._begun_bytes
        at = start % self._ring_bytes
        largest = max(_PIECE_LEAST_BYTES, self._ring_bytes // (connections + 2))
        # The first pieces are small: who waits for the first bytes has the link to himself sooner.
        size_bytes = min(
            max(_PIECE_LEAST_BYTES, start),
            largest,
            _PIECE_MOST_BYTES,
            self._ring_bytes - at,
            self._blob.size_bytes - start,
        )
        with self._changed:
            if start + size_bytes - min(self._positions) > self._ring_bytes:
                self._width.idle()  # it is the readers that are slow
                return None
            room = self._view[at : at + size_bytes]
            piece = _Piece(ByteRange(start, start + size_bytes), room, self._landed)
            self._pieces.append(piece)
        self._begun_bytes += size_bytes
        self._active += 1
        return piece

    def _connections(self) -> int:
        allowed = self._may_use()
        if allowed is not None:
            self._width.idle()
            return min(allowed, self._most)
        if self._slow:
            self._width.observe(trio.current_time(), self.received_bytes)
        else:
            self._width.idle()
        return self._width.connections

    async def _obtain(self, piece: _Piece) -> None:
        """Fetch a piece, however often it takes."""
        while piece.filled < piece.stop:
            piece.gave_up = False
            began_s, size_bytes = trio.current_time(), piece.stop - piece.filled
            try:
                await self._fetcher.fetch(
                    self._blob,
                    ByteRange(piece.filled, piece.stop),
                    piece,
                    limiter=self._limiter,
                    patient=self._source_answers,
                )
                self._source_answers = True
                self._slow = trio.current_time() - began_s > size_bytes / _SLOW_BYTES_PER_S
            except SourceError as error:
                self._source_answers = False
                await self._rest(piece, error)
        self._active -= 1
        self._wanted.set()

    async def _rest(self, piece: _Piece, error: SourceError) -> None:
        self._width.idle()
        with self._changed:
            piece.gave_up = True
            is_next = piece.start <= min(self._positions)
        if is_next:  # else it is tried once more when a reader comes to it, before anybody hears
            self._on_trouble(error)
        if self._asked_again.is_set():
            self._asked_again = trio.Event()
        with trio.move_on_after(REST_S):
            await self._asked_again.wait()

    # -- in worker threads ------------------------------------------------------------------

    def parts(self, reader: int) -> Iterator[memoryview]:
        """Yield the blob's bytes in order, as they land; a part is good until the next.

        Raises:
            Stopped: not all of them will come.
        """
        position = 0
        while position < self._blob.size_bytes:
            stop = self._wait_landed(position)
            at = position % self._ring_bytes
            yield self._view[at : at + stop - position]
            position = stop
            self._pass(reader, position)

    def _wait_landed(self, position: int) -> int:
        """Return up to where bytes from `position` on lie in one piece; at least one does."""
        with self._changed:
            while True:
                if self._stopped:
                    raise Stopped
                piece = next((item for item in self._pieces if position < item.stop), None)
                if piece is not None and position < piece.filled:
                    return piece.filled
                if piece is not None and piece.gave_up:
                    piece.gave_up = False
                    self._tell(self.ask_again)
                self._changed.wait()

    def _landed(self, piece: _Piece, count: int) -> None:
        with self._changed:
            piece.filled += count
            self.received_bytes += count
            if max(self._positions) >= piece.start:
                self._changed.notify_all()

    def _pass(self, reader: int, position: int) -> None:
        with self._changed:
            self._positions[reader] = position
            slowest = min(self._positions)
            freed = False
            while self._pieces and self._pieces[0].stop <= slowest:
                self._pieces.popleft()
                freed = True
        if freed:
            self._tell(self._make_room)

    def _make_room(self) -> None:
        self._wanted.set()

    def _tell(self, what: Callable[[], None]) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(what, idempotent=True)

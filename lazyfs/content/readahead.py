"""Bytes that a forward reader will want next, fetched before it asks.

The kernel turns CRIU's one giant `preadv` into a train of small requests with two in flight, so
it is here that a restore becomes parallel. A read that begins where an earlier one ended goes
on a *stream*; a stream may be fetched ahead by as much as it has consumed, so bytes fetched stay
within a factor of what was read, and the window opens exponentially all the same. A large first
read is no page fault but the head of a giant one: its window opens at once.

Where faults out of the blue do not stop, each would cost a round trip until everything is here
at last: the whole file is then *swept* beside them, from its start, at full speed. So is its whole
*family*, the pages files of a checkpoint, once several of them are read at a time: then all of it
will be read, by tasks that are restored side by side, and in pieces that many readers choose the
link is never full. Long reads wait for such a sweep, as long as it moves.

Where it is known beforehand what will be wanted (`prefetch.py`), that is fetched before it is asked
for: what a trace names ahead of all streams, and the rest, in the order in which a restore reads,
behind them. Then nothing needs to be swept.

No lock: `_streams` is changed on the trio thread between checkpoints only. Failures are not
told here: the reader that gets so far asks for itself and hears of it.
"""

import logging
import sys
from collections import deque
from collections.abc import Sequence
from functools import partial
from math import inf

import msgspec
import trio

from lazyfs.content.flight import Flight, Task
from lazyfs.content.lanes import Lane
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.prefetch import Prefetch, Traced
from lazyfs.content.width import Width
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.window import SHARED_BYTES

log = logging.getLogger(__name__)

_STREAMS_MOST = 64
_SLACK_READS = 4
"""The kernel's requests overtake each other by so many of their own size."""
_STEADY_BYTES = 64 << 10
"""What has gone on for so long will go on."""
_LEAST_WINDOW_BYTES = 1 << 20
_GIANT_READ_BYTES = 256 << 10
"""CRIU faults 4 KiB at a time, for which the kernel begins with 16 KiB; what begins larger is
the head of a long read."""
_FIRST_WINDOW_BYTES = 16 << 20
_LONG_READ_BYTES = 2 << 20
"""Who has read so much, or has begun as if, will read the file to its end."""
_SCATTER_FAULTS = 32
_SCATTER_S = 2.0
"""So many lone faults within so long: the file is read all over."""
_FAMILY_FILES = 3
"""Long reads in so many files of a family within `_SCATTER_S`: they are all being read."""
_SWEEP_STALL_S = 1.0
_LOOK_AGAIN_S = 0.1
_YIELD_S = 0.02
_LEAST_REQUEST_BYTES = 1 << 20
_TRACED_ON_THE_WAY_BYTES = 4 << 20
"""Of what a trace names: three times what is on its way at 1 Gbit/s and 10 ms."""
_ENDING_BYTES = 1 << 20
"""A flight with so much left to come gives its place to the next one: at 1 Gbit/s, shared by two,
that is the 17 ms which its first byte takes."""
_AWAITED_MOST = 16
"""Flights of other daemons that are awaited at a time; they take no connection."""


class _Stream(msgspec.Struct, eq=False):
    position: int
    limit: int
    consumed_bytes: int
    window_bytes: int


class Readahead:
    """The readahead of one layer; `run` it in the mount's nursery."""

    def __init__(self, content: LayerContent) -> None:
        """`run` must be started for anything to be fetched."""
        self._content = content
        self._settings = content.settings
        self._streams: deque[_Stream] = deque(maxlen=_STREAMS_MOST)
        self._under_way: dict[Flight, int] = {}
        """Flights that must land for the next one to take off, and how much content each brings."""
        self._awaited = 0
        self._width = Width(
            self._settings.readahead_connections_least, self._settings.readahead_connections
        )
        self.prefetch = Prefetch(content)
        """What is known to be wanted: for `expect` and `follow`."""
        self._fill = ByteRange(0, 0)
        self._fill_eagerly = False
        self._sweep = ByteRange(0, 0)
        self._swept_family = ByteRange(0, 0)
        self._long_reads: deque[tuple[float, ByteRange]] = deque(maxlen=_STREAMS_MOST)
        self._lone_faults_at_s: deque[float] = deque(maxlen=_SCATTER_FAULTS)
        self._fill_error: LazyfsError | None = None
        self._long_read = trio.Event()
        self._wanted = trio.Event()
        self._has_yielded = False
        """Whether nothing was begun because somebody walks, or faults beside a trace: nobody tells
        when that is over."""

    def observe(self, content: ByteRange, limit: int) -> bool:
        """Take note of a read within a file that ends at `limit`; say if it was foreseen."""
        stream = self._find(content, limit)
        foreseen = stream is not None
        if stream is None:
            stream = _Stream(content.start, limit, 0, 0)
            self._streams.append(stream)
            if content.size_bytes >= _GIANT_READ_BYTES:
                stream.window_bytes = _FIRST_WINDOW_BYTES
        advanced = content.stop - stream.position
        if advanced > 0:
            stream.position = content.stop
            stream.consumed_bytes += advanced
            if stream.consumed_bytes >= _STEADY_BYTES:
                stream.window_bytes = max(
                    stream.window_bytes, stream.consumed_bytes, _LEAST_WINDOW_BYTES
                )
        if stream.window_bytes:
            self._wanted.set()
            if stream.window_bytes >= _LONG_READ_BYTES:
                self._long_read.set()
        return foreseen

    async def wait_long_read(self) -> None:
        """Come back when somebody reads on and on, from now on."""
        self._long_read = trio.Event()
        await self._long_read.wait()

    def note_lone_fault(self, file: ByteRange) -> None:
        """Take note that a small read, which nothing foretold, has to wait."""
        if self.prefetch.follows:
            return
        now_s = trio.current_time()
        self._lone_faults_at_s.append(now_s)
        if len(self._lone_faults_at_s) < _SCATTER_FAULTS:
            return
        if now_s - self._lone_faults_at_s[0] <= _SCATTER_S and self._sweep != file:
            log.debug("faults all over: sweeping %s", file)
            self._sweep = file
            self._wanted.set()

    def note_long_read(self, file: ByteRange, family: ByteRange) -> None:
        """Take note that a long read of a file of a family has to wait."""
        if self._swept_family == family or family.size_bytes <= file.size_bytes:
            return
        if self.prefetch.follows:
            return
        if not self._content.holdings.keeps_all:
            return
        now_s = trio.current_time()
        self._long_reads.append((now_s, file))
        files = {each for at_s, each in self._long_reads if now_s - at_s <= _SCATTER_S}
        files = {each for each in files if family.start <= each.start < family.stop}
        if len(files) >= _FAMILY_FILES:
            log.debug("files read side by side: sweeping %s", family)
            self._sweep = self._swept_family = family
            self._wanted.set()

    async def wait_swept(self, content: ByteRange) -> None:
        """Let a sweep of the family bring the head of a long read, if one is on its way there.

        Comes back when it has begun to, or when nothing moves.
        """
        while self._swept_family.start < self._swept_family.stop and self._is_ahead(content):
            landed_bytes = self._content.landed_bytes
            with trio.move_on_after(_SWEEP_STALL_S) as patience:
                await self._content.wait_change(content)
            if patience.cancelled_caught and self._content.landed_bytes == landed_bytes:
                return

    async def wait_replayed(self, content: ByteRange) -> None:
        """Let a trace have the link before what nobody waits for.

        Comes back when all of it has been asked for, or `content` is here, or nothing moves.
        """
        landed_bytes, moved_at_s = -1, trio.current_time()
        while self.prefetch.is_replaying and self._content.poison is None:
            if self._content.peek(content) is not None:
                return
            if self._content.landed_bytes != landed_bytes:
                landed_bytes, moved_at_s = self._content.landed_bytes, trio.current_time()
            elif trio.current_time() - moved_at_s >= _SWEEP_STALL_S:
                return
            with trio.move_on_after(_LOOK_AGAIN_S):
                await self._content.wait_change(content)

    def _is_ahead(self, content: ByteRange) -> bool:
        return self._sweep.start <= content.start < self._sweep.stop

    def expect(self, traced: Traced) -> None:
        """Fetch what a trace names (`Prefetch.placed`) as fast as it can be had."""
        self.prefetch.expect(traced)
        self._wanted.set()

    def follow(self, rest: Sequence[ByteRange]) -> None:
        """Fetch all of these, in this order, behind what readers and traces want."""
        self.prefetch.follow(rest)
        self._wanted.set()

    def fill(self, content: ByteRange, *, eager: bool) -> None:
        """Fetch a stretch that nobody reads, when no stream wants anything.

        With all connections if `eager`. It replaces the stretch that was asked for before.
        """
        self._fill = content
        self._fill_eagerly = eager
        self._wanted.set()

    def take_fill_error(self) -> LazyfsError | None:
        """Return why `fill` stopped, once."""
        error, self._fill_error = self._fill_error, None
        return error

    async def run(self) -> None:
        """Keep the windows of all streams filled, then a sweep, then `fill`; for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                with trio.move_on_after(_YIELD_S if self._has_yielded else inf):
                    await self._wanted.wait()
                self._wanted = trio.Event()
                while (flight := self._next()) is not None:
                    self._depart(flight)
                    nursery.start_soon(self._conduct, flight)

    def _next(self) -> Flight | None:
        """Begin what is to be fetched next, if a connection is free for it.

        Of the latest streams first, nearest to the reader first.
        """
        settings = self._settings
        self._has_yielded = False
        if self._content.poison is not None:
            return None
        keeps_all = self._content.holdings.keeps_all
        has_stopped = self._content.lanes.idle_for_s >= settings.idle_s  # who was reading
        if self._swept_family.size_bytes and (has_stopped or not keeps_all):
            self._sweep = self._swept_family = ByteRange(0, 0)
        run = self._next_traced(keeps_all=keeps_all)
        if run is not None:
            self._width.idle()
            flight = self._content.take_off(run, Lane.READAHEAD)
            flight.window_bytes = SHARED_BYTES
            return flight
        lanes = self._content.lanes
        self._has_yielded = lanes.is_walked or self._is_replay_disturbed
        if self._has_yielded:
            self._width.idle()
            return None
        sweeping = keeps_all and self._sweep.start < self._sweep.stop
        request_bytes = settings.readahead_request_bytes
        if lanes.is_gentle:  # the windows are narrow then
            self._width.idle()
            connections = min(settings.gentle_connections, settings.readahead_connections)
            request_bytes = min(_LEAST_REQUEST_BYTES, request_bytes)
        else:
            self._width.observe(trio.current_time(), self._content.landed_bytes)
            connections = self._width.connections
        if len(self._under_way) >= connections or self._awaited >= _AWAITED_MOST:
            return None
        most_bytes = settings.readahead_window_bytes
        if not keeps_all:  # what is fetched too far ahead has to go before it is read
            most_bytes = min(most_bytes, settings.memory_cache_bytes // 4)
        streams = list(reversed(self._streams))[: None if keeps_all else 1]
        for stream in streams if not (sweeping and self._swept_family.size_bytes) else ():
            window_bytes = min(stream.window_bytes, most_bytes)
            ahead = ByteRange(stream.position, min(stream.position + window_bytes, stream.limit))
            share_bytes = max(_LEAST_REQUEST_BYTES, window_bytes // connections)
            run = self._content.next_run(ahead, min(share_bytes, request_bytes))
            if run is not None:
                return self._content.take_off(run, Lane.READAHEAD)
        if sweeping:
            run = self._content.next_run(self._sweep, request_bytes)
            if run is not None:
                flight = self._content.take_off(run, Lane.READAHEAD)
                start = self._content.chunks.content_start(flight.last)
                self._sweep = ByteRange(min(start, self._sweep.stop), self._sweep.stop)
                return flight
            self._sweep = self._swept_family = ByteRange(0, 0)
        run = self.prefetch.next_rest(request_bytes) if keeps_all else None
        if run is not None:
            return self._content.take_off(run, Lane.READAHEAD)
        if keeps_all and (
            self._fill_eagerly or len(self._under_way) < settings.completion_connections
        ):
            run = self._content.next_run(self._fill, request_bytes)
            if run is not None:
                return self._content.take_off(run, Lane.COMPLETION)
        self._width.idle()
        return None

    def _next_traced(self, *, keeps_all: bool) -> tuple[int, int] | None:
        """Return what a trace wants next, if it may be on its way by now."""
        settings = self._settings
        connections, most_bytes = settings.readahead_connections, _TRACED_ON_THE_WAY_BYTES
        if self._is_replay_disturbed:  # what is on its way stands before what is waited for
            connections = min(settings.gentle_connections, connections)
            most_bytes = connections * SHARED_BYTES
        if len(self._under_way) >= connections or self._awaited >= _AWAITED_MOST:
            return None
        if sum(self._under_way.values()) >= most_bytes:
            return None
        room_bytes = sys.maxsize if keeps_all else settings.memory_cache_bytes // 2
        return self.prefetch.next_traced(room_bytes)

    @property
    def _is_replay_disturbed(self) -> bool:
        """Whether readers wait for what the trace does not name, while it is being replayed."""
        prefetch = self.prefetch
        return prefetch.is_replaying and self._content.lanes.is_surprised(prefetch.known_at_s)

    async def _conduct(self, flight: Flight) -> None:
        try:
            await self._content.conduct(flight)
        except LazyfsError as error:
            log.debug("readahead failed, its readers will ask for themselves: %s", error)
            self._give_up(flight, error)
        except Exception as error:  # a bug must not end the mount
            log.exception("readahead failed: please report this")
            self._give_up(flight, LazyfsError(str(error)))
        finally:
            if flight.task is Task.AWAIT:
                self._awaited -= 1
            self._end(flight)

    def _depart(self, flight: Flight) -> None:
        """Count a flight that has taken off, until little of it is left to come.

        The next one is asked for by then, so the link has something to carry meanwhile.
        """
        if flight.task is Task.AWAIT:
            self._awaited += 1
            return
        chunks = self._content.chunks
        start, stop = chunks.content_start(flight.first), chunks.content_start(flight.last)
        self._under_way[flight] = stop - start
        left_bytes = min(_ENDING_BYTES, (stop - start) // 2)
        flight.ending_at = chunks.index_at(stop - left_bytes) if left_bytes else flight.last
        flight.on_ending = partial(self._end, flight)

    def _end(self, flight: Flight) -> None:
        self._under_way.pop(flight, None)
        self._wanted.set()

    def _give_up(self, flight: Flight, error: LazyfsError) -> None:
        """Forget what was wanted, or it would be asked for again at once."""
        self._streams.clear()
        self._sweep = self._swept_family = ByteRange(0, 0)
        self._lone_faults_at_s.clear()
        self.prefetch.give_up()
        self._fill = ByteRange(0, 0)
        if flight.lane is Lane.COMPLETION:
            self._fill_error = error

    def _find(self, content: ByteRange, limit: int) -> _Stream | None:
        slack_bytes = _SLACK_READS * content.size_bytes
        for stream in reversed(self._streams):
            if stream.limit == limit and abs(content.start - stream.position) <= slack_bytes:
                self._streams.remove(stream)  # the latest last: lone faults push out what is old
                self._streams.append(stream)
                return stream
        return None


class FileReader:
    """One open file: a stretch of a layer's content, read by offset."""

    def __init__(
        self,
        content: LayerContent,
        readahead: Readahead,
        start: int,
        size: int,
        family: ByteRange | None = None,
    ) -> None:
        """The file's bytes are the content from `start` on, `size` of them.

        `family`: a stretch of content around it that is read whole if several of its files are.
        """
        self._content = content
        self._readahead = readahead
        self._start = start
        self._stop = start + size
        self._file = ByteRange(start, start + size)
        self._family = family or self._file

    async def read(self, offset: int, size_bytes: int, lane: Lane = Lane.DEMAND) -> Data:
        """Return the bytes from `offset` on: `size_bytes` of them, or all up to the file's end.

        A checkpoint only if bytes have to be fetched.

        Raises:
            IntegrityError, FetchError, SourceError: never a short read instead.
        """
        begin = min(self._start + offset, self._stop)
        wanted = ByteRange(begin, min(begin + size_bytes, self._stop))
        foreseen = self._readahead.observe(wanted, self._stop)
        view = self._content.peek(wanted)
        if view is not None:
            return view
        if lane is Lane.DEMAND:
            prefetch = self._readahead.prefetch
            prefetch.note_wait(wanted)
            foreseen = foreseen or prefetch.foresees(wanted) or self._content.is_coming(wanted)
        lone = not foreseen and wanted.size_bytes < _GIANT_READ_BYTES and lane is Lane.DEMAND
        if lone:
            self._readahead.note_lone_fault(self._file)
        elif self._family is not self._file:
            self._readahead.note_long_read(self._file, self._family)
            await self._readahead.wait_swept(wanted)
        return await self._content.read(wanted, lane, out_of_the_blue=lone)

    def is_here(self, offset: int, size_bytes: int) -> bool:
        """Whether `read` would have them at once."""
        begin = min(self._start + offset, self._stop)
        wanted = ByteRange(begin, min(begin + size_bytes, self._stop))
        return wanted.start == wanted.stop or self._content.is_here(wanted)

    def is_kept(self) -> bool:
        """Whether all of the file is in the cache, checked or not."""
        return not self._file.size_bytes or self._content.is_kept(self._file)

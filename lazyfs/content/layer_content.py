"""The content of one layer: chunks fetched once however many readers ask.

No lock: chunk states and `_flights` change only on the trio thread and only between two
checkpoints, so whoever finds chunks absent marks them as flying in the same go. An `await` put
between the two breaks that. Worker threads report through `run_sync_soon`, whose order is kept:
all landings of a fetch are known before the task that awaits the fetch goes on.

A fetch under way is a *flight*. It belongs to the task that began it; when that task is
cancelled its chunks are absent again and the next waiter leads anew. A waiter that sees no byte
of a background flight for `patience_s` fetches for itself; whichever copy is whole first is
kept, the other is dropped unseen, so there is never more than one truth about a chunk.

Other daemons fetch the same layer into the same cache file. What they fetch is awaited, or taken
in where they have stored it already; see `others.py`.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from lazyfs.content.cache_file import CacheFile
from lazyfs.content.flight import Flight, Memory, Task
from lazyfs.content.holdings import ABSENT, FLYING, READY, UNCHECKED, Holdings
from lazyfs.content.landing import Landing
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.model import Content
from lazyfs.content.others import Others
from lazyfs.content.runs import Runs
from lazyfs.ground.data import Data
from lazyfs.ground.errors import CONDEMNED, IntegrityError, LazyfsError, raise_sole_error
from lazyfs.ground.journal import ArrivalNote
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import ContentSettings
from lazyfs.layers.model import ChunkMap
from lazyfs.transport.blob import Blob
from lazyfs.transport.place import PlaceLied
from lazyfs.transport.retry import Fetcher
from lazyfs.transport.window import allow_on_the_way

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """To a landing: nothing is wanted any more."""


class LayerContent(Content):
    """Bytes of one layer by content address; the module's docstring has its rules."""

    def __init__(
        self,
        blob: Blob,
        chunks: ChunkMap,
        cache: CacheFile | None,
        lanes: Lanes,
        fetcher: Fetcher,
        settings: ContentSettings,
    ) -> None:
        """Without a `cache` chunks live in memory, within `settings.memory_cache_bytes`."""
        self.chunks = chunks
        self.fetcher = fetcher
        self.counters = counters = fetcher.counters
        self.settings = settings
        self.lanes = lanes
        self.holdings = Holdings(chunks, cache, counters, settings.memory_cache_bytes, blob.name)
        self._state = self.holdings.state
        self._runs = Runs(chunks, self._state, settings)
        self._others = Others(self.holdings, self._runs, settings.patience_s, self._arrived)
        self.blob = blob
        self._source_answers = True
        """Once a fetch has given up, later ones do so soon, until one succeeds: a reader asks
        again after an error, page by page, and must not wait out a whole deadline each time."""
        self._flights: list[Flight] = []
        self.landed_bytes = 0
        """Content that has come from the source so far."""
        self._changed = trio.lowlevel.ParkingLot()
        self._poison: LazyfsError | None = None
        self.condemned = trio.Event()
        """Set when there is a `poison`."""

    # -- reading ----------------------------------------------------------------------------

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return the bytes as a slice of the cache's mapping, if they are all there."""
        if content.start >= content.stop:
            return memoryview(b"")
        if self._poison is None and self.holdings.all_on_disk(*self._span(content)):
            return self.holdings.view(content)
        return None

    async def read(
        self, content: ByteRange, lane: Lane = Lane.DEMAND, *, out_of_the_blue: bool = True
    ) -> Data:
        """Return exactly the bytes of `content`, fetching what is missing.

        `out_of_the_blue`: no readahead saw the demand coming, so background lanes make room.

        Raises:
            IntegrityError: bytes contradict their digest, now or at any time before.
            FetchError, SourceError: not obtained.
        """
        view = self.peek(content)
        if view is not None:
            return view
        if lane is Lane.DEMAND:
            self.counters.reads_waited += 1
            self.lanes.note_demand(out_of_the_blue=out_of_the_blue)
        await self.ensure(content, lane)
        view = self.peek(content)
        return view if view is not None else await self._gather(content, lane)

    async def ensure(self, content: ByteRange, lane: Lane) -> None:
        """Come back when the chunks of `content` are here (or, in memory, have been).

        Raises:
            IntegrityError, FetchError, SourceError: as `read`.
        """
        if content.start < content.stop:
            await self._ensure(*self._span(content), lane)

    @property
    def is_fetching(self) -> bool:
        """Whether any fetch is under way."""
        return bool(self._flights)

    def is_here(self, content: ByteRange) -> bool:
        """Whether the bytes are held, on disk or (until others need the room) in memory."""
        first, last = self._span(content)
        return all(state >= READY for state in self._state[first:last])

    def is_kept(self, content: ByteRange) -> bool:
        """Whether the bytes are in the cache's file, maybe yet to be checked, or zeros.

        What only memory holds may have to go before it is read.
        """
        first, last = self._span(content)
        if self._state.find(ABSENT, first, last) >= 0 or self.holdings.may_lose(first, last):
            return False
        return not any(
            flight.first < last and first < flight.last and flight.task is not Task.CHECK
            for flight in self._flights
        )

    def is_coming(self, content: ByteRange) -> bool:
        """Whether whatever of the bytes is not held is being fetched already."""
        first, last = self._span(content)
        return all(state == FLYING or state >= READY for state in self._state[first:last])

    async def wait_change(self, content: ByteRange) -> None:
        """Come back when it may be that more of `content` is here, or that it will not be."""
        first, last = self._span(content)
        index = self._state.find(FLYING, first, last)
        flight = self._flight_over(index) if index >= 0 else None
        if flight is None:
            await self._changed.park()
        else:
            await flight.wait_landed(min(last, flight.last) - 1)

    async def wait_news(self) -> None:
        """Come back when the state of any chunk may have changed, or its trust."""
        await self._changed.park()

    def next_run(self, content: ByteRange, most_bytes: int) -> tuple[int, int] | None:
        """Return the first chunks within `content` that nobody fetches yet, for `take_off`.

        No checkpoint may come between the two.
        """
        if content.start >= content.stop:
            return None
        return self._runs.next_run(*self._span(content), most_bytes)

    def take_off(self, run: tuple[int, int], lane: Lane) -> Flight:
        """Reserve the chunks of a run; whoever calls this must `conduct` the flight.

        It may be shorter than the run: other daemons fetch the same layer.
        """
        first, last = run
        part = self._others.divide(first, last)
        flight = Flight(self.holdings, self._landed, first, part.last, lane, part.task)
        flight.rank, flight.holds_lock = part.rank, part.locked
        self._flights.append(flight)
        self._changed.unpark_all()
        for index in range(flight.first, flight.last):
            if self._state[index] < READY:
                self._state[index] = FLYING
        return flight

    async def conduct(self, flight: Flight) -> None:
        """Fetch, check or wait for the chunks of a flight that has taken off.

        Raises:
            IntegrityError, FetchError, SourceError: as `read`.
        """
        try:
            if flight.task is Task.FETCH:
                await self._fetch(flight)
            elif flight.task is Task.CHECK:
                await self._check_cached(flight)
            else:
                await self._others.wait(flight)
        finally:
            self._touch_down(flight)

    # -- the end of trust -------------------------------------------------------------------

    @property
    def poison(self) -> LazyfsError | None:
        """Why nothing is served any more, if that is so."""
        return self._poison

    def condemn(self, error: LazyfsError, *, guilty: bool = True) -> None:
        """Serve nothing more of this layer, say why, and forget what the cache holds of it.

        One that is not `guilty` shares the fate of another layer. What it has proven is kept.
        """
        if self._poison is not None:
            return
        self._poison = error.with_traceback(None)  # which would hold on to buffers
        self.condemned.set()
        if guilty:
            log.critical("%s" + CONDEMNED, error)
        if guilty or not self.proven:
            self.holdings.purge()
        for flight in self._flights:
            flight.let_go_all()
        self._changed.unpark_all()

    def raise_if_condemned(self) -> None:
        """Raise the error of a verification that has failed, if any has."""
        if self._poison is not None:
            raise self._poison

    # -- what it comes to -------------------------------------------------------------------

    @property
    def proven(self) -> bool:
        """Whether a digest that the manifest vouches for has proven all that is served."""
        return self.chunks.proven or self.holdings.sealed

    def note_seal(self) -> bool:
        """Whether another daemon has just been found to have proven the whole blob."""
        if not self.holdings.learn_seal():
            return False
        self._changed.unpark_all()
        return True

    @property
    def content_size_bytes(self) -> int:
        """Size of the content address space."""
        return self.chunks.content_size_bytes

    def here_bytes(self) -> int:
        """How much content is here, give or take a chunk's size."""
        return self.holdings.here_bytes()

    def close(self) -> None:
        """Let go of what is held, when nobody reads any more."""
        self.holdings.close()

    def _span(self, content: ByteRange) -> tuple[int, int]:
        return self.chunks.index_at(content.start), self.chunks.index_at(content.stop - 1) + 1

    # -- flights ----------------------------------------------------------------------------

    async def _ensure(self, first: int, last: int, lane: Lane) -> None:
        """As `ensure`, by chunk.

        What has once been here is not looked at again: in memory it may have had to go, and
        waiting for all at once could last for ever.
        """
        index, fetched_up_to = first, first
        while index < last:
            self.raise_if_condemned()
            state = self._state[index]
            if state >= READY or index < fetched_up_to:
                index += 1
            elif state == FLYING:
                await self._await_flight(index, last, lane)
            elif state == UNCHECKED:
                run = index, self._runs.unchecked_end(index, len(self._state))
                await self.conduct(self.take_off(run, lane))
            else:
                runs = self._runs.absent(index, last, demand=lane is Lane.DEMAND)
                flights = [self.take_off(runs[0], lane)]
                for run in runs[1:]:
                    if self._state[run[0]] == ABSENT:  # and not found on the disk with another run
                        flights.append(self.take_off(run, lane))
                await at_once([partial(self.conduct, flight) for flight in flights])
                if flights[0].task is Task.FETCH:
                    fetched_up_to = flights[0].last

    async def _await_flight(self, index: int, last: int, lane: Lane) -> None:
        """Wait for news of a chunk; fetch it oneself when there have been none for too long."""
        flight = self._flight_over(index)
        if flight is None:  # cannot be: FLYING says so
            raise AssertionError(f"chunk {index} flies on no flight")
        patience_s = self.settings.patience_s
        end = index + 1
        while end < min(last, flight.last) and self._state[end] == FLYING:
            end += 1
        wait_s = patience_s
        if flight.task is Task.AWAIT:  # has long been waited for, maybe
            wait_s = max(0.0, flight.moved_at_s + patience_s - time.monotonic())
        with trio.move_on_after(wait_s):
            await flight.wait_landed(end - 1)  # they land in order: one waking for all of them
        if self._state[index] >= READY:
            return
        if flight.error is not None and flight.lane is lane:
            raise flight.error
        stalled = time.monotonic() - flight.moved_at_s >= patience_s
        is_fetch_of_others = flight.lane is not Lane.DEMAND and flight.task is not Task.CHECK
        if stalled and lane is Lane.DEMAND and is_fetch_of_others:
            if self._flight_over(index) is not flight:
                return
            log.debug("chunks %d-%d: no byte for %.1f s, asking beside", index, end, patience_s)
            await self.conduct(self.take_off((index, end), lane))

    async def _fetch(self, flight: Flight) -> None:
        """Land a flight; anew, from other places, where one of them gave wrong bytes."""
        is_background = flight.lane is not Lane.DEMAND

        def check() -> None:
            if self._poison is not None:
                raise _Stopped  # no error of the place that is being asked
            gently = is_background and flight.window_bytes is None and self.lanes.is_gentle
            allow_on_the_way(self.lanes.gentle_bytes if gently else flight.window_bytes)

        while True:
            landing = Landing(self.chunks, flight, check)
            try:
                await self.fetcher.fetch(
                    self.blob,
                    landing.byte_range,
                    landing,
                    limiter=self.lanes.limiter(flight.lane),
                    patient=self._source_answers,
                    urgent=flight.lane is Lane.DEMAND,
                    why=flight.lane.value,
                )
            except _Stopped:
                self.raise_if_condemned()
            except PlaceLied as error:
                log.warning("%s gave wrong bytes and is asked no more: %s", error.place, error)
                flight.give_back_claims()
            except LazyfsError as error:
                flight.error = error
                self._source_answers = False
                if isinstance(error, IntegrityError):
                    self.condemn(error)
                raise
            else:
                self._source_answers = True
                return
            finally:
                landing.close()

    async def _check_cached(self, flight: Flight) -> None:
        """Believe chunks that others have stored only if they still give their marks.

        The first of them, for which somebody may be waiting, are let in before the rest is looked
        at. Those that are bad are refused at the end, since until then they fly here.
        """
        is_demand = flight.lane is Lane.DEMAND
        head = self._runs.check_head(flight.first, flight.last) if is_demand else flight.last
        bad: list[tuple[int, int]] = []
        for first, last in ((flight.first, head), (head, flight.last)):
            if first == last:
                continue
            marks = [(index, self.holdings.mark(index)) for index in range(first, last)]
            for index, mark, is_good in await self._others.check(marks):
                if not is_good:
                    bad.append((index, mark))
                elif self._state[index] == FLYING:
                    self.holdings.accept(index, mark)
                    self._note_arrival(index, index + 1)
            flight.let_go(first, last)
        for index, mark in bad:
            self.holdings.refuse(index, mark)

    def _arrived(self, first: int, last: int) -> None:
        """Wake those who wait for chunks that another daemon has brought."""
        self.landed_bytes += self.chunks.content_start(last) - self.chunks.content_start(first)
        self._note_arrival(first, last)
        for flight in self._flights:
            flight.let_go(first, last)

    def _note_arrival(self, first: int, last: int) -> None:
        journal = self.counters.journal
        if journal is not None:
            span = self.chunks.content_start(first), self.chunks.content_start(last)
            journal.note_arrival(ArrivalNote(self.blob.name, *span, time.monotonic()))

    def _touch_down(self, flight: Flight) -> None:
        self._flights.remove(flight)
        flight.give_back_claims()
        self._others.leave(flight)
        undone = UNCHECKED if flight.task is Task.CHECK else ABSENT
        for index in range(flight.first, flight.last):
            if self._state[index] == FLYING and self._flight_over(index) is None:
                self._state[index] = undone
        flight.let_go_all()
        self._changed.unpark_all()

    def _flight_over(self, index: int) -> Flight | None:
        """Return the flight that carries a chunk, the latest if there are several."""
        for flight in reversed(self._flights):
            if flight.first <= index < flight.last:
                return flight
        return None

    def adopt(self, first: int, marks: Sequence[int], memory: Memory) -> None:
        """Let readers at chunks that somebody has stored (`Holdings.store`), number `first` on.

        On the trio thread; does not raise.
        """
        last = first + len(marks)
        if not self.holdings.publish(first, marks, memory):
            self.condemn(self.holdings.contradiction(first, last))
            return
        for flight in self._flights:  # a chunk may be carried by several
            if flight.first < last and first < flight.last:
                flight.let_go(first, last)

    def witness(self, first: int, marks: Sequence[int]) -> None:
        """Take note of what chunks must be like, and condemn the layer if one was otherwise.

        On the trio thread; does not raise.
        """
        last = first + len(marks)
        if not self.holdings.witness(first, marks):
            self.condemn(self.holdings.contradiction(first, last))

    def _landed(self, first: int, marks: Sequence[int], memory: Memory) -> None:
        last = first + len(marks)
        self.landed_bytes += self.chunks.content_start(last) - self.chunks.content_start(first)
        self._note_arrival(first, last)
        self.adopt(first, marks, memory)
        for flight in [each for each in self._flights if each.first <= first < each.last]:
            flight.note_landed(last)

    async def _gather(self, content: ByteRange, lane: Lane) -> bytes:
        """Put a range together chunk by chunk: those in memory may go at any moment."""
        out = bytearray()
        first, last = self._span(content)
        for index in range(first, last):
            while (part := self.holdings.part(index, content)) is None:
                await self._ensure(index, index + 1, lane)
            out += part
        self.raise_if_condemned()
        if len(out) != content.size_bytes:  # padding between files was asked for
            raise AssertionError(f"{content} is not within one file")
        return bytes(out)


async def at_once(jobs: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run jobs side by side; of their errors raise the first, the others being like it."""
    if len(jobs) == 1:
        await jobs[0]()
        return
    try:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
    except BaseExceptionGroup as group:
        raise_sole_error(group)

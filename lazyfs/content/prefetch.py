"""What is fetched of one layer before anybody asks: first what a trace names, then all the rest.

The *traced* ranges are demand foreseen: a restore that was recorded wanted them, in this order. So
they go before what readers seem to want next, over several connections, and a reader who has to
wait for one of them comes out of no blue. Ranges that were needed at nearly the same time are
fetched by address: what lies close together is one request.

The *rest* is all that a restore reads, in its order: what nobody waits for, as much of it as fills
the link, behind everything else.

A trace is a hint, maybe of another workload. While it is replayed, readers who have to wait for
something else are counted: where nearly all of them do, the trace is dropped.

Sans-I/O, on the trio thread: it decides which run of chunks is next, and fetches nothing.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from lazyfs.content.layer_content import LayerContent
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.model import ChunkMap

log = logging.getLogger(__name__)

BATCH_BYTES = 4 * MIB
"""So much of a trace, in the order of need, is put into the order of addresses; 30 ms of 1 Gbit/s.
"""
_BRIDGE_BYTES = 256 * KIB
"""Gaps up to this size are fetched along: 2 ms of 1 Gbit/s, about what a request costs."""
_WORTH_BYTES = 512 * KIB
"""Requests of so much on average fill the link."""
_TRACED_REQUEST_BYTES = MIB
"""At most: the faults that come first wait for little else."""
_REST_FIRST_BYTES = MIB
_JUDGED_WAITS = 32
_WORTH_WAITS = _JUDGED_WAITS // 4
"""Of the latest waits so many at least must be for what the trace names."""


class PrefetchState(Enum):
    """How far a trace has been replayed."""

    NONE = "none"
    """There is none."""
    REPLAYING = "replaying"
    DONE = "done"
    """All of it has been asked for."""
    DROPPED = "dropped"
    """Readers wanted something else."""


class Traced(NamedTuple):
    """What a trace names of a layer."""

    ranges: Sequence[ByteRange]
    """Of content, in the order in which they are fetched."""
    named: bytearray
    """By chunk: 1 for those that it names."""
    size_bytes: int
    """Of those chunks."""


class Prefetch:
    """The order in which one layer's content is fetched ahead of all readers."""

    def __init__(self, content: LayerContent) -> None:
        """Foresee nothing yet."""
        self._content = content
        self.state = PrefetchState.NONE
        self._traced: Sequence[ByteRange] = ()
        self.traced_bytes = 0
        """How much content the trace names: whole chunks."""
        self.known_at_s = 0.0
        """When the trace was known, by time.monotonic()."""
        self._next_traced = 0
        self._rest: list[ByteRange] = []
        self._next_rest = 0
        self._rest_bytes = 0
        self._taken_bytes = 0
        self._named = bytearray()
        """By chunk: whether the trace names it."""
        self._waits: deque[bool] = deque(maxlen=_JUDGED_WAITS)

    # -- what is foreseen -------------------------------------------------------------------

    def placed(self, traced: Iterable[ByteRange]) -> Traced:
        """Return ranges of content, first needed first, as whole chunks, each once.

        From any thread: a trace may name a great many.
        """
        chunks = self._content.chunks
        named = bytearray(len(chunks))
        found = list(batched(_whole_chunks(traced, chunks, named)))
        size_bytes = sum(
            chunks.content_start(last) - chunks.content_start(first)
            for first, last in _named_runs(named)
        )
        return Traced(found, named, size_bytes)

    def expect(self, traced: Traced) -> None:
        """Replay a trace, in the place of another."""
        self._traced, self._named, self.traced_bytes = traced
        self._next_traced = self._taken_bytes = 0
        self.known_at_s = time.monotonic()
        self._waits.clear()
        self.state = PrefetchState.REPLAYING if self._traced else PrefetchState.NONE

    def follow(self, rest: Sequence[ByteRange]) -> None:
        """Fetch all of these when nobody wants anything else; in the place of others."""
        self._rest = [item for item in rest if item.size_bytes]
        self._next_rest = 0

    @property
    def follows(self) -> bool:
        """Whether everything will be fetched, in an order that is known."""
        return self._next_rest < len(self._rest)

    @property
    def is_replaying(self) -> bool:
        """Whether some of the trace has still to be asked for."""
        return self.state is PrefetchState.REPLAYING

    def foresees(self, wanted: ByteRange) -> bool:
        """Whether a trace that has not been dropped names any of it."""
        if self.state in (PrefetchState.NONE, PrefetchState.DROPPED):
            return False
        if wanted.start >= wanted.stop:
            return False
        first, last = self._span(wanted)
        return self._named.find(1, first, last) >= 0

    def note_wait(self, wanted: ByteRange) -> None:
        """Take note that a reader has to wait; drop the trace if that is nearly always for others.

        What is here already when it is wanted says nothing: others may have brought it.
        """
        if not self.is_replaying:
            return
        self._waits.append(self.foresees(wanted))
        if len(self._waits) == _JUDGED_WAITS and sum(self._waits) < _WORTH_WAITS:
            log.info("%s: a trace is of no use here, and is dropped", self._content.blob.name)
            self.drop(PrefetchState.DROPPED)

    def drop(self, state: PrefetchState) -> None:
        """Ask for nothing more of the trace."""
        if self.is_replaying:
            self.state = state
            self._next_traced = len(self._traced)

    def give_up(self) -> None:
        """Ask for nothing more: the source does not answer, and readers will ask themselves."""
        self.drop(PrefetchState.DONE)
        self._next_rest = len(self._rest)

    # -- what is next -----------------------------------------------------------------------

    def next_traced(self, room_bytes: int) -> tuple[int, int] | None:
        """Return the next run of chunks of the trace, if any of it is still to be asked for.

        No more of it than `room_bytes` in all.
        """
        while self._next_traced < len(self._traced) and self._taken_bytes < room_bytes:
            item = self._traced[self._next_traced]
            run = self._content.next_run(item, _TRACED_REQUEST_BYTES)
            if run is not None:
                self._taken_bytes += self._size_bytes(run)
                return run
            self._next_traced += 1
        self.drop(PrefetchState.DONE)
        return None

    def next_rest(self, most_bytes: int) -> tuple[int, int] | None:
        """Return the next run of the rest; small ones first, so that its first bytes are early."""
        while self._next_rest < len(self._rest):
            item = self._rest[self._next_rest]
            share_bytes = max(_REST_FIRST_BYTES, self._rest_bytes)
            run = self._content.next_run(item, min(share_bytes, most_bytes))
            if run is not None:
                self._rest_bytes += self._size_bytes(run)
                start = max(item.start, self._content.chunks.content_start(run[0]))
                self._rest[self._next_rest] = ByteRange(start, item.stop)
                return run
            self._next_rest += 1
        return None

    # -- what it comes to -------------------------------------------------------------------

    def traced_here_bytes(self) -> int:
        """How much of `traced_bytes` is here, give or take a chunk's size."""
        named = int.from_bytes(self._named, "little")
        here = int.from_bytes(self._content.holdings.here_flags(), "little")
        count = self._named.count(1)
        return self.traced_bytes * (named & here).bit_count() // count if count else 0

    def _size_bytes(self, run: tuple[int, int]) -> int:
        chunks = self._content.chunks
        return chunks.content_start(run[1]) - chunks.content_start(run[0])

    def _span(self, content: ByteRange) -> tuple[int, int]:
        chunks = self._content.chunks
        return chunks.index_at(content.start), chunks.index_at(content.stop - 1) + 1


def _whole_chunks(
    ranges: Iterable[ByteRange], chunks: ChunkMap, named: bytearray
) -> Iterator[ByteRange]:
    """Yield the chunks that ranges are in, each once, and name them; those that there are."""
    for item in ranges:
        if not 0 <= item.start < item.stop <= chunks.content_size_bytes:
            continue
        first, last = chunks.index_at(item.start), chunks.index_at(item.stop - 1) + 1
        while (start := named.find(0, first, last)) >= 0:
            first = named.find(1, start, last)
            first = last if first < 0 else first
            named[start:first] = b"\1" * (first - start)
            yield ByteRange(chunks.content_start(start), chunks.content_start(first))


def _named_runs(named: bytearray) -> Iterator[tuple[int, int]]:
    last = 0
    while (first := named.find(1, last)) >= 0:
        last = named.find(0, first)
        last = len(named) if last < 0 else last
        yield first, last


def batched(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Yield ranges that were needed at nearly the same time by address, those side by side as one.

    A batch is as small as may be, so that what was needed first comes first, and as large as it
    has to be for requests to be worth what they cost; where that is all, because nothing lies side
    by side, small all the same. What an earlier batch has is not left out: whoever fetches sees
    that it is here.
    """
    left = list(ranges)
    start, may_grow = 0, True
    while start < len(left):
        stop, runs = _batch(left, start, BATCH_BYTES)
        size_bytes = BATCH_BYTES
        while may_grow and stop < len(left) and len(runs) > 1 and _mean_bytes(runs) < _WORTH_BYTES:
            size_bytes *= 2
            stop, runs = _batch(left, start, size_bytes)
        if _mean_bytes(runs) < _WORTH_BYTES:
            may_grow = may_grow and stop < len(left)  # or each batch would look at all that is left
            stop, runs = _batch(left, start, BATCH_BYTES)
        yield from runs
        start = stop


def _batch(ranges: Sequence[ByteRange], start: int, most_bytes: int) -> tuple[int, list[ByteRange]]:
    """Return where the ranges from `start` on come to so much, and what they are together."""
    size_bytes = 0
    stop = start
    while stop < len(ranges) and size_bytes < most_bytes:
        size_bytes += ranges[stop].size_bytes
        stop += 1
    return stop, list(coalesce(ranges[start:stop], _BRIDGE_BYTES))


def _mean_bytes(runs: Sequence[ByteRange]) -> int:
    return sum(each.size_bytes for each in runs) // len(runs)

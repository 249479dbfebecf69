"""One fetch under way: which chunks, how they come, on which lane, and who waits for them."""

import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import TypeAlias

import trio

from lazyfs.content.holdings import Holdings
from lazyfs.content.lanes import Lane
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError

_BEAT_EVERY_S = 0.1
"""Often enough for whoever is patient for `patience_s`, and slower than anybody looks."""

Memory: TypeAlias = Sequence[bytes | None] | None
"""Chunks that the disk would not take; None for one, or for all: it has."""
Landed: TypeAlias = Callable[[int, Sequence[int], Memory], None]


class Task(Enum):
    """How the chunks of a flight come to be here."""

    FETCH = "fetch"
    """From the source."""
    CHECK = "check"
    """From the cache's disk, if they are what their marks say."""
    AWAIT = "await"
    """Another daemon fetches them."""


class Flight:
    """One fetch under way, of the chunks `first` up to `last`; the shore of its landing.

    Methods are called from the worker thread that receives, unless they say otherwise.
    """

    def __init__(
        self,
        holdings: Holdings,
        landed: Landed,
        first: int,
        last: int,
        lane: Lane,
        task: Task = Task.FETCH,
    ) -> None:
        """`landed` is told on the trio thread what has been stored."""
        self.first = first
        self.last = last
        self.lane = lane
        self.task = task
        self.window_bytes: int | None = None
        """No more of it than so much is on its way at a time, whoever waits or not."""
        self.ending_at = last
        """Once all chunks before this one have landed, `on_ending` is called, once."""
        self.on_ending: Callable[[], None] | None = None
        self.rank = 0
        """Of the lock that is held, or awaited (`host_locks.py`)."""
        self.holds_lock = False
        """Whether other daemons know that these chunks are being fetched."""
        self._beat_at_s = time.monotonic()
        self._beats = 0
        self.error: LazyfsError | None = None
        self.moved_at_s = time.monotonic()
        self._holdings = holdings
        self._landed = landed
        self._token = trio.lowlevel.current_trio_token()
        self._claims: set[int] = set()
        self._awaited: dict[int, trio.Event] = {}

    async def wait_landed(self, index: int) -> None:
        """Come back when a chunk has landed, or the flight has ended. On the trio thread."""
        await self._awaited.setdefault(index, trio.Event()).wait()

    def let_go(self, first: int, last: int) -> None:
        """Wake those who wait for chunks `first` up to `last`. On the trio thread."""
        for index in [index for index in self._awaited if first <= index < last]:
            self._awaited.pop(index).set()

    def note_landed(self, last: int) -> None:
        """All up to chunk `last` has come. On the trio thread."""
        if last >= self.ending_at and self.on_ending is not None:
            on_ending, self.on_ending = self.on_ending, None
            on_ending()

    def let_go_all(self) -> None:
        """Wake all who wait. On the trio thread."""
        self.let_go(self.first, self.last)

    def moved(self) -> None:
        """Note that bytes have come, and let other daemons know now and then."""
        self.moved_at_s = now_s = time.monotonic()
        if self.holds_lock and now_s - self._beat_at_s >= _BEAT_EVERY_S:
            self._beat_at_s = now_s
            self._beats += 1
            self._holdings.locks.beat(self.first, self.last, turn=self._beats % 2 == 1)

    def claim(self, index: int) -> bool:
        """Take the right to store a chunk, for as long as the flight lasts."""
        if not self._holdings.claim(index):
            return False
        self._claims.add(index)
        return True

    def store(self, first: int, pieces: Sequence[Data]) -> None:
        """Keep chunks and tell the trio thread."""
        self._publish(first, *self._holdings.store(first, pieces))

    def store_large(self, index: int, decode: Callable[[], Iterator[Data]]) -> None:
        """Keep a large chunk and tell the trio thread."""
        self._publish(index, *self._holdings.store_large(index, decode))

    def _publish(self, first: int, marks: Sequence[int], memory: Memory) -> None:
        self._claims.difference_update(range(first, first + len(marks)))
        self._token.run_sync_soon(self._landed, first, marks, memory)

    def give_back_claims(self) -> None:
        """Chunks that were claimed and not stored may be stored by others again."""
        while self._claims:
            self._holdings.unclaim(self._claims.pop())

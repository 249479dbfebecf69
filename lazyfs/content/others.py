"""Other daemons that read the same layer: who fetches what, and what they have stored already.

Before chunks are fetched they are locked (FETCH, `host_locks.py`), and then it is looked at once
more whether others have stored them meanwhile; so what all daemons of a host want is fetched
once. What is locked is waited for: others' marks are looked at every few milliseconds, and
readers are let in chunk by chunk. When the lock is gone without its chunks having come (its holder
was killed, or could not store them) they are fetched here. When no byte comes for long the lock
is no longer respected: its holder may have been stopped. Then chunks are fetched twice, and
`chunk_store.py` sees to it that both are the same; under a lock of the next rank, so that of many
who have waited in vain one asks, and the others give that one the same time.

No lock within: on the trio thread, and changed between two checkpoints only.
"""

import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import trio
from msgspec.structs import replace

from lazyfs.content.flight import Flight, Task
from lazyfs.content.holdings import ABSENT, FLYING, UNCHECKED, Holdings
from lazyfs.content.host_locks import RANKS
from lazyfs.content.lanes import Lane
from lazyfs.content.runs import Runs

log = logging.getLogger(__name__)

_POLL_FIRST_S = 0.002
_POLL_MOST_S = 0.025
_BACKGROUND_PATIENCE = 10
"""What nobody waits for can wait so many times longer."""
_IGNORE_STALLED_S = 15.0
_TRIES = 8


class _Stalled(msgspec.Struct, frozen=True):
    """Chunks that somebody has locked and does not bring."""

    first: int
    last: int
    rank: int
    until_s: float


class Part(msgspec.Struct, frozen=True):
    """What is to be done about some chunks."""

    task: Task
    last: int
    """Behind the last of them."""
    rank: int = 0
    locked: bool = False
    """Whether they have been locked, under `rank`: then somebody must `leave` them."""


class Others:
    """What other daemons do with the chunks of one layer."""

    def __init__(
        self,
        holdings: Holdings,
        runs: Runs,
        patience_s: float,
        arrived: Callable[[int, int], None],
    ) -> None:
        """`arrived` is told of chunks that others have brought and that may be read now."""
        self._holdings = holdings
        self._runs = runs
        self._patience_s = patience_s
        self._arrived = arrived
        self._stalled: list[_Stalled] = []

    def divide(self, first: int, last: int) -> Part:
        """Say what is to be done about the chunks from `first` on, up to `last` at most."""
        state = self._holdings.state
        if state[first] == UNCHECKED:
            return Part(Task.CHECK, last)
        if state[first] != ABSENT:  # others in this daemon fetch it; this one asks beside them
            return Part(Task.FETCH, last)
        part = self._lock(first, last)
        check_limit = self._runs.check_limit(first, len(state))
        self._holdings.refresh(first, max(part.last, check_limit))
        if state[first] == UNCHECKED:
            self._unlock(part, first)
            return Part(Task.CHECK, self._runs.unchecked_end(first, len(state)))
        cuts = (state.find(each, first, part.last) for each in (UNCHECKED, FLYING))
        end = min((cut for cut in cuts if cut >= 0), default=part.last)
        while state[end - 1] != ABSENT:
            end -= 1
        self._unlock(part, end)
        return replace(part, last=end)

    def _unlock(self, part: Part, first: int) -> None:
        """Leave the end of a part, from `first` on."""
        if part.locked and first < part.last:
            self._holdings.locks.leave_fetch(first, part.last, part.rank)

    def leave(self, flight: Flight) -> None:
        """Let others fetch what this flight has not brought."""
        if flight.holds_lock:
            flight.holds_lock = False
            self._holdings.locks.leave_fetch(flight.first, flight.last, flight.rank)

    async def wait(self, flight: Flight) -> None:
        """Take in what others store of a flight's chunks.

        Comes back when all are here, or when those that are missing should be asked for.
        """
        holdings, locks = self._holdings, self._holdings.locks
        patience_s = self._patience_s
        if flight.lane is not Lane.DEMAND:
            patience_s *= _BACKGROUND_PATIENCE
        pause_s = _POLL_FIRST_S
        ended = beat = False
        while True:
            news = holdings.landed_elsewhere(flight.first, flight.last)
            if news:
                flight.moved()
                self._forgive(flight.first, flight.last)
                pause_s = _POLL_FIRST_S
                await self._take_in(news)
            missing = holdings.state.find(FLYING, flight.first, flight.last)
            if missing < 0 or (ended and not news):
                return
            others = locks.fetched_by_others(missing, missing + 1, flight.rank)
            ended = others is None  # and yet it may have stored it since we looked
            if locks.beat_of_others(missing) != beat:
                beat = not beat
                flight.moved()
            if others is not None and time.monotonic() - flight.moved_at_s >= patience_s:
                log.debug("chunks %d-%d: another daemon brings nothing, asking beside", *others)
                until_s = time.monotonic() + _IGNORE_STALLED_S
                self._stalled.append(_Stalled(*others, flight.rank, until_s))
                return
            if not ended:
                await trio.sleep(pause_s)
                pause_s = min(1.5 * pause_s, _POLL_MOST_S)

    async def check(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
        """Look whether the file holds chunks as marks say: number, mark, and whether it does."""
        verify = self._holdings.verify
        good = await trio.to_thread.run_sync(lambda: [verify(*each) for each in wanted])
        return [(*each, is_good) for each, is_good in zip(wanted, good, strict=True)]

    async def _take_in(self, news: Sequence[tuple[int, int]]) -> None:
        for index, mark, is_good in await self.check(news):
            if self._holdings.state[index] != FLYING:
                continue  # this daemon has asked beside
            if not is_good:
                self._holdings.refuse(index, mark)
            elif self._holdings.accept(index, mark):
                self._arrived(index, index + 1)

    def _lock(self, first: int, last: int) -> Part:
        """Lock as many chunks from `first` on as are free, or say who is awaited."""
        for rank in range(RANKS):
            part = self._lock_under(rank, first, last)
            if part.task is Task.FETCH or not self._has_stalled(first, part.last, rank):
                return part
            last = part.last
        return Part(Task.FETCH, last)

    def _lock_under(self, rank: int, first: int, last: int) -> Part:
        locks = self._holdings.locks
        for tries in range(_TRIES):
            if tries >= _TRIES // 2:  # there are many, and who is told first need not lie first
                last = first + 1
            if locks.take_fetch(first, last, rank):
                return Part(Task.FETCH, last, rank, locked=True)
            others = locks.fetched_by_others(first, last, rank)
            if others is None:
                continue  # it has just ended
            if others[0] <= first:
                return Part(Task.AWAIT, min(last, max(others[1], first + 1)), rank)
            last = others[0]
        return Part(Task.FETCH, last)

    def _has_stalled(self, first: int, last: int, rank: int) -> bool:
        now_s = time.monotonic()
        self._stalled = [each for each in self._stalled if each.until_s > now_s]
        return any(
            each.first < last and first < each.last and each.rank == rank for each in self._stalled
        )

    def _forgive(self, first: int, last: int) -> None:
        self._stalled = [each for each in self._stalled if each.last <= first or last <= each.first]

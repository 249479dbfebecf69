"""Other daemons that read the same layer: who fetches what, and what they have stored already.

Before chunks are fetched they are locked (FETCH, `host_locks.py`), and then it is looked at once
more whether others have stored them meanwhile; so what all daemons of a host want is fetched
once. What is locked is waited for: others' marks are looked at every few milliseconds, and
readers are let in chunk by chunk. When the lock is gone without its chunks having come (its holder
was killed, or could not store them) they are fetched here. When nothing comes for long the lock
is no longer respected: its holder may have been stopped. Then chunks are fetched twice, and
`chunk_store.py` sees to it that both are the same.

No lock within: on the trio thread, and changed between two checkpoints only.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from lazyfs.content.flight import Flight, Task
from lazyfs.content.holdings import ABSENT, FLYING, UNCHECKED, Holdings
from lazyfs.content.lanes import Lane
from lazyfs.content.runs import Runs

log = logging.getLogger(__name__)

_POLL_FIRST_S = 0.002
_POLL_MOST_S = 0.025
_BACKGROUND_PATIENCE = 10
"""What nobody waits for can wait so many times longer."""
_IGNORE_STALLED_S = 15.0
_TRIES = 8


@dataclass(frozen=True, slots=True)
class _Stalled:
    """Chunks that somebody has locked and does not bring."""

    first: int
    last: int
    until_s: float


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

    def divide(self, first: int, last: int) -> tuple[Task, int, bool]:
        """Say what is to be done about the chunks from `first` on, up to which, and if locked.

        Whoever is told that it is locked must `leave` it.
        """
        state = self._holdings.state
        if state[first] == UNCHECKED:
            return Task.CHECK, last, False
        if state[first] != ABSENT:  # others in this daemon fetch it; this one asks beside them
            return Task.FETCH, last, False
        task, stop, locked = self._lock(first, last)
        self._holdings.refresh(first, max(stop, self._runs.check_limit(first, len(state))))
        if state[first] == UNCHECKED:
            end = self._runs.unchecked_end(first, len(state))
            task, keep = Task.CHECK, first
        else:
            cuts = (state.find(each, first, stop) for each in (UNCHECKED, FLYING))
            end = min((cut for cut in cuts if cut >= 0), default=stop)
            while state[end - 1] != ABSENT:
                end -= 1
            keep = end
        if locked and keep < stop:
            self._holdings.locks.leave_fetch(keep, stop)
        return task, end, locked and keep > first

    def leave(self, flight: Flight) -> None:
        """Let others fetch what this flight has not brought."""
        if flight.holds_lock:
            flight.holds_lock = False
            self._holdings.locks.leave_fetch(flight.first, flight.last)

    async def wait(self, flight: Flight) -> None:
        """Take in what others store of a flight's chunks.

        Comes back when all are here, or when those that are missing should be asked for.
        """
        holdings, locks = self._holdings, self._holdings.locks
        patience_s = self._patience_s
        if flight.lane is not Lane.DEMAND:
            patience_s *= _BACKGROUND_PATIENCE
        pause_s = _POLL_FIRST_S
        ended = False
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
            others = locks.fetched_by_others(missing, missing + 1)
            ended = others is None  # and yet it may have stored it since we looked
            if others is not None and time.monotonic() - flight.moved_at_s >= patience_s:
                log.debug("chunks %d-%d: another daemon brings nothing, asking beside", *others)
                until_s = time.monotonic() + _IGNORE_STALLED_S
                self._stalled.append(_Stalled(*others, until_s))
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

    def _lock(self, first: int, last: int) -> tuple[Task, int, bool]:
        """Lock as many chunks from `first` on as are free, or say who is awaited."""
        locks = self._holdings.locks
        stop = last
        for tries in range(_TRIES):
            if tries >= _TRIES // 2:  # there are many, and who is told first need not lie first
                stop = first + 1
            if locks.take_fetch(first, stop):
                return Task.FETCH, stop, True
            others = locks.fetched_by_others(first, stop)
            if others is None:
                continue  # it has just ended
            if others[0] <= first:
                stop = min(stop, max(others[1], first + 1))
                return Task.FETCH if self._has_stalled(*others) else Task.AWAIT, stop, False
            stop = others[0]
        return Task.FETCH, stop, False

    def _has_stalled(self, first: int, last: int) -> bool:
        now_s = time.monotonic()
        self._stalled = [each for each in self._stalled if each.until_s > now_s]
        return any(each.first < last and first < each.last for each in self._stalled)

    def _forgive(self, first: int, last: int) -> None:
        self._stalled = [each for each in self._stalled if each.last <= first or last <= each.first]

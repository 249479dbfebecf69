"""The attempts a fetch makes at one time: one, or two of which the first to have bytes goes on.

Decides when an attempt is over although its thread still blocks, and whether a second one is made
beside it. An attempt that is over has its sink taken back and its thread woken; the thread ends
by itself. Until then it counts against `Means.threads`, so they cannot become too many.

All state belongs to the trio thread. A thread reports by `run_sync_soon`, whose order is kept:
what its sink has told before is known before the fetch goes on.
"""

import math
import time
from contextlib import suppress

import msgspec
import trio

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.lease import Attempt, Detached
from lazyfs.transport.patience import HedgeBudget
from lazyfs.transport.place import Choice, Place, PlaceLied, is_transient
from lazyfs.transport.slots import Slot, Slots
from lazyfs.transport.waiting import Course

_THREADS_MOST = 128
"""Above what the lanes may have at work at once; what is left is for threads not yet woken."""
_LATE_S = 0.25
"""If we are woken so much too late, it is we (or the machine) who were asleep, not the source."""

_ENDING_S = 0.5


class Means(msgspec.Struct, frozen=True):
    """What all fetches of a mount share."""

    settings: TransportSettings
    counters: Counters
    slots: Slots
    budget: HedgeBudget = msgspec.field(default_factory=HedgeBudget)
    threads: trio.CapacityLimiter = msgspec.field(
        default_factory=lambda: trio.CapacityLimiter(_THREADS_MOST)
    )


async def _acquire(limiter: trio.CapacityLimiter, borrower: object) -> None:
    """Take a token; without a turn of the event loop, if one is free."""
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        limiter.acquire_on_behalf_of_nowait(borrower)
    except trio.WouldBlock:
        await limiter.acquire_on_behalf_of(borrower)


class Race:
    """One round of a fetch: an attempt, and perhaps another beside it, to the end of both."""

    def __init__(
        self,
        course: Course,
        choice: Choice,
        means: Means,
        limiter: trio.CapacityLimiter,
        *,
        urgent: bool,
    ) -> None:
        """Ask for nothing yet."""
        self._course = course
        self._lease = course.lease
        self._choice = choice
        self._means = means
        self._limiter = limiter
        self._urgent = urgent
        self._running: list[Attempt] = []
        self._news = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._error: LazyfsError | None = None
        self._hedge_slot: Slot | None = None
        self._began_s = 0.0

    @property
    def silent_s(self) -> float:
        """Seconds since the round began, or a byte last came in it."""
        return time.monotonic() - max(self._began_s, self._lease.heard_s)

    async def run(self, place: Place) -> LazyfsError | None:
        """Return None once all has come, else why the last attempt failed.

        A token of the limiter is held for as long as it lasts.

        Raises:
            PlaceLied: bytes were wrong, and there is another place.
            IntegrityError: bytes were wrong.
            What else the sink raises.
        """
        self._course.place = place.health.name
        await _acquire(self._limiter, self)
        try:
            if not place.health.remote:
                return await self._run(place)
            with await self._means.slots.take(place.health.host, urgent=self._urgent):
                return await self._run(place)
        finally:
            self._limiter.release_on_behalf_of(self)

    async def _run(self, place: Place) -> LazyfsError | None:
        self._lease.begin_at(place.health)
        attempt = self._attempt(place)
        await _acquire(self._means.threads, attempt)
        self._began_s = time.monotonic()
        hedge_at_s = self._began_s + place.health.hedge_after_s() if self._urgent else math.inf
        self._begin(attempt)
        try:
            while self._running:
                await self._wait(hedge_at_s)
                if self._harvest():
                    return None
                await self._drop_what_is_over()
                if self._running and time.monotonic() >= hedge_at_s:
                    hedge_at_s = math.inf
                    self._hedge(place)
        finally:
            for attempt in self._running[:]:
                await self._drop(attempt)
            if self._hedge_slot is not None:
                self._hedge_slot.give_back()
                self._limiter.release_on_behalf_of(self._hedge_slot)
        return self._error or FetchError(f"{self._course.blob}: nothing came", transient=True)

    # -- attempts ---------------------------------------------------------------------------

    def _attempt(self, place: Place) -> Attempt:
        most_s = place.health.silence_most_s(self._means.settings.stall_timeout_s)
        if most_s < math.inf:
            most_s = min(
                most_s * 2.0**self._course.stalls,
                max(most_s, self._means.settings.stall_timeout_s),
            )
        return Attempt(self._lease, place, most_s)

    def _begin(self, attempt: Attempt) -> None:
        """Start the thread of an attempt that has a token of `Means.threads`."""
        self._running.append(attempt)
        self._course.attempts += 1
        self._means.counters.requests += 1

        def ended() -> None:
            self._means.threads.release_on_behalf_of(attempt)
            attempt.has_ended = True
            self._news.set()

        def report(_: object) -> None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(ended)

        trio.lowlevel.start_thread_soon(attempt.run, report)

    def _hedge(self, place: Place) -> None:
        """Begin a second attempt beside a slow one, if it is free to be had."""
        means, health = self._means, place.health
        if self._lease.tenant is not None or health.failures:
            return
        if means.threads.available_tokens < 1:
            return
        other = self._choice.other_than(place)
        if self._lease.giver is not None:
            other = place  # who has given a part gives the rest of it, see `Lease.begin_at`
        attempt = self._attempt(other)
        slot = means.slots.take_at_once(other.health.host, urgent=True)
        if slot is None:
            return
        try:
            self._limiter.acquire_on_behalf_of_nowait(slot)
        except trio.WouldBlock:
            slot.give_back()
            return
        if not means.budget.spend():
            self._limiter.release_on_behalf_of(slot)
            slot.give_back()
            return
        self._hedge_slot = slot
        means.threads.acquire_on_behalf_of_nowait(attempt)
        means.counters.hedges += 1
        attempt.is_hedge = True
        self._begin(attempt)
        for each in self._running:
            each.tell_taken(self._tell)
        if self._lease.tenant is not None:  # it was taken before anybody was told to tell
            self._news.set()

    def _tell(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._look)

    def _look(self) -> None:
        self._news.set()

    # -- what becomes of them ---------------------------------------------------------------

    async def _wait(self, hedge_at_s: float) -> None:
        """Come back when there is news, or it is time to do something without."""
        now_s = time.monotonic()
        wait_s = min(each.silence_most_s - each.silent_s for each in self._running)
        wait_s = max(0.0, min(wait_s, hedge_at_s - now_s))
        with trio.move_on_after(wait_s) as patience:
            await self._news.wait()
        if patience.cancelled_caught:
            if time.monotonic() - now_s - wait_s > _LATE_S:
                for attempt in self._running:
                    attempt.forgive()
        else:
            self._news = trio.Event()

    def _harvest(self) -> bool:
        """Take note of attempts that have ended; return whether all has come."""
        for attempt in [each for each in self._running if each.has_ended]:
            self._retire(attempt)
            error = attempt.error
            if self._lease.is_filled and (
                error is None or (isinstance(error, LazyfsError) and is_transient(error))
            ):
                self._succeeded(attempt)
                return True
            if isinstance(error, Detached):
                continue
            if error is None:
                name = self._course.blob
                error = FetchError(f"{name}: the reply ended early", transient=True)
            if isinstance(error, IntegrityError):
                raise self._lie(attempt, error)
            if not isinstance(error, LazyfsError):
                raise error
            self._failed(attempt, error)
        return False

    async def _drop_what_is_over(self) -> None:
        """End attempts that have lost, or have been silent for too long."""
        for attempt in self._running[:]:
            position = self._lease.position  # before the tenant: it moves only after that is set
            tenant = self._lease.tenant
            if attempt is not tenant and (tenant is not None or attempt.wanted.start != position):
                await self._drop(attempt)
            elif attempt.silent_s >= attempt.silence_most_s:
                silent_s = attempt.silent_s
                await self._drop(attempt)
                await self._let_end(attempt)
                self._course.stalls += 1
                self._means.counters.stalls += 1
                name = attempt.place.health.name
                text = f"{name} has been silent for {silent_s:.1f} s, longer than it usually is"
                self._failed(attempt, FetchError(text, transient=True))

    async def _drop(self, attempt: Attempt) -> None:
        """Take the sink away from an attempt that may not have ended."""
        await attempt.take_back()
        self._retire(attempt)

    async def _let_end(self, attempt: Attempt) -> None:
        """Give a thread that was woken a moment: its blob may learn where not to ask again."""
        with trio.move_on_after(_ENDING_S):
            while not attempt.has_ended:
                await self._news.wait()
                if not attempt.has_ended:
                    self._news = trio.Event()
        self._news.set()  # there may have been some of others

    def _retire(self, attempt: Attempt) -> None:
        self._running.remove(attempt)
        self._means.counters.bytes_fetched += attempt.delivered_bytes
        if self._lease.tenant is attempt:  # its thread has ended
            self._lease.tenant = None

    def _succeeded(self, attempt: Attempt) -> None:
        if attempt.first_byte_s is not None:
            attempt.place.health.answered(attempt.first_byte_s)
        self._means.counters.hedges_won += attempt.is_hedge
        if self._urgent:
            self._means.budget.earn()

    def _failed(self, attempt: Attempt, error: LazyfsError) -> None:
        self._choice.failed(attempt.place, error)
        self._error = self._course.last_error = error.with_traceback(None)
        self._means.budget.lose()

    def _lie(self, attempt: Attempt, error: IntegrityError) -> IntegrityError:
        """Blame the place for wrong bytes; return what to raise."""
        another = self._choice.lied(attempt.place, error)
        if self._choice.is_of_many:
            self._means.counters.places_refused += 1
        return PlaceLied(error, attempt.place.health.name) if another else error

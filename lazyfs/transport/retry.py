"""One fetch, however many attempts it takes: the only place where anything is asked for again.

Decides: what a failed attempt means (`Patience`), and that a fetch resumes where the last
attempt ended. The deadline is on *silence*, not on the transfer: `deadline_s` is the most time
that attempts and pauses may take since the last byte came (or since the first attempt began),
so a large range on a slow link is not cut off while it moves. Time spent waiting for the limiter
is not silence and does not count.

Cancelling: a blob blocks in connect or in receive, where no thread can be woken. So the thread
is abandoned: `fetch` ends at once, the thread finds its sink gone at the next piece (at the
latest when a timeout of the transport ends its receive; until then it keeps its token of the
limiter). The sink is never touched once `fetch` has ended: lending and advancing happen under
`_Lease`'s lock, and what ends first takes it for good. A blob must therefore only copy between
`space()` and `advance()`, never wait for anything.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import trio

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, UnknownHost
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.blob import Blob, Sink

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Patience:
    """What to do after a failed attempt.

    Sans-I/O: it is told how long things took and says for how long to pause.
    """

    def __init__(self, what: str, settings: TransportSettings) -> None:
        self._what = what
        self._settings = settings
        self._silence_s = 0.0
        self._failures = 0
        self._attempts = 0

    def pause_after(self, error: FetchError, *, silent_s: float, progressed: bool) -> float:
        """Return how many seconds to wait before the next attempt.

        `silent_s`: for how long no byte had come when the attempt ended. `progressed`: the
        attempt delivered something; it starts the backoff and the deadline anew.

        Exponential with full jitter. A server's Retry-After is obeyed as far as the deadline
        allows: then one last attempt is made sooner than it asked for.

        Raises:
            FetchError: `error` itself if it is not transient, or one that says how long was
                tried and why the last attempt failed.
        """
        if not error.transient:
            raise error
        if progressed:
            self._silence_s = 0.0
            self._failures = 0
        self._silence_s += silent_s
        self._attempts += 1
        left_s = self._settings.deadline_s - self._silence_s
        if left_s <= 0:
            raise FetchError(
                f"{self._what}: gave up, {self._silence_s:.0f} s without a byte in "
                f"{self._attempts} attempts; the last: {error}",
                transient=False,
            )
        most_s = min(
            self._settings.backoff_most_s,
            self._settings.backoff_first_s * 2.0 ** min(self._failures, 30),
        )
        self._failures += 1
        pause_s = random.uniform(0, most_s)  # noqa: S311 - spreads clients, guards no secret
        pause_s = min(max(pause_s, error.retry_after_s or 0.0), left_s)
        self._silence_s += pause_s
        _log.info("%s: asking again in %.1f s: %s", self._what, pause_s, error)
        return pause_s


class _Detached(Exception):
    """The fetch that this sink belonged to has ended."""


class _Lease:
    """The fetch's sink, lent to one attempt's thread for as long as the fetch goes on.

    `_lock` is held by the thread from `space()` to the end of `advance()`; all else belongs to
    the thread until `take_back` has ended.
    """

    def __init__(self, sink: Sink, wanted_bytes: int) -> None:
        self._sink = sink
        self._wanted_bytes = wanted_bytes
        self._lock = threading.Lock()
        self._room: memoryview | None = None
        self._detached = False
        self._heard_s = 0.0
        self.began = False
        self.delivered_bytes = 0

    @property
    def silent_s(self) -> float:
        """Seconds since the attempt began or a byte last came."""
        return time.monotonic() - self._heard_s

    def run(self, blob: Blob, byte_range: ByteRange) -> None:
        """Make the attempt, in a worker thread."""
        self.began = True
        self._heard_s = time.monotonic()
        try:
            blob.read_into(byte_range, self)
        finally:
            self._settle()

    def space(self) -> memoryview:
        if self._room is not None:
            return self._room
        self._lock.acquire()
        try:
            if self._detached:
                raise _Detached
            left_bytes = self._wanted_bytes - self.delivered_bytes
            if left_bytes == 0:
                raise FetchError("more bytes came than were asked for", transient=False)
            self._room = self._sink.space()[:left_bytes]
        finally:
            if self._room is None:
                self._lock.release()
        return self._room

    def advance(self, count: int) -> None:
        self._heard_s = time.monotonic()
        self.delivered_bytes += count
        if self._room is not None:
            self._room.release()  # the sink may want its buffer for itself now
        try:
            self._sink.advance(count)
        finally:
            self._settle()

    def _settle(self) -> None:
        if self._room is not None:
            self._room.release()
            self._room = None
            self._lock.release()

    async def take_back(self) -> None:
        """Take the sink away from the thread: at once if that has ended, or after its piece."""
        with trio.CancelScope(shield=True):
            while not self._lock.acquire(blocking=False):  # noqa: ASYNC110 - a thread's, no event
                await trio.sleep(0.001)
        self._detached = True
        self._lock.release()


class Fetcher:
    """The one policy by which a mount's ranges are fetched."""

    def __init__(self, settings: TransportSettings, counters: Counters) -> None:
        """Ask for nothing yet."""
        self.settings = settings
        self.counters = counters
        self._one_attempt = replace(settings, deadline_s=0.0)

    async def fetch(
        self,
        blob: Blob,
        byte_range: ByteRange,
        sink: Sink,
        *,
        limiter: trio.CapacityLimiter,
        patient: bool = True,
    ) -> None:
        """Deliver exactly the bytes of `byte_range` into `sink`, in order.

        One token of `limiter` is held per attempt, none in the pauses between. `sink` is called
        in worker threads, one at a time; once this has ended, however it did, no more. Not
        `patient`: one attempt has to do.

        Raises:
            FetchError: nothing came for `settings.deadline_s`, or asking again cannot help.
            SourceError: asking again cannot help.
            IntegrityError: the blob is not what it was.

        Always a checkpoint.
        """
        counters = self.counters
        settings = self.settings if patient else self._one_attempt
        patience = Patience(f"{blob.name}, {byte_range}", settings)
        start = byte_range.start
        if start == byte_range.stop:
            await trio.lowlevel.checkpoint()
            return
        while True:
            lease = _Lease(sink, byte_range.stop - start)
            error = FetchError(f"{blob.name}: the reply ended early", transient=True)
            try:
                await trio.to_thread.run_sync(
                    lease.run,
                    blob,
                    ByteRange(start, byte_range.stop),
                    abandon_on_cancel=True,
                    limiter=limiter,
                )
            except FetchError as failure:
                error = failure
            finally:
                await lease.take_back()
                counters.requests += lease.began
                counters.bytes_fetched += lease.delivered_bytes
            start += lease.delivered_bytes
            if start == byte_range.stop and error.transient:
                return
            pause_s = patience.pause_after(
                error, silent_s=lease.silent_s, progressed=lease.delivered_bytes > 0
            )
            await trio.sleep(pause_s)
            counters.retries += 1


def attempts(
    what: str,
    action: Callable[[], _T],
    *,
    settings: TransportSettings,
    counters: Counters,
) -> _T:
    """Return what `action` returns, called again as `Patience` allows. Blocks, in a thread.

    For the few small requests a mount begins with. Raises what `action` raises, and the
    FetchError that says for how long was tried.
    """
    patience = Patience(what, settings)
    while True:
        began = time.monotonic()
        counters.requests += 1
        try:
            return action()
        except UnknownHost:
            raise  # nothing has worked yet: it is the name that is wrong
        except FetchError as error:
            silent_s = time.monotonic() - began
            pause_s = patience.pause_after(error, silent_s=silent_s, progressed=False)
        time.sleep(pause_s)
        counters.retries += 1

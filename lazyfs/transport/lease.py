"""A fetch's sink, lent to one attempt at a time.

Attempts run in threads that nobody can stop, several of them for one fetch: one that was given
up, and the one that took its place; two of which the first that has bytes shall go on. The sink
is always one's (`Lease`): lending, advancing and taking back happen under a lock, and an attempt
that does not hold it, or no longer, finds out at its next piece (`Detached`) and ends.

A blob must therefore only copy between `space()` and `advance()`, never wait for anything, and
call `space()` only when it has bytes to put there.
"""

import threading
import time
from collections.abc import Callable

import trio

from lazyfs.ground.errors import FetchError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import RewindingSink, Sink, WishingSink
from lazyfs.transport.place import Health, Place
from lazyfs.transport.wake import Waker
from lazyfs.transport.window import allow_on_the_way


class Detached(Exception):
    """To an attempt: the sink is another's, or the fetch has ended."""


class Lease:
    """The sink of one fetch, how much of it is filled, and who may fill it.

    `lock` is held by a thread from `space()` to the end of `advance()`; what is here changes only
    under it.
    """

    def __init__(self, sink: Sink, wanted: ByteRange) -> None:
        """Nobody has it yet."""
        self.sink = sink
        self.wanted = wanted
        self.position = wanted.start
        """The bytes up to here have been delivered."""
        self.heard_s = float("-inf")
        """When the last of them came (`time.monotonic`)."""
        self.first_s: float | None = None
        """When the first of them came."""
        self.tenant: Attempt | None = None
        self.giver: Health | None = None
        """The place that the last of them came from."""
        self.lock = threading.Lock()

    @property
    def is_filled(self) -> bool:
        """Whether all has been delivered."""
        return self.position == self.wanted.stop

    def begin_at(self, place: Health) -> None:
        """Make sure that what is judged as one comes from one place: blame falls on that.

        While there is no tenant and no attempt that could become one.
        """
        if self.giver not in (None, place) and isinstance(self.sink, RewindingSink):
            self.position -= self.sink.rewind()
            self.giver = None

    def admit(self, attempt: "Attempt") -> None:
        """Let an attempt that has bytes be the one that delivers; under the lock.

        Raises:
            Detached: it may not.
        """
        if attempt.is_gone:
            raise Detached
        if self.tenant is None and attempt.wanted.start == self.position:
            self.tenant = attempt
            if self.first_s is None:
                self.first_s = time.monotonic()
            attempt.note_first_byte()
        if self.tenant is not attempt:
            raise Detached


class Attempt:
    """One attempt of a fetch at one place, in a thread of its own; the sink that it gets."""

    def __init__(self, lease: Lease, place: Place, silence_most_s: float) -> None:
        """Ask for what is still missing."""
        self.place = place
        self.wanted = ByteRange(lease.position, lease.wanted.stop)
        self.silence_most_s = silence_most_s
        self.is_hedge = False
        self.is_gone = False
        """The sink has been taken away from it for good."""
        self.has_ended = False
        self.error: BaseException | None = None
        """Why its thread ended, if not well."""
        self.first_byte_s: float | None = None
        """How long the place took to begin its answer."""
        self.delivered_bytes = 0
        self._lease = lease
        self._waker = Waker()
        self._on_taken: Callable[[], None] | None = None
        self._room: memoryview | None = None
        self._began_s = self._heard_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since it began or a byte last came; none while we deal with what came."""
        return 0.0 if self._room is not None else time.monotonic() - self._heard_s

    def forgive(self) -> None:
        """Count its silence from now: it is we who were not there."""
        self._heard_s = time.monotonic()

    def tell_taken(self, on_taken: Callable[[], None]) -> None:
        """Have `on_taken` called, in the attempt's thread, when it gets the sink."""
        self._on_taken = on_taken

    def note_first_byte(self) -> None:
        """Take note that it has got the sink."""
        self.first_byte_s = time.monotonic() - self._began_s
        if self._on_taken is not None:
            self._on_taken()

    def run(self) -> None:
        """Make the attempt, in a worker thread; `error` is how it ended."""
        self._began_s = self._heard_s = time.monotonic()
        allow_on_the_way(None)  # whatever this thread was at before
        try:
            with self._waker:
                if isinstance(self._lease.sink, WishingSink):
                    self._lease.sink.begin()
                self.place.blob.read_into(self.wanted, self)
        except BaseException as error:  # noqa: BLE001 - raised where the fetch is awaited
            self.error = error
        finally:
            self._settle()

    async def take_back(self) -> None:
        """Take the sink away: at once, or after the piece that the thread is busy with.

        The thread is woken, and ends by itself.
        """
        lock = self._lease.lock
        with trio.CancelScope(shield=True):
            # A thread's lock: there is no event to wait for, and it is held for a piece at most.
            while not lock.acquire(blocking=False):  # noqa: ASYNC110
                await trio.sleep(0.001)
        self.is_gone = True
        if self._lease.tenant is self:
            self._lease.tenant = None
        lock.release()
        if not self.has_ended:
            self._waker.wake()

    # -- the sink, in the attempt's thread --------------------------------------------------

    def space(self) -> memoryview:
        """Lend the sink's room, if the sink is this attempt's."""
        if self._room is not None:
            return self._room
        lease = self._lease
        if self.is_gone:
            raise Detached
        lease.lock.acquire()
        try:
            lease.admit(self)
            left_bytes = lease.wanted.stop - lease.position
            if left_bytes == 0:
                raise FetchError("more bytes came than were asked for", transient=False)
            self._room = lease.sink.space()[:left_bytes]
        finally:
            if self._room is None:
                lease.lock.release()
        return self._room

    def advance(self, count: int) -> None:
        """Hand on what was put into the room."""
        self.delivered_bytes += count
        self._lease.position += count
        self._lease.giver = self.place.health
        if self._room is not None:
            self._room.release()  # the sink may want its buffer for itself now
        try:
            self._lease.sink.advance(count)
        finally:
            self._heard_s = self._lease.heard_s = time.monotonic()
            self._settle()

    def _settle(self) -> None:
        if self._room is not None:
            self._room.release()
            self._room = None
            self._lease.lock.release()

"""One fetch, however many attempts it takes; small answers are asked for by `attempts.py`.

Decides: that a fetch resumes where the last attempt ended, at which place (`place.Choice`), after
which pause (`patience.Patience`), and when a reader is told that it cannot be had. What happens
within one attempt, or two beside each other, is `race.Race`.

The deadline is on *silence*, not on the transfer: `deadline_s` is the most time that attempts and
pauses may take since the last byte came (or since the first attempt began), so a large range on a
slow link is not cut off while it moves. Time spent waiting for the limiter, or for a connection
that others on this machine use, is not silence and does not count.

Cancelling: a blob blocks in connect or in receive. So the thread is abandoned, and woken where
that can be done (`wake.py`): `fetch` ends at once, the thread finds its sink gone at the next
piece. The sink is never touched once `fetch` has ended (`lease.py`).
"""

import logging
import time

import trio
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.patience import Patience
from lazyfs.transport.place import Choice
from lazyfs.transport.race import Means, Race
from lazyfs.transport.slots import Slots
from lazyfs.transport.waiting import Course, Waiting

_log = logging.getLogger(__name__)

_TOLD_AFTER_S = 0.2
_TOLD_MOST = 64


class Fetcher:
    """The one policy by which a mount's ranges are fetched."""

    def __init__(self, settings: TransportSettings, counters: Counters) -> None:
        """Ask for nothing yet."""
        self.settings = settings
        self.counters = counters
        self._brief = replace(
            settings, deadline_s=min(settings.deadline_s, settings.brief_deadline_s)
        )
        self._slots = Slots(settings.run_directory, settings.shared_connections)
        self._means = Means(settings, counters, self._slots)
        self._under_way: set[Course] = set()

    @property
    def threads(self) -> int:
        """How many threads are at work, those included that have been given up."""
        return int(self._means.threads.borrowed_tokens)

    def waiting(self) -> list[Waiting]:
        """Return the fetches that have been under way for a while, the oldest first.

        At most so many that a status stays readable.
        """
        now_s = time.monotonic()
        old = [each for each in self._under_way if now_s - each.began_s >= _TOLD_AFTER_S]
        old.sort(key=lambda each: each.began_s)
        return [each.waiting(now_s) for each in old[:_TOLD_MOST]]

    def close(self) -> None:
        """Let go of what is shared with other mounts, when nothing is fetched any more."""
        self._slots.close()

    async def fetch(
        self,
        blob: Blob,
        byte_range: ByteRange,
        sink: Sink,
        *,
        limiter: trio.CapacityLimiter,
        patient: bool = True,
        urgent: bool = False,
        why: str = "",
    ) -> None:
        """Deliver exactly the bytes of `byte_range` into `sink`, in order.

        One token of `limiter` is held per attempt, none in the pauses between. `sink` is called
        in worker threads, one at a time; once this has ended, however it did, no more.

        `patient`: go on for `settings.deadline_s`; else, because the source is known to be away,
        only for `settings.brief_deadline_s`. `urgent`: somebody waits for exactly these bytes, so
        a slow answer is asked for a second time, and connections shared with others are had
        sooner. `why` is told by `waiting`.

        Raises:
            FetchError: nothing came for that long, or asking again cannot help.
            SourceError: asking again cannot help, anywhere.
            PlaceLied: the sink found bytes to be wrong, and there is another place to have them
                from: fetch anew, into a sink that begins anew.
            IntegrityError: the sink found bytes to be wrong, or the blob is not what it was.

        Always a checkpoint.
        """
        if byte_range.start == byte_range.stop:
            await trio.lowlevel.checkpoint()
            return
        course = Course(blob.name, byte_range, sink, why)
        patience = Patience(f"{blob.name}, {byte_range}", self.settings if patient else self._brief)
        choice = Choice(blob)
        furthest = byte_range.start
        self._under_way.add(course)
        try:
            while True:
                race = Race(course, choice, self._means, limiter, urgent=urgent)
                error = await race.run(choice.next())
                if error is None:
                    return
                progressed = course.lease.position > furthest
                furthest = max(furthest, course.lease.position)
                await _pause(patience, choice, race.silent_s, error, progressed=progressed)
                self.counters.retries += 1
        finally:
            self._under_way.discard(course)
            if self.counters.journal is not None:
                self.counters.journal.note_fetch(course.note(time.monotonic()))


async def _pause(
    patience: Patience, choice: Choice, silent_s: float, error: LazyfsError, *, progressed: bool
) -> None:
    """Come back when it is time to ask again: at once if there is another place to ask.

    Raises:
        FetchError: patience is at its end.
        LazyfsError: nobody will ever give it.
    """
    place = choice.next()
    reason = choice.why(error)
    patience.spend(silent_s, progressed=progressed, why=reason)
    if choice.may_go_on_at_once():
        _log.info("going on at %s: %s", place.health.name, error)
        return
    await trio.sleep(patience.pause(silent_s, choice.wish_s(place), reason))

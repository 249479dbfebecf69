"""Reading along while another daemon of the host decodes a stream.

Who follows fetches nothing: it looks how far the other is (`notice.py`), maps what has come, and
wakes its readers. It looks every few milliseconds while somebody waits, and rarely otherwise. It
takes over at once where the other has ended, however that was, since its lock has gone with it.
Where the other lives but shows no life for `stream_patience_s`, being stopped, its lock and its
file stay its own: the directory is moved away, and another one begun.

A follower waits for the other's source by its own deadline.
"""

import logging
from contextlib import suppress
from enum import Enum, auto

import trio

from lazyfs.content.coming import Coming
from lazyfs.content.growing_file import GrowingFile
from lazyfs.content.kept import is_published, publish
from lazyfs.content.notice import News, Notice, State
from lazyfs.content.stream_pass import Job
from lazyfs.ground.errors import FetchError, LazyfsError

log = logging.getLogger(__name__)

_LOOK_FIRST_S = 0.002
_LOOK_MOST_S = 0.02
_LOOK_IDLE_S = 0.25
_TRY_EVERY_S = 0.1
_STEP_MOST_S = 0.5
"""Time that counts between two looks: when the whole machine has slept, nobody was stuck."""
_OFFLOAD_BYTES = 1 << 20
_DEADLINE_MARGIN_S = 1.0
"""The other has waited for its source as long, and knows better what to say."""


class Outcome(Enum):
    """How following has ended."""

    WHOLE = auto()
    LEAD = auto()
    """The other has ended before; this daemon leads now."""
    FAILED = auto()
    """The other has found the blob not to be what its digest promises."""
    STUCK = auto()
    """The other does not go on, or nobody can tell: all begin anew."""


class Follower:
    """One content that another daemon decodes."""

    def __init__(self, job: Job, coming: Coming, file: GrowingFile, notice: Notice) -> None:
        """Do nothing yet."""
        self._job = job
        self._coming = coming
        self._file = file
        self._notice = notice
        self._news = News()
        self._unchanged_s = 0.0
        self._silent_s = 0.0
        self._tried_s = float("-inf")

    async def run(self) -> Outcome:
        """Follow, until there is something else to do.

        Raises:
            IntegrityError: what comes is not what came before.
        """
        look_s = _LOOK_FIRST_S
        looked_s = trio.current_time()
        first = self._notice.look()
        if first is not None:
            self._news = News(troubles=first.troubles)  # those are over, or will be told again
        while True:
            outcome, came = await self._look()
            if outcome is not None:
                return outcome
            now_s = trio.current_time()
            if self._is_stuck(min(now_s - looked_s, _STEP_MOST_S)):
                return Outcome.STUCK
            looked_s = now_s
            self._coming.asked = trio.Event()
            look_s = _LOOK_FIRST_S if came else min(look_s * 1.5, _LOOK_MOST_S)
            if self._coming.is_waited_for:
                await trio.sleep(look_s)
                continue
            look_s = _LOOK_FIRST_S
            with trio.move_on_after(_LOOK_IDLE_S):
                await self._coming.asked.wait()

    async def _look(self) -> tuple[Outcome | None, bool]:
        """Take in what has changed; return how it ends, and whether any content has come."""
        news = self._notice.look()
        came = False
        if news is not None:
            came = await self._take_in(news)
            if news.state is State.WHOLE and self._has_all(news):
                return Outcome.WHOLE, came
            if news.state is State.FAILED:
                return Outcome.FAILED, came
        if trio.current_time() > self._tried_s + _TRY_EVERY_S:
            self._tried_s = trio.current_time()
            if self._file.cradle.lead():
                return await self._decide(), came
        return None, came

    async def _decide(self) -> Outcome:
        """Having become the one who leads: see how the other has ended."""
        if self._file.cradle.is_replaced():
            return Outcome.STUCK
        news = self._notice.look()
        if news is None:
            return Outcome.STUCK
        await self._take_in(news)
        match news.state:
            case State.WHOLE:
                return Outcome.WHOLE if self._has_all(news) else Outcome.STUCK
            case State.FAILED:
                return Outcome.FAILED
            case _:
                return Outcome.LEAD

    async def _take_in(self, news: News) -> bool:
        before, self._news = self._news, news
        came = news.position > self._file.size_bytes
        if came:
            try:
                await self._advance(news.position)
            except OSError as problem:
                self._coming.trouble(self._job.no_room(problem, self._file.size_bytes))
        self._coming.hashed_bytes = news.hashed_bytes
        self._coming.wake()
        if news.beats != before.beats:
            self._unchanged_s = 0.0
        if came or news.hashed_bytes != before.hashed_bytes:
            self._silent_s = 0.0
            self._coming.on_ask = _nothing
        if news.troubles != before.troubles and news.state is State.DECODING:
            self._coming.on_ask = self._notice.ask
            self._coming.trouble(self._notice.trouble())
        return came

    def _has_all(self, news: News) -> bool:
        """Whether all that the other has told of could be mapped: the file may be damaged."""
        return self._file.size_bytes >= news.position

    async def _advance(self, position: int) -> None:
        if position - self._file.size_bytes > _OFFLOAD_BYTES:  # it may have to be compared
            await trio.to_thread.run_sync(self._file.advance, position)
        else:
            self._file.advance(position)

    def _is_stuck(self, passed_s: float) -> bool:
        """Count how long there was no life, and how long nothing came for those who wait."""
        self._unchanged_s += passed_s
        self._silent_s = self._silent_s + passed_s if self._coming.is_waited_for else 0.0
        deadline_s = self._job.fetcher.settings.deadline_s
        if self._silent_s > deadline_s + _DEADLINE_MARGIN_S:
            self._silent_s = 0.0
            self._coming.on_ask = self._notice.ask
            self._coming.trouble(
                FetchError(
                    f"{self._job.blob.name}: gave up, nothing came for {deadline_s:.0f} s by way "
                    "of the lazyfs that decodes it",
                    transient=False,
                )
            )
        return self._unchanged_s > self._job.settings.stream_patience_s

    async def settle(self) -> None:
        """See to it that later mounts find a whole content, if the other ends before it has."""
        home = self._job.home
        while home is not None and not is_published(self._file, home):
            if self._file.cradle.lead() and not is_published(self._file, home):
                with suppress(LazyfsError):
                    try:
                        await trio.to_thread.run_sync(publish, self._file, home, None, _nothing)
                    except OSError as problem:
                        name = self._job.blob.name
                        log.warning("later mounts will not find %s: %s", name, problem)
                return
            await trio.sleep(_LOOK_IDLE_S)


def _nothing() -> None:
    pass

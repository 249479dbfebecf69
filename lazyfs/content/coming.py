"""How far a content has come, in whichever file, and who waits for more of it.

Belongs to the trio thread, but for `moved`, which the thread that decodes calls.
"""

import logging
from collections.abc import Callable

import trio

from lazyfs.content.blob_stream import REST_S
from lazyfs.content.growing_file import GrowingFile
from lazyfs.content.waiters import NEVER, Waiters
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.journal import Steps
from lazyfs.ground.ranges import ByteRange

log = logging.getLogger(__name__)


class Coming:
    """One content that comes, as its readers see it."""

    def __init__(self, steps: Steps | None = None) -> None:
        """Nothing has come. `steps`: where what comes is noted, if somebody records."""
        self.file: GrowingFile | None = None
        self.hashed_bytes = 0
        """How far the blob has been hashed."""
        self.asked = trio.Event()
        """Somebody has begun to wait; whoever reacts to that puts another in its place."""
        self.on_ask: Callable[[], None] = _nobody
        """Called when somebody begins to wait."""
        self._steps = steps
        self._waiters = Waiters()
        self._in_trouble_at = -1
        self._token = trio.lowlevel.current_trio_token()

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return the bytes as a slice of a mapping, if they are all here."""
        return self.file.peek(content) if self.file is not None else None

    def position(self) -> int:
        """Return up to where the content is here."""
        return self.file.here_bytes() if self.file is not None else 0

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiters)

    async def wait(self, stop: int) -> None:
        """Come back when there is news for who needs the content up to `stop`.

        Raises what `trouble` is told meanwhile.
        """
        self.asked.set()
        self.on_ask()
        await self._waiters.wait(stop, self.position)

    def wake(self) -> None:
        """Let those go on for whom enough is here."""
        if self._steps is not None:
            self._steps.up_to(self.position())
        self._waiters.wake(self.position())

    def wake_all(self) -> None:
        """Let all look what has become of the content."""
        if self._steps is not None:
            self._steps.up_to(self.position(), at_least_bytes=1)
        self._waiters.wake(NEVER)

    def moved(self) -> None:
        """Wake who waits for what has come, from another thread."""
        if self._steps is not None or self.position() >= self._waiters.least:
            self._token.run_sync_soon(self.wake, idempotent=True)

    def trouble(self, error: LazyfsError) -> None:
        """Tell all who wait that it cannot go on now."""
        position = self.position()
        known = self._in_trouble_at == position
        self._in_trouble_at = position
        log.log(logging.DEBUG if known else logging.WARNING, "waiting to go on: %s", error)
        self._waiters.fail(error)

    async def rest(self, error: LazyfsError) -> None:
        """Tell all who wait; come back when somebody asks again, or after `REST_S`."""
        self.trouble(error)
        self.asked = trio.Event()
        with trio.move_on_after(REST_S):
            await self.asked.wait()

    def close(self) -> None:
        """Let go of the file, when nobody reads any more."""
        if self.file is not None:
            self.file.close()
        self.file = None


def _nobody() -> None:
    pass

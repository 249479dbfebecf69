"""Who waits for a content that grows to come up to where.

Belongs to the trio thread, but for `least`: the thread that moves the content's position looks at
it afterwards, and who begins to wait looks at the position after having set it, so one of the two
sees the other, and that thread wakes the loop only where it has to.
"""

from collections.abc import Callable

import trio

from lazyfs.ground.errors import LazyfsError

NEVER = 1 << 62
"""Behind every content."""


class Waiters:
    """Who waits for the content to come up to where."""

    def __init__(self) -> None:
        self.least = NEVER
        """The nearest address that somebody waits for. Read by the decoding thread."""
        self._waiters: dict[trio.Event, tuple[int, list[LazyfsError]]] = {}

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiters)

    async def wait(self, stop: int, position: Callable[[], int]) -> None:
        """Come back when there is news for who needs the content up to `stop`.

        Raises what `fail` is told meanwhile.
        """
        news = trio.Event()
        errors: list[LazyfsError] = []
        stop = min(stop, NEVER)  # or nobody would come by there
        self._waiters[news] = stop, errors
        self.least = min(self.least, stop)
        try:
            if position() < stop:
                await news.wait()
        finally:
            self._waiters.pop(news, None)
            self._find_least()
        if errors:
            raise errors[0]

    def wake(self, position: int) -> None:
        """Let those go on who wait for no more than what is here now."""
        for news, (stop, _) in list(self._waiters.items()):
            if stop <= position:
                del self._waiters[news]
                news.set()
        self._find_least()

    def fail(self, error: LazyfsError) -> None:
        """Let all go on, with an error."""
        for _, errors in self._waiters.values():
            errors.append(error)
        self.wake(NEVER)

    def _find_least(self) -> None:
        self.least = min((stop for stop, _ in self._waiters.values()), default=NEVER)

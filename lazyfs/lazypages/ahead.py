"""Fills in what a trace foretells, in its order, as it comes: what is there is no fault any more.

Fetches nothing: who replays the trace does (`content/prefetch.py`). What does not come, or has been
moved by the task meanwhile, is left to the faults, and to what is sent behind them.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import trio

from lazyfs.ground.errors import LazyfsError
from lazyfs.lazypages.order import Part
from lazyfs.lazypages.pages import LazyMemory
from lazyfs.lazypages.task import Sent, Task

log = logging.getLogger(__name__)

_LOOKED_AT = 32
"""Parts that are not here, of which one may come any moment: bytes come in nearly this order."""
_LOOK_AGAIN_S = 0.02
_LATER_S = 0.002
_IN_VAIN_S = 2.0
"""Nothing came for so long, nor is it on its way: whoever replayed the trace has given it up."""


class Ahead:
    """Of one restore; `run` it beside its tasks."""

    def __init__(self, parts: Iterable[Part], tasks: Sequence[Task]) -> None:
        """`parts`: what is foreseen; `tasks`: those that are not over, as they come and go."""
        self._parts = deque(parts)
        self._tasks = tasks

    async def run(self, are_all: Callable[[], bool]) -> None:
        """Come back when all of it is filled in, or comes no more. Raises as `Task.run`.

        `are_all`: whether all tasks have been announced.
        """
        moved_at_s = trio.current_time()
        while self._parts:
            skipped: list[Part] = []
            is_later = is_moving = False
            while self._parts and len(skipped) < _LOOKED_AT:
                part = self._parts.popleft()
                sent = self._send(part)
                if sent is Sent.ALL and (are_all() or self._is_wanted(part)):
                    is_moving = True
                    await trio.lowlevel.checkpoint()
                    continue
                is_later = is_later or sent is not Sent.ABSENT
                skipped.append(part)
            self._parts.extendleft(reversed(skipped))
            if is_moving or is_later:
                moved_at_s = trio.current_time()
            elif trio.current_time() - moved_at_s > _IN_VAIN_S and not self._is_coming(skipped[0]):
                log.info("%d parts of what was foreseen have not come", len(self._parts))
                return
            if not is_moving:
                await self._wait(skipped[0], is_later=is_later)

    def _is_wanted(self, part: Part) -> bool:
        return any(task.lazy.memory is part.memory for task in self._tasks)

    def _lazy(self, part: Part) -> LazyMemory | None:
        return next((task.lazy for task in self._tasks if task.lazy.memory is part.memory), None)

    def _is_coming(self, part: Part) -> bool:
        """Whether it is still being fetched, over a slow link, or will be."""
        lazy = self._lazy(part)
        return lazy is not None and any(
            lazy.files[place.level].is_foreseen(place.offset)
            for place in part.memory.places(part.start, part.stop)
        )

    def _send(self, part: Part) -> Sent:
        found = Sent.ALL
        for task in list(self._tasks):
            if task.lazy.memory is part.memory and not task.is_over:
                sent = task.send(part.start, part.stop)
                found = sent if sent is not Sent.ALL else found
        return found

    async def _wait(self, part: Part, *, is_later: bool) -> None:
        """Come back when it is worth looking again."""
        with trio.move_on_after(_LATER_S if is_later else _LOOK_AGAIN_S):
            lazy = self._lazy(part)
            if is_later or lazy is None:
                await trio.sleep_forever()
                return
            for place in part.memory.places(part.start, part.stop):
                file = lazy.files[place.level]
                if file.peek(place.offset, place.size_bytes) is None:
                    try:
                        await file.wait(place.offset, place.size_bytes)
                    except LazyfsError as error:  # of which whoever misses it will hear
                        log.debug("what was foreseen does not come: %s", error)
                        await trio.sleep_forever()
                    return
            await trio.lowlevel.checkpoint()

"""Drives the walk that finds a layer's entries, a step at a time."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from lazyfs.checkpoint.tree import Filling
from lazyfs.ground.errors import SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import Entry, Walk

log = logging.getLogger(__name__)

_ASK_AGAIN_S = 5.0
_T = TypeVar("_T")


class Walker:
    """A walk, and the entries that it has found so far."""

    def __init__(
        self,
        walk: Walk,
        entries: list[Entry],
        look: Callable[[Sequence[ByteRange]], Awaitable[list[bytes]]],
    ) -> None:
        """`look` gives the bytes that the walk wants to see, and may raise to be asked again."""
        self.entries = entries
        self._walk = walk
        self._look = look
        self._began = False
        self._wanted: Sequence[ByteRange] = ()

    async def step(self) -> bool:
        """Go on until the walk wants to see more, or has ended; return whether it goes on.

        Always a checkpoint. After an error of `look` it may be tried again.

        Raises:
            MalformedError, UnsupportedLayer: what it walks through is no layer.
            IntegrityError, FetchError, SourceError: it cannot be read.
        """
        await trio.lowlevel.checkpoint()
        try:
            if not self._began:
                self._began = True
                self._wanted = next(self._walk)
            else:
                self._wanted = self._walk.send(await self._look(self._wanted))
        except StopIteration:
            return False
        return True

    async def run(self) -> None:
        """Walk to the end; raises as `step`."""
        while await self.step():
            pass


async def at_last(ask: Callable[[], Awaitable[_T]], filling: Filling) -> _T:
    """Return what `ask` returns, however often it takes; who waits meanwhile hears why.

    Raises:
        whatever `ask` raises, but for SourceError.
    """
    said = ""
    while True:
        try:
            return await ask()
        except SourceError as error:
            level = logging.DEBUG if str(error) == said else logging.WARNING
            said = str(error)
            log.log(level, "not all names are known yet: %s", said)
            filling.fail(error)
            await filling.rest(_ASK_AGAIN_S)


async def fill_tree(
    walker: Walker, add: Callable[[Sequence[Entry]], None], filling: Filling
) -> None:
    """Give `add` the entries as they are found, to the last; tell who waits for them.

    A source that fails is asked again; who waits meanwhile hears why.

    Raises:
        as `Walker.step`, but for SourceError; and what `add` raises.
    """
    done = 0
    goes_on = True
    while goes_on:
        goes_on = await at_last(walker.step, filling)
        if done < len(walker.entries):
            add(walker.entries[done:])
            done = len(walker.entries)
            filling.news()

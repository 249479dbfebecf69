"""Has fetched what will be wanted, from the moment on that all names are known.

Two things are found out beside each other: what a trace says was needed (the file that is named, or
what is attached to the image), and in which order CRIU reads all the rest. Each is handed to the
layers as soon as it is known. Neither is an error of the mount, and nothing waits for them but who
wants the whole `Plan`.

Where somebody only looks at a checkpoint nothing is fetched of memory. Where a mount is not for a
restore alone, a trace is replayed once a restore begins (`restore_sign.py`), and all the rest is
fetched once that reads memory at length; not while it only faults.
"""

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.checkpoint.plan import Plan, Stretch, traced_stretches
from lazyfs.checkpoint.restore_sign import MemoryReads, RestoreSign
from lazyfs.content.prefetch import PrefetchState
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import EntryType

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.opened_layer import OpenedLayer
    from lazyfs.checkpoint.tree import Node

_TOLD_FIRST = (PrefetchState.DROPPED, PrefetchState.REPLAYING, PrefetchState.DONE)
"""Of several layers, what one of them does is told of all."""

log = logging.getLogger(__name__)


class Foresight:
    """What is foreseen of one checkpoint; `run` it beside the readers."""

    def __init__(self, checkpoint: "OpenedCheckpoint", *, everything: bool) -> None:
        """`everything`: all that CRIU reads will be wanted, since this is for a restore."""
        self._checkpoint = checkpoint
        self._everything = everything
        self._begun = trio.Event()
        self._sign = RestoreSign()
        self._memory = MemoryReads()
        self._traced: tuple[Stretch, ...] = ()
        self._rest: tuple[Stretch, ...] = ()
        self._is_replayed = False
        if everything:
            self._begun.set()

    def note_open(self, node: "Node", pid: int) -> bool:
        """Take note that a process has opened a file: a restore may have begun.

        Says whether it is CRIU that will read memory from it, in large pieces and once.
        """
        images = self._checkpoint.images
        if images is None or node.parent is not images.node:
            return False
        if self._begun.is_set():
            return self._memory.opened(node.name, pid)
        if self._sign.opened(node.name, pid):
            log.info("a restore has begun")
            self._begun.set()
        return False

    def as_json(self) -> dict[str, Any]:
        """Return what `docs/json.md` describes."""
        found = [
            each
            for layer in self._checkpoint.image_layers
            if (each := layer.prefetched) is not None
        ]
        states = {each.state for each in found}
        state = next((each for each in _TOLD_FIRST if each in states), PrefetchState.NONE)
        traced_bytes = sum(each.traced_bytes for each in found)
        is_waiting = bool(self._traced) and not self._is_replayed
        return {
            "state": "waiting" if is_waiting else state.value,
            "traced_bytes": traced_bytes,
            "traced_here_bytes": sum(each.traced_here_bytes() for each in found),
            "everything": self._everything,
        }

    async def run(self) -> None:
        """Make the plan, and have it followed; sets `checkpoint.plan` and `plan_known`."""
        checkpoint = self._checkpoint
        try:
            filling = checkpoint.tree.root.filling
            journal = checkpoint.counters.journal
            if filling is not None or (journal is not None and journal.is_precise):
                return  # a stream brings all in its own order; who records precisely wants none
            if self._everything:
                self._start()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guarded, "a trace", self._look_at_trace)
                if self._everything:
                    nursery.start_soon(self._guarded, "the order of a restore", self._follow)
            checkpoint.plan = Plan(self._traced, self._rest)
        finally:
            checkpoint.plan_known.set()
        await self._begun.wait()
        await self._replay()
        if not self._everything:
            await self._wait_long_read()
            self._everything = True
            log.info("memory is read at length: all of it is fetched")
            self._start()
            await self._guarded("the order of a restore", self._follow)

    async def _guarded(self, what: str, job: Callable[[], Awaitable[None]]) -> None:
        try:
            await job()
        except LazyfsError as error:
            log.info("%s is not known: %s", what, error)
        except Exception:  # a bug must not end the mount
            log.exception("%s is not known: please report this", what)

    async def _look_at_trace(self) -> None:
        await self._checkpoint.trace_known.wait()
        trace = self._checkpoint.trace
        if trace is not None:
            self._traced = await trio.to_thread.run_sync(traced_stretches, trace, self._checkpoint)
            if self._begun.is_set():
                await self._replay()

    async def _wait_long_read(self) -> None:
        """Come back when memory is read at length: the restore is not lazy, or not any more."""
        async with trio.open_nursery() as nursery:

            async def watch(layer: "OpenedLayer") -> None:
                await layer.wait_long_read()
                nursery.cancel_scope.cancel()

            for layer in self._checkpoint.image_layers:
                nursery.start_soon(watch, layer)

    async def _replay(self) -> None:
        if not self._is_replayed:
            self._is_replayed = True
            placed = await trio.to_thread.run_sync(self._by_layer, self._traced)
            for number, ranges in placed.items():
                await self._checkpoint.layers[number].expect(ranges)

    def _start(self) -> None:
        """Begin with what names alone tell: a round trip or two until the order is known."""
        from lazyfs.checkpoint.read_order import first_stretches

        self._hand_out(first_stretches(self._checkpoint))

    async def _follow(self) -> None:
        from lazyfs.checkpoint.read_order import all_stretches

        self._rest = await all_stretches(self._checkpoint)
        self._hand_out(self._rest)

    def _hand_out(self, rest: Iterable[Stretch]) -> None:
        for number, ranges in self._by_layer(rest).items():
            self._checkpoint.layers[number].follow(ranges)

    def _by_layer(self, stretches: Iterable[Stretch]) -> dict[int, list[ByteRange]]:
        """Return where stretches of files lie in the content of their layers."""
        found: dict[int, list[ByteRange]] = defaultdict(list)
        for path, offset, size_bytes in stretches:
            node = self._checkpoint.tree.find(path)
            if node is not None and node.type is EntryType.FILE:
                start = node.content_start + offset
                found[node.layer].append(ByteRange(start, start + size_bytes))
        return found

"""The wish that all of a mount be here, and what has become of it.

Whoever asks (`lazyfs wait --complete`) may go away again: the mount goes on fetching. Demand reads
have connections of their own, and the content floor keeps the background out of their way.
"""

import logging
from collections.abc import Callable
from typing import Any

import trio

from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.ground.errors import LazyfsError

log = logging.getLogger(__name__)


class Whole:
    """All of one checkpoint; `run` must be running."""

    def __init__(self, checkpoint: OpenedCheckpoint) -> None:
        """Fetch nothing before somebody asks."""
        self._checkpoint = checkpoint
        self._asked = trio.Event()
        self._state = ""
        self._error: LazyfsError | None = None
        self._progress = Progress(checkpoint)

    def ask(self) -> None:
        """Have all of it fetched and proven; once more if that has failed before."""
        if self._state != "running":
            self._state, self._error = "running", None
            self._asked.set()

    def as_json(self) -> dict[str, Any] | None:
        """Return what has become of it; None if nobody asked."""
        if not self._state:
            return None
        return {
            "state": self._state,
            "done_bytes": self._progress.done_bytes,
            "all_bytes": self._progress.all_bytes,
            "error": str(self._error) if self._error is not None else None,
            "exit_code": self._error.exit_code if self._error is not None else 0,
        }

    async def run(self) -> None:
        """Do what is asked for; for ever."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            self._progress = Progress(self._checkpoint)
            try:
                await complete(self._checkpoint, self._progress)
            except LazyfsError as error:
                log.info("not all of it could be fetched: %s", error)
                self._error = error
            except Exception as error:  # a bug must not end the mount
                log.exception("not all of it could be fetched: please report this")
                self._error = LazyfsError(f"a bug in lazyfs: {error!r}")
            self._state = "done" if self._error is None else "failed"


class Progress:
    """How much of a checkpoint's layers is done. In each layer's own unit: fit for a share."""

    def __init__(self, checkpoint: OpenedCheckpoint) -> None:
        self._layers = {
            number: (0, layer.descriptor.size_bytes)
            for number, layer in enumerate(checkpoint.image_layers)
        }

    @property
    def done_bytes(self) -> int:
        """So many."""
        return sum(done for done, _ in self._layers.values())

    @property
    def all_bytes(self) -> int:
        """Of so many."""
        return sum(whole for _, whole in self._layers.values())

    def of(self, number: int) -> Callable[[int, int], None]:
        """Return what one layer's progress is told to."""

        def note(done_bytes: int, all_bytes: int) -> None:
            self._layers[number] = done_bytes, all_bytes

        return note


async def complete(
    checkpoint: OpenedCheckpoint, progress: Progress, *, alone: bool = False
) -> None:
    """Come back when all of a checkpoint is here, and proven as far as it can be.

    `alone`: nobody else reads it, and no proof runs in the background.

    Raises:
        IntegrityError: it is not what its digest promises.
        FetchError, SourceError: it could not be had.
        LazyfsError: there is no room for it.
    """
    for number, layer in enumerate(checkpoint.image_layers):
        await layer.complete(progress.of(number), alone=alone)
    await checkpoint.complete()

"""What a keeper does all the time: wait for what comes first, look at the mount, tell the front."""

import json
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.served import Abandoned, Served

TICK_S = 0.25
DAEMON_GONE = "the mount's daemon was killed; what had been restored is killed"

_T = TypeVar("_T")


class Watch:
    """The keeper's eyes and mouth."""

    def __init__(self, telling: int, stops: tuple[int, ...]) -> None:
        """Events go to `telling`; `stops` can be read when the restore is to be given up."""
        self.stops = stops
        self.figures: dict[str, Any] = {}
        """What is told of the restore so far (`docs/json.md`, `lazyfs restore`)."""
        self._telling = telling
        self._next_tick_s = 0.0

    def wait(self, watched: list[int], served: Served, tick_s: float = TICK_S) -> set[int]:
        """Return which can be read, after `tick_s` at most; tell how far it is.

        Raises:
            Abandoned: the front is gone, or a signal came.
        """
        poll = select.poll()
        for descriptor in (*watched, *self.stops):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(tick_s * 1000)}
        if ready & set(self.stops):
            raise Abandoned("interrupted; nothing of the restore is left")
        now_s = time.monotonic()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            with suppress(LazyfsError):
                self.note(status_of(served))
                self.tell(event="progress", **self.figures)
        return ready

    def look(self, served: Served, question: Callable[[Path], _T]) -> _T:
        """Return what a look at the mount tells; names that have not come yet are waited for."""
        answers: list[_T | BaseException] = []
        done, ending = os.pipe()

        def look() -> None:
            try:
                answers.append(question(served.path))
            except BaseException as error:  # noqa: BLE001 - raised by who asked
                answers.append(error)
            os.close(ending)

        asking = threading.Thread(target=look, daemon=True)
        asking.start()
        try:
            while done not in self.wait([done, served.fileno()], served):
                if served.has_ended:
                    raise LazyfsError(DAEMON_GONE)
        finally:
            os.close(done)
        asking.join()
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def note(self, status: Mapping[str, Any]) -> None:
        """Take from a mount's state what is told of the restore."""
        self.figures["fetched_bytes"] = status.get("bytes_fetched")
        pages = status.get("lazy_pages") or {}
        read = [status.get("bytes_read"), pages.get("bytes_faulted"), pages.get("bytes_background")]
        self.figures["read_bytes"] = sum(count for count in read if isinstance(count, int))
        self.figures["requests"] = status.get("requests")
        self.figures["followed_trace"] = status.get("trace")

    def tell(self, **words: Any) -> None:
        """Tell the front of an event, if it is still there."""
        with suppress(BrokenPipeError):
            os.write(self._telling, json.dumps(words).encode() + b"\n")


def status_of(served: Served) -> Mapping[str, Any]:
    """Return a mount's state.

    Raises:
        LazyfsError: it has none to tell any more: what was restored from it must be killed.
    """
    try:
        return served.status()
    except LazyfsError as error:
        if served.has_ended:
            raise LazyfsError(DAEMON_GONE) from None
        raise LazyfsError(f"{error}; what had been restored is killed") from None

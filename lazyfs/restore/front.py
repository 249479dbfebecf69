"""The user's process of a restore: starts the keeper, hears its events, ends it all if need be.

It holds a pipe whose end tells the keeper that we are gone, however that happens. And it adopts
what the keeper leaves behind, so that it can kill it if the keeper is killed. Only if both are
killed at once is something left.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.containers import remove
from lazyfs.restore.keeper import keep
from lazyfs.restore.plan import Plan
from lazyfs.restore.processes import adopt_orphans, kill_descendants

_LINE_MOST_BYTES = 1 << 20
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Event = Mapping[str, Any]
"""`event` says which: waiting, stub, mounted, resumed, progress, home, proving, end."""


class Front:
    """A restore under way, as the user's process sees it."""

    def __init__(self, plan: Plan) -> None:
        """Start it. This process must have no other threads yet."""
        self.stopped_by = 0
        """The signal that ended it, if one did."""
        hearing, telling = os.pipe()
        front, self._lifeline = os.pipe()
        adopt_orphans()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how children end
        pid = os.fork()
        if pid == 0:
            os.close(hearing)
            os.close(self._lifeline)
            keep(plan, telling, front)
        os.close(telling)
        os.close(front)
        self._pid, self._hearing = pid, hearing
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def events(self) -> Iterator[Event]:
        """Yield what happens, up to the event `end`.

        Raises:
            LazyfsError: the keeper was killed; so is what it had restored.
        """
        helpers: set[int] = set()
        directories: list[str] = []
        undo: list[str] | None = None
        with open(self._hearing, "rb") as pipe:
            while line := pipe.readline(_LINE_MOST_BYTES):
                event = json.loads(line)
                if event["event"] == "helpers":
                    helpers = set(event["pids"])
                    directories += event.get("directories", ())
                    undo = event.get("undo", undo)
                    continue
                if event["event"] == "end":
                    self._reap()
                    yield event
                    return
                yield event
        kill_descendants({self._pid, *helpers})  # those that may miss pages go first
        kill_descendants()
        if undo is not None:
            remove(undo)
        for each in directories:
            shutil.rmtree(each, ignore_errors=True)
        raise LazyfsError(
            "the process that kept the restore was killed; nothing of the restore is left"
        )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline = -1

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

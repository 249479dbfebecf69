"""A restore's recording, as its keeper sees it: when it is over, and what CRIU was at meanwhile.

The mount's daemon notes and writes; it is told over a link (`watcher.py`).
"""

import math
import time
from contextlib import suppress
from pathlib import Path

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.after import believe, raise_if_lost
from lazyfs.restore.plan import LOG, Recording
from lazyfs.restore.processes import has_ended
from lazyfs.restore.served import Served
from lazyfs.restore.watch import DAEMON_GONE, Watch, status_of
from lazyfs.trace_file import RecordConfig
from lazyfs.watcher import GIVEN_UP_S, TICK_S, Link, given_up

_FAILED = "the restore failed"
_ENDED = "the process ended"
_LOG_MOST_BYTES = 64 << 20
_LOOK_S = 0.25


class Recorded:
    """One recording."""

    def __init__(self, wanted: Recording, work: Path, way: str) -> None:
        """`work`: where CRIU logs. `way`: how memory comes (`trace.Recording.way`)."""
        self._until = wanted.until
        self._work = work
        self._started_s = 0.0
        self._restored_s = math.inf
        self._link, self._theirs = Link.pair()
        link = self._theirs.fileno()
        self.config = RecordConfig(wanted.file, way, wanted.began_s, link, wanted.is_precise)
        """For the daemon, which is to be forked before `begin`."""

    def begin(self) -> None:
        """Take note that it is being restored."""
        self._theirs.close()
        self._started_s = time.monotonic()
        self._link.mark("restore started", self._started_s)

    def last(self, watch: Watch, served: Served, pid: int) -> None:
        """Wait for the end of the recording, now that the tasks run, and have it written.

        `pid`: of the first of them, whose end is the recording's too; 0 if it is not known.

        Raises:
            LazyfsError: the restore has failed meanwhile.
        """
        self._restored_s = time.monotonic()
        self._link.mark("restored", self._restored_s)
        watch.tell(event="recording", until=self._until.name)
        given_up_s = time.monotonic() + GIVEN_UP_S + self._until.least_s
        check = self._until.begin()
        try:
            while (why := check.poll()) is None:
                if time.monotonic() >= given_up_s:
                    why = given_up(self._until)
                    break
                if served.fileno() in watch.wait([served.fileno()], served, TICK_S):
                    raise LazyfsError(DAEMON_GONE)
                if self._look(served, pid):
                    why = _ENDED
                    break
        finally:
            check.close()
        self._finish(watch, why)

    def end(self, watch: Watch) -> None:
        """Have what there is written, unless that has been done: the restore has failed."""
        self._theirs.close()  # else a daemon that is gone seems to be there
        self._finish(watch, _FAILED)
        self._link.close()

    _is_finished = False
    _looked_s = 0.0

    def _look(self, served: Served, pid: int) -> bool:
        """See now and then that the restore has not failed; return whether it has ended."""
        if time.monotonic() - self._looked_s < _LOOK_S:
            return False
        self._looked_s = time.monotonic()
        status = status_of(served)
        believe(status)
        raise_if_lost(served, status)
        return bool(pid) and has_ended(pid)

    def _finish(self, watch: Watch, why: str) -> None:
        at_s = time.monotonic()  # before what takes a while
        if self._is_finished:
            return
        self._is_finished = True
        written = self._link.end(why, self._phases(), at_s)
        if written:
            watch.figures["trace"] = dict(written)
            watch.tell(event="recorded", **written)

    def _phases(self) -> list[tuple[str, float, float]]:
        """Return CRIU's phases. Its log was last written to when its last line says.

        When it was started says less: a container's runtime begins CRIU in its own time. But it
        was not before that, and not after it had ended: whoever has touched the log since, or set
        the clock, moves nothing out of the restore.
        """
        from lazyfs.checkpoint.criu_phases import length_ms, phases_of

        with suppress(OSError):
            log = self._work / LOG
            written_s = log.stat().st_mtime - time.time() + time.monotonic()
            with log.open(errors="replace") as file:
                text = file.read(_LOG_MOST_BYTES)
            ended_s = min(written_s, self._restored_s)
            began_s = max(self._started_s, ended_s - length_ms(text) / 1000)
            return [
                (phase.name, began_s + phase.began_ms / 1000, began_s + phase.ended_ms / 1000)
                for phase in phases_of(text)
            ]
        return []

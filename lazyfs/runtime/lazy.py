"""Lazy pages under a container runtime: can it, who brings them, and have they come?

The side that brings pages has to share the work directory with the runtime's CRIU. runc has
`--lazy-pages`; crun has not (as of 1.21), which its help tells, so a later one may.
"""

import logging
import select
import subprocess
from pathlib import Path

from lazyfs.restore.lazypages import LazyPages
from lazyfs.restore.served import Served

log = logging.getLogger(__name__)

_HELP_TIMEOUT_S = 20.0


def knows_lazy_pages(program: str) -> bool:
    """Whether a runtime's `restore` has an option --lazy-pages."""
    try:
        done = subprocess.run(
            [program, "restore", "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_HELP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"--lazy-pages" in done.stdout + done.stderr


class Pages:
    """Who brings the pages of one restore, and what became of it."""

    def __init__(self, side: LazyPages) -> None:
        self._side = side
        self._ended = False
        self._failure: str | None = None

    @classmethod
    def start(cls, work_dir: Path, served: Served, criu: str) -> "Pages":
        """Start the side that brings pages; return when the runtime can be started.

        Raises:
            LazyfsError: it does not start.
        """
        work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(LazyPages.start(work_dir, served.path, (criu,), served.holders))

    @property
    def pid(self) -> int:
        """Of the process that must be spared when others are killed."""
        return self._side.pid

    def fileno(self) -> int:
        """Return what can be read when it has ended, one way or the other."""
        return self._side.fileno()

    def failure(self) -> str | None:
        """Return why pages will be missing for ever; None if all is well."""
        self._look()
        return self._failure

    def has_ended(self) -> bool:
        """Whether all pages are home, or none will come any more."""
        self._look()
        return self._ended

    def end(self) -> None:
        """Stop; what misses pages must have been killed before."""
        self._side.end()

    def _look(self) -> None:
        if self._ended:
            return
        poll = select.poll()
        poll.register(self._side.fileno(), select.POLLIN)
        if poll.poll(0):
            self._failure = self._side.wait()
            self._ended = True

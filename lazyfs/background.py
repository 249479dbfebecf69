"""What a process needs that lives on in the background: a log, and nothing of its caller's.

Light imports only: used before and after a fork.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from lazyfs.ground.printable import printable

_LARGE_LOG_BYTES = 16 << 20
_SILENT_S = 1.0
_EVERY_S = 5.0


class OneLine(logging.Formatter):
    """A line a record, whatever names are in it; a traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, fit for a terminal."""
        return printable(super().formatMessage(record))


class Waiting(logging.Handler):
    """Says what a source is asked for again, after a second, and not each time.

    A pause that lasts beyond that second is told as it begins: nothing else may come after it.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Begin to hear of it. `say` may raise OSError and ValueError."""
        super().__init__(logging.INFO)
        self._say = say
        self._quiet_until_s = time.monotonic() + _SILENT_S
        logger = logging.getLogger("lazyfs.transport.patience")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, if the last word is a while ago."""
        pause_s: float = getattr(record, "pause_s", 0.0)
        if time.monotonic() + pause_s < self._quiet_until_s:
            return
        self._quiet_until_s = time.monotonic() + _EVERY_S
        try:
            self._say(record.getMessage())
        except (OSError, ValueError):
            self.handleError(record)

    def silence(self) -> None:
        """Say no more, from any thread: `say` is not under way either."""
        self.acquire()  # as whoever calls `emit` does
        self._quiet_until_s = float("inf")
        self.release()


def log_to(path: Path) -> None:
    """Log to a file, with times, beside standard error (which is /dev/null once ready).

    One that has grown large makes way for a new one, and is kept until that is as large.
    """
    logger = logging.getLogger("lazyfs")
    logging.raiseExceptions = False  # a log whose disk is full is no traceback on the terminal
    for handler in logger.handlers:
        handler.setLevel(logger.level or logging.WARNING)
    logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size > _LARGE_LOG_BYTES:
            path.replace(path.with_name(path.name + ".old"))
        to_file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(OneLine("%(asctime)s %(levelname)s %(process)d %(message)s"))
        logger.addHandler(to_file)


def close_inherited(kept: Collection[int]) -> None:
    """Let go of the caller's descriptors: a lock of its shell must not live as long as we do.

    Of its log as well, properly: else what is logged went to whatever is opened next.
    """
    logger = logging.getLogger("lazyfs")
    for handler in logger.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
    for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)

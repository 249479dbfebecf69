"""What a person at a terminal hears while a source is asked in vain: why it takes so long.

Only of what is asked again, after a second, and not each time: a prompt that stands still for the
20 seconds that a mount has patience for looks like a hang. With -v all is told anyway.
"""

import logging
import sys
import time

from lazyfs.cli.options import is_verbose
from lazyfs.ground.printable import printable

_SILENT_S = 1.0
_EVERY_S = 5.0


def tell_of_waiting() -> None:
    """From now on say on standard error what is waited for, if that is a terminal."""
    logger = logging.getLogger("lazyfs.transport.patience")
    told = any(isinstance(handler, _Waiting) for handler in logger.handlers)
    if told or is_verbose() or not sys.stderr.isatty():
        return
    for handler in logging.getLogger("lazyfs").handlers:
        if not isinstance(handler, logging.FileHandler):  # a daemon's log is told all of it
            handler.setLevel(max(handler.level, logging.WARNING))
    logger.addHandler(_Waiting())
    logger.setLevel(logging.INFO)


class _Waiting(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._quiet_until_s = time.monotonic() + _SILENT_S

    def emit(self, record: logging.LogRecord) -> None:
        """Say what is asked again, if the last word is a while ago."""
        if time.monotonic() < self._quiet_until_s:
            return
        self._quiet_until_s = time.monotonic() + _EVERY_S
        try:
            sys.stderr.write(f"lazyfs: still waiting: {printable(record.getMessage())}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            self.handleError(record)

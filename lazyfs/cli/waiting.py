"""What a person at a terminal hears while a source is asked in vain: why it takes so long.

Only of what is asked again, after a second, and not each time: a prompt that stands still for the
20 seconds that a mount has patience for looks like a hang. With -v all is told anyway.
"""

import logging
import sys

from lazyfs.background import Waiting
from lazyfs.cli.options import is_verbose
from lazyfs.ground.printable import printable


def tell_of_waiting() -> None:
    """From now on say on standard error what is waited for, if that is a terminal."""
    logger = logging.getLogger("lazyfs.transport.patience")
    told = any(isinstance(handler, Waiting) for handler in logger.handlers)
    if told or is_verbose() or not sys.stderr.isatty():
        return
    for handler in logging.getLogger("lazyfs").handlers:
        if not isinstance(handler, logging.FileHandler):  # a daemon's log is told all of it
            handler.setLevel(max(handler.level, logging.WARNING))
    Waiting(_say)


def _say(text: str) -> None:
    sys.stderr.write(f"lazyfs: still waiting: {printable(text)}\n")
    sys.stderr.flush()

"""The few small requests that a mount begins with, asked again by the same rules as ranges are.

Blocks, and imports no trio: it is at work before that is there (`checkpoint/ahead.py`).
"""

import time
from collections.abc import Callable
from typing import TypeVar

from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import FetchError, UnknownHost
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.patience import Patience

_T = TypeVar("_T")


def attempts(
    what: str,
    action: Callable[[], _T],
    *,
    settings: TransportSettings,
    counters: Counters,
    heard_s: Callable[[], float] = lambda: 0.0,
) -> _T:
    """Return what `action` returns, called again as `Patience` allows. Blocks, in a thread.

    `heard_s`: when something last went forward (`time.monotonic`): silence is what comes after.

    Raises what `action` raises, and the
    FetchError that says for how long was tried.
    """
    patience = Patience(what, settings)
    while True:
        began = time.monotonic()
        counters.requests += 1
        try:
            return action()
        except UnknownHost:
            raise  # nothing has worked yet: it is the name that is wrong
        except FetchError as error:
            silent_s = time.monotonic() - max(began, heard_s())
            pause_s = patience.pause_after(error, silent_s=silent_s, progressed=False)
        time.sleep(pause_s)
        counters.retries += 1

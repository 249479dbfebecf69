"""How a thread that blocks in the network is woken by another.

Python wakes no thread. But one that waits for a socket comes back at once when that is shut down
for it. So whoever is about to block says how it is to be woken (`blocks_on`), and whoever started
the thread wakes it (`Waker.wake`), without either knowing the other: between them are blobs,
clients and redirects. Nothing is promised: a thread that connects or resolves a name comes back
with its own timeout.
"""

import threading
from collections.abc import Callable
from types import TracebackType

_here = threading.local()


class Waker:
    """Wakes one thread, wherever it blocks within the `with`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._how: Callable[[], None] | None = None
        self._woken = False

    def __enter__(self) -> None:
        """Begin, in the thread that is to be woken."""
        _here.waker = self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _here.waker = None
        self.watch(None)

    def watch(self, how: Callable[[], None] | None) -> None:
        """Take note of how the thread is woken from now on; it was woken already: do it now."""
        with self._lock:
            self._how = how
            if self._woken and how is not None:
                how()

    def wake(self) -> None:
        """Wake the thread, now and whenever it is about to block again."""
        with self._lock:
            self._woken = True
            if self._how is not None:
                self._how()


def blocks_on(how: Callable[[], None] | None) -> None:
    """Say how this thread can be woken while it blocks; None: it will not block any more.

    `how` is called in another thread, at any time, must not block, and may come too late.
    """
    waker: Waker | None = getattr(_here, "waker", None)
    if waker is not None:
        waker.watch(how)

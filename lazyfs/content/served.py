"""What has been served of content that nothing has proven yet, and whether it still holds.

A daemon that leaves one file for another, or goes on where another daemon has ended, must find
that all it has served comes once more. What is in a file, but was never served, binds nobody.
"""

import threading

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB

PAGE_BYTES = 64 * KIB
"""So finely is noted what was served: 16 GiB of content take 256 KiB."""


class Served:
    """Pages of a content of which something has been served. For several threads at once."""

    def __init__(self) -> None:
        """Nothing has been."""
        self.stop = 0
        """Behind the last byte that was served."""
        self._pages = bytearray()
        self._lock = threading.Lock()

    def note(self, content: ByteRange) -> None:
        """Take note that these bytes, at least one, are served."""
        first, last = content.start // PAGE_BYTES, (content.stop - 1) // PAGE_BYTES + 1
        with self._lock:
            self.stop = max(self.stop, content.stop)
            if len(self._pages) < last:
                self._pages.extend(bytes(last - len(self._pages)))
            self._pages[first:last] = b"\1" * (last - first)

    def add(self, other: "Served") -> None:
        """Take note of all that another knows."""
        with other._lock:
            theirs, stop = bytes(other._pages), other.stop
        with self._lock:
            self.stop = max(self.stop, stop)
            self._pages.extend(bytes(max(0, len(theirs) - len(self._pages))))
            at = theirs.find(1)
            while at >= 0:
                self._pages[at] = 1
                at = theirs.find(1, at + 1)

    def has(self, address: int) -> bool:
        """Whether anything of the page of this byte has been."""
        page = address // PAGE_BYTES
        return page < len(self._pages) and bool(self._pages[page])


class Former:
    """What an earlier file had of the content: the first `size_bytes` of `view`.

    It may be peeked on one thread and compared on another.
    """

    def __init__(self, view: memoryview, size_bytes: int, served: Served, *, trusted: bool) -> None:
        """`trusted`: whether more of it may be served, because nothing speaks against it."""
        self.view = view
        self.size_bytes = size_bytes
        self.served = served
        self.trusted = trusted
        self._lock = threading.Lock()

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return a slice, if it has that and may still be believed; take note of it."""
        with self._lock:
            if not self.trusted or content.stop > self.size_bytes:
                return None
            self.served.note(content)
        return self.view[content.start : content.stop]

    def distrust(self) -> None:
        """Serve nothing more of it."""
        with self._lock:
            self.trusted = False

    def compare(self, start: int, piece: Data, name: str) -> None:
        """See that what was served is what comes now, at `start` of the content.

        Where something else differs, nothing more of it is served.

        Raises:
            IntegrityError: it is not; `name` is the blob's.
        """
        if start >= self.size_bytes:
            return
        now = memoryview(piece)[: self.size_bytes - start]
        if self.trusted:
            try:
                compare(name, start, now, self.view)
            except IntegrityError:
                self.distrust()
            else:
                return
        at = 0
        while at < len(now):
            stop = min(len(now), at + PAGE_BYTES - (start + at) % PAGE_BYTES)
            if self.served.has(start + at):
                compare(name, start + at, now[at:stop], self.view)
            at = stop

    def check_size(self, size_bytes: int, name: str) -> None:
        """See that all that was served is within a content of this size.

        Raises:
            IntegrityError: it is not.
        """
        if self.size_bytes > size_bytes:
            self.distrust()
        must = min(self.size_bytes, self.served.stop)
        if must > size_bytes:
            raise IntegrityError(
                f"{name} decodes to {size_bytes} bytes; before, there were {must} at least"
            )


def compare(name: str, start: int, piece: memoryview, before: memoryview) -> None:
    """See that a piece of the content is what `before` has from `start` on.

    Raises:
        IntegrityError: it is not; `name` is the blob's.
    """
    for at in range(0, len(piece), MIB):
        part = bytes(piece[at : at + MIB])
        if part != bytes(before[start + at : start + at + len(part)]):
            raise IntegrityError(
                f"{name} decodes to other bytes than before, at {start + at} or behind"
            )

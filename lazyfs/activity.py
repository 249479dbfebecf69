"""What readers of a mount are doing: which files they hold, which reads wait, what failed last.

Belongs to the trio thread. Kept for every read, so it is cheap: what a person wants to know of it
is put together when somebody asks.
"""

import time
from collections.abc import Iterator
from itertools import islice

import msgspec

from lazyfs.ground.journal import Journal, ReadNote

_TELL_MOST = 32


class Reading(msgspec.Struct, frozen=True):
    """A read that has not been answered yet."""

    path: str
    """In the checkpoint."""
    offset: int
    size_bytes: int
    waits_s: float
    opened_by_pid: int
    """Who opened the file, in the daemon's pid namespace; 0 if it is not seen from there."""


class _OpenFile(msgspec.Struct, frozen=True):
    path: str
    pid: int


_NO_FILE = _OpenFile("", 0)


class Activity:
    """What goes on in one mount."""

    def __init__(self, journal: Journal | None = None) -> None:
        """`journal`: where reads are noted that have been answered, if somebody records."""
        self._journal = journal
        self.open_directories = 0
        self.last_error: str | None = None
        self.last_error_at_s = 0.0
        """Seconds since the epoch."""
        self._files: dict[int, _OpenFile] = {}
        self._reads: dict[int, tuple[int, int, int, float]] = {}
        self._waited: set[int] = set()
        self._number = 0

    @property
    def open_files(self) -> int:
        """How many times files are open."""
        return len(self._files)

    @property
    def is_unused(self) -> bool:
        """Whether nobody holds a file or a directory open."""
        return not self._files and not self.open_directories

    def opened(self, handle: int, path: str, pid: int) -> None:
        """Note that somebody has opened a file."""
        self._files[handle] = _OpenFile(path, pid)

    def released(self, handle: int) -> None:
        """Note that nobody has it open any more."""
        self._files.pop(handle, None)

    def read_begins(self, handle: int, offset: int, size_bytes: int) -> int:
        """Note a read; return what `read_ends` wants."""
        self._number += 1
        self._reads[self._number] = (handle, offset, size_bytes, time.monotonic())
        return self._number

    def read_waits(self, number: int) -> None:
        """Note, for the journal, that its bytes are not here yet."""
        self._waited.add(number)

    def read_ends(self, number: int) -> None:
        """Note that it has been answered."""
        read = self._reads.pop(number)
        if self._journal is not None:
            handle, offset, size_bytes, began_s = read
            path, waited = self._files.get(handle, _NO_FILE).path, number in self._waited
            self._waited.discard(number)
            now_s = time.monotonic()
            note = ReadNote(path, offset, size_bytes, began_s, now_s, is_fault=False, waited=waited)
            self._journal.note_read(note)

    def failed(self, text: str) -> None:
        """Note an error that somebody was answered with."""
        self.last_error = text
        self.last_error_at_s = time.time()

    @property
    def reads_waiting(self) -> int:
        """How many reads are under way."""
        return len(self._reads)

    @property
    def longest_wait_s(self) -> float:
        """For how long the oldest of them has been."""
        oldest = next(iter(self._reads.values()), None)  # they are in the order of their coming
        return time.monotonic() - oldest[3] if oldest is not None else 0.0

    def reading(self) -> Iterator[Reading]:
        """Yield the oldest reads under way, at most 32."""
        now_s = time.monotonic()
        for handle, offset, size_bytes, since_s in islice(self._reads.values(), _TELL_MOST):
            file = self._files.get(handle, _NO_FILE)
            yield Reading(file.path, offset, size_bytes, now_s - since_s, file.pid)

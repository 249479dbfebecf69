"""Content that is written from its start to its end, of a size that nobody knows before.

A sparse file, mapped anew in doubling steps: slices of an older mapping stay good. What later
mounts may find is only what has been proven to the end (`kept.py`); until then the file is alone
in a directory with a random name:

    DIR/incoming/<random>/content     locked (flock) for as long as its daemon lives
                 lock                 held while directories are made and removed

Whoever makes a new one removes those whose daemons have ended.

One thread appends. `size_bytes` grows only after `view` covers it, so a reader on another thread
that looks at the size first may slice the view up to there.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import write_all
from lazyfs.ground.data import Data
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB

STRETCH_BYTES = 4 * MIB
"""Content without chunks of its own is marked by stretches of this size; part of the format."""
_MAP_FIRST_BYTES = 64 * MIB
_LEAVE_FREE_BYTES = 256 * MIB
_LEAVE_FREE_SHARE = 16
"""So much of a disk stays free, or this part of it if that is less: others write there too."""
_LOOK_EVERY_BYTES = 16 * MIB


class Strides:
    """The mark (xxh3, never 0) of each stretch of what passes."""

    def __init__(self) -> None:
        self.marks = array("Q")
        self._hasher = xxhash.xxh3_64()
        self._filled = 0

    def update(self, data: Data) -> None:
        """Take in what comes next."""
        view = memoryview(data)
        while len(view):
            piece = view[: STRETCH_BYTES - self._filled]
            self._hasher.update(piece)
            self._filled += len(piece)
            view = view[len(piece) :]
            if self._filled == STRETCH_BYTES:
                self.finish()

    def finish(self) -> None:
        """Mark the last stretch, which may be shorter."""
        if self._filled:
            self.marks.append(self._hasher.intdigest() or 1)
            self._hasher.reset()
            self._filled = 0


class GrowingFile:
    """One content that grows. Every method but `peek` and `close` may raise OSError."""

    def __init__(self, cache: Cache) -> None:
        """Make the directory, and clean up after the dead."""
        if cache.directory is None:
            raise OSError(errno.ENOSPC, "a stream cannot be kept in memory yet")
        incoming = cache.directory / "incoming"
        incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _exclusive(incoming):
            remove_abandoned(incoming)
            self.directory = Path(tempfile.mkdtemp(dir=incoming))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            try:
                self.fd = os.open(self.directory / "content", flags, 0o600)
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                shutil.rmtree(self.directory, ignore_errors=True)
                raise
        self._room = cache.room
        self.size_bytes = 0
        self.strides = Strides()
        self.published = False
        self._view = memoryview(b"")
        self._look_at_bytes = 0

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return a slice of the mapping, if the content has come so far."""
        if content.stop > self.size_bytes:
            return None
        return self._view[content.start : content.stop]

    def append(self, piece: Data) -> None:
        """Add what comes next; after an error the same may be added again."""
        stop = self.size_bytes + len(piece)
        if stop > self._look_at_bytes:
            self._leave_free(len(piece))
            self._look_at_bytes = stop + _LOOK_EVERY_BYTES
        self._room.take(len(piece))
        if stop > len(self._view):
            self._map(max(_MAP_FIRST_BYTES, 2 * len(self._view), stop))
        write_all(self.fd, self.size_bytes, [piece])
        self.strides.update(piece)
        self.size_bytes = stop

    def finish(self) -> None:
        """Say that the content has ended."""
        os.ftruncate(self.fd, self.size_bytes)
        self.strides.finish()

    def close(self) -> None:
        """Let go of the file; if it was not published, remove it."""
        self._view = memoryview(b"")
        if not self.published:
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self.fd)

    def _map(self, size_bytes: int) -> None:
        os.ftruncate(self.fd, size_bytes)
        # The old mapping lives for as long as somebody holds a slice of it.
        self._view = memoryview(mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

    def _leave_free(self, more_bytes: int) -> None:
        disk = os.fstatvfs(self.fd)
        floor = min(_LEAVE_FREE_BYTES, disk.f_blocks * disk.f_frsize // _LEAVE_FREE_SHARE)
        if disk.f_bavail * disk.f_frsize < floor + more_bytes:
            raise OSError(errno.ENOSPC, f"less than {floor >> 20} MiB would be left free")


def remove_abandoned(incoming: Path) -> None:
    """Remove directories whose daemons have ended."""
    for directory in incoming.iterdir():
        if directory.is_dir() and not directory.is_symlink() and _is_abandoned(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _is_abandoned(directory: Path) -> bool:
    try:
        fd = os.open(directory / "content", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@contextlib.contextmanager
def _exclusive(directory: Path) -> Iterator[None]:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

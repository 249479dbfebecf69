"""Content that is written from its start to its end, of a size that nobody knows before.

A sparse file, mapped anew in doubling steps: slices of an older mapping stay good. Of all who have
it open (`incoming.py`) one decodes: it appends, in one thread. The others follow: they see in the
mapping what has been appended, up to where they have been told.

Bytes that somebody may have been served are never overwritten. Who takes up where another has
ended decodes from the blob's start, which is all that there is, and *compares* with what is there;
only behind it is anything written. Who leaves one file for another, because it was given up,
compares what comes there with what the former had. What differs is an IntegrityError: one of the
two passes was fed wrong bytes, and nobody knows which.

`size_bytes` grows only after the mapping covers it and all comparing is done, so a reader on
another thread that looks at the size first may slice the mapping up to there.
"""

import errno
import mmap
import os
from array import array
from dataclasses import dataclass

import xxhash

from lazyfs.content.cache_file import write_all
from lazyfs.content.incoming import Cradle
from lazyfs.content.room import Room
from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError
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


@dataclass(frozen=True, slots=True)
class Former:
    """What an earlier file had, and may have been served: the first `size_bytes` of `view`."""

    view: memoryview
    size_bytes: int
    trusted: bool
    """Whether it may still be served, because nothing speaks against it."""

    def compare(self, now: Data | None, name: str) -> None:
        """See that it is what is there `now`: as many bytes, or None if there are fewer.

        Raises:
            IntegrityError: it is not.
        """
        if now is None:
            raise IntegrityError(f"{name} is {self.size_bytes} bytes no longer")
        _compare(name, 0, memoryview(now), self.view)


class GrowingFile:
    """One content that grows. Every method but `peek` and `close` may raise OSError."""

    def __init__(self, cradle: Cradle, room: Room, name: str, former: Former | None = None) -> None:
        """`name`: the blob's, for messages; `former`: what all that comes has to agree with."""
        self.cradle = cradle
        self.size_bytes = 0
        """So much can be read here, beside what the former has."""
        self.decoded_bytes = 0
        """How far this daemon has decoded it itself."""
        self.strides = Strides()
        self.whole = False
        """Whether all of it is here, and the blob matches its digest."""
        self._room = room
        self._name = name
        self._former = former
        self._view = memoryview(b"")
        self._there_bytes = 0
        self._look_at_bytes = 0
        self._withdrawn = False

    @property
    def fd(self) -> int:
        """The content's."""
        return self.cradle.fd

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return a slice of the mapping, if the content has come so far."""
        former = self._former
        if self._withdrawn:
            return None
        if content.stop <= self.size_bytes:
            return self._view[content.start : content.stop]
        if former is not None and former.trusted and content.stop <= former.size_bytes:
            return former.view[content.start : content.stop]
        return None

    def here_bytes(self) -> int:
        """Return up to where `peek` gives something."""
        former = self._former
        if self._withdrawn:
            return 0
        if former is None or not former.trusted:
            return self.size_bytes
        return max(self.size_bytes, former.size_bytes)

    def close(self) -> None:
        """Let go of the file; it goes if nobody else uses it and it was not published."""
        self._view = memoryview(b"")
        self._former = None
        self.size_bytes = 0
        self.cradle.close()

    # -- when it is left for another --------------------------------------------------------

    def withdraw(self) -> None:
        """Serve nothing more of it: it has been found to be wrong."""
        self._withdrawn = True

    def as_former(self) -> Former | None:
        """Return what has been served of it, or of the one before; None if nothing has."""
        trusted = not self._withdrawn
        former = self._former
        if former is not None and former.size_bytes > self.size_bytes:
            return Former(former.view, former.size_bytes, former.trusted and trusted)
        return Former(self._view, self.size_bytes, trusted) if self.size_bytes else None

    # -- by those that follow ---------------------------------------------------------------

    def advance(self, position: int) -> None:
        """Take note that the content is in the file up to there.

        Raises:
            IntegrityError: it is not what the former had.
        """
        position = min(position, os.fstat(self.fd).st_size)
        if position <= self.size_bytes:
            return
        if position > len(self._view):
            self._map(os.fstat(self.fd).st_size)
        self._compare_former(self.size_bytes, self._view[self.size_bytes : position])
        self._arrived(position)

    # -- by the one who decodes, in one thread ----------------------------------------------

    def begin(self) -> bool:
        """Decode from the start, after `Cradle.lead`: what is there has to come once more.

        False if it cannot be told how much that is.

        Raises:
            IntegrityError: as `advance`.
        """
        if self.cradle.notice is not None:
            news = self.cradle.notice.take_over()
            if news is None:
                return False
            try:
                self.advance(news.position)
            except OSError:
                return False
            if self.size_bytes < news.position:
                return False
            self._there_bytes = self.size_bytes
        return True

    def append(self, piece: Data) -> None:
        """Add what comes next; after an OSError the same may be added again.

        Raises:
            IntegrityError: there is something else already.
        """
        start, stop = self.decoded_bytes, self.decoded_bytes + len(piece)
        known = memoryview(piece)[: max(0, self._there_bytes - start)]
        fresh = memoryview(piece)[len(known) :]
        self._compare_former(start, piece)
        _compare(self._name, start, known, self._view)
        if len(fresh):
            self._take_room(len(fresh), stop)
            if stop > len(self._view):
                self._enlarge(max(_MAP_FIRST_BYTES, 2 * len(self._view), stop))
            write_all(self.fd, start + len(known), [fresh])
            if self.cradle.notice is not None:
                self.cradle.notice.tell(position=stop)
        self.strides.update(piece)
        self.decoded_bytes = stop
        self._arrived(max(stop, self.size_bytes))

    def finish(self) -> None:
        """Say that the content has ended.

        Raises:
            IntegrityError: there was more of it before.
        """
        former = self._former
        served = max(self._there_bytes, former.size_bytes if former is not None else 0)
        if served > self.decoded_bytes:
            raise IntegrityError(
                f"{self._name} decodes to {self.decoded_bytes} bytes; before, it gave {served}"
            )
        os.ftruncate(self.fd, self.decoded_bytes)
        self.strides.finish()

    def _arrived(self, position: int) -> None:
        self.size_bytes = position
        if self._former is not None and self._former.size_bytes <= position:
            self._former = None

    def _compare_former(self, start: int, piece: Data) -> None:
        former = self._former
        if former is not None and start < former.size_bytes:
            part = memoryview(piece)[: former.size_bytes - start]
            _compare(self._name, start, part, former.view)

    def _enlarge(self, size_bytes: int) -> None:
        if os.fstat(self.fd).st_size < size_bytes:
            os.ftruncate(self.fd, size_bytes)
        self._map(size_bytes)

    def _map(self, size_bytes: int) -> None:
        # The old mapping lives for as long as somebody holds a slice of it.
        self._view = memoryview(mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

    def _take_room(self, count: int, stop: int) -> None:
        self._room.take(count)
        if stop > self._look_at_bytes and self.cradle.directory is not None:
            self._leave_free(count)
            self._look_at_bytes = stop + _LOOK_EVERY_BYTES

    def _leave_free(self, more_bytes: int) -> None:
        disk = os.fstatvfs(self.fd)
        floor = min(_LEAVE_FREE_BYTES, disk.f_blocks * disk.f_frsize // _LEAVE_FREE_SHARE)
        if disk.f_bavail * disk.f_frsize < floor + more_bytes:
            raise OSError(errno.ENOSPC, f"less than {floor >> 20} MiB would be left free")


def _compare(name: str, start: int, piece: memoryview, before: memoryview) -> None:
    """See that a piece of the content is what `before` has from `start` on."""
    for at in range(0, len(piece), MIB):
        part = bytes(piece[at : at + MIB])
        if part != bytes(before[start + at : start + at + len(part)]):
            raise IntegrityError(
                f"{name} decodes to other bytes than before, at {start + at} or behind"
            )

"""Content that is written from its start to its end, of a size that nobody knows before.

A sparse file, mapped anew in doubling steps: slices of an older mapping stay good. Of all who have
it open (`incoming.py`) one decodes: it appends, in one thread. The others follow: they see in the
mapping what has been appended, up to where they have been told.

Bytes that somebody may have been served are never overwritten. Who takes up where another has
ended decodes from the blob's start, which is all that there is, and *compares* with what is there;
only behind it is anything written. Who leaves one file for another, because it was given up,
compares what comes there with what the former had (`served.py`). Where it differs from what was
served, that is an IntegrityError: one of the two passes was fed wrong bytes, and nobody knows
which.

`size_bytes` grows only after the mapping covers it and all comparing is done, so a reader on
another thread that looks at the size first may slice the mapping up to there.
"""

import mmap
import os
from array import array
from collections.abc import Sequence

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import write_all
from lazyfs.content.incoming import Cradle
from lazyfs.content.marks import Marker, mark_from
from lazyfs.content.served import Former, Served, compare
from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB

STRETCH_BYTES = 4 * MIB
"""Content without chunks of its own is marked by stretches of this size; part of the format."""
_MAP_FIRST_BYTES = 64 * MIB


class Strides:
    """The mark (xxh3, never 0) of each stretch of what passes."""

    def __init__(self, marker: Marker) -> None:
        self.marks = array("Q")
        self._hasher = marker.hasher()
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
            self.marks.append(mark_from(self._hasher))
            self._hasher.reset()
            self._filled = 0


class Contradiction(Exception):
    """What is decoded is not what another daemon has written, but nobody here was served that."""


class GrowingFile:
    """One content that grows. Every method but `peek` and `close` may raise OSError."""

    def __init__(
        self, cradle: Cradle, cache: Cache, name: str, formers: Sequence[Former] = ()
    ) -> None:
        """`name`: the blob's, for messages; `formers`: what all that comes has to agree with."""
        self.cradle = cradle
        self.size_bytes = 0
        """So much can be read here, beside what the former has."""
        self.decoded_bytes = 0
        """How far this daemon has decoded it itself."""
        self.strides = Strides(cache.marker)
        self.marker = cache.marker
        self._room = cache.room
        self._name = name
        self._formers = tuple(formers)
        self._served = Served() if cradle.notice is not None else None
        self._view = memoryview(b"")
        self._there_bytes = 0
        self._withdrawn = False

    @property
    def fd(self) -> int:
        """The content's."""
        return self.cradle.fd

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return a slice of the mapping, if the content has come so far."""
        if self._withdrawn:
            return None
        if content.stop <= self.size_bytes:
            if self._served is not None:
                self._served.note(content)
            return self._view[content.start : content.stop]
        for former in self._formers:
            view = former.peek(content)
            if view is not None:
                return view
        return None

    def here_bytes(self) -> int:
        """Return up to where `peek` gives something."""
        if self._withdrawn:
            return 0
        return max(self.size_bytes, *(each.size_bytes for each in self._formers if each.trusted), 0)

    def prove(self) -> None:
        """Take note that all of it is what the digest promises."""
        self._served = None

    def close(self) -> None:
        """Let go of the file; it goes if nobody else uses it and it was not published."""
        self._view = memoryview(b"")
        self._formers = ()
        self.size_bytes = 0
        self.cradle.close()

    # -- when it is left for another --------------------------------------------------------

    def withdraw(self) -> None:
        """Serve nothing more of it: it has been found to be wrong."""
        self._withdrawn = True
        for former in self._formers:
            former.distrust()

    def as_formers(self) -> list[Former]:
        """Return what has been served of it, and of those before."""
        formers = list(self._formers)
        if self.size_bytes and self._served is not None:
            trusted = not self._withdrawn
            formers.append(Former(self._view, self.size_bytes, self._served, trusted=trusted))
        return formers

    # -- by those that follow ---------------------------------------------------------------

    def advance(self, position: int) -> None:
        """Take note that the content is in the file up to there.

        Raises:
            IntegrityError: it is not what a former had.
        """
        position = min(position, os.fstat(self.fd).st_size)
        if position <= self.size_bytes:
            return
        if position > len(self._view):
            self._map(os.fstat(self.fd).st_size)
        self._compare_formers(self.size_bytes, self._view[self.size_bytes : position])
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
            IntegrityError: something else was served before.
            Contradiction: something else is there, which nobody here was served.
        """
        start, stop = self.decoded_bytes, self.decoded_bytes + len(piece)
        known = memoryview(piece)[: max(0, self._there_bytes - start)]
        fresh = memoryview(piece)[len(known) :]
        self._compare_formers(start, piece)
        self._compare_known(start, known)
        if len(fresh):
            self._room.take(len(fresh))
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
            IntegrityError, Contradiction: there was more of it before.
        """
        for former in self._formers:
            former.check_size(self.decoded_bytes, self._name)
        if self._there_bytes > self.decoded_bytes:
            self._as_served().check_size(self.decoded_bytes, self._name)
            raise Contradiction
        os.ftruncate(self.fd, self.decoded_bytes)
        self.strides.finish()

    def _arrived(self, position: int) -> None:
        self.size_bytes = position
        over = [each for each in self._formers if each.size_bytes <= position]
        if over and self._served is not None:
            for former in over:
                self._served.add(former.served)
        if over:
            self._formers = tuple(each for each in self._formers if each.size_bytes > position)

    def _as_served(self) -> Former:
        return Former(self._view, self._there_bytes, self._served or Served(), trusted=False)

    def _compare_formers(self, start: int, piece: Data) -> None:
        for former in self._formers:
            former.compare(start, piece, self._name)

    def _compare_known(self, start: int, known: memoryview) -> None:
        try:
            compare(self._name, start, known, self._view)
        except IntegrityError as error:
            self._as_served().compare(start, known, self._name)
            raise Contradiction from error

    def _enlarge(self, size_bytes: int) -> None:
        if os.fstat(self.fd).st_size < size_bytes:
            os.ftruncate(self.fd, size_bytes)
        self._map(size_bytes)

    def _map(self, size_bytes: int) -> None:
        # The old mapping lives for as long as somebody holds a slice of it.
        self._view = memoryview(mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

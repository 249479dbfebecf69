"""What a pass over a whole blob leaves for later mounts, and what they find of it.

    DIR/layers/sha256-<hex>.<cache tag>/content   the whole content
                                       /marks     as in `cache_file.py`: a mark for each chunk of
                                                  the restart index, or else for each stretch
                                       /proven    as in `cache_file.py`
                                       /index     what `StreamDecoder.restart_index` gave, if
                                                  anything: then the layer can be read at random,
                                                  and the directory is a `CacheFile`'s
                                       /used      empty; its mtime is when it was used last

It comes to be by the rename of a directory of `incoming.py`, once the blob has been found to match
its digest, and is never written to by a stream again: where it is found to be damaged it is moved
away, so that what others have mapped stays as it was. Who uses it holds a shared lock on
`content`, which keeps it from being evicted.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import MARK_BYTES, is_sealed, little_endian, seal
from lazyfs.content.growing_file import STRETCH_BYTES, GrowingFile, Strides
from lazyfs.content.incoming import bury
from lazyfs.content.marks import Marker, mark_from
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import FixedChunks
from lazyfs.layers.model import ChunkMap, LayerIndex

log = logging.getLogger(__name__)

_INDEX_MOST_BYTES = 1 << 34
_BUFFER_BYTES = MIB
_TOUCH_EVERY_S = 60.0


def publish(
    growing: GrowingFile,
    home: Path,
    index: tuple[Data, ChunkMap] | None,
    check: Callable[[], None],
) -> bool:
    """Let later mounts find a whole, proven content; False if others were first.

    `index`: the restart index, and the chunks that it gives. `check` is called now and then and
    may raise.

    Raises:
        OSError: the disk will not have it, or has lost what was written.
    """
    data, chunks = index if index is not None else (b"", _stretches_of(growing.size_bytes))
    if chunks.content_size_bytes != growing.size_bytes:
        raise OSError("the restart index is of another content")
    marks = growing.strides.marks
    if index is not None or growing.decoded_bytes < growing.size_bytes:
        marks = _marks_of(growing, chunks, check)
    packed = little_endian(array("Q", marks)).tobytes()

    def prepare(directory: Path) -> None:
        if index is not None:
            (directory / "index").write_bytes(data)
        (directory / "marks").write_bytes(packed)
        (directory / "used").touch(0o600)
        seal(directory, packed, growing.marker)

    return growing.cradle.publish(home, prepare, replace=index is not None)


def is_published(growing: GrowingFile, home: Path) -> bool:
    """Whether later mounts find this very content."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(growing.fd), (home / "content").stat())
    return False


def touch(home: Path) -> None:
    """Note that what is kept of a layer is used now."""
    with contextlib.suppress(OSError):
        os.utime(home / "used")


def find_restart_index(cache: Cache, digest: Digest | None, tag: str) -> memoryview | None:
    """Return what an earlier mount noted of a stream, mapped; for `StreamIndex.reopen`.

    If that refuses it, `forget` it.
    """
    home = cache.home(digest, tag) if digest is not None else None
    if home is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(home / "index", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.fstat(fd).st_size
            if 0 < size_bytes <= _INDEX_MOST_BYTES:
                return memoryview(mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ))
        finally:
            os.close(fd)
    return None


def forget(home: Path, fd: int | None = None) -> None:
    """Unlink what is kept of a layer; with `fd`, only if that is still its content.

    Whoever has it open or mapped keeps it.
    """
    with contextlib.suppress(OSError):
        if fd is None or os.path.samestat(os.fstat(fd), (home / "content").stat()):
            bury(home)


class Kept:
    """A whole content that an earlier mount has proven; believed piece by piece.

    A piece is a stretch or, if it was a gzip layer's, a chunk of its restart index. Which pieces
    have been checked changes on the trio thread only.
    """

    def __init__(
        self, home: Path, fd: int, chunks: ChunkMap, marks: "array[int]", marker: Marker
    ) -> None:
        """Use `open_kept`."""
        self.size_bytes = chunks.content_size_bytes
        self._chunks = chunks
        self._home = home
        self._fd = fd
        self._marks = marks
        self._marker = marker
        self._checked = bytearray(len(marks))
        self._checks: dict[int, trio.Event] = {}
        self._touched_s = 0.0
        self._touch()
        self._view = memoryview(b"")
        if self.size_bytes:
            self._view = memoryview(mmap.mmap(fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return a slice of the mapping, if all of it has been checked."""
        if content.stop > self.size_bytes:
            return None
        first, last = self._pieces(content)
        if self._checked.count(1, first, last) < last - first:
            return None
        return self._view[content.start : content.stop]

    async def check(self, content: ByteRange) -> int:
        """See that the bytes are those that were proven; each piece is looked at once.

        Returns how many pieces were found good now; -1 if one was not.
        """
        good = 0
        self._touch()
        for piece in range(*self._pieces(content)):
            while not self._checked[piece]:
                if piece in self._checks:
                    await self._checks[piece].wait()
                    continue
                done = self._checks[piece] = trio.Event()
                try:
                    if not await trio.to_thread.run_sync(self._is_good, piece):
                        return -1
                    self._checked[piece] = 1
                    good += 1
                finally:
                    del self._checks[piece]
                    done.set()
        return good

    def forget(self) -> None:
        """Let nobody find it any more."""
        forget(self._home, self._fd)

    def close(self) -> None:
        """Let go of it, and of its lock."""
        touch(self._home)
        self._view = memoryview(b"")
        os.close(self._fd)

    def _touch(self) -> None:
        if time.monotonic() > self._touched_s + _TOUCH_EVERY_S:
            self._touched_s = time.monotonic()
            touch(self._home)

    def _pieces(self, content: ByteRange) -> tuple[int, int]:
        """Return the first piece of a range, and the one behind its last; of no bytes, none."""
        if content.start >= content.stop:
            return 0, 0
        index_at = self._chunks.index_at
        return index_at(content.start), index_at(content.stop - 1) + 1

    def _is_good(self, piece: int) -> bool:
        chunks = self._chunks
        content = ByteRange(chunks.content_start(piece), chunks.content_start(piece + 1))
        hasher = self._marker.hasher()
        try:
            with _buffer() as buffer:
                _read(self._fd, content, buffer, hasher.update)
        except OSError:
            return False
        return mark_from(hasher) == self._marks[piece]


def open_kept(
    cache: Cache,
    digest: Digest | None,
    tag: str,
    reopen: Callable[[Data], LayerIndex] | None = None,
) -> Kept | None:
    """Open the whole content of a stream, if an earlier mount left it.

    One that has a restart index is understood only with `reopen`, as of `StreamIndex`.
    """
    home = cache.home(digest, tag) if digest is not None else None
    if home is None:
        return None
    with contextlib.ExitStack() as on_error, contextlib.suppress(OSError, LazyfsError):
        fd = os.open(home / "content", os.O_RDONLY | os.O_CLOEXEC)
        on_error.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        size_bytes = os.fstat(fd).st_size
        chunks: ChunkMap = _stretches_of(size_bytes)
        has_index = (home / "index").exists()
        if has_index:
            index = find_restart_index(cache, digest, tag)
            if reopen is None or index is None:
                return None
            chunks = reopen(index).chunks
        if not os.path.samestat(os.fstat(fd), (home / "content").stat()):
            return None  # it was moved away before it was locked
        packed = _marks_in(home, len(chunks))
        sealed = is_sealed(home, packed, cache.marker)
        if chunks.content_size_bytes != size_bytes or not sealed:
            if has_index:
                return None  # a `CacheFile` can do with less
            log.warning("what is kept in %s is damaged; doing it over", home)
            forget(home, fd)
            return None
        kept = Kept(home, fd, chunks, little_endian(array("Q", packed)), cache.marker)
        on_error.pop_all()
        return kept
    return None


def _stretches_of(size_bytes: int) -> ChunkMap:
    return FixedChunks(size_bytes, STRETCH_BYTES)


def _marks_in(home: Path, count: int) -> bytes:
    """Return the marks of so many pieces, or bytes that nobody has sealed."""
    with contextlib.suppress(OSError), open(home / "marks", "rb") as file:
        packed = file.read(count * MARK_BYTES + 1)
        if len(packed) == count * MARK_BYTES:
            return packed
    return b"?"


def _marks_of(growing: GrowingFile, chunks: ChunkMap, check: Callable[[], None]) -> "array[int]":
    """Read what was written; mark its chunks, and compare its stretches while at it."""
    marks = array("Q")
    strides = Strides(growing.marker)
    hasher = growing.marker.hasher()

    def see(data: memoryview) -> None:
        hasher.update(data)
        strides.update(data)

    with _buffer() as buffer:
        for index in range(len(chunks)):
            check()
            start, stop = chunks.content_start(index), chunks.content_start(index + 1)
            _read(growing.fd, ByteRange(start, stop), buffer, see)
            marks.append(mark_from(hasher))
            hasher.reset()
    strides.finish()
    if growing.decoded_bytes == growing.size_bytes and strides.marks != growing.strides.marks:
        raise OSError("what was written has changed on the disk")
    return marks


@contextlib.contextmanager
def _buffer() -> Iterator[memoryview]:
    """Lend page-aligned memory, into which is read several times faster than into a bytearray."""
    memory = mmap.mmap(-1, _BUFFER_BYTES)
    with memory, memoryview(memory) as view:
        yield view


def _read(
    fd: int, content: ByteRange, buffer: memoryview, see: Callable[[memoryview], None]
) -> None:
    """Read with system calls: a bad disk is then an OSError, not a SIGBUS."""
    at = content.start
    while at < content.stop:
        with buffer[: content.stop - at] as room:
            count = os.preadv(fd, [room], at)
            if count <= 0:
                raise OSError("the file is shorter than its content")
            with room[:count] as data:
                see(data)
        at += count

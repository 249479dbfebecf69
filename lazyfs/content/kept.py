"""What a pass over a whole blob leaves for later mounts, and what they find of it.

    DIR/layers/sha256-<hex>.<cache tag>/content   the whole content
                                       /marks     as in `cache_file.py`: a mark for each chunk of
                                                  the restart index, or else for each stretch
                                       /proven    as in `cache_file.py`
                                       /index     what `StreamDecoder.restart_index` gave, if
                                                  anything: then the layer can be read at random,
                                                  and the directory is a `CacheFile`'s

It comes to be by the rename of a directory that nobody knew, once the blob has been found to
match its digest, and is never written to by a stream again: where it is found to be damaged it
is unlinked, so that what others have mapped stays as it was. Who uses it holds a shared lock on
`content`; a `CacheFile` wants it alone.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import trio
import xxhash

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import MARK_BYTES, is_sealed, little_endian, seal
from lazyfs.content.growing_file import STRETCH_BYTES, GrowingFile, Strides
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import ChunkMap

log = logging.getLogger(__name__)

_INDEX_MOST_BYTES = 1 << 34
_BUFFER_BYTES = MIB


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
    marks = growing.strides.marks
    if index is not None:
        data, chunks = index
        if chunks.content_size_bytes != growing.size_bytes:
            raise OSError("the restart index is of another content")
        marks = _marks_of(growing, chunks, check)
        (growing.directory / "index").write_bytes(data)
    packed = little_endian(array("Q", marks)).tobytes()
    (growing.directory / "marks").write_bytes(packed)
    seal(growing.directory, packed)
    home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        growing.directory.rename(home)
    except FileExistsError:
        return False
    except OSError:
        if home.is_dir():
            return False
        raise
    growing.published = True
    growing.directory = home
    fcntl.flock(growing.fd, fcntl.LOCK_SH)
    return True


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
        if fd is not None and not os.path.samestat(os.fstat(fd), (home / "content").stat()):
            return
        incoming = home.parent.parent / "incoming"
        incoming.mkdir(mode=0o700, exist_ok=True)
        grave = tempfile.mkdtemp(dir=incoming)
        home.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


class Kept:
    """A whole content that an earlier mount has proven; believed stretch by stretch.

    Which stretches have been checked changes on the trio thread only.
    """

    def __init__(self, home: Path, fd: int, marks: "array[int]") -> None:
        """Use `open_kept`."""
        self.size_bytes = os.fstat(fd).st_size
        self._home = home
        self._fd = fd
        self._marks = marks
        self._checked = bytearray(len(marks))
        self._checks: dict[int, trio.Event] = {}
        self._view = memoryview(b"")
        if self.size_bytes:
            self._view = memoryview(mmap.mmap(fd, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ))

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return a slice of the mapping, if all of it has been checked."""
        if content.stop > self.size_bytes:
            return None
        first, last = _stretches(content)
        if self._checked.count(1, first, last) < last - first:
            return None
        return self._view[content.start : content.stop]

    async def check(self, content: ByteRange) -> int:
        """See that the bytes are those that were proven; each stretch is looked at once.

        Returns how many stretches were found good now; -1 if one was not.
        """
        good = 0
        for stretch in range(*_stretches(content)):
            while not self._checked[stretch]:
                if stretch in self._checks:
                    await self._checks[stretch].wait()
                    continue
                done = self._checks[stretch] = trio.Event()
                try:
                    if not await trio.to_thread.run_sync(self._is_good, stretch):
                        return -1
                    self._checked[stretch] = 1
                    good += 1
                finally:
                    del self._checks[stretch]
                    done.set()
        return good

    def forget(self) -> None:
        """Let nobody find it any more."""
        forget(self._home, self._fd)

    def close(self) -> None:
        """Let go of it, and of its lock."""
        self._view = memoryview(b"")
        os.close(self._fd)

    def _is_good(self, stretch: int) -> bool:
        start = stretch * STRETCH_BYTES
        content = ByteRange(start, min(start + STRETCH_BYTES, self.size_bytes))
        hasher = xxhash.xxh3_64()
        try:
            with _buffer() as buffer:
                _read(self._fd, content, buffer, hasher.update)
        except OSError:
            return False
        return (hasher.intdigest() or 1) == self._marks[stretch]


def open_kept(cache: Cache, digest: Digest | None, tag: str) -> Kept | None:
    """Open the whole content of a stream without a restart index, if an earlier mount left it."""
    home = cache.home(digest, tag) if digest is not None else None
    if home is None:
        return None
    with contextlib.ExitStack() as on_error, contextlib.suppress(OSError):
        fd = os.open(home / "content", os.O_RDONLY | os.O_CLOEXEC)
        on_error.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if (home / "index").exists():
            return None
        packed = _marks_in(home, os.fstat(fd).st_size)
        if not is_sealed(home, packed):
            log.warning("what is kept in %s is damaged; doing it over", home)
            forget(home, fd)
            return None
        kept = Kept(home, fd, little_endian(array("Q", packed)))
        on_error.pop_all()
        return kept
    return None


def _marks_in(home: Path, size_bytes: int) -> bytes:
    """Return the marks of so much content, or bytes that nobody has sealed."""
    wanted_bytes = -(-size_bytes // STRETCH_BYTES) * MARK_BYTES
    with contextlib.suppress(OSError), open(home / "marks", "rb") as file:
        packed = file.read(wanted_bytes + 1)
        if len(packed) == wanted_bytes:
            return packed
    return b"?"


def _marks_of(growing: GrowingFile, chunks: ChunkMap, check: Callable[[], None]) -> "array[int]":
    """Read what was written; mark its chunks, and compare its stretches while at it."""
    marks = array("Q")
    strides = Strides()
    hasher = xxhash.xxh3_64()

    def see(data: memoryview) -> None:
        hasher.update(data)
        strides.update(data)

    with _buffer() as buffer:
        for index in range(len(chunks)):
            check()
            start, stop = chunks.content_start(index), chunks.content_start(index + 1)
            _read(growing.fd, ByteRange(start, stop), buffer, see)
            marks.append(hasher.intdigest() or 1)
            hasher.reset()
    strides.finish()
    if strides.marks != growing.strides.marks:
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


def _stretches(content: ByteRange) -> tuple[int, int]:
    """Return the first stretch of a range, and the one behind its last; of no bytes, none."""
    if content.start >= content.stop:
        return 0, 0
    return content.start // STRETCH_BYTES, (content.stop - 1) // STRETCH_BYTES + 1

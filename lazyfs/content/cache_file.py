"""One layer's content on disk: a sparse file in the content address space, and a mark per chunk.

Written with `pwritev` (a full disk is then an OSError, not a SIGBUS) and read through a read-only
mapping (a reply is a slice of it, without a copy). Nothing is ever fsynced: a chunk that an
earlier daemon left counts only if its bytes still give the mark, the xxh3 of what was stored, so
a torn write or a SIGKILL at any moment costs a fetch and never a wrong byte.

The tag names all that proves the chunks, or, where nothing does, the source they came from: what
a hostile image has put here is never found by another.

    DIR/layers/sha256-<hex>.<cache tag>/content   the bytes, at their content addresses
                                       /marks     one u64 (little-endian) a chunk; 0: not here
                                       /proven    xxh3-128 of `marks`, once the whole blob was
                                                  found to match its digest

One daemon owns a layer's files at a time (flock on `content`, gone with its holder however it
ends). Whoever comes second gets a private, nameless file: two writers that were told different
bytes by an unproven source must never see each other's.
"""

import contextlib
import fcntl
import mmap
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import xxhash

from lazyfs.content.cache import Cache
from lazyfs.content.room import Room
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest

MARK_BYTES = 8
_IOV_MAX = 1024


def mark_of(data: Data) -> int:
    """Return the mark of a chunk's bytes: their 64-bit xxh3, never 0 (which means "absent")."""
    return xxhash.xxh3_64_intdigest(data) or 1


def is_sealed(home: Path, marks: Data) -> bool:
    """Whether the blob that these marks describe was once proven whole by its digest."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (home / "proven").read_text() == xxhash.xxh3_128_hexdigest(marks)
    return False


def seal(home: Path, marks: Data) -> None:
    """Note that the whole blob matches its digest, its content being as in `marks`."""
    (home / "proven").write_text(xxhash.xxh3_128_hexdigest(marks))


def little_endian(marks: "array[int]") -> "array[int]":
    """Turn marks as they are on disk into numbers, or back; in place."""
    if sys.byteorder == "big":
        marks.byteswap()
    return marks


class CacheFile:
    """The content of one layer, as far as it is here.

    Every method may raise OSError; the caller then goes on without it. `write`, `record` and
    `read_into` may be called from several threads at once, for different chunks.
    """

    def __init__(
        self,
        content_fd: int,
        size_bytes: int,
        home: Path | None = None,
        marks_fd: int = -1,
        room: Room | None = None,
    ) -> None:
        """Use `open_cache_file`; a private file has neither `home` nor marks."""
        self._room = room or Room()
        self._content_fd = content_fd
        self._marks_fd = marks_fd
        self._home = home
        self._map = (
            mmap.mmap(content_fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            if size_bytes
            else None
        )
        self.view = memoryview(self._map) if self._map is not None else memoryview(b"")

    @property
    def persistent(self) -> bool:
        """Whether a later mount will find what is stored."""
        return self._home is not None

    def marks(self, count: int) -> bytes:
        """Return the marks as an earlier daemon left them, `count` u64 in little-endian."""
        if self._home is None:
            return bytes(count * MARK_BYTES)
        return os.pread(self._marks_fd, count * MARK_BYTES, 0).ljust(count * MARK_BYTES, b"\0")

    def write(self, content_start: int, pieces: Sequence[Data]) -> None:
        """Store `pieces`, one after the other, from `content_start` on."""
        self._room.take(sum(map(len, pieces)))
        write_all(self._content_fd, content_start, pieces)

    def record(self, first: int, marks: Sequence[int]) -> None:
        """Vouch for the chunks from number `first` on; only after `write` has returned."""
        if self._home is not None:
            data = b"".join(mark.to_bytes(MARK_BYTES, "little") for mark in marks)
            write_all(self._marks_fd, first * MARK_BYTES, [data])

    def read_into(self, content_start: int, buffer: memoryview) -> int:
        """Read stored bytes with a system call: a bad disk is then an OSError, not a SIGBUS."""
        return os.preadv(self._content_fd, [buffer], content_start)

    def is_sealed(self, marks: bytes) -> bool:
        """Whether the blob that these marks describe was once proven whole by its digest."""
        if self._home is None:
            return False
        return is_sealed(self._home, marks)

    def seal(self, marks: bytes) -> None:
        """Note that the whole blob matches its digest, chunk by chunk as in `marks`."""
        if self._home is not None:
            seal(self._home, marks)

    def purge(self) -> None:
        """Forget every chunk: the bytes have been found to be wrong."""
        if self._home is None:
            return
        (self._home / "proven").unlink(missing_ok=True)
        size_bytes = os.fstat(self._marks_fd).st_size
        os.ftruncate(self._marks_fd, 0)
        os.ftruncate(self._marks_fd, size_bytes)

    def close(self) -> None:
        """Let go of the file and its lock. Slices of `view` still held keep the mapping alive."""
        self.view = memoryview(b"")
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
        os.close(self._content_fd)
        if self._marks_fd >= 0:
            os.close(self._marks_fd)


def open_cache_file(
    cache: Cache, digest: Digest | None, tag: str, size_bytes: int, count: int
) -> CacheFile:
    """Open or create the cache of one layer.

    Without a `digest`, or when another daemon has it, the file is private and begins empty.

    Raises:
        OSError: there is no place for it (no directory, read-only, no rights).
    """
    if cache.directory is None:
        fd = os.memfd_create("lazyfs", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return CacheFile(fd, size_bytes, room=cache.room)
    layers = cache.directory / "layers"
    layers.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = cache.home(digest, tag) if digest is not None else None
    if home is None:
        return _open_private(layers, size_bytes, cache.room)
    home.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as on_error:
        content_fd = os.open(home / "content", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        on_error.callback(os.close, content_fd)
        try:
            fcntl.flock(content_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _open_private(layers, size_bytes, cache.room)
        marks_fd = os.open(home / "marks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        on_error.callback(os.close, marks_fd)
        for fd, wanted_bytes in ((content_fd, size_bytes), (marks_fd, count * MARK_BYTES)):
            if os.fstat(fd).st_size != wanted_bytes:
                os.ftruncate(marks_fd, 0)
                os.ftruncate(fd, 0)
                os.ftruncate(fd, wanted_bytes)
        if os.fstat(marks_fd).st_size != count * MARK_BYTES:
            os.ftruncate(marks_fd, count * MARK_BYTES)
        opened = CacheFile(content_fd, size_bytes, home, marks_fd, cache.room)
        on_error.pop_all()
        return opened


def _open_private(directory: Path, size_bytes: int, room: Room) -> CacheFile:
    with tempfile.TemporaryFile(dir=directory, buffering=0) as content:
        os.ftruncate(content.fileno(), size_bytes)
        return CacheFile(os.dup(content.fileno()), size_bytes, room=room)


def write_all(fd: int, offset: int, pieces: Sequence[Data]) -> None:
    """`pwritev` everything, whatever the kernel takes at a time."""
    for begin in range(0, len(pieces), _IOV_MAX):
        views = [memoryview(piece) for piece in pieces[begin : begin + _IOV_MAX] if len(piece)]
        while views:
            written = os.pwritev(fd, views, offset)
            if written <= 0:
                raise OSError("pwritev wrote nothing")
            offset += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]

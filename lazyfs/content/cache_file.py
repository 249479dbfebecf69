"""One layer's content on disk: a sparse file in the content address space, and a mark per chunk.

Written with `pwritev` (a full disk is then an OSError, not a SIGBUS) and read through a read-only
mapping (a reply is a slice of it, without a copy). Nothing is ever fsynced: a chunk that a daemon
did not store itself counts only if its bytes still give the mark of what was stored, a seeded
xxh3 (`marks.py`), so a torn write or a SIGKILL at any moment costs a fetch and never a wrong byte.

The tag names all that proves the chunks, or, where nothing does, the source they came from: what
a hostile image has put here is never found by another.

    DIR/layers/sha256-<hex>.<cache tag>/content   the bytes, at their content addresses
                                       /marks     one u64 (little-endian) a chunk; 0: not here
                                       /proven    xxh3-128 and mark of `marks`, once the whole
                                                  blob was found to match its digest
                                       /used      its time is that of the last use

All daemons of a host use the files at once (`layer_home.py`). What is in `content` under a mark
may be in somebody's reply at any moment: who may write what, and when, is `chunk_store.py`'s; the
locks are `host_locks.py`'s.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import xxhash

from lazyfs.content.cache import Cache
from lazyfs.content.host_locks import HostLocks
from lazyfs.content.layer_home import LayerHome, open_home
from lazyfs.content.marks import Marker
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest

MARK_BYTES = 8
_IOV_MAX = 1024
_IN_MEMORY = (0x01021994, 0x858458F6)
"""Of tmpfs, memfds included, and of ramfs: `f_type` in statfs(2)."""


def is_sealed(home: Path, marks: Data, marker: Marker) -> bool:
    """Whether the blob that these marks describe was once proven whole by its digest."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (home / "proven").read_text() == _proof_of(marks, marker)
    return False


def seal(home: Path, marks: Data, marker: Marker) -> None:
    """Note that the whole blob matches its digest, its content being as in `marks`."""
    (home / "proven").write_text(_proof_of(marks, marker))


def little_endian(marks: "array[int]") -> "array[int]":
    """Turn marks as they are on disk into numbers, or back; in place."""
    if sys.byteorder == "big":
        marks.byteswap()
    return marks


class CacheFile:
    """The content of one layer, as far as it is here.

    Every method may raise OSError; the caller then goes on without it. `write`, `record`,
    `marks` and `read_into` may be called from several threads at once.
    """

    def __init__(
        self,
        content_fd: int,
        size_bytes: int,
        cache: Cache,
        home: LayerHome | None = None,
    ) -> None:
        """Use `open_cache_file`; a private file has no `home`, and no marks."""
        self.marker = cache.marker
        self._content_fd = content_fd
        self._home = home
        self._room = cache.room
        self._map = (
            mmap.mmap(content_fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            if size_bytes
            else None
        )
        self.view = memoryview(self._map) if self._map is not None else memoryview(b"")
        self.holes_are_free = _are_holes_free(content_fd)
        """Whether looking at a hole through `view` takes no room: where it does, and there is
        none, that is a SIGBUS."""
        shared = home is not None and home.writable
        self.locks = HostLocks(home.marks_fd if home is not None and shared else None)

    @property
    def persistent(self) -> bool:
        """Whether others have the same file, or later mounts will: it has marks."""
        return self._home is not None

    @property
    def writable(self) -> bool:
        """Whether it takes anything."""
        return self._home is None or self._home.writable

    @property
    def is_found(self) -> bool:
        """Whether later mounts will find this file."""
        return self._home is not None and self._home.is_found

    def marks(self, first: int, last: int) -> bytes:
        """Return the marks of chunks as they are now on disk, u64 in little-endian."""
        count = (last - first) * MARK_BYTES
        if self._home is None:
            return bytes(count)
        return os.pread(self._home.marks_fd, count, first * MARK_BYTES).ljust(count, b"\0")

    def marks_changed_ns(self) -> int:
        """Return when any daemon last recorded a mark."""
        return os.fstat(self._home.marks_fd).st_mtime_ns if self._home is not None else 0

    def write(self, content_start: int, pieces: Sequence[Data]) -> None:
        """Store `pieces`, one after the other, from `content_start` on."""
        if not self.writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        self._room.take(sum(map(len, pieces)))
        write_all(self._content_fd, content_start, pieces)

    def record(self, first: int, marks: Sequence[int]) -> None:
        """Vouch for the chunks from number `first` on; only after `write` has returned."""
        if self._home is not None:
            data = b"".join(mark.to_bytes(MARK_BYTES, "little") for mark in marks)
            write_all(self._home.marks_fd, first * MARK_BYTES, [data])
            self._home.note_use()

    def read_into(self, content_start: int, buffer: memoryview) -> int:
        """Read stored bytes with a system call: a bad disk is then an OSError, not a SIGBUS."""
        return os.preadv(self._content_fd, [buffer], content_start)

    def is_sealed(self, marks: bytes) -> bool:
        """Whether the blob that these marks describe was once proven whole by its digest."""
        return self._home is not None and self._home.proof() == _proof_of(marks, self.marker)

    def seal_stamp(self) -> int:
        """Return a number that changes when any daemon seals; 0 if none has."""
        return self._home.proof_stamp() if self._home is not None else 0

    def seal(self, marks: bytes) -> None:
        """Note that the whole blob matches its digest, chunk by chunk as in `marks`."""
        if self._home is not None:
            self._home.prove(_proof_of(marks, self.marker))

    def purge(self) -> None:
        """Have nobody find the layer any more: its bytes have been found to be wrong.

        Those who have it open keep it, and their own judgement.
        """
        if self._home is not None:
            self._home.discard()

    def close(self) -> None:
        """Let go of the file and its locks. Slices of `view` still held keep the mapping alive."""
        self.view = memoryview(b"")
        if self._map is not None:
            with contextlib.suppress(BufferError):
                self._map.close()
        if self._home is not None:
            self._home.close()
        else:
            os.close(self._content_fd)


def open_cache_file(
    cache: Cache, digest: Digest | None, tag: str, size_bytes: int, count: int
) -> CacheFile:
    """Open or create the cache of one layer.

    Without a `digest`, or where it cannot be shared, the file is private and begins empty.

    Raises:
        OSError: there is no place for it (no directory, read-only, no rights).
    """
    if cache.directory is None:
        fd = os.memfd_create("lazyfs", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return CacheFile(fd, size_bytes, cache)
    path = cache.home(digest, tag) if digest is not None else None
    home = open_home(path, size_bytes, count * MARK_BYTES) if path is not None else None
    if home is None:
        layers = cache.directory / "layers"
        layers.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=layers, buffering=0) as content:
            os.ftruncate(content.fileno(), size_bytes)
            return CacheFile(os.dup(content.fileno()), size_bytes, cache)
    try:
        return CacheFile(home.content_fd, size_bytes, cache, home)
    except BaseException:
        home.close()
        raise


def _are_holes_free(fd: int) -> bool:
    told = (ctypes.c_long * 32)()  # `struct statfs`, of at most 120 bytes, begins with f_type
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, told) != 0:
        return False
    return told[0] not in _IN_MEMORY


def _proof_of(marks: Data, marker: Marker) -> str:
    """Return what proves marks, and that they were made with this seed."""
    return f"{xxhash.xxh3_128_hexdigest(marks)}-{marker.of(marks):016x}"


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

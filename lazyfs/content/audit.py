"""Looking at a cached layer as a whole: is every chunk still what was stored?

A mount checks a chunk when it first needs it; this does so for all of them, without a mount and
without a network. Of a plain tar that is all here the digest is computed too. Others may use the
layer meanwhile. What is damaged is dropped only where nobody does: the chunk's mark becomes 0,
then its bytes a hole, and the next mount fetches it anew.
"""

import ctypes
import fcntl
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lazyfs.content import janitor
from lazyfs.content.cache_file import MARK_BYTES, is_sealed, little_endian, seal
from lazyfs.content.chunk_note import Grid, even_grid, grid_of, read_note, zero_chunks_noted
from lazyfs.content.documents import is_sound
from lazyfs.content.growing_file import STRETCH_BYTES
from lazyfs.content.marks import Marker, mark_from, marker_of
from lazyfs.content.shelf import Shelved
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import FIXED_CHUNK_BYTES
from lazyfs.layers.restart_index import chunks_in

if TYPE_CHECKING:
    from hashlib import _Hash

_PIECE_BYTES = MIB
_FILE_MOST_BYTES = 1 << 34
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""Modes of fallocate(2)."""
_STREAMED = ("zstd-stream-1", "gzip-spans-1")
"""Layouts whose content is one stretch after the other, unless they have an index."""


class Audit(msgspec.Struct):
    """What was found of one layer."""

    layer: Shelved
    checked_chunks: int = 0
    checked_bytes: int = 0
    damaged: list[ByteRange] = msgspec.field(default_factory=list)
    """Content that is not what was stored."""
    torn: bool = False
    """Its files do not fit each other: none of it is good for anything."""
    repaired: bool = False
    """What was damaged has been dropped, and will be fetched anew."""
    digest_matches: bool | None = None
    """Of a plain tar that is whole: whether it is what the digest names. None: not computed."""
    unknown: str | None = None
    """Why chunks could not be compared, if they could not."""

    @property
    def is_damaged(self) -> bool:
        """Whether anything was found to be other than it was stored."""
        return bool(self.damaged) or self.digest_matches is False


def here_bytes(layer: Shelved) -> int:
    """Return how much of a layer's content is here, give or take a chunk's size."""
    marks = array("Q", _marks_in(layer))
    if not marks:
        return 0
    here = min(len(marks), len(marks) - marks.count(0) + zero_chunks_noted(layer.home))
    return layer.content_bytes * here // len(marks)


def is_proven(layer: Shelved) -> bool:
    """Whether the whole layer was once found to match its digest, and its marks are as then."""
    marks = _marks_in(layer)
    return bool(marks) and is_sealed(layer.home, marks, _marker(layer))


def audit(directory: "Path", layer: Shelved, on_bytes: Callable[[int], None]) -> Audit:
    """Compare all that is here of a layer with its marks; drop what is damaged, if nobody uses it.

    `on_bytes` is told each time how many more bytes were looked at. Blocks.
    """
    found = Audit(layer)
    with _opened(layer) as fd:
        if fd is None:
            found.unknown = "it is gone"
            return found
        marks = _marks_in(layer)
        grid = _grid(layer)
        if grid is None:
            found.unknown = "nothing here tells how it is cut into chunks; mounting it once does"
            return found
        if not os.fstat(fd).st_blocks:
            return found  # all hole, as when it was made
        if len(marks) != len(grid) * MARK_BYTES or _end(grid) > layer.content_bytes:
            found.damaged = [ByteRange(0, layer.content_bytes)]
            found.torn = True
        else:
            _compare(found, fd, grid, little_endian(array("Q", marks)), on_bytes)
            if found.digest_matches and not is_sealed(layer.home, marks, _marker(layer)):
                with suppress(OSError):
                    seal(layer.home, marks, _marker(layer))
    if found.is_damaged:
        found.repaired = _repair(directory, found, grid)
    return found


def _compare(
    found: Audit, fd: int, grid: Grid, marks: "array[int]", on_bytes: Callable[[int], None]
) -> None:
    """Look at every chunk that has a mark; hash the whole too, if it is its own blob."""
    layer = found.layer
    marker = _marker(layer)
    whole = layer.digest.hasher() if layer.is_plain_tar and 0 not in marks else None
    for index, mark in enumerate(marks):
        if not mark:
            continue
        content = ByteRange(grid.starts[index], grid.starts[index] + grid.sizes[index])
        good = _mark(marker, fd, content, whole) == mark
        if not good:  # somebody may have been writing it anew
            now = _marks_in(layer)[index * MARK_BYTES : (index + 1) * MARK_BYTES]
            good = _mark(marker, fd, content, None) == int.from_bytes(now, "little")
            whole = None
        if not good:
            found.damaged.append(content)
        found.checked_chunks += 1
        found.checked_bytes += content.size_bytes
        on_bytes(content.size_bytes)
    if whole is not None and not found.damaged:
        found.digest_matches = whole.hexdigest() == layer.digest.hex


def _repair(directory: "Path", found: Audit, grid: Grid) -> bool:
    """Drop what is damaged, if nobody uses the layer; what only a whole is good for, as a whole."""
    layer = found.layer
    as_a_whole = found.torn or found.digest_matches is False or _is_stretches(layer)
    with janitor.sole_user(layer.home) as fd, suppress(OSError):
        if fd is None:
            return False
        if as_a_whole:
            janitor.bury(directory, layer.home)
            return True
        numbers = {start: index for index, start in enumerate(grid.starts)}
        with open(layer.home / "marks", "r+b", buffering=0) as marks:
            for content in found.damaged:
                marks.seek(numbers[content.start] * MARK_BYTES)
                marks.write(bytes(MARK_BYTES))
                _punch(fd, content)
        (layer.home / "proven").unlink(missing_ok=True)
        return True
    return False


@contextmanager
def _opened(layer: Shelved) -> Iterator[int | None]:
    """Open a layer's content, and keep it from being evicted, if it can be kept."""
    try:
        fd = os.open(layer.home / "content", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def _mark(marker: Marker, fd: int, content: ByteRange, whole: "_Hash | None") -> int:
    """Return the mark that bytes give, never 0; -1 if they cannot be read."""
    hasher = marker.hasher()
    at = content.start
    try:
        while at < content.stop:
            data = os.pread(fd, min(_PIECE_BYTES, content.stop - at), at)
            if not data:
                return -1
            hasher.update(data)
            if whole is not None:
                whole.update(data)
            at += len(data)
    except OSError:
        return -1
    return mark_from(hasher)


def _marker(layer: Shelved) -> Marker:
    return marker_of(layer.home.parent.parent)


def _grid(layer: Shelved) -> Grid | None:
    """Return how a layer is cut, as far as the cache can know it."""
    if layer.is_plain_tar:
        return even_grid(layer.content_bytes, FIXED_CHUNK_BYTES)
    if _is_stretches(layer):
        return even_grid(layer.content_bytes, STRETCH_BYTES)
    with suppress(OSError, LazyfsError), open(layer.home / "index", "rb") as file:
        return grid_of(chunks_in(file.read(_FILE_MOST_BYTES)))
    return read_note(layer.home)


def _is_stretches(layer: Shelved) -> bool:
    return layer.tag.startswith(_STREAMED) and not (layer.home / "index").exists()


def _marks_in(layer: Shelved) -> bytes:
    with suppress(OSError), open(layer.home / "marks", "rb") as file:
        marks = file.read(_FILE_MOST_BYTES)
        if len(marks) % MARK_BYTES == 0:
            return marks
    return b""


def _end(grid: Grid) -> int:
    return grid.starts[-1] + grid.sizes[-1] if len(grid) else 0


def _punch(fd: int, content: ByteRange) -> None:
    """Make a hole of whole blocks, and of what is left zeros; a disk that cannot keeps them."""
    libc = ctypes.CDLL(None, use_errno=True)
    offset, length = ctypes.c_longlong(content.start), ctypes.c_longlong(content.size_bytes)
    libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def verify_document(path: Path) -> bool:
    """Compare a document with what was stored, and drop it if it is damaged; whether it is not."""
    try:
        sound = is_sound(path)
    except FileNotFoundError:
        return True  # removed meanwhile
    except (OSError, ValueError):
        sound = False
    if not sound:
        with suppress(OSError):
            path.unlink()
    return sound

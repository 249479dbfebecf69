r"""Where the chunks of a cached layer lie, for who has nothing but the cache.

Formats with a table know it from the image; the cache's own commands cannot ask that. So a mount
leaves a note beside the marks:

    chunks      16 bytes "lazyfs-chunks-1\n"
                u64 number of chunks, u64 number of those that are all zeros
                u64 first content address of each chunk
                u64 size of each chunk, padding that belongs to no file not counted
                16 bytes xxh3-128 of all that

Numbers are little-endian. Layouts that need no note: a plain tar's even grid, and the stretches
of what was decoded from its start. The note says what is to be compared with which mark, and
proves nothing.
"""

import os
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash

from lazyfs.ground.data import Data
from lazyfs.layers.model import ChunkMap

_NAME = "chunks"
_MAGIC = b"lazyfs-chunks-1\n"
_HEAD = struct.Struct("<16sQQ")
_SEAL_BYTES = 16
_NOTE_MOST_BYTES = 1 << 30
_STEP = 4096


class Grid(msgspec.Struct, frozen=True):
    """How content is cut; `starts` and `sizes` in bytes, a number for each chunk."""

    starts: Sequence[int]
    sizes: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)


def even_grid(size_bytes: int, chunk_bytes: int) -> Grid:
    """Cut content into chunks that are alike, but for the last."""
    starts = range(0, size_bytes, chunk_bytes)
    return Grid(starts, [min(chunk_bytes, size_bytes - start) for start in starts])


def grid_of(chunks: ChunkMap, check: Callable[[], None] = lambda: None) -> Grid:
    """Read a chunk map out. `check` is called now and then and may raise."""
    starts, sizes = array("Q"), array("Q")
    for index in range(len(chunks)):
        if index % _STEP == 0:
            check()
        starts.append(chunks.content_start(index))
        sizes.append(chunks.content_size(index))
    return Grid(starts, sizes)


def leave_note(home: Path, chunks: ChunkMap, check: Callable[[], None] = lambda: None) -> None:
    """Note beside a layer's marks how it is cut, unless that is known. Blocks.

    `check` is called now and then and may raise.

    Raises:
        OSError: the disk will not have it.
    """
    if (home / _NAME).exists():
        return
    grid = grid_of(chunks, check)
    parts = [
        _HEAD.pack(_MAGIC, len(grid), len(chunks.zero_chunks())),
        _little_endian(array("Q", grid.starts)),
        _little_endian(array("Q", grid.sizes)),
    ]
    seal = xxhash.xxh3_128()
    for part in parts:
        seal.update(part)
    fd, name = tempfile.mkstemp(dir=home, prefix=f".{_NAME}-")
    try:
        with open(fd, "wb") as file:
            file.writelines([*parts, seal.digest()])
        Path(name).rename(home / _NAME)
    except OSError:
        with suppress(OSError):
            Path(name).unlink()
        raise


def read_note(home: Path) -> Grid | None:
    """Return how a layer is cut, if there is a good note of it."""
    with suppress(OSError), open(home / _NAME, "rb") as file:
        if os.fstat(file.fileno()).st_size <= _NOTE_MOST_BYTES:
            return parse_note(file.read(_NOTE_MOST_BYTES))
    return None


def parse_note(data: Data) -> Grid | None:
    """Return what a note says; None if it is torn, or none."""
    view = memoryview(data).cast("B")
    sealed, seal = view[:-_SEAL_BYTES], view[-_SEAL_BYTES:]
    if len(sealed) < _HEAD.size or xxhash.xxh3_128_digest(sealed) != seal:
        return None
    magic, count, _ = _HEAD.unpack_from(sealed)
    if magic != _MAGIC or len(sealed) != _HEAD.size + 16 * count:
        return None
    middle = _HEAD.size + 8 * count
    return Grid(_numbers(sealed[_HEAD.size : middle]), _numbers(sealed[middle:]))


def zero_chunks_noted(home: Path) -> int:
    """Return how many chunks are all zeros, as far as a note tells: they are never fetched."""
    with suppress(OSError, struct.error), open(home / _NAME, "rb") as file:
        magic, count, zeros = _HEAD.unpack(file.read(_HEAD.size))
        if magic == _MAGIC and zeros <= count:
            return int(zeros)
    return 0


def _little_endian(numbers: "array[int]") -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _numbers(column: Data) -> "array[int]":
    numbers = array("Q")
    numbers.frombytes(column)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers

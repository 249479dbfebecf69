"""Where content is kept: a directory that all daemons of a host share, or memory; and how much.

    DIR/layers/<digest>.<tag>/   the content of one layer (`cache_file.py`, `kept.py`)
       /incoming/                what is not whole yet (`incoming.py`), what is being removed
       /documents/               what says how layers are to be read (`documents.py`)
       /lock                     held by who makes room (`room.py`)
       /seed                     of the marks of all chunks (`marks.py`)
       /log/                     what daemons log

In memory content is in memfds: nothing of it is ever written to a file. The kernel may swap
their pages, as it may those of the processes that were checkpointed.
"""

import mmap
import os
import tempfile
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Self

from lazyfs.content.documents import Documents
from lazyfs.content.marks import Marker, marker_of
from lazyfs.content.room import DiskBounds, MemoryBounds, Room
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.settings import CACHE_LIMIT, MIB, Limit


class Cache:
    """One host's cache, as one daemon sees it."""

    def __init__(self, directory: Path | None, limit: Limit = CACHE_LIMIT) -> None:
        """Touch nothing yet. Without a `directory` all is kept in memory, and for nobody else."""
        self.directory = directory
        self.room = Room(MemoryBounds(limit) if directory is None else DiskBounds(directory, limit))
        """Asked before bytes are written to any file of the cache."""
        self.documents = Documents(directory, self.room)

    @classmethod
    def memory(cls, limit: Limit = CACHE_LIMIT) -> Self:
        """Keep everything in memory, for this daemon alone."""
        return cls(None, limit)

    @cached_property
    def marker(self) -> Marker:
        """What marks the chunks of this cache. Blocks, the first time."""
        return Marker() if self.directory is None else marker_of(self.directory)

    def __str__(self) -> str:
        return str(self.directory) if self.directory is not None else "memory"

    def home(self, digest: Digest, tag: str) -> Path | None:
        """Return the directory of a layer whose content later mounts find; None in memory."""
        if self.directory is None:
            return None
        return self.directory / "layers" / f"{digest.algorithm}-{digest.hex}.{tag}"

    def has_of(self, digest: Digest) -> bool:
        """Whether an earlier mount has left content of a layer, whatever names it; it may be gone.

        Blocks.
        """
        if self.directory is None:
            return False
        begin = f"{digest.algorithm}-{digest.hex}."
        with suppress(OSError):
            found = (self.directory / "layers").iterdir()
            return any(each.name.startswith(begin) for each in found)
        return False

    def scratch(self, size_bytes: int) -> mmap.mmap:
        """Return a writable mapping for this daemon alone; if it is large, of a nameless file.

        A file's pages are not the daemon's own memory.
        """
        if size_bytes > MIB and self.directory is not None:
            with suppress(OSError):
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.room.take(size_bytes)
                with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                    os.posix_fallocate(file.fileno(), 0, size_bytes)
                    return mmap.mmap(file.fileno(), size_bytes)
        return mmap.mmap(-1, max(1, size_bytes))

    def keep(self, data: Data) -> memoryview:
        """Return a copy of `data` that is not the daemon's own memory, if there is a directory.

        Raises:
            OSError: the disk will not have it.
        """
        if self.directory is None:
            return memoryview(bytes(data))
        view = memoryview(data).cast("B")
        self.room.take(len(view))
        with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
            written = 0
            while written < len(view):
                written += file.write(view[written:])
            return memoryview(mmap.mmap(file.fileno(), len(view), prot=mmap.PROT_READ))

"""Where content is kept: a directory that all daemons of a host share, or memory.

DIR/layers/<digest>.<tag>/   the content of one layer (`cache_file.py`, `kept.py`)
/incoming/                what is not whole yet (`growing_file.py`), what is being removed
"""

import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from lazyfs.content.room import Room
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.settings import MIB


class Cache:
    """One host's cache, as one daemon sees it."""

    def __init__(self, directory: Path | None) -> None:
        """Touch nothing yet. Without a `directory` all is kept in memory, and for nobody else."""
        self.directory = directory
        self.room = Room()

    def __str__(self) -> str:
        return str(self.directory) if self.directory is not None else "memory"

    def home(self, digest: Digest, tag: str) -> Path | None:
        """Return the directory of a layer whose content later mounts find; None in memory."""
        if self.directory is None:
            return None
        return self.directory / "layers" / f"{digest.algorithm}-{digest.hex}.{tag}"

    def scratch(self, size_bytes: int) -> mmap.mmap:
        """Return a writable mapping for this daemon alone; if it is large, of a nameless file.

        A file's pages are not the daemon's own memory.
        """
        if size_bytes > MIB and self.directory is not None:
            with suppress(OSError):
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
            view = memoryview(data).cast("B")
            written = 0
            while written < len(view):
                written += file.write(view[written:])
            return memoryview(mmap.mmap(file.fileno(), len(view), prot=mmap.PROT_READ))

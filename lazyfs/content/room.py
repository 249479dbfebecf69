"""Whether there is room for more bytes in the cache, asked before they are written.

A writer takes what it is about to write from a *credit*: an integer, so that asking costs
nothing. When that is used up somebody looks: at what the cache takes up, against its limit, and
at what is left of the disk or of the memory; on disk whole layers that nobody uses make room,
the least recently used first (`janitor.py`). What is short then is refused: an OSError, as a full
disk gives it, and the caller goes on without caching. While refused it is looked once a second,
or when the disk has more free than before, so that the cache takes more again once there is room.

So a limit is overshot by what has been taken and not written yet: at most two credits a daemon
(one, and one more while somebody looks), that is 32 MiB, or a thirty-second part of a smaller
limit; and by nameless files of *other* daemons (of layers that no digest names), which nobody else
can see. The floor that stays free on the disk holds for those too.

Called from many worker threads at once. Nothing here waits for another process for longer than
`_LOCK_PATIENCE_S`, nor for another thread for longer than `_PATIENCE_S`.
"""

import errno
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple, Protocol

from lazyfs.content import janitor, shelf
from lazyfs.content.memory_left import memory_left
from lazyfs.ground.settings import CACHE_LIMIT, GIB, KIB, MIB, Limit

_CREDIT_MOST_BYTES = 16 * MIB
_CREDIT_LEAST_BYTES = 64 * KIB
_CREDIT_SHARE = 64
_PATIENCE_S = 5.0
_LOCK_PATIENCE_S = 2.0
_LOOK_AGAIN_S = 1.0

_FLOOR_BYTES = 256 * MIB
_FLOOR_SHARE = 16
"""So much of a disk, and of memory, stays free, or this part of it if that is less."""
_SPARE_BYTES = 10 * GIB
_SPARE_SHARE = 10
"""Where so much of a disk is not free (or this part of it, if less), unused layers go."""


class Bounds(Protocol):
    """What a `Room` looks at."""

    @property
    def credit_bytes(self) -> int:
        """How much may be written between two looks."""

    def have(self, wanted_bytes: int) -> int:
        """Return how many bytes may be written now, which is `wanted_bytes` at least. Blocks.

        Raises:
            OSError: so much may not be written (ENOSPC, EDQUOT), or nobody can tell.
        """

    def has_changed(self) -> bool:
        """Whether there is plainly more room than when it was refused. Takes no time."""


class Room:
    """Room for a cache's bytes; without `bounds`, always."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        """Look at nothing before somebody asks."""
        self._bounds = bounds
        self._credit_bytes = 0
        self._looked = threading.Condition()
        self._looking = False
        self._refusal: tuple[int, str] | None = None
        self._look_again_at_s = 0.0
        self._granted_bytes = 0
        """Granted by the latest look, if more than a credit: maybe it is not written yet."""

    def take(self, count: int) -> None:
        """Be called before `count` bytes are written.

        Raises:
            OSError: there is no room for them: ENOSPC on the disk, EDQUOT within the limit.
        """
        if self._bounds is None:
            return
        deadline_s = time.monotonic() + _PATIENCE_S
        with self._looked:
            while not self._take_credit(count, self._bounds):
                if not self._looking:
                    self._looking = True
                    self._credit_bytes = 0  # what was drawn up to now has been written, by and by
                    break
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise OSError(errno.EDQUOT, "nobody could tell in time whether there is room")
                self._looked.wait(left_s)
            else:
                return
        self._look(count, self._bounds)

    def _take_credit(self, count: int, bounds: Bounds) -> bool:
        """Take from the credit; False if it does not suffice. While somebody looks, overdraw it."""
        if self._refusal is not None:
            too_soon = time.monotonic() < self._look_again_at_s and not bounds.has_changed()
            if self._looking or too_soon:
                raise OSError(*self._refusal)
            return False
        least = -bounds.credit_bytes if self._looking else 0
        if self._credit_bytes - count < least:
            return False
        self._credit_bytes -= count
        return True

    def _look(self, count: int, bounds: Bounds) -> None:
        refusal, credit_bytes = None, 0
        try:
            wanted_bytes = count + self._granted_bytes
            self._granted_bytes = 0
            credit_bytes = min(bounds.have(wanted_bytes) - wanted_bytes, bounds.credit_bytes)
            if count > bounds.credit_bytes:
                self._granted_bytes = count
        except OSError as error:
            refusal = error.errno or errno.ENOSPC, error.strerror or str(error)
            raise
        finally:
            with self._looked:
                self._looking = False
                self._refusal = refusal
                self._look_again_at_s = time.monotonic() + _LOOK_AGAIN_S
                self._credit_bytes += credit_bytes
                self._looked.notify_all()


class Level(NamedTuple):
    """How full a cache directory is. In bytes."""

    used_bytes: int
    """What its files take up on the disk."""
    limit_bytes: int
    free_bytes: int
    """Of the disk, for this user."""
    disk_bytes: int

    @property
    def room_bytes(self) -> int:
        """What may still be written."""
        floor_bytes = min(_FLOOR_BYTES, self.disk_bytes // _FLOOR_SHARE)
        return min(self.limit_bytes - self.used_bytes, self.free_bytes - floor_bytes)

    @property
    def spare_bytes(self) -> int:
        """What may still be written before unused layers have to go."""
        spare_bytes = min(_SPARE_BYTES, self.disk_bytes // _SPARE_SHARE)
        return min(self.limit_bytes - self.used_bytes, self.free_bytes - spare_bytes)


def level_of(directory: Path, limit: Limit) -> Level:
    """Look how full a cache directory is.

    Raises:
        OSError: the disk does not answer.
    """
    disk = os.statvfs(directory)
    disk_bytes = disk.f_blocks * disk.f_frsize
    return Level(
        used_bytes=shelf.used_bytes(directory),
        limit_bytes=limit.of(disk_bytes),
        free_bytes=disk.f_bavail * disk.f_frsize,
        disk_bytes=disk_bytes,
    )


class DiskBounds:
    """The bounds of a cache directory: its limit, and what stays free on its disk."""

    def __init__(self, directory: Path, limit: Limit = CACHE_LIMIT) -> None:
        """Touch nothing yet."""
        self._directory = directory
        self._limit = limit
        self._free_bytes = 0
        """Of the disk, at the last look."""
        self._credit_bytes = _CREDIT_LEAST_BYTES

    @property
    def credit_bytes(self) -> int:
        """How much may be written between two looks."""
        return self._credit_bytes

    def have(self, wanted_bytes: int) -> int:
        """Return how many bytes may be written; unused layers make room, if they have to.

        Raises:
            OSError: not so many as are wanted.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        level = level_of(self._directory, self._limit)
        self._credit_bytes = _credit_of(level.limit_bytes)
        enough_bytes = wanted_bytes + self._credit_bytes
        if level.spare_bytes < enough_bytes:
            # Who can go on does not wait for another that makes room already.
            patience_s = _LOCK_PATIENCE_S if level.room_bytes < wanted_bytes else 0
            with janitor.locked(self._directory / "lock", patience_s) as alone:
                level = level_of(self._directory, self._limit)
                if alone and level.spare_bytes < enough_bytes:
                    janitor.make_room(self._directory, enough_bytes - level.spare_bytes)
                    level = level_of(self._directory, self._limit)
        self._free_bytes = level.free_bytes
        if level.room_bytes >= wanted_bytes:
            return level.room_bytes
        if level.limit_bytes - level.used_bytes < wanted_bytes:
            limit = _in_words(level.limit_bytes)
            raise OSError(
                errno.EDQUOT, f"the cache has reached its limit of {limit} (--cache-size)"
            )
        raise OSError(errno.ENOSPC, "No space left but what the cache leaves to others")

    def has_changed(self) -> bool:
        """Whether much of the disk has become free since the last look."""
        try:
            disk = os.statvfs(self._directory)
        except OSError:
            return False
        return disk.f_bavail * disk.f_frsize >= self._free_bytes + self.credit_bytes


class MemoryBounds:
    """The bounds of a cache in memory: of this process, and of what the machine has left."""

    def __init__(self, limit: Limit = CACHE_LIMIT) -> None:
        """Look how much memory is available: a part of that may be the limit."""
        memory = memory_left()
        self._floor_bytes = min(_FLOOR_BYTES, memory.all_bytes // _FLOOR_SHARE)
        self._limit_bytes = limit.of(memory.available_bytes)
        if limit.count_bytes is None:  # the least of a part is for disks: memory ends
            self._limit_bytes = min(self._limit_bytes, memory.available_bytes)

    @property
    def credit_bytes(self) -> int:
        """How much may be written between two looks."""
        return _credit_of(self._limit_bytes)

    def have(self, wanted_bytes: int) -> int:
        """Return how many bytes may be written.

        Raises:
            OSError: not so many as are wanted.
        """
        left_bytes = self._limit_bytes - shelf.memory_bytes()
        if left_bytes < wanted_bytes:
            limit = _in_words(self._limit_bytes)
            raise OSError(
                errno.EDQUOT,
                f"the cache in memory has reached its limit of {limit} (--cache-size)",
            )
        free_bytes = memory_left().available_bytes - self._floor_bytes
        if free_bytes < wanted_bytes:
            raise OSError(errno.ENOSPC, "No space left in memory but what others need")
        return min(left_bytes, free_bytes)

    def has_changed(self) -> bool:
        """No: memory comes and goes."""
        return False


def _credit_of(limit_bytes: int) -> int:
    return max(_CREDIT_LEAST_BYTES, min(_CREDIT_MOST_BYTES, limit_bytes // _CREDIT_SHARE))


def _in_words(limit_bytes: int) -> str:
    return f"{limit_bytes >> 20} MiB" if limit_bytes >= 1 << 20 else f"{limit_bytes} bytes"

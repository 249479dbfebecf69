"""Removing what a cache directory can do without, and never what somebody uses.

Whoever uses a layer holds a lock (flock) on its `content`. So a layer is removed by him who gets
that lock for himself, and has it until nothing is left: first the layer's directory is renamed to
`DIR/incoming/`, where nobody looks for layers, then its files are unlinked. Who has opened the
file meanwhile and gets the lock later sees that it is no longer the layer's, and begins anew.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lazyfs.content import shelf
from lazyfs.content.shelf import Document, Shelved

log = logging.getLogger(__name__)

_POLL_S = 0.02
_MAKING_S = 60.0


def make_room(directory: Path, wanted_bytes: int) -> int:
    """Remove what dead daemons left, then what is unused, the least recently used first.

    Stops when `wanted_bytes` have become free; returns how many have.
    """
    freed_bytes = remove_leftovers(directory)
    found: list[Shelved | Document] = [*shelf.shelved(directory), *shelf.documents(directory)]
    for item in sorted(found, key=lambda item: item.last_used_s):
        if freed_bytes >= wanted_bytes:
            break
        if isinstance(item, Document):
            freed_bytes += remove_document(item)
            continue
        removed_bytes = remove(directory, item)
        if removed_bytes is not None:
            log.info("made room: %s is not kept any more", item.digest)
            freed_bytes += removed_bytes
    return freed_bytes


def remove_document(document: Document) -> int:
    """Remove a document; return the bytes that it took up. Who has it open keeps it."""
    try:
        document.path.unlink()
    except OSError:
        return 0
    return document.disk_bytes


def remove(directory: Path, layer: Shelved) -> int | None:
    """Remove a layer that nobody uses; return the bytes that it took up, None if it is in use."""
    with sole_user(layer.home) as fd:
        if fd is None:
            return None
        freed_bytes = shelf.disk_bytes_of(layer.home)
        bury(directory, layer.home)
        return freed_bytes


@contextlib.contextmanager
def sole_user(home: Path) -> Iterator[int | None]:
    """Keep others from using a layer that nobody uses; give its `content`, else None."""
    try:
        fd = os.open(home / "content", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        yield fd if _is_sole_user(fd, home) else None
    finally:
        os.close(fd)


def _is_sole_user(fd: int, home: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), (home / "content").lstat())
    except OSError:
        return False


def bury(directory: Path, home: Path) -> None:
    """Take a layer's directory away from where it is looked for, and remove it.

    Raises:
        OSError: it is still there.
    """
    incoming = directory / "incoming"
    incoming.mkdir(mode=0o700, exist_ok=True)
    grave = Path(tempfile.mkdtemp(dir=incoming))
    try:
        home.rename(grave)
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def remove_leftovers(directory: Path) -> int:
    """Remove what daemons that have ended did not finish; return the bytes that it took up."""
    from lazyfs.content.incoming import remove_abandoned  # which knows of `Cache`, as we do not

    for path in shelf.half_written(directory):
        if _is_old(path):
            with contextlib.suppress(OSError):
                path.unlink()
    torsos = [home for home in shelf.torsos(directory) if _is_old(home)]
    sizes = {entry: shelf.disk_bytes_of(entry) for entry in (*shelf.unfinished(directory), *torsos)}
    if not sizes:
        return 0
    for home in torsos:
        with contextlib.suppress(OSError):
            bury(directory, home)
    with locked(directory / "incoming" / "lock", 1.0) as alone, contextlib.suppress(OSError):
        if alone:
            remove_abandoned(directory / "incoming")
    return sum(size for entry, size in sizes.items() if not entry.exists())


def _is_old(home: Path) -> bool:
    """Whether nobody can be making it just now."""
    try:
        return time.time() - home.stat().st_mtime > _MAKING_S
    except OSError:
        return False


@contextlib.contextmanager
def locked(path: Path, patience_s: float) -> Iterator[bool]:
    """Hold a lock between processes; False if it could not be had in time, or at all."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield False
        return
    try:
        yield _lock_in_time(fd, time.monotonic() + patience_s)
    finally:
        os.close(fd)


def _lock_in_time(fd: int, deadline_s: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        except OSError:
            return False
        else:
            return True

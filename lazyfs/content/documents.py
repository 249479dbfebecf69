"""Small things that say how layers are to be read, kept so that later mounts need not ask.

    DIR/documents/<digest>.<kind>-<source>   one line that proves the rest, and the rest

Manifests, configs, tables of contents: whatever is asked for before there is a layer whose chunks
could be kept. `digest` is that of the manifest, or of the blob that it is a part of; `source` names
where it was had, so that who may read one repository is given nothing that only another holds.

The first line has the sha256 of what follows. It finds out what a crash has torn or a disk has
lost; what makes the bytes the right ones is the digest that named them in the first place, and
that is for who asks to see to. A document is made whole, by a rename, and never changed: who
has it open keeps it. Nobody locks anything. It is removed as layers are, by its last use.

What this must not do: fail. A document that is not to be had is had from its source.
"""

import hashlib
import logging
import mmap
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lazyfs.content.room import Room
from lazyfs.content.shelf import NEW
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.settings import KIB, MIB

_log = logging.getLogger(__name__)

_MOST_BYTES = 64 * MIB
"""Of one document: a table of contents of a million chunks. What is larger is had anew."""
_MAPPED_BYTES = 256 * KIB
"""From here on a document is mapped: a file's pages are not the daemon's own memory."""
_HEAD = re.compile(rb"lazyfs document 1 sha256:([0-9a-f]{64})\n")
_HEAD_BYTES = len(b"lazyfs document 1 sha256:") + 64 + 1


class Documents:
    """The documents of one cache directory; thread-safe, and everything blocks."""

    def __init__(self, directory: Path | None, room: Room) -> None:
        """Touch nothing yet. Without a `directory` (a cache in memory) nothing is kept."""
        self._directory = None if directory is None else directory / "documents"
        self._room = room

    def has(self, name: str) -> bool:
        """Whether there is a document, good or not."""
        return self._directory is not None and (self._directory / name).exists()

    def find(self, name: str) -> Data | None:
        """Return a document, as it was kept; None if there is none, or not any more."""
        if self._directory is None:
            return None
        try:
            body = _read(self._directory / name)
        except (OSError, ValueError):
            return None
        if body is None:
            _log.info("the cache's document %s is damaged and is had anew", name)
            self.forget(name)
            return None
        self.note_use([name])
        return body

    def keep(self, name: str, pieces: Sequence[Data]) -> None:
        """Keep a document, if there is room for it."""
        size_bytes = sum(len(piece) for piece in pieces)
        if self._directory is None or size_bytes > _MOST_BYTES:
            return
        proof = hashlib.sha256()
        for piece in pieces:
            proof.update(piece)
        head = f"lazyfs document 1 sha256:{proof.hexdigest()}\n".encode()
        try:
            self._room.take(len(head) + size_bytes)
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(name, [head, *pieces])
        except OSError as error:
            _log.info("%s is not kept: %s", name, error.strerror or error)

    def note_use(self, names: Sequence[str]) -> None:
        """Note that documents are in use, for whoever makes room."""
        if self._directory is None:
            return
        for name in names:
            with suppress(OSError):
                os.utime(self._directory / name, follow_symlinks=False)

    def forget(self, name: str) -> None:
        """Have nobody find a document any more."""
        if self._directory is not None:
            with suppress(OSError):
                (self._directory / name).unlink()

    def _write(self, name: str, pieces: Sequence[Data]) -> None:
        directory = self._directory
        if directory is None:
            raise AssertionError("a document that is kept nowhere")
        descriptor, path = tempfile.mkstemp(prefix=NEW, dir=directory)
        new = Path(path)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for piece in pieces:
                    view = memoryview(piece).cast("B")
                    while view:
                        view = view[file.write(view) :]
            new.replace(directory / name)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise


def name_of(digest: Digest, kind: str, source: str) -> str:
    """Return what a document is called; `source` is the name of where it was had."""
    return f"{digest.algorithm}-{digest.hex}.{kind}-{Digest.of(source.encode()).hex[:16]}"


def is_sound(path: Path) -> bool:
    """Whether a document is as it was stored.

    Raises:
        OSError: it cannot be read.
    """
    return _read(path) is not None


def _read(path: Path) -> Data | None:
    """Return what follows the first line, if that proves it.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with open(path, "rb", buffering=0, opener=_follow_no_link) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if not _HEAD_BYTES <= size_bytes <= _HEAD_BYTES + _MOST_BYTES:
            return None
        data: Data
        if size_bytes >= _MAPPED_BYTES:
            data = memoryview(mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ))
        else:
            data = os.pread(file.fileno(), size_bytes, 0)
    head, body = _HEAD.fullmatch(data[:_HEAD_BYTES]), data[_HEAD_BYTES:]
    if head is None or hashlib.sha256(body).hexdigest().encode() != head[1]:
        return None
    return body


def _follow_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)

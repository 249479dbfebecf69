"""What lies in a cache directory, seen from outside: sizes, ages, who uses it.

Looks only; takes no lock, so that nobody is kept from a layer by somebody's curiosity, and
believes nothing for ever: any of it may be gone at the next look.

    DIR/layers/<digest>.<tag>/   a layer's files (`cache_file.py`, `kept.py`, `chunk_note.py`)
       /incoming/<name>/         what is not whole yet, or is being removed (`growing_file.py`)
       /documents/<name>         what says how layers are to be read (`documents.py`)
"""

import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError

NEW = ".new-"
"""How the names of documents begin that are not whole yet."""
_BLOCK_BYTES = 512
"""Unit of `st_blocks`: inode(7)."""
_MEMORY_NAME = "/memfd:lazyfs"
_GONE = " (deleted)"
"""How Linux names a file that has no name any more: proc_pid_fd(5)."""

_FORMATS = {
    "tar-256k": "tar",
    "gzip-spans": "gzip",
    "zstd-stream": "zstd",
    "zstd-chunked": "zstd:chunked",
    "zstd-seekable": "zstd:seekable",
    "stargz": "eStargz",
    "soci": "gzip+SOCI",
}
"""What people call a layout, by how its cache tag begins (`LayerIndex.cache_tag`)."""
_STREAMED = ("gzip-spans", "zstd-stream")
_OF_A_SOURCE = re.compile(r"-[0-9a-f]{16}$")


class Shelved(msgspec.Struct, frozen=True):
    """A layer of which the cache holds something."""

    home: Path
    digest: Digest
    tag: str
    """Names the layout and what proves its chunks, or the source that they came from."""
    disk_bytes: int
    """What it takes up on the disk."""
    content_bytes: int
    """How large its content is when all of it is here."""
    last_used_s: float
    """Seconds since the epoch."""

    @property
    def format_name(self) -> str:
        """What the layer is in its registry, as far as the tag tells; else the tag."""
        for prefix, name in _FORMATS.items():
            if self.tag == prefix or self.tag.startswith(prefix + "-"):
                return name
        return self.tag

    @property
    def chunks_proven(self) -> bool:
        """Whether only chunks are here that matched a digest of their own.

        Where nothing proves them the tag ends with a hash of the source they came from.
        """
        return _OF_A_SOURCE.search(self.tag) is None and not self.tag.startswith(_STREAMED)

    @property
    def is_plain_tar(self) -> bool:
        """Whether its content is its blob, byte for byte."""
        return self.format_name == "tar"


class Document(msgspec.Struct, frozen=True):
    """A document of which the cache has a copy."""

    path: Path
    digest: Digest
    """Of the manifest or the blob, or of the blob that it is a part of."""
    disk_bytes: int
    last_used_s: float
    """Seconds since the epoch."""


def documents(directory: Path) -> list[Document]:
    """List the documents in a cache directory, the least recently used first."""
    found = []
    for path in _entries(directory / "documents"):
        digest = _digest_of(path)
        with suppress(OSError):
            seen = path.lstat()
            if digest is not None and stat.S_ISREG(seen.st_mode):
                size_bytes = seen.st_blocks * _BLOCK_BYTES
                found.append(Document(path, digest, size_bytes, seen.st_mtime))
    return sorted(found, key=lambda each: (each.last_used_s, each.path.name))


def half_written(directory: Path) -> list[Path]:
    """List the documents that are being written, or that nobody will finish."""
    entries = _entries(directory / "documents")
    return [entry for entry in entries if entry.name.startswith(NEW)]


def shelved(directory: Path) -> list[Shelved]:
    """List the layers in a cache directory, the least recently used first."""
    found = []
    for home in _entries(directory / "layers"):
        layer = _look_at(home)
        if layer is not None:
            found.append(layer)
    return sorted(found, key=lambda layer: (layer.last_used_s, layer.home.name))


def unfinished(directory: Path) -> list[Path]:
    """List the directories of what is not whole yet, or is being removed."""
    return [entry for entry in _entries(directory / "incoming") if entry.is_dir()]


def torsos(directory: Path) -> list[Path]:
    """List directories of layers that have no content: of no use to anybody."""
    homes = [home for home in _entries(directory / "layers") if _digest_of(home) is not None]
    return [home for home in homes if home.is_dir() and not (home / "content").is_file()]


def _look_at(home: Path) -> Shelved | None:
    digest = _digest_of(home)
    try:
        content = (home / "content").lstat()
    except OSError:
        return None
    if digest is None or not stat.S_ISREG(content.st_mode):
        return None
    last_used_s = content.st_mtime
    with suppress(OSError):
        last_used_s = (home / "used").lstat().st_mtime
    tag = home.name.partition(".")[2]
    return Shelved(home, digest, tag, disk_bytes_of(home), content.st_size, last_used_s)


def _digest_of(home: Path) -> Digest | None:
    try:
        return Digest.parse(home.name.partition(".")[0].replace("-", ":", 1))
    except MalformedError:
        return None


# -- how much ------------------------------------------------------------------------------------


def used_bytes(directory: Path) -> int:
    """Return what a cache directory takes up, nameless files of this process included.

    Those have been removed while they were in use, or belong to layers that no digest names.
    """
    named = sum(
        disk_bytes_of(entry)
        for place in ("layers", "incoming")
        for entry in _entries(directory / place)
    )
    named += disk_bytes_of(directory / "documents")
    return named + _nameless_bytes(f"{directory.absolute()}/")


def memory_bytes() -> int:
    """Return how much content this process keeps in memory."""
    return _nameless_bytes(_MEMORY_NAME)


def disk_bytes_of(directory: Path) -> int:
    """Return what the files right in a directory take up, holes not counted."""
    total = 0
    for entry in _entries(directory):
        with suppress(OSError):
            total += entry.lstat().st_blocks * _BLOCK_BYTES
    return total


def _nameless_bytes(prefix: str) -> int:
    """Return what open files without a name take up whose name would begin with `prefix`."""
    sizes = {}
    for link in _entries(Path("/proc/self/fd")):
        with suppress(OSError):
            name = str(link.readlink())
            if name.startswith(prefix) and name.endswith(_GONE):
                file = link.stat()
                sizes[file.st_dev, file.st_ino] = file.st_blocks * _BLOCK_BYTES
    return sum(sizes.values())


# -- who uses it ---------------------------------------------------------------------------------


def holders() -> Mapping[tuple[int, int, int], frozenset[int]]:
    """Return who holds file locks (flock): process ids by major, minor and inode number.

    Only processes of this pid namespace are seen. Source: proc_locks(5).
    """
    found: dict[tuple[int, int, int], frozenset[int]] = {}
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) >= 6 and words[1] == "FLOCK":
                with suppress(ValueError):
                    major, minor, inode = words[5].split(":")
                    key = int(major, 16), int(minor, 16), int(inode)
                    found[key] = found.get(key, frozenset()) | {int(words[4])}
    return found


def users_of(
    directory: Path, held: Mapping[tuple[int, int, int], frozenset[int]]
) -> frozenset[int]:
    """Return the processes that use what is in a directory, as far as `holders` could see."""
    try:
        file = (directory / "content").lstat()
    except OSError:
        return frozenset()
    device = os.major(file.st_dev), os.minor(file.st_dev)
    users = held.get((*device, file.st_ino), frozenset())
    if users or device[0]:
        return users
    # btrfs and overlayfs give files another (anonymous) device than their locks.
    alike = [pids for key, pids in held.items() if key[0] == 0 and key[2] == file.st_ino]
    return frozenset().union(*alike)


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []

"""What is in a tar on this machine that holds images: where each file lies, from its headers.

Source: OCI image-spec, image-layout.md; containers/image, docker/internal/tarfile/reader.go
(symlinks: `docker save` wrote a layer that occurs twice once).
"""

import posixpath
import re
from collections.abc import Mapping

from lazyfs.ground.errors import MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import HEAD_BYTES, Entry, EntryType
from lazyfs.layers.tar import walk_tar
from lazyfs.transport.archives import read_range
from lazyfs.transport.blob import Blob

_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"BZh", "bzip2", "bunzip2"),
)
_MEMBERS_MOST = 100_000
_NAME_BYTES = 100
_FIRST_NAMES = re.compile(
    r"(?:\./)?(?:blobs/.*|oci-layout|index\.json|manifest\.json|repositories"
    r"|[0-9a-f]{64}(?:/.*|\.tar|\.json))",
    re.DOTALL,
)


def read_members(archive: Blob) -> Mapping[str, ByteRange]:
    """Return where the files of an image archive lie, by normalised name. Blocks: it reads.

    Raises:
        SourceError: it is compressed as a whole, or cannot be read.
        MalformedError: it is no tar.
    """
    head = read_range(archive, ByteRange(0, min(HEAD_BYTES, archive.size_bytes)))
    for magic, name, program in _COMPRESSED:
        if head.startswith(magic):
            raise SourceError(
                f"{archive.name} is compressed as a whole ({name}): nothing in it can be reached "
                f"without unpacking all that is before it. Unpack it once: {program} FILE"
            )
    entries: list[Entry] = []
    try:
        _walk(archive, entries, head)
    except MalformedError as error:
        raise MalformedError(f"{archive.name}: {error}") from None
    found: dict[str, ByteRange] = {}
    for entry in entries:
        if entry.type is EntryType.FILE:
            stop = entry.content_start + entry.size_bytes
            found[entry.path] = ByteRange(entry.content_start, stop)
    for entry in entries:
        if entry.type is EntryType.SYMLINK:
            target = posixpath.join(posixpath.dirname(entry.path), entry.symlink_target)
            meant = found.get(posixpath.normpath(target))
            if meant is not None:
                found.setdefault(entry.path, meant)
    return found


def scheme_of(archive: Blob) -> str | None:
    """Return what holds images here: `oci-archive`, `docker-archive`, or None for another file.

    Only an archive that begins as one of those do is looked through. Blocks: it reads.
    """
    head = read_range(archive, ByteRange(0, min(_NAME_BYTES, archive.size_bytes)))
    first = head.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if not _FIRST_NAMES.fullmatch(first):
        return None
    try:
        members = read_members(archive)
    except (MalformedError, SourceError):
        return None
    if "manifest.json" in members:
        return "docker-archive"
    return "oci-archive" if {"oci-layout", "index.json"} <= members.keys() else None


def _walk(archive: Blob, entries: list[Entry], head: bytes) -> None:
    walk = walk_tar(archive.size_bytes, entries, head=head)
    try:
        wanted = next(walk)
        while True:
            wanted = walk.send([read_range(archive, item) for item in wanted])
            if len(entries) > _MEMBERS_MOST:
                raise MalformedError(f"more than {_MEMBERS_MOST} files are in it")
    except StopIteration:
        return
    finally:
        walk.close()

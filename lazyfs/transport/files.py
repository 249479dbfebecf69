"""Blobs and images that are on this machine: a checkpoint archive, an OCI layout directory.

A file is read through the descriptor that was opened: replacing its name changes nothing, and
writing into it is noticed by size and modification time, looked at after every piece and before
the piece is handed on. (Two writes within one tick of the kernel's clock, 4 ms, look alike.)

In a layout every step is opened without following symlinks: what is named by a digest there
must lie there. Source: OCI image-spec, image-layout.md.
"""

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.place import Health
from lazyfs.transport.referrers import (
    fallback_tag,
    is_fallback_tag,
    parse_referrers,
    referring_as,
)
from lazyfs.transport.source import MANIFEST_LIMIT_BYTES, Manifest, ReferrerDescriptor, Referrers

_log = logging.getLogger(__name__)

_PIECE_BYTES = 256 * 1024
_REF_NAME = "org.opencontainers.image.ref.name"
_LISTED_MOST = 20
_REFERRERS_READ_MOST = 64
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not hold us up
_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    """Return what a written file does not keep, and what another file does not have.

    The latter because a descriptor's number is given anew once it is closed.
    """
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


class FileBlob:
    """A regular file. Safe in several threads at once."""

    def __init__(self, descriptor: int, *, name: str, size_bytes: int | None = None) -> None:
        """Take over `descriptor`. `size_bytes`: what was promised, if anybody did.

        Raises:
            SourceError: it is no regular file.
            IntegrityError: it is not as large as promised.
        """
        self._descriptor = descriptor
        self._name = name
        self._opened_as = _identity(descriptor)
        wrong: SourceError | IntegrityError | None = None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            wrong = SourceError(f"{name} is not a regular file")
        elif size_bytes not in (None, self.size_bytes):
            wrong = IntegrityError(
                f"{name} has {self.size_bytes} bytes, though {size_bytes} were promised"
            )
        if wrong is not None:
            os.close(descriptor)
            raise wrong
        self._closed = False

    @property
    def name(self) -> str:
        """Its path, or what a person calls it."""
        return self._name

    @property
    def size_bytes(self) -> int:
        """Its size when it was opened."""
        return self._opened_as[0]

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver the bytes of `byte_range`. See `Blob.read_into`.

        Raises:
            IntegrityError: the file was written to since it was opened.
        """
        at, stop = byte_range
        if not 0 <= at <= stop <= self.size_bytes:
            raise SourceError(f"{self._name} has {self.size_bytes} bytes; asked for {byte_range}")
        while at < stop:
            piece = self._read(min(_PIECE_BYTES, stop - at), at)
            at += len(piece)
            with memoryview(piece) as view:
                taken = 0
                while taken < len(view):
                    room = sink.space()
                    count = min(len(room), len(view) - taken)
                    room[:count] = view[taken : taken + count]
                    sink.advance(count)
                    taken += count

    def close(self) -> None:
        """Close the file; a read under way fails."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)

    def _read(self, size_bytes: int, at: int) -> bytes:
        if self._closed:
            raise SourceError(f"{self._name} has been closed")
        try:
            piece = os.pread(self._descriptor, size_bytes, at)
            same = _identity(self._descriptor) == self._opened_as
        except OSError as error:
            raise SourceError(f"{self._name} cannot be read: {error.strerror}") from error
        if not same or not piece:
            raise IntegrityError(
                f"{self._name} was written to since it was opened; mount it anew when it is whole"
            )
        return piece


def open_file(path: Path) -> FileBlob:
    """Open a checkpoint archive.

    Raises:
        SourceError: it cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, _FILE)
    except OSError as error:
        raise SourceError(f"{path} cannot be opened: {error.strerror}") from error
    return FileBlob(descriptor, name=str(path))


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None

    @property
    def tag(self) -> str | None:
        return (self.annotations or {}).get(_REF_NAME)

    @property
    def is_aside(self) -> bool:
        """Whether nobody who names no image can mean it: an unnamed artifact, a referrers list."""
        return bool(self.artifact_type) if self.tag is None else is_fallback_tag(self.tag)


class _Index(msgspec.Struct, frozen=True, rename="camel"):
    manifests: list[_Descriptor]


class LayoutSource:
    """See `ImageSource`: the images of one OCI layout directory."""

    def __init__(self, directory: Path, *, counters: Counters) -> None:
        """Open the directory.

        Raises:
            SourceError: it is no OCI layout.
        """
        self._path = directory
        self._counters = counters
        self._blobs: list[Blob] = []
        try:
            self._root = os.open(directory, _DIRECTORY)
        except OSError as error:
            raise SourceError(f"{directory} cannot be opened: {error.strerror}") from error
        try:
            self._read("oci-layout")
        except SourceError as error:
            self.close()
            raise SourceError(f"{directory} is not an OCI layout: {error}") from None

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"oci:{self._path}"

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest with this tag or digest, or the only one. See `ImageSource`."""
        descriptor = self._choose(reference)
        digest = Digest.parse(descriptor.digest)
        if descriptor.size > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{self.name}@{digest}: {descriptor.size} bytes of manifest")
        data = self._read("blobs", digest.algorithm, digest.hex)
        digest.check(data, f"{self.name}@{digest}")
        annotations: Mapping[str, str] = descriptor.annotations or {}
        return Manifest(data, descriptor.media_type, digest, annotations)

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. See `ImageSource.blob`.

        Raises:
            SourceError: there is none.
            IntegrityError: it is not as large as promised.
        """
        descriptor = self._open("blobs", digest.algorithm, digest.hex)
        blob = FileBlob(descriptor, name=f"{self.name}@{digest}", size_bytes=size_bytes)
        self._blobs.append(blob)
        return blob

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole. See `ImageSource.read_blob`."""
        what = f"{self.name}@{digest}"
        if size_bytes > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{what} is said to have {size_bytes} bytes: too many to be read")
        data = self._read("blobs", digest.algorithm, digest.hex)
        digest.check(data, what)
        return data

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        """Return what refers to the manifest: what `index.json` lists, or the fallback tag.

        See `ImageSource.referrers`. Only so many manifests are read; blobs that nothing lists are
        not looked at.
        """
        tag = fallback_tag(digest)
        found: dict[Digest, ReferrerDescriptor] = {}
        try:
            listed = [
                each
                for each in self._index_entries()
                if each.tag == tag or each.artifact_type in (None, "", *artifact_types)
            ]
        except LazyfsError as error:
            _log.info("%s: its referrers are taken to be none: %s", self.name, error)
            return Referrers(is_known=False)
        listed.sort(key=lambda each: each.tag != tag and each.artifact_type not in artifact_types)
        for each in listed[:_REFERRERS_READ_MOST]:
            try:
                item = Digest.parse(each.digest)
                data = self.read_blob(item, each.size)
                if each.tag == tag:
                    others = parse_referrers(data, *artifact_types)
                    found |= {other.digest: other for other in others}
                elif (kind := referring_as(data, digest)) in artifact_types:
                    annotations: Mapping[str, str] = each.annotations or {}
                    found[item] = ReferrerDescriptor(
                        item, each.media_type, each.size, kind, annotations
                    )
            except LazyfsError as error:
                _log.info("%s: %s is taken to be no referrer: %s", self.name, each.digest, error)
        return Referrers(found.values())

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        """Return what a referrer offers. See `ImageSource.read_offer`."""
        return self.read_blob(digest, size_bytes)

    @property
    def is_settled(self) -> bool:
        """Yes. See `ImageSource.is_settled`."""
        return True

    def healths(self) -> Sequence[Health]:
        """Return nothing: there is no place but this machine. See `ImageSource.healths`."""
        return ()

    def close(self) -> None:
        """Close the directory and the blobs it gave."""
        for blob in self._blobs:
            blob.close()
        self._blobs.clear()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _index_entries(self) -> list[_Descriptor]:
        try:
            return msgspec.json.decode(self._read("index.json"), type=_Index).manifests
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedError(f"{self._path}/index.json: {error}") from None

    def _choose(self, reference: str | None) -> _Descriptor:
        manifests = listed = self._index_entries()
        if reference is not None and ":" in reference and _is_digest(reference):
            found = [each for each in listed if each.digest == reference]
            return found[0] if found else _Descriptor(digest=reference, size=0)
        if reference is not None:
            listed = [each for each in listed if each.tag == reference]
        else:
            # What refers to an image lies beside it, where it was copied along.
            listed = [each for each in listed if not each.is_aside] or listed
        if len({each.digest for each in listed}) == 1:
            return listed[0]
        tags = sorted({each.tag for each in manifests if each.tag is not None})
        shown = ", ".join(tags[:_LISTED_MOST]) + (", …" if len(tags) > _LISTED_MOST else "")
        having = f"it has {shown}" if tags else f"it has {len(manifests)} without tags"
        if reference is None:
            wrong = "there is no image in it" if not listed else f"which image? {having}"
        elif listed:
            wrong = f"{reference!r} names several images"
        else:
            wrong = f"no image is called {reference!r} there; {having}"
        raise SourceError(f"{self.name}: {wrong}")

    def _read(self, *names: str) -> bytes:
        descriptor = self._open(*names)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MANIFEST_LIMIT_BYTES + 1)
        if len(data) > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{'/'.join((str(self._path), *names))} is too large to be read")
        self._counters.requests += 1
        self._counters.bytes_fetched += len(data)
        return data

    def _open(self, *names: str) -> int:
        """Open a regular file below the directory, no step of the way being a symlink."""
        what = "/".join((str(self._path), *names))
        if self._root < 0:
            raise SourceError(f"{self.name} has been closed")
        at = self._root
        try:
            for name in names[:-1]:
                step = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                if at != self._root:
                    os.close(at)
                at = step
            descriptor = os.open(names[-1], _FILE | os.O_NOFOLLOW, dir_fd=at)
        except OSError as error:
            raise SourceError(
                f"{what} cannot be opened (symlinks are not followed): {error.strerror}"
            ) from error
        finally:
            if at != self._root:
                os.close(at)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise SourceError(f"{what} is not a regular file")
        return descriptor


def _is_digest(text: str) -> bool:
    try:
        Digest.parse(text)
    except MalformedError:
        return False
    return True

"""Writes an OCI layout: a directory that others may read and write at the same time.

A file comes to be by a rename, whole; the index is replaced under a lock on the directory, so that
of two writers none loses the other's entry. What is there under its digest already is left as it
is. Blocks throughout.

Source: OCI image-spec, image-layout.md; annotations.md (`org.opencontainers.image.ref.name`).
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError
from lazyfs.transport.referrers import INDEX_TYPE, entries_of, is_replaced, referring_as

_REF_NAME = "org.opencontainers.image.ref.name"
_LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
_INDEX_MOST_BYTES = 4 * 1024 * 1024
_PIECE_BYTES = 1024 * 1024
_NEW = ".new-"


class LayoutTarget:
    """An OCI layout directory, made if it is not there. See `Target`."""

    def __init__(self, directory: Path, *, name: str | None = None) -> None:
        """Make the directory.

        Raises:
            LazyfsError: it cannot be made, or is something else than a layout.
        """
        self._directory = directory
        self._name = name or f"oci:{directory}"
        with _told(self._name):
            directory.mkdir(parents=True, exist_ok=True)
            marker = directory / "oci-layout"
            if not marker.exists():
                with self._lock():
                    self._begin(marker)

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self._name

    def put_blob(self, digest: Digest, size_bytes: int, open_blob: Callable[[], BinaryIO]) -> None:
        """See `Target.put_blob`."""
        with _told(self._name):
            path = self._path(digest)
            if _is_there(path, digest, size_bytes):
                return
            with open_blob() as source, _replacing(path) as file:
                if _copy(source, digest, file) != digest.hex:
                    raise IntegrityError(f"{self._name}: what was to be written is not {digest}")

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> Digest:
        """See `Target.put_manifest`; without a tag it is a blob that something else names."""
        digest = Digest.of(data)
        descriptor: dict[str, Any] = {
            "mediaType": media_type,
            "digest": str(digest),
            "size": len(data),
        }
        with _told(self._name):
            _replace(self._path(digest), data)
            if tag is not None:
                if tag:
                    descriptor["annotations"] = {_REF_NAME: tag}
                with self._lock():
                    self._enter(descriptor, tag)
        return digest

    def attach(
        self, data: bytes, subject: Digest, entry: Mapping[str, Any], key: str
    ) -> Literal["api", "tag", "index"]:
        """See `Target.attach`: as others write layouts, `index.json` lists what has a subject."""
        with _told(self._name):
            _replace(self._path(Digest.of(data)), data)
            with self._lock():
                index, entries = self._index()
                index["manifests"] = [
                    each for each in entries if not self._gives_way(each, subject, entry, key)
                ] + [dict(entry)]
                _replace(self._directory / "index.json", json.dumps(index).encode())
        return "index"

    def close(self) -> None:
        """Do nothing: all is written."""

    def _gives_way(
        self, old: Mapping[str, Any], subject: Digest, entry: Mapping[str, Any], key: str
    ) -> bool:
        """Whether `entry` takes the place of what the index lists, of the same image."""
        if not is_replaced(old, entry, key):
            return False
        try:
            path = self._path(Digest.parse(str(old.get("digest"))))
            with path.open("rb") as file:
                return bool(referring_as(file.read(_INDEX_MOST_BYTES), subject))
        except (MalformedError, FileNotFoundError):
            return False

    def _begin(self, marker: Path) -> None:
        """Make a layout of the directory, if nobody has meanwhile."""
        if marker.exists():
            return
        if any(not each.name.startswith(_NEW) for each in self._directory.iterdir()):
            raise LazyfsError(f"{self._name} is a directory with something else in it")
        _replace(marker, _LAYOUT_FILE)

    def _path(self, digest: Digest) -> Path:
        path = self._directory / "blobs" / digest.algorithm / digest.hex
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _enter(self, descriptor: dict[str, Any], tag: str) -> None:
        """Put a descriptor into the index in place of what had its tag."""
        index, entries = self._index()
        same = [each for each in entries if _tag_of(each) == tag]
        if not tag:
            same = [each for each in same if each.get("digest") == descriptor["digest"]]
        index["manifests"] = [each for each in entries if each not in same] + [descriptor]
        _replace(self._directory / "index.json", json.dumps(index).encode())

    def _index(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the index, and the descriptors in it.

        Raises:
            MalformedError: it is none.
        """
        path = self._directory / "index.json"
        index: Any = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
        if path.exists():
            if path.stat().st_size > _INDEX_MOST_BYTES:
                raise MalformedError(f"{path} is larger than {_INDEX_MOST_BYTES} bytes")
            try:
                index = json.loads(path.read_bytes())
            except (ValueError, RecursionError):
                index = None
        entries = entries_of(index)
        if entries is None:
            raise MalformedError(f"{path} is no index of an OCI layout")
        return index, entries

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def archive_target(path: Path) -> Iterator[LayoutTarget]:
    """Give a layout that becomes an archive at `path` when the block ends well.

    Raises:
        LazyfsError: it cannot be written.
    """
    name = f"oci-archive:{path}"
    with _told(name):
        room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield LayoutTarget(room / "layout", name=name)
        with _told(name), _replacing(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for child in sorted((room / "layout").iterdir()):
                archive.add(child, arcname=child.name, filter=_nameless)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _nameless(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without who wrote it and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _is_there(path: Path, digest: Digest, size_bytes: int) -> bool:
    try:
        with path.open("rb") as file:
            return (
                os.fstat(file.fileno()).st_size == size_bytes and _copy(file, digest) == digest.hex
            )
    except FileNotFoundError:
        return False


def _copy(source: BinaryIO, digest: Digest, file: BinaryIO | None = None) -> str:
    """Return the hash of a file, copied on the way."""
    hasher = digest.hasher()
    while piece := source.read(_PIECE_BYTES):
        hasher.update(piece)
        if file is not None:
            file.write(piece)
    return hasher.hexdigest()


def _tag_of(entry: dict[str, Any]) -> str:
    annotations = entry.get("annotations")
    return str(annotations.get(_REF_NAME, "")) if isinstance(annotations, dict) else ""


def _replace(path: Path, data: bytes) -> None:
    with _replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file that takes the place of `path`, whole and on the disk, when the block ends.

    Who may read it is the umask's to decide.
    """
    new = path.with_name(f"{_NEW}{secrets.token_hex(8)}")
    with new.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            new.rename(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LazyfsError(f"{name} cannot be written: {error.strerror or error}") from error

"""Directories on this machine: an image as skopeo copies it to `dir:`, an unpacked checkpoint.

An unpacked checkpoint is served as the tar that it might come from: headers are made of what the
directory says, and are all that is kept in memory; a file's bytes come from the file. So it is a
layer like any other. What changes while it is mounted is an error, as of any file.

No step of any way is opened through a symlink: they are shown as what they are.

Source: containers/image, directory/directory_transport.go; GNU tar manual, "Basic Tar Format".
"""

import os
import stat
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.files import FileBlob
from lazyfs.transport.place import Health
from lazyfs.transport.source import MANIFEST_LIMIT_BYTES, Manifest, Referrers

_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
_DIRECTORY = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY
_ENTRIES_MOST = 200_000
"""Each costs some 600 bytes of memory. A checkpoint has hundreds, a container's files thousands."""
_MANIFEST = "manifest.json"
_END_BYTES = 1024
_BLOCK_BYTES = tarfile.BLOCKSIZE


def open_directory(path: Path) -> int:
    """Return a descriptor of a directory.

    Raises:
        SourceError: it cannot be opened, or is none.
    """
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        raise SourceError(f"{path} cannot be opened: {error.strerror}") from error


def holds_image(path: Path) -> bool:
    """Whether a directory is one of skopeo's: such have their manifest on top."""
    return (path / _MANIFEST).is_file()


class DirectorySource:
    """See `ImageSource`: the one image, or the one index with its images, of a `dir:`."""

    def __init__(self, directory: Path, *, counters: Counters) -> None:
        """Open the directory.

        Raises:
            SourceError: it cannot be opened.
        """
        self._path = directory
        self._counters = counters
        self._blobs: list[Blob] = []
        self._root = open_directory(directory)

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"dir:{self._path}"

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest on top, or the one with this digest. See `ImageSource`."""
        data = self._read(_MANIFEST)
        digest = Digest.of(data)
        if reference in (None, str(digest)):
            return Manifest(data, "", digest)
        wanted = Digest.parse(reference or "")
        if wanted == Digest(wanted.algorithm, _hex_of(data, wanted)):
            return Manifest(data, "", wanted)
        data = self._read(f"{wanted.hex}.{_MANIFEST}")
        wanted.check(data, f"{self.name}@{wanted}")
        return Manifest(data, "", wanted)

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. See `ImageSource.blob`.

        Raises:
            SourceError: there is none.
            IntegrityError: it is not as large as promised.
        """
        descriptor = self._open(digest.hex)
        blob = FileBlob(descriptor, name=f"{self.name}@{digest}", size_bytes=size_bytes)
        self._blobs.append(blob)
        return blob

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole. See `ImageSource.read_blob`."""
        what = f"{self.name}@{digest}"
        if size_bytes > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{what} is said to have {size_bytes} bytes: too many to be read")
        data = self._read(digest.hex)
        digest.check(data, what)
        return data

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        """Return nothing: skopeo copies one image, and not what refers to it."""
        return Referrers()

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

    def _open(self, name: str) -> int:
        if self._root < 0:
            raise SourceError(f"{self.name} has been closed")
        try:
            return os.open(name, _FILE, dir_fd=self._root)
        except OSError as error:
            raise SourceError(
                f"{self._path / name} cannot be opened (symlinks are not followed): "
                f"{error.strerror}"
            ) from error

    def _read(self, name: str) -> bytes:
        try:
            with os.fdopen(self._open(name), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise SourceError(f"{self._path / name} is not a regular file")
                data = file.read(MANIFEST_LIMIT_BYTES + 1)
        except OSError as error:
            raise SourceError(f"{self._path / name} cannot be read: {error.strerror}") from error
        if len(data) > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{self._path / name} is too large to be read")
        self._counters.requests += 1
        self._counters.bytes_fetched += len(data)
        return data


def _hex_of(data: bytes, like: Digest) -> str:
    hasher = like.hasher()
    hasher.update(data)
    return hasher.hexdigest()


class _File(msgspec.Struct, frozen=True):
    """A file of an unpacked checkpoint as it was when it was found."""

    path: str
    size_bytes: int
    identity: tuple[int, int, int]


class UnpackedDirectory:
    """A directory as the blob of a tar that it would make. Safe in several threads at once."""

    def __init__(self, directory: Path) -> None:
        """Look through the directory; its files are opened only as they are read.

        Raises:
            SourceError: it cannot be looked through.
            MalformedError: there is too much in it.
        """
        self._path = directory
        self._root = open_directory(directory)
        self._starts: list[int] = []
        self._pieces: list[bytes | _File] = []
        self._size_bytes = 0
        try:
            self._lay_out()
        except OSError as error:
            self.close()
            where = error.filename or ""
            raise SourceError(f"{directory}/{where} cannot be read: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Its path."""
        return str(self._path)

    @property
    def size_bytes(self) -> int:
        """Of the tar."""
        return self._size_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver the bytes of `byte_range`. See `Blob.read_into`.

        Raises:
            IntegrityError: a file was written to since it was found, or replaced.
        """
        at, stop = byte_range
        if not 0 <= at <= stop <= self._size_bytes:
            raise SourceError(f"{self.name} makes {self._size_bytes} bytes; asked for {byte_range}")
        while at < stop:
            index = bisect_right(self._starts, at) - 1
            piece, start = self._pieces[index], self._starts[index]
            size = len(piece) if isinstance(piece, bytes) else piece.size_bytes
            within = ByteRange(at - start, min(stop - start, size))
            if isinstance(piece, bytes):
                _give(piece[within.start : within.stop], sink)
            else:
                self._give_file(piece, within, sink)
            at += within.size_bytes

    def close(self) -> None:
        """Close the directory; a read under way fails."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _lay_out(self) -> None:
        headers = bytearray()
        for count, (path, status, target) in enumerate(_walk(self._root)):
            if count >= _ENTRIES_MOST:
                raise MalformedError(f"{self.name} holds more than {_ENTRIES_MOST} files")
            headers += _header(path, status, target)
            if stat.S_ISREG(status.st_mode) and status.st_size:
                self._append(bytes(headers))
                self._append(_File(path, status.st_size, _identity(status)))
                headers = bytearray(-status.st_size % _BLOCK_BYTES)
        self._append(bytes(headers) + bytes(_END_BYTES))

    def _append(self, piece: bytes | _File) -> None:
        self._starts.append(self._size_bytes)
        self._pieces.append(piece)
        self._size_bytes += len(piece) if isinstance(piece, bytes) else piece.size_bytes

    def _give_file(self, file: _File, byte_range: ByteRange, sink: Sink) -> None:
        what = f"{self.name}/{file.path}"
        if self._root < 0:
            raise SourceError(f"{self.name} has been closed")
        try:
            descriptor = _open_below(self._root, file.path)
        except OSError as error:
            raise SourceError(f"{what} cannot be opened: {error.strerror}") from error
        changed = _identity(os.fstat(descriptor)) != file.identity
        blob = FileBlob(descriptor, name=what)
        try:
            if changed or blob.size_bytes != file.size_bytes:
                raise IntegrityError(
                    f"{what} was written to or replaced since it was found; mount it anew when it "
                    "is whole"
                )
            blob.read_into(byte_range, sink)
        finally:
            blob.close()


def _walk(root: int) -> Iterator[tuple[str, os.stat_result, str]]:
    """Yield all that is below a directory, parents first: path, status, a symlink's target."""
    ahead = [""]
    while ahead:
        directory = ahead.pop()
        descriptor = _open_below(root, directory, _DIRECTORY) if directory else os.dup(root)
        try:
            with os.scandir(descriptor) as found:
                names = sorted(entry.name for entry in found)
            below = []
            for name in names:
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                is_link = stat.S_ISLNK(status.st_mode)
                target = os.readlink(name, dir_fd=descriptor) if is_link else ""
                path = f"{directory}/{name}" if directory else name
                yield path, status, target
                if stat.S_ISDIR(status.st_mode):
                    below.append(path)
            ahead += reversed(below)
        finally:
            os.close(descriptor)


def _open_below(root: int, path: str, flags: int = _FILE) -> int:
    """Open `path` below a directory, no step of the way being a symlink.

    Raises:
        OSError: it is not there, or a step is no directory.
    """
    *steps, last = path.split("/")
    at = root
    try:
        for name in steps:
            step = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            if at != root:
                os.close(at)
            at = step
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=at)
    finally:
        if at != root:
            os.close(at)


_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def _header(path: str, status: os.stat_result, target: str) -> bytes:
    """Return the tar header of what was found; nothing for what a tar cannot hold: a socket."""
    kind = _TYPES.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return b""
    info = tarfile.TarInfo(path)
    info.type, info.linkname = kind, target
    info.size = status.st_size if kind == tarfile.REGTYPE else 0
    info.mode = stat.S_IMODE(status.st_mode)
    info.uid, info.gid = status.st_uid, status.st_gid
    info.mtime = status.st_mtime_ns // 10**9
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_dev, status.st_ino


def _give(data: bytes, sink: Sink) -> None:
    with memoryview(data) as view:
        taken = 0
        while taken < len(view):
            room = sink.space()
            count = min(len(room), len(view) - taken)
            room[:count] = view[taken : taken + count]
            sink.advance(count)
            taken += count

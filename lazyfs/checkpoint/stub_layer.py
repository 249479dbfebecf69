"""One layer of a stub: the same entries, byte for byte, but for memory; and the marker.

In the place of each pages file is a symbolic link that leads to itself. CRIU takes a pages file
that is not there for an empty one, and ignores what then fails when it reads shared memory: a
process would come up with zeros there. A name that cannot be followed (ELOOP) ends the restore,
whatever kind of memory it is, whoever opens it.

Sans-I/O but for the file that is written to. Sources: CRIU 4.1.1 and 4.2, criu/image.c
(`do_open_image`: ENOENT alone means empty), criu/shmem.c (`do_restore_shmem_content`); pax(1p) and
tar(5) (`SCHILY.xattr`) for what a header holds.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import BinaryIO, Literal

import msgspec
import trio
from msgspec.structs import replace

from lazyfs.checkpoint.criu import is_pages, link_for_left_out
from lazyfs.content.model import Reader
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, UnsupportedLayer
from lazyfs.layers.model import Entry, EntryType
from lazyfs.layers.names import decode_name

_STEP_BYTES = 1 << 20
_SMALL_BYTES = 1 << 16
_LEVEL = 6
_GZIP = 31
"""zlib's word for a gzip stream; it notes no time and no name, so the same gives the same."""
_TYPES = {
    EntryType.FILE: tarfile.REGTYPE,
    EntryType.DIRECTORY: tarfile.DIRTYPE,
    EntryType.SYMLINK: tarfile.SYMTYPE,
    EntryType.FIFO: tarfile.FIFOTYPE,
}


class Plan(msgspec.Struct, frozen=True):
    """What becomes of one layer's entries."""

    entries: Sequence[Entry]
    directories: Collection[str]
    """Images directories, by their paths in the layer: their pages files are left out."""
    marker_before: str | None = None
    """Path of the entry before which the marker goes, into the same directory; None: nowhere."""
    marker: bytes = b""
    marker_name: str = ""

    def leaves_out(self, entry: Entry) -> bool:
        """Whether an entry is memory."""
        directory, _slash, name = entry.path.rpartition("/")
        return entry.type is EntryType.FILE and is_pages(name) and directory in self.directories

    @property
    def changes(self) -> bool:
        """Whether the layer has to be written anew."""
        return self.marker_before is not None or any(map(self.leaves_out, self.entries))


class Written(msgspec.Struct, frozen=True):
    """A layer that was written."""

    digest: Digest
    size_bytes: int
    diff_id: Digest
    """Digest of the tar, uncompressed."""


async def write_layer(
    plan: Plan,
    read: Callable[[Entry], Reader],
    file: BinaryIO,
    compression: Literal["gzip", "none"],
) -> Written:
    """Write a layer to `file`. The same plan gives the same bytes. `read` gives a file's bytes.

    Raises:
        UnsupportedLayer: it holds a device, of which only the name is known here, or an odd name.
        IntegrityError, FetchError, SourceError: it cannot be read.
        LazyfsError: there is no room for it.
    """
    blob = _Hashed(file.write)
    packer = zlib.compressobj(_LEVEL, wbits=_GZIP) if compression == "gzip" else None

    def pack(data: Data) -> None:
        blob.write(data if packer is None else packer.compress(data))

    tar = _Hashed(pack)
    written: set[str] = set()
    for entry in plan.entries:
        if entry.path == plan.marker_before:
            info = _info(replace(entry, path=_beside(entry.path, plan.marker_name), mode=0o644))
            info.size = len(plan.marker)
            await _write(tar, _header(info) + plan.marker + _padding(info.size))
        if plan.leaves_out(entry):
            await _write(tar, _header(_link_in_place_of(entry)))
        else:
            await _copy(tar, entry, read, written)
            written.add(entry.path)
    end = 2 * tarfile.BLOCKSIZE
    await _write(tar, bytes(end + -(tar.size_bytes + end) % tarfile.RECORDSIZE))
    if packer is not None:
        await _write(blob, packer.flush())
    return Written(blob.digest, blob.size_bytes, tar.digest)


class _Hashed:
    """Passes on what is written, counted and hashed."""

    def __init__(self, write: Callable[[Data], object]) -> None:
        self._write = write
        self._hasher = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Data) -> None:
        self._write(data)
        self._hasher.update(data)
        self.size_bytes += len(data)

    @property
    def digest(self) -> Digest:
        return Digest("sha256", self._hasher.hexdigest())


async def _write(out: _Hashed, data: Data) -> None:
    try:
        if len(data) < _SMALL_BYTES:
            out.write(data)
            await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(out.write, data)
    except OSError as error:
        raise LazyfsError(f"a layer of the stub cannot be written: {error.strerror}") from error


async def _copy(
    out: _Hashed, entry: Entry, read: Callable[[Entry], Reader], written: Collection[str]
) -> None:
    info = _info(entry)
    if entry.link_of and entry.link_of in written:
        info.type, info.linkname = tarfile.LNKTYPE, entry.link_of
        await _write(out, _header(info))
        return
    if entry.type is not EntryType.FILE:
        await _write(out, _header(info))
        return
    info.size = entry.size_bytes
    await _write(out, _header(info))
    reader = read(entry)
    for offset in range(0, entry.size_bytes, _STEP_BYTES):
        await _write(out, await reader.read(offset, _STEP_BYTES))
    await _write(out, _padding(entry.size_bytes))


def _info(entry: Entry) -> tarfile.TarInfo:
    """Return an entry's header, without a size.

    Raises:
        UnsupportedLayer: it is a device or a socket.
    """
    kind = _TYPES.get(entry.type)
    if kind is None:
        raise UnsupportedLayer(
            f"{entry.path!r} is a device, a socket or a whiteout: no stub can be made of its layer"
        )
    info = tarfile.TarInfo(entry.path or "./")
    info.type, info.linkname, info.mode = kind, entry.symlink_target, entry.mode
    info.uid, info.gid = entry.uid, entry.gid
    seconds, rest_ns = divmod(entry.mtime_ns, 10**9)
    info.mtime = seconds
    headers = {f"SCHILY.xattr.{name}": decode_name(value) for name, value in entry.xattrs}
    if rest_ns and seconds >= 0:
        headers["mtime"] = f"{seconds}.{rest_ns:09d}"
    info.pax_headers = headers
    return info


def _link_in_place_of(entry: Entry) -> tarfile.TarInfo:
    name = entry.path.rpartition("/")[2]
    target = link_for_left_out(name)
    link = replace(entry, type=EntryType.SYMLINK, mode=0o777, symlink_target=target, xattrs=())
    return _info(link)


def _header(info: tarfile.TarInfo) -> bytes:
    try:
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UnsupportedLayer(
            f"{info.name!r} has an extended attribute whose name is not UTF-8: no stub can be made "
            "of its layer"
        ) from None


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % tarfile.BLOCKSIZE)


def _beside(path: str, name: str) -> str:
    directory, slash, _name = path.rpartition("/")
    return f"{directory}{slash}{name}"

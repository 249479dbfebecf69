"""A view of a checkpoint as a FUSE filesystem; the only importer of pyfuse3.

It adapts and decides nothing: names and attributes are the view's, bytes are the readers'. Every
operation stands behind a guard, since an exception that escapes a pyfuse3 handler ends the whole
mount. What has been told does not change during a mount, so everything may be cached by the kernel
for good: attributes, names, names that are not there (CRIU probes dozens), and pages. Only the
number of links may change, of a directory and of a container's files, while names are coming.
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    StatvfsData,
    XAttrNameT,
)

from lazyfs.activity import Activity
from lazyfs.checkpoint.overlay import OPAQUE_XATTRS
from lazyfs.checkpoint.tree import Node, path_of
from lazyfs.checkpoint.view import View
from lazyfs.content.model import Reader
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.layers.model import EntryType
from lazyfs.layers.names import decode_name, encode_name
from lazyfs.mountpoint import FUSE_SUBTYPE

log = logging.getLogger(__name__)

STATUS_XATTR = "user.lazyfs.status"
"""Extended attribute of the mount's root: its state as JSON. Not listed, so no copy takes it."""
PID_XATTR = "user.lazyfs.pid"
"""The daemon's process id, for whoever unmounts and waits for its end."""

_FOREVER_S = 10 * 365 * 86400.0
_BLOCK_BYTES = 4096
_SAY_AGAIN_S = 60.0
"""A program that reads on and on after an error must not fill the log's disk with it."""
_TASKS_MOST = 512
"""Requests handled at once; beyond the kernel's background limit, so demand always finds one."""
_KINDS = {
    EntryType.FILE: stat.S_IFREG,
    EntryType.DIRECTORY: stat.S_IFDIR,
    EntryType.SYMLINK: stat.S_IFLNK,
    EntryType.FIFO: stat.S_IFIFO,
    EntryType.WHITEOUT: stat.S_IFCHR,
}
"""A whiteout is a character device 0/0: overlayfs.rst, "whiteouts and opaque directories"."""
_READABLE = 0o444
_SEARCHABLE = 0o555

P = ParamSpec("P")
R = TypeVar("R")


def _guarded(
    operation: Callable[Concatenate["CheckpointOperations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["CheckpointOperations", P], Coroutine[Any, Any, R]]:
    @wraps(operation)
    async def guarded(self: "CheckpointOperations", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await operation(self, *args, **kwargs)
        except FUSEError:
            raise
        except LazyfsError as error:
            self.note_failure(operation.__name__, error)
            raise FUSEError(error.errno) from None
        except Exception as error:  # a bug must not end the mount
            self.note_failure(operation.__name__, error)
            log.exception("%s failed: please report this", operation.__name__)
            raise FUSEError(errno.EIO) from None

    return guarded


class CheckpointOperations(pyfuse3.Operations):
    """The operations of one read-only mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        view: View,
        open_reader: Callable[[Node], Reader],
        counters: Counters,
        activity: Activity,
        status: Callable[[], bytes],
    ) -> None:
        """`status` gives what `STATUS_XATTR` shows: JSON of at most 64 KiB."""
        super().__init__()
        self._view = view
        self._open_reader = open_reader
        self._counters = counters
        self._activity = activity
        self._status = status
        self._is_root = os.geteuid() == 0
        self.on_open: Callable[[Node, int], bool] = lambda node, pid: False
        """Told of each file that is opened, and by which process (0 if that is not seen here).
        Says whether it will be read once, in large pieces."""
        self.begun = trio.Event()
        """Set when the kernel and we have agreed on how to talk."""
        self._readers: dict[int, Reader] = {}
        self._next_handle = 1
        self._failure, self._failure_at_s = "", 0.0
        self._listings: dict[int, Sequence[tuple[bytes, int]]] = {}
        self._absent = EntryAttributes()
        self._absent.st_ino = InodeT(0)
        self._absent.entry_timeout = _FOREVER_S

    def note_failure(self, operation: str, error: Exception) -> None:
        """Count a request that is answered with an error, and log it; repetitions now and then."""
        self._counters.failed_reads += 1
        text = f"{operation} answered with an error: {error}"
        self._activity.failed(text)
        now_s = time.monotonic()
        if text != self._failure or now_s - self._failure_at_s >= _SAY_AGAIN_S:
            self._failure, self._failure_at_s = text, now_s
            log.error("%s", text)

    def note_undelivered(self, operation: str) -> None:
        """Note that the kernel did not take an answer; it has told the reader EIO itself.

        It copies a read's bytes out of the cache file's mapping: a disk that cannot give back what
        it had, or a file that somebody cut, is seen there and nowhere else.
        """
        text = "the cache's file does not give back what was stored in it; see to its disk"
        self.note_failure(operation, LazyfsError(text))

    def init(self) -> None:
        """The kernel's first message has been answered."""
        self.begun.set()

    # -- names ------------------------------------------------------------------------------

    @_guarded
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Find a name; one that is not there is remembered as absent (inode 0)."""
        inode = await self._view.lookup(parent_inode, decode_name(name))
        return self._absent if inode is None else self._attributes(inode)

    @_guarded
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Attributes as archived; a checkpoint's files readable by all whom the mount lets in."""
        return self._attributes(inode)

    @_guarded
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """A link's target, as archived."""
        return FileNameT(encode_name(self._view.node(inode).symlink_target))

    @_guarded
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """The handle of a directory is its inode."""
        self._activity.open_directories += 1
        return FileHandleT(inode)

    @_guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List a directory from its `start_id`th name on."""
        listing = self._listings.get(fh)
        if listing is None:
            listing = [(encode_name(name), inode) for name, inode in await self._view.listing(fh)]
            self._listings[fh] = listing
        for position in range(start_id, len(listing)):
            name, inode = listing[position]
            attributes = self._attributes(inode)
            if not pyfuse3.readdir_reply(token, FileNameT(name), attributes, position + 1):
                return

    @_guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        """Listings are kept: they are small and cannot change."""
        self._activity.open_directories -= 1

    # -- bytes ------------------------------------------------------------------------------

    @_guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open for reading; CRIU's --auto-dedup wants to punch holes and must hear EROFS."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        handle = self._next_handle
        self._next_handle += 1
        node = self._view.node(inode)
        self._readers[handle] = reader = self._open_reader(node)
        self._activity.opened(handle, path_of(node), ctx.pid)
        # Past the page cache each byte is copied once in place of twice. But who waits for such an
        # answer cannot be killed before it comes, so that is for what is here.
        direct = self.on_open(node, ctx.pid) and reader.is_kept()
        return FileInfo(fh=FileHandleT(handle), keep_cache=True, direct_io=direct)

    @_guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> Data:  # type: ignore[override]
        """Exactly the bytes that the file's size promises, or an error; a view, not a copy."""
        reader = self._readers[fh]
        number = self._activity.read_begins(fh, off, size)
        if self._counters.journal is not None and not reader.is_here(off, size):
            self._activity.read_waits(number)
        try:
            data = await reader.read(off, size)
        finally:
            self._activity.read_ends(number)
        self._counters.reads += 1
        self._counters.bytes_read += len(data)
        return data

    @_guarded
    async def release(self, fh: FileHandleT) -> None:
        """Forget an open file."""
        self._activity.released(fh)
        self._readers.pop(fh, None)

    # -- the whole --------------------------------------------------------------------------

    @_guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Full to the brim: there is nothing to write."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK_BYTES
        data.f_blocks = -(-self._view.size_bytes // _BLOCK_BYTES)
        data.f_bfree = data.f_bavail = 0
        data.f_files = len(self._view.nodes)
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    @_guarded
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """The root's are the mount's state and its daemon; a container's files have their own."""
        if inode == pyfuse3.ROOT_INODE:
            if name == STATUS_XATTR.encode():
                return self._status()
            if name == PID_XATTR.encode():
                return str(os.getpid()).encode()
        wanted = decode_name(name)
        of_overlay = any(wanted == key for key, _ in OPAQUE_XATTRS)
        value = (await self._view.xattrs(inode, of_overlay=of_overlay)).get(wanted)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @_guarded
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """A container's files' own; the root has none that a copy should take along."""
        xattrs = await self._view.xattrs(inode, of_overlay=True)
        return [XAttrNameT(encode_name(key)) for key in xattrs]

    def _attributes(self, inode: int) -> EntryAttributes:
        node = self._view.node(inode)
        attributes = EntryAttributes()
        attributes.st_ino = InodeT(inode)
        attributes.generation = 0
        attributes.entry_timeout = _FOREVER_S
        attributes.attr_timeout = _FOREVER_S if self._view.is_settled(inode) else 0.0
        bits = node.mode
        if not (node.exact and self._is_root):
            bits |= _SEARCHABLE if node.type is EntryType.DIRECTORY else _READABLE
        attributes.st_mode = ModeT(_KINDS[node.type] | bits)
        attributes.st_nlink = self._view.links(inode)
        attributes.st_uid, attributes.st_gid = node.uid, node.gid
        attributes.st_rdev = 0
        size_bytes = len(encode_name(node.symlink_target)) or node.size_bytes
        attributes.st_size = size_bytes
        attributes.st_blksize = _BLOCK_BYTES
        attributes.st_blocks = -(-size_bytes // 512)
        for stamp in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(attributes, stamp, node.mtime_ns)
        return attributes


class _Undelivered(logging.Handler):
    """Hears of answers that did not get to the kernel: pyfuse3 has no other way to tell.

    Others than those of a bad page are to requests that nobody waits for any more.
    """

    def __init__(self, operations: CheckpointOperations) -> None:
        super().__init__(logging.ERROR)
        self._operations = operations

    def emit(self, record: logging.LogRecord) -> None:
        """Note what `fuse_NAME(): fuse_reply_* failed with REASON` says of a bad page."""
        message = record.getMessage()
        operation = message.removeprefix("fuse_").partition("(")[0]
        if message.endswith(os.strerror(errno.EFAULT)):
            self._operations.note_undelivered(operation)
        else:
            log.info("pyfuse3: %s", message)


def attach(
    operations: CheckpointOperations,
    mountpoint: str,
    name: str,
    *,
    allow_other: bool,
    noexec: bool = False,
) -> None:
    """Mount; requests are served once `serve` runs. `name` is what mountinfo calls its source.

    Raises:
        LazyfsError: the kernel or fusermount3 refuses.
    """
    options = {
        "ro",
        "nosuid",
        "nodev",
        "noatime",
        "default_permissions",
        f"subtype={FUSE_SUBTYPE}",
        # libfuse, lib/fuse_opt.c: a backslash before what separates options
        "fsname=" + name.replace("\\", "\\\\").replace(",", "\\,"),
    }
    if noexec:
        options.add("noexec")
    if allow_other:
        options.add("allow_other")
    logging.getLogger("pyfuse3").addHandler(_Undelivered(operations))
    try:
        pyfuse3.init(operations, mountpoint, options)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise LazyfsError(
            f"cannot mount on {mountpoint}: {error}; what fusermount3 or the kernel said stands "
            "above or in the log"
        ) from None


async def serve() -> None:
    """Answer requests until the mount is gone.

    Raises:
        LazyfsError: in a group: what was given as /dev/fd/N has not been mounted.
    """
    try:
        await pyfuse3.main(min_tasks=1, max_tasks=_TASKS_MOST)
    except* OSError as group:
        if all(error.errno == errno.EPERM for error in _leaves(group)):
            raise LazyfsError(
                "/dev/fuse is open, but nothing has been mounted with it: call mount(2) with its "
                "number (fd=N) before lazyfs is started"
            ) from None
        raise


def _leaves(group: BaseExceptionGroup[OSError]) -> Iterator[OSError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def forget_bytes(inode: int) -> None:
    """Have the kernel drop its copy of a file's bytes, mapped ones too.

    For a thread: it blocks while a read of the file waits for its answer.
    """
    with suppress(OSError):  # a file that the kernel does not know
        pyfuse3.invalidate_inode(InodeT(inode))


def detach() -> None:
    """Unmount if that has not happened, and let go of the kernel: waiting readers get errors."""
    pyfuse3.close(unmount=True)

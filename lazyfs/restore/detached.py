"""A FUSE filesystem that is mounted nowhere: a descriptor in place of a directory.

fsopen, fsconfig and fsmount give a mount that is in no mount namespace. Nobody else sees it or
pins it, nothing propagates, and the kernel unmounts it when the last descriptor of it is closed,
however its holders end. Other programs are given `/proc/PID/fd/N` for as long as process PID holds
descriptor N: a link that the kernel follows to the mount's root. Seen to be taken as images
directory: CRIU 4.1.1 (restore, lazy-pages), runc 1.1.15 (which opens it and hands CRIU its
descriptor). crun opens it likewise (`src/libcrun/criu.c`); that was read, and not seen.

Where the kernel or the user's rights do not give that (Linux before 5.5, no root), a directory of
mode 0700 in the run directory is mounted on instead; its daemon unmounts it when its starter is
gone (`served.py`).

Must not: talk to the filesystem, which has no daemon yet.

Sources: fsopen(2), fsconfig(2), fsmount(2); Linux, `include/uapi/linux/mount.h`,
`fs/fuse/inode.c` (`fuse_fs_parameters`), `Documentation/filesystems/fuse.rst`.
"""

import ctypes
import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from lazyfs.ground.errors import LazyfsError
from lazyfs.mountpoint import FUSE_DEVICE, FUSE_SUBTYPE, check_fuse, mounts
from lazyfs.mountpoint import detach as unmount
from lazyfs.transport.run_directory import open_run_directory, run_directory

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
"""Of all architectures: Linux, `include/uapi/asm-generic/unistd.h`."""
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_RDONLY, _NOSUID, _NODEV, _NOATIME = 0x1, 0x2, 0x4, 0x10
_ROOT_MODE = "40000"
_NOT_TO_BE_HAD = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP)
_MESSAGE_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class Place(msgspec.Struct):
    """Where a filesystem is to be served; a context manager that is left by `close`."""

    fuse: int = -1
    """An open /dev/fuse for the daemon; -1 if the daemon has to mount on `directory` itself."""
    root: int = -1
    """The mount; it lives as long as this is open in any process."""
    directory: Path | None = None
    """What is mounted on, where there is no detached mount."""
    _home: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        """Return what other processes of this pid namespace reach it by, while we are alive."""
        if self.directory is not None:
            return self.directory
        return Path(f"/proc/{os.getpid()}/fd/{self.root}")

    @property
    def mount_point(self) -> Path:
        """Return what the daemon is told to serve: a directory, or /dev/fd/N."""
        return self.directory or Path(f"/dev/fd/{self.fuse}")

    def let_go_of_fuse(self) -> None:
        """Leave the daemon's end to the daemon, or readers would wait for a dead one."""
        if self.fuse >= 0:
            os.close(self.fuse)
        self.fuse = -1

    def close(self) -> None:
        """Unmount, for what concerns this process. May be called again."""
        self.let_go_of_fuse()
        if self.root >= 0:
            os.close(self.root)
        self.root = -1
        if self.directory is not None:
            if any(each.directory == str(self.directory) for each in mounts()):
                with suppress(LazyfsError):
                    unmount(self.directory, lazy=True)
            if self._home is not None:
                with suppress(OSError):
                    self._home.cleanup()
            self._home = None

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_place(source: str) -> Place:
    """Make a detached mount, or a directory to mount on where there can be none.

    `source` is the mount's name: the reference, without secrets.

    Raises:
        LazyfsError: FUSE is not to be had; the message says what to do.
    """
    check_fuse()
    fuse = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return Place(fuse, _mount(fuse, source))
    except OSError as error:
        os.close(fuse)
        if error.errno not in _NOT_TO_BE_HAD:
            raise LazyfsError(
                f"the checkpoint cannot be mounted: {error.strerror}; see the kernel's log (dmesg)"
            ) from None
        return on_directory()


def _mount(fuse: int, source: str) -> int:
    """Return the root of a new filesystem that is served at `fuse`.

    Raises:
        OSError: the kernel refuses, or knows no such calls.
    """
    context = _call(_FSOPEN, b"fuse", _CLOEXEC)
    try:
        strings = {
            "fd": str(fuse),
            "rootmode": _ROOT_MODE,
            "user_id": str(os.geteuid()),
            "group_id": str(os.getegid()),
            "source": source[: _MESSAGE_BYTES // 2],
            "subtype": FUSE_SUBTYPE,
        }
        for key, value in strings.items():
            _call(_FSCONFIG, context, _SET_STRING, key.encode(), os.fsencode(value), 0)
        for flag in ("ro", "allow_other", "default_permissions"):
            _call(_FSCONFIG, context, _SET_FLAG, flag.encode(), None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _RDONLY | _NOSUID | _NODEV | _NOATIME)
    finally:
        os.close(context)


def on_directory() -> Place:
    """Return a fresh directory that only this user may enter, for the daemon to mount on.

    Raises:
        LazyfsError: there is no place for it.
    """
    try:
        base = run_directory()
        os.close(open_run_directory(base))
        home = tempfile.TemporaryDirectory(prefix="restore-", dir=base)
    except OSError as error:
        raise LazyfsError(
            f"no private directory to mount on can be made in {run_directory()}: {error.strerror}; "
            "name another by LAZYFS_RUN_DIR"
        ) from None
    directory = Path(home.name).resolve() / "images"
    directory.mkdir(mode=0o700)
    return Place(directory=directory, _home=home)


def _call(number: int, *words: int | bytes | None) -> int:
    converted = [
        ctypes.c_char_p(word) if isinstance(word, bytes) or word is None else ctypes.c_long(word)
        for word in words
    ]
    result = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        number_of_error = ctypes.get_errno()
        raise OSError(number_of_error, os.strerror(number_of_error))
    return int(result)

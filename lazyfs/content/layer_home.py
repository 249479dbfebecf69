"""The directory of one layer in the cache: made, found, checked, used by many, thrown away.

It comes to be whole, by the rename of a directory that nobody knew, so all who make it at once
end with the same files. Its files never change their size; one that has another is damaged, and
then the directory is moved away and made anew. Whoever uses it holds a shared lock (flock) on
`content`, which keeps those who make room from it; after the lock it is looked at whether the
name still leads to the same file. Moving it away takes no lock: who has it open keeps it.

What this must not do: look at bytes or marks.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

_FILE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
_TRIES = 100
_LOCK_PATIENCE_S = 1.0
_POLL_S = 0.01
_NOTE_USE_EVERY_S = 60.0
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_OTHERS_WERE_FASTER = (
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EWOULDBLOCK,
)
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENOTDIR)


class _OtherDirectoryError(Exception):
    """The directory has been moved away meanwhile, or was damaged and is now: look again."""


class LayerHome:
    """One layer's directory, held open with its files. From `open_home`."""

    def __init__(
        self, path: Path, directory_fd: int, content_fd: int, marks_fd: int, writable: bool
    ) -> None:
        self.path = path
        self.content_fd = content_fd
        self.marks_fd = marks_fd
        self.writable = writable
        """Whether the disk would take anything."""
        self._directory_fd = directory_fd
        self._noted_use_s = float("-inf")
        self.note_use()

    @property
    def is_found(self) -> bool:
        """Whether a later mount would find these files, not others or none."""
        return _is_at(self.path, self._directory_fd)

    def note_use(self, *, even_if_lately: bool = False) -> None:
        """Note that the layer is in use, for whoever makes room: the time of `used`."""
        now_s = time.monotonic()
        lately = now_s - self._noted_use_s < _NOTE_USE_EVERY_S
        if not self.writable or (lately and not even_if_lately):
            return
        self._noted_use_s = now_s
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | _FILE_FLAGS
            fd = os.open("used", flags, 0o600, dir_fd=self._directory_fd)
            try:
                os.utime(fd)
            finally:
                os.close(fd)

    def proof(self) -> str:
        """Return what `prove` has noted here, by whichever daemon; "" if nothing."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            fd = os.open("proven", os.O_RDONLY | _FILE_FLAGS, dir_fd=self._directory_fd)
            with open(fd, "rb") as file:
                return file.read(256).decode()
        return ""

    def proof_stamp(self) -> int:
        """Return a number that is another one when `proof` is; 0 if there is none."""
        with contextlib.suppress(OSError):
            return os.stat("proven", dir_fd=self._directory_fd, follow_symlinks=False).st_mtime_ns
        return 0

    def prove(self, proof: str) -> None:
        """Note something for later mounts and other daemons, all of it or nothing.

        Raises:
            OSError: the disk will not have it. No error if nobody could find it any more.
        """
        name = f"proven.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FILE_FLAGS
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self._directory_fd)
            with open(fd, "wb") as file:
                file.write(proof.encode())
            directory_fd = self._directory_fd
            os.rename(name, "proven", src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
        except FileNotFoundError:
            if self.is_found:
                raise

    def discard(self) -> None:
        """Have nobody find these files any more. Whoever has them open keeps them.

        Raises:
            OSError: the disk will not have it.
        """
        discard(self.path, os.fstat(self._directory_fd))

    def close(self) -> None:
        """Let go of the files and the lock."""
        self.note_use(even_if_lately=True)
        os.close(self.content_fd)
        os.close(self.marks_fd)
        os.close(self._directory_fd)


def open_home(path: Path, content_bytes: int, marks_bytes: int) -> LayerHome | None:
    """Open a layer's directory, or make it; None if it cannot be shared.

    None: somebody keeps the lock that is for removing it, or its filesystem has no such locks.
    Blocks for a second at most.

    Raises:
        OSError: there is none, and it cannot be made.
    """
    for _ in range(_TRIES):
        try:
            return _open(path, content_bytes, marks_bytes)
        except _OtherDirectoryError:
            continue
        except FileNotFoundError:
            _make(path, content_bytes, marks_bytes)
        except (BlockingIOError, _NoLocksError):
            return None
    raise OSError(errno.EBUSY, "others keep changing it", str(path))


def discard(path: Path, seen: os.stat_result) -> None:
    """Move a layer's directory away and remove it, if it still is the one that was `seen`.

    Raises:
        OSError: the disk will not have it.
    """
    try:
        if not os.path.samestat(seen, path.lstat()):
            return
        incoming = path.parent.parent / "incoming"
        incoming.mkdir(mode=0o700, exist_ok=True)
        grave = Path(tempfile.mkdtemp(dir=incoming))
        try:
            path.rename(grave / "layer")
        finally:
            shutil.rmtree(grave, ignore_errors=True)
    except FileNotFoundError:
        return  # somebody was faster


class _NoLocksError(Exception):
    """The filesystem knows no locks."""


def _open(path: Path, content_bytes: int, marks_bytes: int) -> LayerHome:
    """Open what is there.

    Raises:
        FileNotFoundError: there is nothing.
        BlockingIOError: it is being removed.
        _OtherDirectoryError: look again.
    """
    with ExitStack() as on_error:
        try:
            directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FILE_FLAGS)
        except OSError as problem:
            if problem.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            discard(path, path.lstat())
            raise _OtherDirectoryError from None
        on_error.callback(os.close, directory_fd)
        content_fd, writable = _open_file("content", directory_fd, path)
        on_error.callback(os.close, content_fd)
        marks_fd, _ = _open_file("marks", directory_fd, path)
        on_error.callback(os.close, marks_fd)
        _lock_shared(content_fd, directory_fd, path)
        for fd, wanted_bytes in ((content_fd, content_bytes), (marks_fd, marks_bytes)):
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size != wanted_bytes:
                discard(path, os.fstat(directory_fd))
                raise _OtherDirectoryError
        if not _is_at(path, directory_fd):
            raise _OtherDirectoryError
        home = LayerHome(path, directory_fd, content_fd, marks_fd, writable)
        on_error.pop_all()
        return home


def _open_file(name: str, directory_fd: int, path: Path) -> tuple[int, bool]:
    """Open a file of the directory; say whether it may be written to."""
    try:
        try:
            return os.open(name, os.O_RDWR | _FILE_FLAGS, dir_fd=directory_fd), True
        except OSError as problem:
            if problem.errno not in _READ_ONLY:
                raise
            return os.open(name, os.O_RDONLY | _FILE_FLAGS, dir_fd=directory_fd), False
    except OSError as problem:
        if problem.errno not in _NO_FILE:
            raise
        discard(path, os.fstat(directory_fd))  # it was made whole: this is damage
        raise _OtherDirectoryError from None


def _lock_shared(content_fd: int, directory_fd: int, path: Path) -> None:
    deadline_s = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            _flock(content_fd)
        except BlockingIOError:
            if not _is_at(path, directory_fd):
                raise _OtherDirectoryError from None
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(_POLL_S)
        else:
            return


def _flock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as problem:
        raise _NoLocksError from problem


def _make(path: Path, content_bytes: int, marks_bytes: int) -> None:
    """Make a directory with nothing in it yet, unless others are faster."""
    incoming = path.parent.parent / "incoming"
    for directory in (path.parent, incoming):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=incoming))
    try:
        with ExitStack() as files:
            files.callback(shutil.rmtree, fresh, ignore_errors=True)
            for name, size_bytes in (("content", content_bytes), ("marks", marks_bytes)):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FILE_FLAGS
                fd = os.open(fresh / name, flags, 0o600)
                files.callback(os.close, fd)
                _flock(fd)  # or whoever tidies up `incoming` would take it for left behind
                os.ftruncate(fd, size_bytes)
            fresh.rename(path)
    except OSError as problem:
        if problem.errno not in _OTHERS_WERE_FASTER:
            raise


def _is_at(path: Path, directory_fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(directory_fd), path.lstat())
    except OSError:
        return False

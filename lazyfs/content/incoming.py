"""The directories in which content comes to be, and how the daemons of a host share them.

    DIR/incoming/lock                    held while directories are made, moved and removed
                 <digest>.<tag>-<source>/    shared: found by name by every daemon that wants the
                                             same content from the same source
                 <random>/                   of one daemon alone, or being removed
                         content         held shared by each daemon that uses it
                         notice          held by the daemon that decodes (`notice.py`)

All locks are flocks: they vanish with their holder, however that ends. Whoever holds `notice` is
the only one who writes to `content`, so a daemon that is stopped while it decodes keeps its
files for good: others give it up by taking the directory from where it is found, and begin
another. Nobody waits for a lock for ever: `exclusive` has a bound, the others are only tried.

What lies here is of daemons that live: a directory that nobody holds is removed by the next one
who comes by, so nothing here is ever believed after a crash of the machine.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lazyfs.content.cache import Cache
from lazyfs.content.notice import Notice, State
from lazyfs.ground.digest import Digest

PATIENCE_S = 2.0
"""How long a daemon waits for another that makes or removes a directory: that takes no time."""
_CLOSE_PATIENCE_S = 0.5
_LOOK_AGAIN_S = 0.005
_HALF_MADE_S = 60.0
_FLAGS = os.O_RDWR | os.O_CLOEXEC


class Cradle:
    """Where one content grows."""

    def __init__(
        self, fd: int, directory: Path | None = None, notice: Notice | None = None
    ) -> None:
        """Use one of the functions below. Without a `notice` it is for this daemon alone."""
        self.fd = fd
        self.notice = notice
        self._directory = directory
        self._published = False

    @property
    def directory(self) -> Path | None:
        """Where it was made; None in memory. Others may have taken it from there."""
        return self._directory

    def lead(self) -> bool:
        """Become the one who decodes, if nobody is."""
        if self.notice is None:
            return True
        try:
            fcntl.flock(self.notice.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def state(self) -> State:
        """Return what has become of the pass; of one that is damaged, that it goes on."""
        news = self.notice.look() if self.notice is not None else None
        return news.state if news is not None else State.DECODING

    def is_replaced(self) -> bool:
        """Whether others have given this one up, and have begun another in its place."""
        if self.notice is None or self._directory is None:
            return False
        return self._found() is False

    def discard(self) -> None:
        """Let nobody find it any more; whoever has it open keeps it.

        Raises:
            OSError: it cannot be moved.
        """
        if self._directory is None:
            return
        with exclusive(self._directory.parent):
            self._remove()

    def publish(self, home: Path, prepare: Callable[[Path], None], *, replace: bool) -> bool:
        """Move the directory to `home`, where later mounts look; False if others were first.

        `prepare` puts into it what belongs there. `replace`: what is there already is moved away
        if it has no `index`.

        Raises:
            OSError: the disk will not have it, or it was removed.
        """
        if self._directory is None:
            return False
        with exclusive(self._directory.parent):
            found = self._found()
            if found is None and not home.is_dir():
                raise OSError(f"{self._directory} was removed meanwhile")
            if not found:
                return False  # others have given it up, and have begun anew
            if replace and home.is_dir() and not (home / "index").exists():
                bury(home)
            if home.is_dir():
                return False
            prepare(self._directory)
            home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._directory.rename(home)
            except OSError:
                if home.is_dir():
                    return False
                raise
            with contextlib.suppress(OSError):
                (home / "notice").unlink(missing_ok=True)
        self._published = True
        return True

    def close(self) -> None:
        """Let go of it; who was its last user removes it, if it was not published."""
        try:
            if self._directory is not None and not self._published:
                with contextlib.suppress(OSError):
                    self._leave(self._directory)
        finally:
            os.close(self.fd)
            if self.notice is not None:
                self.notice.close()

    def _leave(self, directory: Path) -> None:
        if self.notice is None:
            shutil.rmtree(directory, ignore_errors=True)
            return
        if not self._found():
            return
        with exclusive(directory.parent, _CLOSE_PATIENCE_S):
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove()

    def _remove(self) -> None:
        if self._directory is not None and self._found():
            bury(self._directory)

    def _found(self) -> bool | None:
        """Whether it is found under its name; None if nothing is."""
        if self._directory is None:
            return None
        with contextlib.suppress(OSError):
            there = (self._directory / "content").stat()
            return os.path.samestat(os.fstat(self.fd), there)
        return None


def shared_name(digest: Digest, tag: str, source_key: str) -> str:
    """Return the name under which those find each other that want the same from the same source.

    `source_key` is of the source's name: nothing has proven yet that it gives what the digest
    promises, so what one source gives must not be served as another's.
    """
    return f"{digest.algorithm}-{digest.hex}.{tag}-{source_key}"


def in_memory() -> Cradle:
    """Make a place for a content that must not touch a disk."""
    return Cradle(os.memfd_create("lazyfs", os.MFD_CLOEXEC))


def make_private(cache: Cache) -> Cradle:
    """Make a place for this daemon alone.

    Raises:
        OSError: there is none to be had.
    """
    if cache.directory is None:
        return in_memory()
    incoming = _made(cache.directory)
    with exclusive(incoming):
        remove_abandoned(incoming)
        return _made_alone(incoming)


def make_shared(cache: Cache, name: str, found: Callable[[], bool]) -> Cradle | None:
    """Join the daemons that use `name`, or be the first; None where there is no need to.

    `found` is asked, while nothing can be published, whether it has been. Where another daemon
    holds things up, the place is for this daemon alone.

    Raises:
        OSError: there is none to be had.
    """
    if cache.directory is None:
        return in_memory()
    incoming = _made(cache.directory)
    try:
        with exclusive(incoming):
            if found():
                return None
            remove_abandoned(incoming)
            directory = incoming / name
            if (directory / "content").exists():
                joined = _joined(directory)
                if joined is None:
                    return _made_alone(incoming)
                if joined.state() is not State.FAILED:
                    return joined
                bury(directory)
                joined.close()
            shutil.rmtree(directory, ignore_errors=True)  # half made, by one who was killed
            directory.mkdir(mode=0o700)
            return _filled(directory, shared=True)
    except TimeoutError:
        return _made_alone(incoming)


def remove_abandoned(incoming: Path) -> None:
    """Remove directories that nobody holds. Only within `exclusive`."""
    for directory in incoming.iterdir():
        if directory.is_dir() and not directory.is_symlink() and _is_abandoned(directory):
            shutil.rmtree(directory, ignore_errors=True)


def bury(directory: Path) -> None:
    """Take a directory of the cache from where it is found, and remove it.

    Whoever has its files open or mapped keeps them.

    Raises:
        OSError: it cannot be moved.
    """
    incoming = _made(directory.parent.parent)
    grave = tempfile.mkdtemp(dir=incoming)
    directory.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


@contextlib.contextmanager
def exclusive(incoming: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Be the only one who makes, moves and removes directories there.

    Raises:
        TimeoutError: another daemon does so, and does not go on.
        OSError: the lock cannot be had at all.
    """
    fd = os.open(incoming / "lock", _FLAGS | os.O_CREAT, 0o600)
    try:
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(
                        f"another lazyfs holds {incoming}/lock and does not go on"
                    ) from error
            time.sleep(_LOOK_AGAIN_S)
        yield
    finally:
        os.close(fd)


def _made(cache_dir: Path) -> Path:
    incoming = cache_dir / "incoming"
    incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
    return incoming


def _made_alone(incoming: Path) -> Cradle:
    return _filled(Path(tempfile.mkdtemp(dir=incoming)), shared=False)


def _filled(directory: Path, *, shared: bool) -> Cradle:
    """Make the files of a new directory; whatever goes wrong, it goes again."""
    with contextlib.ExitStack() as on_error:
        on_error.callback(shutil.rmtree, directory, ignore_errors=True)
        fd = os.open(directory / "content", _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        on_error.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        notice = None
        if shared:
            notice_fd = os.open(directory / "notice", _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            on_error.callback(os.close, notice_fd)
            notice = Notice(notice_fd)
            notice.begin()
        on_error.pop_all()
        return Cradle(fd, directory, notice)
    raise AssertionError("an exit stack passes errors on")


def _joined(directory: Path) -> Cradle | None:
    """Open what others have made; None if it is not understood here."""
    with contextlib.ExitStack() as on_error, contextlib.suppress(OSError):
        fd = os.open(directory / "content", _FLAGS)
        on_error.callback(os.close, fd)
        notice_fd = os.open(directory / "notice", _FLAGS)
        on_error.callback(os.close, notice_fd)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        notice = Notice(notice_fd)
        for _ in range(10):
            if notice.look() is not None:
                on_error.pop_all()
                return Cradle(fd, directory, notice)
            time.sleep(_LOOK_AGAIN_S / 5)
    return None


def _is_abandoned(directory: Path) -> bool:
    try:
        fd = os.open(directory / "content", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        with contextlib.suppress(OSError):  # somebody may be about to move something there
            return time.time() - directory.stat().st_mtime > _HALF_MADE_S
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True

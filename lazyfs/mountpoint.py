"""Directories that are, were or shall be mount points: what the kernel says, and unmounting.

Light imports only: used before the daemon is forked.
"""

import contextlib
import errno
import os
import re
import select
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

import msgspec

from lazyfs.ground.errors import LazyfsError, UsageError

_T = TypeVar("_T")

FUSE_DEVICE = Path("/dev/fuse")
_FUSE_NUMBER = os.makedev(10, 229)
"""Linux, `Documentation/admin-guide/devices.txt`."""
FUSE_SUBTYPE = "lazyfs"
_FILESYSTEM = f"fuse.{FUSE_SUBTYPE}"
_USER_ID = re.compile(r"(?:^|,)user_id=(\d+)")
_GIVEN = re.compile(r"/dev/fd/(\d{1,9})")
_CONNECTION = re.compile(r"^fuse_connection:\s*(\d+)$", re.MULTILINE)
_OCTAL = re.compile(r"\\([0-7]{3})")
_PROGRAM_TIMEOUT_S = 30
_ANSWER_TIMEOUT_S = 5
_GONE_ERRNOS = (errno.ENOTCONN, errno.ECONNABORTED)


class Mounted(msgspec.Struct, frozen=True):
    """A line of /proc/self/mountinfo (proc(5)), as far as it matters here."""

    directory: str
    filesystem: str
    source: str
    device: int = 0
    """As `st_dev` of what is mounted: there is one for each mount of a FUSE filesystem."""
    user_id: int = 0
    """For whom a FUSE filesystem was mounted."""

    @property
    def is_ours(self) -> bool:
        """Whether it is a lazyfs mount, as far as its type tells."""
        return self.filesystem == _FILESYSTEM


def mounts() -> list[Mounted]:
    """Return all mounts of this mount namespace, in the kernel's order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        filesystem, source, *options = right.split(" ")
        words = left.split(" ")
        major, _, minor = words[2].partition(":")
        user = _USER_ID.search(options[0]) if options else None
        found.append(
            Mounted(
                _unescape(words[4]),
                filesystem,
                _unescape(source),
                os.makedev(int(major), int(minor)),
                int(user[1]) if user else 0,
            )
        )
    return found


def mounted_at(directory: Path) -> Mounted | None:
    """Return the topmost mount on a directory, if there is one."""
    path = str(real(directory))
    return next((item for item in reversed(mounts()) if item.directory == path), None)


def what_is_at(directory: Path, mounted: Mounted | None) -> str:
    """Return what a directory is that is no lazyfs mount, in words: "is not a mount point"."""
    if mounted is not None:
        return f"is a mount of {mounted.filesystem}"
    return "is not a mount point" if os.path.lexists(real(directory)) else "does not exist"


def of_another(directory: Path, mounted: Mounted) -> UsageError:
    """Return the error for a lazyfs mount that is not this user's to ask or to unmount."""
    return UsageError(
        f"{directory} was mounted by another user (uid {mounted.user_id}): ask as that user, or "
        "as root"
    )


def given_descriptor(directory: Path) -> int | None:
    """Return N if the mount point is `/dev/fd/N`: somebody else has mounted, and hands us the end.

    They have opened /dev/fuse as N and have called mount(2) with `fd=N`; they will unmount too.
    Source: libfuse, `lib/fuse_lowlevel.c`, `fuse_session_mount`.

    Raises:
        UsageError: N is not open, or is something else.
    """
    found = _GIVEN.fullmatch(str(directory))
    if found is None:
        return None
    number = int(found[1])
    try:
        answer = os.fstat(number)
    except OSError:
        raise UsageError(
            f"{directory} is not open: pass it on when starting lazyfs, with the filesystem mounted"
        ) from None
    if not stat.S_ISCHR(answer.st_mode) or answer.st_rdev != _FUSE_NUMBER:
        raise UsageError(f"{directory} is not open on {FUSE_DEVICE}")
    return number


def device_of(descriptor: int) -> int | None:
    """Return the device of the mount that an open /dev/fuse serves, where the kernel tells."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        found = _CONNECTION.search(text)
        if found is not None:
            return os.makedev(0, int(found[1]))
    return None


def check(directory: Path, *, replace: bool) -> None:
    """See that a directory can be mounted on; with `replace` a mount on it stays for now.

    Raises:
        UsageError, LazyfsError: as `prepare`.
    """
    mounted = mounted_at(directory)
    if replace and mounted is not None and mounted.is_ours:
        check_fuse()
    else:
        prepare(directory)


def prepare(directory: Path, *, replace: bool = False) -> None:
    """See that a directory can be mounted on; a dead mount of an earlier daemon is cleared.

    `replace`: so is a living one; who has files of it open keeps them, and its daemon.

    Raises:
        UsageError: it is missing, no directory, not empty or a mount already.
        LazyfsError: FUSE is not to be had.
    """
    mounted = mounted_at(directory)
    if mounted is not None and mounted.is_ours and (replace or is_dead(directory)):
        detach(directory, lazy=True)
        mounted = mounted_at(directory)
    if mounted is not None:
        advice = "mount on an empty directory"
        if mounted.is_ours:
            advice = (
                f"unmount it first: lazyfs umount {directory}; or take its place: "
                f"lazyfs mount --replace"
            )
        raise UsageError(
            f"{directory} is a mount already ({mounted.filesystem} of {mounted.source}); {advice}"
        )
    try:
        with os.scandir(directory) as names:
            if next(names, None) is not None:
                raise UsageError(f"{directory} is not empty; mount on an empty directory")
    except FileNotFoundError:
        raise UsageError(f"{directory} does not exist; create it first") from None
    except NotADirectoryError:
        raise UsageError(f"{directory} is not a directory") from None
    except OSError as error:
        raise UsageError(f"{directory} cannot be read: {error.strerror}") from None
    check_fuse()


def check_fuse() -> None:
    """See that this kernel and this user can mount FUSE filesystems.

    Raises:
        LazyfsError: they cannot; the message says what to install or allow.
    """
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise LazyfsError(
            f"there is no {FUSE_DEVICE}: load the module (modprobe fuse), or give the container "
            f"the device (--device {FUSE_DEVICE})"
        ) from None
    except OSError as error:
        raise LazyfsError(
            f"{FUSE_DEVICE} cannot be opened: {error.strerror}; whoever may mount must be able to "
            f"read and write it (chmod 666 {FUSE_DEVICE}; in a container --device {FUSE_DEVICE})"
        ) from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise LazyfsError("mounting without root needs fusermount3: install the package fuse3")


def is_dead(directory: Path) -> bool:
    """Whether a mount's daemon is gone. Asked by statfs, which the kernel never answers itself."""

    def ask() -> bool:
        try:
            os.statvfs(directory)
        except OSError as error:
            return error.errno in _GONE_ERRNOS
        return False

    with contextlib.suppress(TimeoutError):
        return answer_of(ask)
    return False


def unmount(directory: Path, *, lazy: bool, timeout_s: float = 20.0) -> None:
    """Unmount a lazyfs mount, dead or alive, and wait until its daemon has ended.

    `lazy`: detach it now, even while files on it are open.

    Raises:
        UsageError: there is no lazyfs mount, or it is another user's.
        LazyfsError: it is busy, or the system's programs refuse.
    """
    mounted = mounted_at(directory)
    if mounted is None or not mounted.is_ours:
        what = what_is_at(directory, mounted)
        raise UsageError(f"{directory} is not a lazyfs mount: it {what}")
    if os.geteuid() not in (0, mounted.user_id):
        raise of_another(directory, mounted)
    try:
        daemon = answer_of(partial(_daemon_of, directory))
    except TimeoutError:
        if not lazy:
            raise LazyfsError(
                f"the daemon of {directory} does not answer; detach it all the same: "
                f"lazyfs umount --lazy {directory}"
            ) from None
        detach(directory, lazy=True)
        return
    try:
        detach(directory, lazy=lazy or daemon is None)
        if daemon is not None:
            _wait_end(daemon, timeout_s, directory)
    finally:
        if daemon is not None:
            os.close(daemon)


def detach(directory: Path, *, lazy: bool) -> None:
    """Unmount by the system's programs.

    Raises:
        LazyfsError: they refuse.
    """
    options = ["-l"] if lazy else []
    command = ["umount", *options, "--", str(directory)]
    if os.geteuid() != 0:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(directory)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LazyfsError(f"cannot unmount {directory}: {error}") from None
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())
    if "busy" in said.lower():
        raise LazyfsError(
            f"{directory} is busy: a process has a file or its working directory there; "
            f"see `fuser -vm {directory}`, or detach it now: lazyfs umount --lazy {directory}"
        )
    if "/etc/mtab" in said:
        said += " (minimal machines lack it: ln -s ../proc/self/mounts /etc/mtab, as root)"
    raise LazyfsError(f"cannot unmount {directory}: {said}")


def _daemon_of(directory: Path) -> int | None:
    """Return a pidfd of the mount's daemon, if it lives and is in our pid namespace."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(os.getxattr(directory, "user.lazyfs.pid"))
        return os.pidfd_open(pid)
    return None


def answer_of(question: Callable[[], _T]) -> _T:
    """Return what a call says that a stuck daemon would hold up for ever.

    Raises:
        TimeoutError: nothing, within five seconds. The thread that asks is left behind.
    """
    answers: SimpleQueue[_T] = SimpleQueue()
    threading.Thread(target=lambda: answers.put(question()), daemon=True).start()
    try:
        return answers.get(timeout=_ANSWER_TIMEOUT_S)
    except Empty:
        raise TimeoutError from None


def _wait_end(pidfd: int, timeout_s: float, directory: Path) -> None:
    deadline_s = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
        if time.monotonic() >= deadline_s:
            raise LazyfsError(
                f"{directory} is unmounted, but its daemon has not ended within {timeout_s:.0f} s: "
                "a process still has files of it open"
            )


def real(directory: Path) -> Path:
    """Resolve all but the last component, which may be a mount that no longer answers."""
    absolute = directory.absolute()
    parent = absolute.parent.resolve()
    name = absolute.name
    if name in ("", "..") or (not mounted_below(parent, name) and (parent / name).is_symlink()):
        return absolute.resolve()
    return parent / name


def mounted_below(parent: Path, name: str) -> bool:
    """Whether `parent/name` is itself the directory of some mount."""
    path = str(parent / name)
    return any(item.directory == path for item in mounts())


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)

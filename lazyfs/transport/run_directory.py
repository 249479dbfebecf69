"""Where daemons of one user on this machine find each other."""

import errno
import os
import stat
from contextlib import suppress


def run_directory() -> str | None:
    """Return the path of the directory; None: this user has no place for one.

    Source: file-hierarchy(7); XDG base directory specification (XDG_RUNTIME_DIR).
    """
    if os.geteuid() == 0:
        return "/run/lazyfs"
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{given}/lazyfs" if given.startswith("/") else None


def open_run_directory(path: str) -> int:
    """Return a descriptor of the directory, which is made if need be.

    Raises:
        OSError: it cannot be had, or somebody else may get at it.
    """
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)  # noqa: PTH102 - the path is text, as settings are
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "others may get at it", path)
    return descriptor

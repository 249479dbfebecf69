"""Where daemons of one user on this machine find each other: a directory closed to all others.

`/run/lazyfs` for root; `$XDG_RUNTIME_DIR/lazyfs` for others, and without one `/tmp/lazyfs-UID`,
believed only if it is a directory, theirs and closed to all others. `LAZYFS_RUN_DIR` names
another.

Light imports only, not even contextlib: used before anything else is imported.
Source: file-hierarchy(7); XDG base directory specification (XDG_RUNTIME_DIR).
"""

import errno
import os
import stat


def run_directory() -> str:
    """Return the path of the directory, which may not exist yet."""
    given = os.environ.get("LAZYFS_RUN_DIR", "")
    if given.startswith("/"):
        return given
    user = os.geteuid()
    if user == 0:
        return "/run/lazyfs"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.path.isdir(runtime):  # noqa: PTH112 - settings are text
        return f"{runtime}/lazyfs"
    return f"/tmp/lazyfs-{user}"  # noqa: S108 - looked at before it is believed


def open_run_directory(path: str) -> int:
    """Return a descriptor of the directory, which is made if need be.

    Raises:
        OSError: it cannot be had, or somebody else may get at it.
    """
    try:  # noqa: SIM105 - see above
        os.mkdir(path, 0o700)  # noqa: PTH102 - the path is text, as settings are
    except FileExistsError:
        pass
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "others may get at it", path)
    return descriptor

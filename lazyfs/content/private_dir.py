"""A cache directory is private: checkpoints hold the memory of processes, secrets included.

Whoever may write to it, or to what it is reached by, decides what is found in it. What leads to
it is its owner's business.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

from lazyfs.ground.errors import UsageError


def make_private(directory: Path) -> None:
    """Make a cache directory for its owner only, if it can be made; see that it is private.

    Raises:
        UsageError: as `insist_on_private`.
    """
    with suppress(OSError):  # whoever cannot write there keeps all in memory, and is told so
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    insist_on_private(directory)


def insist_on_private(directory: Path) -> None:
    """See that a cache directory is its user's own, if it is there.

    Raises:
        UsageError: others could change what is put into it.
    """
    for place in (directory, *(directory / name for name in ("layers", "incoming", "documents"))):
        reason = _why_not(place)
        if reason is not None:
            raise UsageError(f"{place} cannot be the cache, which holds secrets: {reason}")


def _why_not(place: Path) -> str | None:
    try:
        found = place.lstat()
    except OSError:
        return None
    if stat.S_ISLNK(found.st_mode):
        return "it is a symbolic link; name the directory itself, with --cache-dir"
    if not stat.S_ISDIR(found.st_mode):
        return "it is no directory; choose one with --cache-dir"
    if found.st_uid != os.geteuid():
        return f"it belongs to another user (uid {found.st_uid}); choose another with --cache-dir"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it; `chmod 700` keeps them out"
    return None

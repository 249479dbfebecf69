"""Whether what lazyfs shows is what the real tools unpack."""

import hashlib
import os
import stat
from pathlib import Path


def contents(base: Path) -> dict[str, str]:
    """Return what is below a directory: of files the sha256, of links the target, else the kind.

    Everything is read once, in the order of the names.
    """
    return {str(path.relative_to(base)): _content(path) for path in sorted(base.rglob("*"))}


def _content(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        return "directory"
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"
    if stat.S_ISCHR(mode):
        return "device"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

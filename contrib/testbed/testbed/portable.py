"""lazyfs as a tree that runs in the testbed's root, where there is no Python for it.

`contrib/portable/build.sh` makes it. A tree is kept in the testbed's cache directory under a name
made of all that it is made from, so each state of the sources is built once, and those of two
clones do not meet. What has not been asked for in six hours is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path

from .process import run
from .roots import Testbed

_CLONE = Path(__file__).resolve().parents[3]
_MADE_FROM = ("lazyfs", "contrib/portable", "contrib/runtime", "pyproject.toml", "LICENSE")
_KEPT_S = 6 * 3600


def portable_lazyfs(testbed: Testbed) -> Path:
    """Return the tree of this clone's lazyfs as it is now, built if need be: `bin/lazyfs` in it.

    Give it to a `Session` among its folders: it is then seen inside at the same path.

    Raises:
        TestbedError: it cannot be built; the message has the builder's last words.
    """
    folder = testbed.cache / "portable"
    folder.mkdir(exist_ok=True)
    tree = folder / _state()
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            environment = {**os.environ, "PYTHON": sys.executable}
            run([_CLONE / "contrib/portable/build.sh", tree], timeout_s=300, env=environment)
        (folder / f"{tree.name}.used").touch()
        _forget_old(folder)
    return tree


def _state() -> str:
    """Return a name for the state of the sources, and of what they are built with."""
    digest = hashlib.sha256(sys.version.encode())
    for distribution in sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions()):
        digest.update(distribution.encode() + b"\0")
    for name in _MADE_FROM:
        path = _CLONE / name
        for file in sorted([path, *path.rglob("*")]):
            if file.is_file() and "__pycache__" not in file.parts:
                content = file.read_bytes()
                told = f"{file.relative_to(_CLONE)} {file.stat().st_mode} {len(content)}"
                digest.update(told.encode() + b"\0" + content)
    return digest.hexdigest()[:24]


def _forget_old(folder: Path) -> None:
    for used in folder.glob("*.used"):
        with contextlib.suppress(OSError):
            if used.stat().st_mtime < time.time() - _KEPT_S:
                tree = used.with_suffix("")
                for path in (tree, *(each for each in tree.rglob("*") if each.is_dir())):
                    path.chmod(0o700)
                shutil.rmtree(tree, ignore_errors=True)
                used.unlink()

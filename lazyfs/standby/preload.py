"""What a standby imports ahead, and whether it is still what is installed.

Libraries take two thirds of a mount's start. Nothing is run here but what importing runs: no
thread, no event loop, no connection, no read of a setting that a command would read. So a child
begins as a fresh process does.
"""

import gc
import importlib
import os
import sys
import threading
from collections.abc import Sequence

MODULES = (
    *(f"lazyfs.cli.{name}" for name in ("mount", "mount_helper", "restore", "status", "wait")),
    *(f"lazyfs.cli.{name}" for name in ("warm", "inspect", "ls", "cat")),
    *("lazyfs.mount", "lazyfs.restore.front", "lazyfs.lazypages.server", "lazyfs.lazypages.guard"),
    *("lazyfs.checkpoint.ahead", "lazyfs.checkpoint.desk", "lazyfs.checkpoint.preflight"),
    *("lazyfs.transport.http", "lazyfs.transport.mirrors", "lazyfs.transport.registry"),
    *("lazyfs.layers.table", "trio", "pyfuse3", "requests", "ssl", "idna", "encodings.idna"),
    *("rich.console", "rich.progress", "rich.table", "shutil", "tempfile", "subprocess"),
)


class Preloaded:
    """What has been imported, and the state of its files then."""

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        """Import it. This process must have one thread, and has one then."""
        for name in modules:
            importlib.import_module(name)
        if threading.active_count() != 1:
            raise AssertionError("something that was imported has started a thread")
        gc.collect()
        gc.freeze()
        self._files = {path: _state(path) for path in _files()}

    def is_current(self) -> bool:
        """Whether lazyfs's own files, and where its libraries are, are as they were."""
        return all(_state(path) == state for path, state in self._files.items())


def _files() -> list[str]:
    """Return lazyfs's files, and the directories that libraries are put into and taken from."""
    ours = [
        module.__file__
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "lazyfs" and module.__file__
    ]
    return [*ours, *(path for path in sys.path if path.endswith("-packages"))]


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - some two hundred for each command
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

"""What a standby imports ahead, and whether it is still what is installed.

Libraries take two thirds of a mount's start. Nothing is run here but what importing runs: no
thread, no event loop, no connection, no read of a setting that a command would read. So a child
begins as a fresh process does.
"""

import gc
import importlib
import os
import pkgutil
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

import lazyfs

LIBRARIES = (
    *("requests", "urllib3", "ssl", "idna", "encodings.idna", "encodings.ascii", "trio", "pyfuse3"),
    *("zlib_ng.zlib_ng", "zstandard", "xxhash", "msgspec", "h11", "flatbuffers", "yaml", "tomllib"),
    *("rich.console", "rich.progress", "rich.table", "click._textwrap", "difflib"),
)
"""What lazyfs imports inside functions, or its libraries do."""
_LEFT_OUT = ("lazyfs.__main__", "lazyfs.report", "lazyfs.cli.report")
"""What runs when it is imported, and what no command of a standby needs."""


class Preloaded:
    """What has been imported, and the state of its files then."""

    def __init__(self) -> None:
        """Import it. This process must have one thread, and has one then."""
        for name in (*_modules_of(lazyfs), *LIBRARIES):
            importlib.import_module(name)
        if threading.active_count() != 1:
            raise AssertionError("something that was imported has started a thread")
        gc.collect()
        gc.freeze()
        self._files = {path: _state(path) for path in _files()}

    def is_current(self) -> bool:
        """Whether lazyfs's own files, and where its libraries are, are as they were."""
        return all(_state(path) == state for path, state in self._files.items())


def _modules_of(package: ModuleType) -> Iterator[str]:
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if found.name not in _LEFT_OUT:
            yield found.name
            if found.ispkg:
                yield from _modules_of(importlib.import_module(found.name))


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

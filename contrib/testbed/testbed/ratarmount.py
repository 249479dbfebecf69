"""ratarmount: mounts an archive behind a URL; from PyPI, in an environment of its own.

Made when it is first asked for, in the testbed's cache directory; `pip` needs the network for it.
"""

from __future__ import annotations

import fcntl
import shutil
import sys
from pathlib import Path

from .errors import TestbedMissing
from .process import run
from .roots import Testbed

VERSION = "1.3.0"
_PACKAGES = (f"ratarmount=={VERSION}", "fsspec[http]==2026.9.0")
_INSTALL_S = 600.0


def ratarmount(testbed: Testbed) -> Path:
    """Return the program, which mounts an archive at a URL: `ratarmount --foreground URL DIR`.

    In the foreground only: in the background it loses its threads, and says so.

    Raises:
        TestbedMissing: it could not be installed.
    """
    home = testbed.cache / f"ratarmount-{VERSION}"
    program, done = home / "bin/ratarmount", home / "installed"
    with (testbed.cache / "ratarmount.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return program
        shutil.rmtree(home, ignore_errors=True)
        try:
            run([sys.executable, "-m", "venv", home], timeout_s=_INSTALL_S)
            run([home / "bin/pip", "install", "--quiet", *_PACKAGES], timeout_s=_INSTALL_S)
        except Exception as error:
            raise TestbedMissing(f"ratarmount cannot be installed: {error}") from error
        done.touch()
    return program

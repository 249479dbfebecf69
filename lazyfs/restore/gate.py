"""The gate that restored tasks have to pass: CRIU asks, before it lets go of them.

CRIU runs its action scripts with `post-restore` when all memory has been read and no task runs
yet; a script that fails has CRIU kill them all. Ours asks the process that keeps the restore, by
two pipes of it below /proc, and takes its answer. So a task whose memory could not be read never
runs, not for a millisecond. If that process is gone, the script fails.

The script is made known by a configuration file that $CRIU_CONFIG_FILE names, which CRIU reads
whoever starts it: a person, runc or crun. Seen with CRIU 4.1.1, by itself and under runc 1.1.15.
`asked` tells whether CRIU has asked at all; one that has not (`--no-default-config`) is to be
judged after it has returned.

Sources: CRIU, `criu/action-scripts.c`, `criu/config.c` (`init_configuration`),
`criu/cr-restore.c` (`restore_root_task`).
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lazyfs.ground.errors import LazyfsError

CONFIG_VARIABLE = "CRIU_CONFIG_FILE"
_ASK_MOST_BYTES = 64
_PREFIX = "lazyfs-gate-"
_YOUNG_S = 60.0
"""A directory that is younger may not be locked yet."""
_CONFIG_MOST_BYTES = 1 << 20
_SCRIPT = """#!/bin/sh
# CRIU asks whether what it has restored may run. See lazyfs, restore/gate.py.
[ "$CRTOOLS_SCRIPT_ACTION" = post-restore ] || exit 0
echo "$CRTOOLS_INIT_PID" >/proc/{pid}/fd/{asking} || exit 1
read -r answer </proc/{pid}/fd/{hearing} && [ "$answer" = yes ]
"""


class Gate:
    """A gate for one restore, kept by this process; a context manager."""

    def __init__(self, lines: tuple[str, ...] = ()) -> None:
        """`lines` go into CRIU's configuration beside.

        Raises:
            LazyfsError: there is no directory in which a script may be run.
        """
        self.asked = False
        """Whether CRIU has asked."""
        self.root_pid = 0
        """The restored root task, as CRIU sees it, once it has asked."""
        theirs = _theirs()
        self._home = _directory_to_run_in()
        self._lock = os.open(self._home.name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._asked, self._asking = os.pipe()
        self._hearing, self._answering = os.pipe()
        script = Path(self._home.name) / "may-they-run"
        script.write_text(
            _SCRIPT.format(pid=os.getpid(), asking=self._asking, hearing=self._hearing)
        )
        script.chmod(0o700)
        config = Path(self._home.name) / "criu.conf"
        config.write_text("\n".join([theirs, f'action-script "{script}"', *lines, ""]))
        self.environment: Mapping[str, str] = {CONFIG_VARIABLE: str(config)}
        """For whoever starts CRIU."""

    @property
    def home(self) -> str:
        """Return the directory that is left behind if this process is killed."""
        return self._home.name

    def fileno(self) -> int:
        """Return what can be read when CRIU asks."""
        return self._asked

    def answer(self, *, may_live: bool) -> None:
        """Answer CRIU, which has asked."""
        self.asked = True
        with suppress(ValueError):
            self.root_pid = int(os.read(self._asked, _ASK_MOST_BYTES))
        os.write(self._answering, b"yes\n" if may_live else b"no\n")

    def close(self) -> None:
        """Let nobody pass any more."""
        pipes = (self._asked, self._asking, self._hearing, self._answering)
        for descriptor in (*pipes, self._lock):
            with suppress(OSError):
                os.close(descriptor)
        with suppress(OSError):
            self._home.cleanup()

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _directory_to_run_in() -> tempfile.TemporaryDirectory[str]:
    """Return a fresh directory of this user's, on a filesystem that programs may be run from."""
    for base in (tempfile.gettempdir(), "/var/lib", "/run", "/dev/shm"):  # noqa: S108 - fresh, 0700
        with suppress(OSError):
            if not os.statvfs(base).f_flag & os.ST_NOEXEC:
                _clear(Path(base))
                return tempfile.TemporaryDirectory(prefix=_PREFIX, dir=base)
    raise LazyfsError(
        "CRIU needs a script of lazyfs', and no directory here lets programs be run from it: "
        "name one by TMPDIR"
    )


def _clear(base: Path) -> None:
    """Remove what gates have left behind whose keepers were killed: nobody holds their lock."""
    for left in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            seen = left.lstat()
            is_old = time.time() - seen.st_mtime > _YOUNG_S
            if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or not is_old:
                continue
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(lock)


def _theirs() -> str:
    """Return the configuration that the variable names already."""
    given = os.environ.get(CONFIG_VARIABLE, "")
    if not given:
        return ""
    try:
        with open(given, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(_CONFIG_MOST_BYTES)
    except OSError as error:
        raise LazyfsError(f"{given} (${CONFIG_VARIABLE}): {error.strerror}") from None

"""The testbed's Debian 13 root, entered: where container engines run.

`enter.sh` makes it: a mount and a pid namespace, the root pivoted into, what is written kept in
memory. This process holds a pipe to its first process; when the pipe is closed, as it is however
this process ends, the first process ends, and the kernel then kills the others and unmounts.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from .errors import TestbedError
from .process import children, run, wait_line, wait_until
from .roots import Testbed

_ENTER = Path(__file__).resolve().parent.parent / "enter.sh"
_CGROUPS = Path("/sys/fs/cgroup")

# bash, for it reaps the orphans that its pid 1 inherits.
_FIRST_PROCESS = ["bash", "-c", "echo entered; read -r _"]

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
}


class Session:
    """The root, entered; a context manager. All that runs inside is killed at the block's end.

    Folders in `binds` are seen inside at the same paths, with what is mounted on and below them
    at the time of entering: mount lazyfs before, or inside. A container that one session has
    checkpointed and another restores keeps the cgroup's name: give both the same `name`.
    """

    def __init__(self, testbed: Testbed, binds: Sequence[Path] = (), *, name: str = "") -> None:
        self.testbed = testbed
        self.pid = 0
        """Of its first process, as the host knows it."""
        self.name = name
        """A name of its own; cgroups of this name, anywhere, are removed at the end."""
        self._words = [str(_ENTER)]
        for folder in binds:
            self._words += ["-b", str(folder.absolute())]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Session:
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            process = subprocess.Popen(
                [*self._words, *_FIRST_PROCESS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "LAZYFS_TESTBED": str(self.testbed.cache)},
                start_new_session=True,
            )
            self._process = process
            self.name = self.name or f"lazyfs-testbed-{process.pid}"
            wait_line(process, b"entered", "the testbed's root cannot be entered", timeout_s=30)
            (self.pid,) = children(process.pid)
            on_failure.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def command(self, words: Sequence[str | Path]) -> list[str]:
        """Return the words that run a command inside; it is killed when their process is."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wd", "--"]
        enter += ["setpriv", "--pdeathsig", "KILL", "env", "-i"]
        enter += [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        return [*enter, *(str(word) for word in words)]

    def run(self, words: Sequence[str | Path], *, timeout_s: float = 120) -> str:
        """Run a command inside to its end; return its standard output.

        Raises:
            TestbedError: it failed or took longer than `timeout_s`.
        """
        return run(self.command(words), timeout_s=timeout_s)

    def path(self, inside: str | Path) -> Path:
        """Return the path by which the host reaches an absolute path inside."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def close(self) -> None:
        """Kill all that runs inside and wait until it is gone. May be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # --kill-child: the first process goes with it, and all others with that
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        if self.pid:
            wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), "the session's end", 20)
        with contextlib.suppress(TestbedError):  # one that stays is empty, and does no harm
            wait_until(self._cgroups_removed, f"the end of the cgroups {self.name}", 5)

    def _cgroups_removed(self) -> bool:
        for cgroup in list(self._cgroups()):
            for folder, _, _ in os.walk(cgroup, topdown=False):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()
        return not any(self._cgroups())

    def _cgroups(self) -> Iterator[Path]:
        """Yield our cgroups: on the only hierarchy, or on each of version 1."""
        for pattern in (self.name, f"*/{self.name}"):
            yield from _CGROUPS.glob(pattern)

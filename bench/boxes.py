"""Where a restore that is measured runs: a box, with pids and mounts of its own.

CRIU gives a process the pid that it had. So that several can be restored from one checkpoint at
once, and so that nothing is left of any, each restore is in a pid and a mount namespace, with an
init that reaps. All that runs in a box dies with it, and its mounts go. Everything else is the
machine's: network, files, cgroups; and boxes share lazyfs's run directory.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from harness import REPOSITORY
from testbed import Status, TestbedError
from testbed.guard import watch
from testbed.process import children, last_lines, stop, tree, wait_line, wait_until

T = TypeVar("T")

_INIT = """
trap '' CHLD
mount --rbind /proc "$3" && mount -t proc proc /proc && mount --bind "$1" "$2" || exit
echo "$4" >/proc/sys/kernel/ns_last_pid
echo up
exec sleep infinity
"""
"""Its children are reaped by the kernel: it ignores their ends."""
_PIDS_APART = 2000
"""Boxes share lazyfs's files, as daemons of one machine do: no two pids there may be the same."""
_PIDS_USED = 600
_SAMPLE_S = 0.25


class GaveUpError(TestbedError):
    """A way has not come to its end in the time that it was given."""


@dataclass
class Usage:
    """Processor time of processes, as last seen; in seconds by pid."""

    by_pid: dict[int, float] = field(default_factory=dict)
    sampled_s: float = 0.0

    @property
    def total_s(self) -> float:
        """What all of them have used together."""
        return sum(self.by_pid.values())


class Box:
    """One box; a context manager. `work` is its directory, seen inside under the same name."""

    def __init__(self, work: Path, number: int, status: Path, pid: int) -> None:
        """Prepare it.

        Args:
            work: an empty directory of its own.
            number: 0, 1, …: which of those that run at the same time.
            status: the status file in which a restored process reports, as it knows it.
            pid: the restored process's.
        """
        self.work = work
        self.pid = pid
        self.usage = Usage()
        self.environment = {"LAZYFS_STANDBY": "off", "LAZYFS_RUN_DIR": str(work.parent / "run")}
        """Of commands: lazyfs's daemons of all boxes find each other, and nobody else's."""
        own = work / "status"
        self.status = Status(own / status.name)
        """Where what the process in this box reports is to be read."""
        for each in (own, work / "proc", work / "criu", work / "mount"):
            each.mkdir(parents=True)
        (work.parent / "run").mkdir(mode=0o700, exist_ok=True)
        last_pid = 300 + _PIDS_APART * number
        if last_pid <= pid <= last_pid + _PIDS_USED:
            last_pid += _PIDS_USED
        arguments = [str(own), str(status.parent), str(work / "proc"), str(last_pid)]
        self._words = ["unshare", "--pid", "--fork", "--kill-child", "--mount"]
        self._words += ["--propagation", "private", "--", "/bin/sh", "-c", _INIT, "box", *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> "Box":
        null = subprocess.DEVNULL
        pipe = subprocess.PIPE
        process = subprocess.Popen(self._words, stdin=null, stdout=pipe, stderr=pipe)
        watch(process.pid)
        wait_line(process, b"up", "a box does not open", timeout_s=20)
        self._process = process
        (self._init,) = children(process.pid)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        stop(process)

    def seen(self, path: Path) -> Path:
        """Return where the machine sees what the box has at a path."""
        return Path(f"/proc/{self._init}/root{path}")

    def machine(self, path: Path) -> Path:
        """Return where the box sees what the machine has below /proc."""
        return self.work / "proc" / path.relative_to("/proc")

    def start(
        self, words: Sequence[str | Path], log: Path, *, stdout: Path | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command in the box; what it says goes to `log`."""
        command = ["nsenter", "-t", str(self._init), "-p", "-m", "--", *map(str, words)]
        with log.open("ab") as err, (stdout or log).open("ab") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd="/",
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **self.environment},
            )

    def run(self, words: Sequence[str | Path], log: Path, timeout_s: float) -> None:
        """Run a command in the box to its end.

        Raises:
            TestbedError: it failed; GaveUpError: it takes too long.
        """
        self.wait(self.start(words, log), log, timeout_s)

    def wait(self, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float) -> None:
        """Wait for a command's end, and see that it was a good one; as `run`."""
        self.wait_until(lambda: process.poll() is not None, f"the end of {log.stem}", timeout_s)
        if process.returncode:
            raise TestbedError(f"{log.stem}: exit code {process.returncode}\n{last_lines(log)}")

    def first_loop_s(self, began_s: float) -> float | None:
        """Return the seconds until the process first did its work, if it has."""
        events = self.status.events("loop", began_s)
        return events[0].at_s - began_s if events else None

    def wait_until(self, condition: Callable[[], T | None], what: str, timeout_s: float) -> T:
        """Return the condition's first value that is neither None nor False.

        Raises:
            GaveUpError: there was none within `timeout_s`.
        """
        until_s = time.monotonic() + timeout_s

        def met() -> T | None:
            if time.monotonic() > until_s:
                raise GaveUpError(f"not within {timeout_s:.0f} s: {what}")
            self._sample()
            return condition()

        return wait_until(met, what, 2 * timeout_s)

    # -- what it comes to ----------------------------------------------------------------------

    def memory_hash(self, timeout_s: float) -> tuple[str, ...]:
        """Have the restored process hash its memory."""
        pid = self._host_pid()
        return self.status.wait_hashes(lambda: os.kill(pid, signal.SIGUSR1), timeout_s)

    def lazyfs_status(self) -> dict[str, Any]:
        """Return a mount's account of itself, wherever in the box it is; empty if there is none.

        The mount of `lazyfs restore` has no name: a descriptor of the process that keeps it does.
        """
        mount = self.seen(self.work / "mount")
        if state := _status_of(mount):
            return state
        for pid in self._lazyfs_pids():
            with contextlib.suppress(OSError):
                for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                    if descriptor.readlink().is_relative_to("/") and (
                        state := _status_of(descriptor)
                    ):
                        return state
        return {}

    def lazyfs_cpu_s(self) -> float:
        """Return the processor time of lazyfs's processes so far."""
        self._sample(now=True)
        return round(self.usage.total_s, 3)

    def _sample(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self.usage.sampled_s < _SAMPLE_S:
            return
        self.usage.sampled_s = time.monotonic()
        for pid in self._lazyfs_pids():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                self.usage.by_pid[pid] = ticks / os.sysconf("SC_CLK_TCK")

    def _lazyfs_pids(self) -> list[int]:
        found = []
        for pid in self._pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(word.endswith(b"lazyfs") for word in words[:4]):
                    found.append(pid)
        return found

    def _pids(self) -> list[int]:
        """All processes of the box; those that `nsenter` started are no children of its init."""
        ours = Path(f"/proc/{self._init}/ns/pid").readlink()
        found = set(tree(self._init))
        for each in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if each.name.isdigit() and (each / "ns/pid").readlink() == ours:
                    found.add(int(each.name))
        return sorted(found)

    def _host_pid(self) -> int:
        for pid in self._pids():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("NSpid:") and int(line.split()[-1]) == self.pid:
                        return pid
        raise TestbedError(f"no process {self.pid} is in the box: it has ended")


def _status_of(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(os.getxattr(path, "user.lazyfs.status"))
        if isinstance(state, dict):
            return state
    return {}

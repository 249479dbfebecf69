"""The process that is checkpointed, and what it says of itself in its status file."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from .errors import TestbedError
from .guard import watch
from .process import kill_child, wait_until
from .roots import Testbed

Pattern = Literal["regions", "scattered"]


@dataclass(frozen=True)
class Event:
    """One line of the status file; workload.c says what each field means."""

    kind: str
    member: int
    at_s: float
    """As of `time.time()`: CLOCK_MONOTONIC goes on from the dump in a restored process."""
    pid: int
    number: int
    value: str


@dataclass(frozen=True)
class Status:
    """A workload's status file."""

    path: Path
    members: int = 1
    """How many processes write to it: one, and its children."""

    def events(self, kind: str | None = None, after_s: float = 0) -> list[Event]:
        """Return what was reported after a moment of `time.time()`, oldest first."""
        try:
            lines = self.path.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            words = line.split()
            if line.endswith("\n") and len(words) == 6:
                name, member, at_s, pid, number, value = words
                event = Event(name, int(member), float(at_s), int(pid), int(number), value)
                if kind in (None, event.kind) and event.at_s > after_s:
                    found.append(event)
        return found

    def wait_loop(self, after_s: float = 0, timeout_s: float = 60) -> Event:
        """Wait until every member has finished a loop after `after_s`; return the last's event."""
        return self._wait_all("loop", after_s, timeout_s)[-1]

    def wait_hashes(self, ask: Callable[[], object], timeout_s: float = 60) -> tuple[str, ...]:
        """Have all members hash their memory and return the hashes, the parent's first.

        Args:
            ask: sends SIGUSR1 to the parent process.
            timeout_s: for all to have answered.
        """
        asked_s = time.time()
        ask()
        events = self._wait_all("hash", asked_s, timeout_s)
        return tuple(event.value for event in sorted(events, key=lambda event: event.member))

    def _wait_all(self, kind: str, after_s: float, timeout_s: float) -> list[Event]:
        def firsts() -> list[Event] | None:
            found: dict[int, Event] = {}
            for event in self.events(kind, after_s):
                found.setdefault(event.member, event)
            return list(found.values()) if len(found) == self.members else None

        return wait_until(
            firsts, f"a {kind} of each of {self.members} processes in {self.path}", timeout_s
        )


def workload_options(
    status: Path,
    *,
    size_mib: int = 64,
    percent: float = 5,
    pattern: Pattern = "regions",
    shared_mib: int = 0,
    children: int = 0,
    cow: bool = False,
    interval_ms: int = 50,
    seed: int = 1,
) -> list[str]:
    """Return the options of the program; workload.c says what each does."""
    words = ["--status", str(status), "--size", str(size_mib), "--percent", f"{percent:g}"]
    words += ["--pattern", pattern, "--shared", str(shared_mib), "--children", str(children)]
    words += ["--interval", str(interval_ms), "--seed", str(seed), *(["--cow"] if cow else [])]
    return words


class Workload:
    """A running workload; a context manager that kills it and its children at the end.

    The options are those of workload.c. It is ready when the block is entered: its memory is
    full and every process has done a loop.
    """

    def __init__(
        self,
        testbed: Testbed,
        status: Path,
        *,
        size_mib: int = 64,
        percent: float = 5,
        pattern: Pattern = "regions",
        shared_mib: int = 0,
        children: int = 0,
        cow: bool = False,
        interval_ms: int = 50,
        seed: int = 1,
    ) -> None:
        self.status = Status(status.absolute(), members=1 + children)
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            str(testbed.program("workload")),
            *workload_options(
                self.status.path,
                size_mib=size_mib,
                percent=percent,
                pattern=pattern,
                shared_mib=shared_mib,
                children=children,
                cow=cow,
                interval_ms=interval_ms,
                seed=seed,
            ),
        ]
        self._memory_mib = size_mib * (1 + children) + shared_mib

    def __enter__(self) -> Workload:
        self.status.path.unlink(missing_ok=True)
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        self._process, self.pid = process, process.pid
        with ExitStack() as on_failure:
            on_failure.callback(self.stop)
            watch(process.pid)

            def ready() -> bool:
                if process.poll() is not None:
                    raise TestbedError(f"the workload ended with code {process.returncode}")
                loops = self.status.events("loop")
                return len({event.member for event in loops}) == self.status.members

            wait_until(ready, "the workload's first loop", timeout_s=30 + self._memory_mib / 50)
            on_failure.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def memory_hash(self) -> tuple[str, ...]:
        """Return a hash of the memory of each process, the parent's first."""
        return self.status.wait_hashes(lambda: os.kill(self.pid, signal.SIGUSR1))

    def stop(self) -> None:
        """Kill it, unless it has ended (a dump ends it)."""
        process, self._process = self._process, None
        if process is not None:
            kill_child(process.pid)
            process.wait()

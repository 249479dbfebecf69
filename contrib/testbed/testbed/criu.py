"""Dump and restore host processes with CRIU, with or without a lazy-pages daemon.

A restored process is a child of the caller (`--restore-sibling`), so it can be reaped and its pid
is free again for the next restore. CRIU restores pids as they were: dump, then restore, without
thousands of other processes in between.

The images directory is not touched by this module itself, so a restore that is being measured
starts as cold as the caller left it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .errors import TestbedError
from .guard import watch
from .process import kill_child, last_lines, stop, tree, wait_gone, wait_until
from .roots import Testbed
from .workload import Status

SOCKET = "lazy-pages.socket"


class CriuError(TestbedError):
    """CRIU failed; the message ends with its log's errors."""


@dataclass
class Restored:
    """A restored process; a context manager that kills it, and its daemon, at the end."""

    started_s: float
    """`time.time()` just before anything of the restore was started."""
    seconds: float
    """From then until `criu restore` returned."""
    status: Status
    lazy_pages: subprocess.Popen[bytes] | None
    """The lazy-pages daemon. It ends by itself when all memory has been delivered."""
    ask_hash: Callable[[], None]
    """Sends SIGUSR1 to the parent process."""
    end: Callable[[], None]
    """Kills the processes and waits until they are gone."""
    pid: int = 0
    """Of the parent process, on the host; 0 for a container."""

    def wait_first_loop(self, timeout_s: float = 60) -> float:
        """Wait until each process has done a loop; return the seconds that took since the start."""
        return self.status.wait_loop(self.started_s, timeout_s).at_s - self.started_s

    def memory_hash(self, timeout_s: float = 60) -> tuple[str, ...]:
        """Return a hash of the memory of each process; reads all of it."""
        return self.status.wait_hashes(self.ask_hash, timeout_s)

    def wait_lazy_pages(self, timeout_s: float = 120) -> float:
        """Wait for the daemon to have delivered everything; return the seconds since the start.

        Raises:
            CriuError: the daemon failed.
        """
        if self.lazy_pages is None:
            return self.seconds
        code = wait_until(self.lazy_pages.poll, "the lazy-pages daemon's end", timeout_s)
        if code != 0:
            raise CriuError(f"the lazy-pages daemon ended with code {code}")
        return time.time() - self.started_s

    def kill(self) -> None:
        """Kill the process, its children and the daemon, and wait until they are gone."""
        with ExitStack() as parts:
            if self.lazy_pages is not None:
                parts.callback(stop, self.lazy_pages)
            parts.callback(self.end)

    def __enter__(self) -> Restored:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def dump(
    testbed: Testbed,
    pid: int,
    images_dir: Path,
    work_dir: Path,
    *,
    leave_running: bool = False,
    timeout_s: float = 300,
) -> float:
    """Dump a process tree into `images_dir` (made if need be); return the seconds it took.

    The logs go to `work_dir`. Unless `leave_running`, the processes are gone afterwards, and their
    pids free.

    Raises:
        CriuError: the dump failed; the processes run on.
    """
    images_dir.mkdir(parents=True, exist_ok=True)
    pids = tree(pid)
    words = ["--tree", str(pid), *(["--leave-running"] if leave_running else [])]
    started_s = time.monotonic()
    _criu(testbed, "dump", words, images_dir, work_dir, timeout_s)
    seconds = time.monotonic() - started_s
    if not leave_running:
        wait_gone(pids)
    return seconds


def restore(
    testbed: Testbed,
    images_dir: Path,
    work_dir: Path,
    status: Status,
    *,
    lazy_pages: bool | Sequence[str] | Path = False,
    timeout_s: float = 300,
) -> Restored:
    """Restore a process tree from `images_dir`, which may be read-only.

    Args:
        testbed: where CRIU is.
        images_dir: what `dump` wrote, or a view of it.
        work_dir: for logs, the pidfile and the socket.
        status: the workload's status file, where it goes on reporting.
        lazy_pages: True to restore with CRIU's lazy-pages daemon; or the command of another server
            for `work_dir`/lazy-pages.socket; or the path of that socket, on which one listens.
        timeout_s: for `criu restore` to return.

    Raises:
        CriuError: the restore failed; nothing of it is left.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    pidfile = work_dir / "restore.pid"
    pidfile.unlink(missing_ok=True)
    started_s = time.time()
    with ExitStack() as on_failure:
        daemon = None
        words = ["--restore-detached", "--restore-sibling", "--pidfile", str(pidfile.absolute())]
        if isinstance(lazy_pages, Path):
            words.append("--lazy-pages")
        elif lazy_pages:
            command = list(lazy_pages) if not isinstance(lazy_pages, bool) else None
            daemon = start_lazy_pages(testbed, images_dir, work_dir, command)
            on_failure.callback(stop, daemon)
            words.append("--lazy-pages")
        on_failure.callback(_clear_failed_restore, work_dir / "restore.log")
        _criu(testbed, "restore", words, images_dir, work_dir, timeout_s)
        seconds = time.time() - started_s
        pid = int(pidfile.read_text())
        watch(pid)
        on_failure.pop_all()
    return Restored(
        started_s,
        seconds,
        status,
        daemon,
        ask_hash=lambda: os.kill(pid, signal.SIGUSR1),
        end=lambda: kill_child(pid),
        pid=pid,
    )


def start_lazy_pages(
    testbed: Testbed,
    images_dir: Path,
    work_dir: Path,
    command: Sequence[str] | None = None,
    timeout_s: float = 30,
) -> subprocess.Popen[bytes]:
    """Start a lazy-pages server, CRIU's or another; return when its socket is there.

    Raises:
        CriuError: it ended, or made no socket within `timeout_s`.
    """
    socket, log = work_dir / SOCKET, work_dir / "lazy-pages.log"
    socket.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    words = list(command or _words(testbed, "lazy-pages", images_dir, work_dir, verbosity=1))
    with (work_dir / "lazy-pages.out").open("wb") as out:
        daemon = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )

    watch(daemon.pid)

    def listening() -> bool:
        if daemon.poll() is not None:
            said = f"{last_lines(work_dir / 'lazy-pages.out')}\n{last_lines(log)}".strip()
            raise CriuError(f"the lazy-pages server ended with code {daemon.returncode}\n{said}")
        return socket.exists()

    with ExitStack() as on_failure:
        on_failure.callback(stop, daemon)
        wait_until(listening, f"{socket}", timeout_s)
        on_failure.pop_all()
    return daemon


def _words(
    testbed: Testbed, action: str, images_dir: Path, work_dir: Path, verbosity: int = 3
) -> list[str]:
    words = [*testbed.host_command("criu"), action, f"-v{verbosity}", "-o", f"{action}.log"]
    return [*words, "-D", str(images_dir.absolute()), "-W", str(work_dir.absolute())]


def _criu(
    testbed: Testbed,
    action: str,
    options: Sequence[str],
    images_dir: Path,
    work_dir: Path,
    timeout_s: float,
) -> None:
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / f"{action}.log"
    log.unlink(missing_ok=True)
    words = [*_words(testbed, action, images_dir, work_dir), *options]
    with (work_dir / f"{action}.out").open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CriuError(
                f"criu {action} took longer than {timeout_s:g} s\n{last_lines(log)}"
            ) from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code != 0:
        said = last_lines(log) if log.exists() else last_lines(work_dir / f"{action}.out")
        raise CriuError(f"criu {action} failed with code {code}; {log} ends:\n{said}")


def _clear_failed_restore(log: Path) -> None:
    """Kill what a failed `criu restore` may have left: its root task would be our child."""
    with contextlib.suppress(OSError):
        forked = re.search(r"Forking task with (\d+) pid", log.read_text(errors="replace"))
        if forked:
            kill_child(int(forked[1]))

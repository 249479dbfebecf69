"""Waiting for conditions, and ending processes so that nothing of them is left.

Every wait here has a deadline and polls: a condition is never assumed after a sleep.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from .errors import TestbedError
from .guard import forget

T = TypeVar("T")

_POLL_S = 0.005


def wait_until(condition: Callable[[], T | None], what: str, timeout_s: float) -> T:
    """Return the condition's first value that is neither None nor False.

    Raises:
        TestbedError: there was none within `timeout_s`; the message says `what` was awaited.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value is not None and value is not False:
            return value
        if time.monotonic() > deadline:
            raise TestbedError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(_POLL_S)


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float = 120,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command to its end and return its standard output.

    Raises:
        TestbedError: it failed or took longer than `timeout_s`; the message has its last words.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=env,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TestbedError(f"took longer than {timeout_s:g} s: {' '.join(words)}") from error
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise TestbedError(f"exit code {done.returncode} from {' '.join(words)}\n{said}")
    return done.stdout


def last_lines(log: Path, lines: int = 15) -> str:
    """Return the end of a log file, or a note that there is none."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"({error})"
    return "\n".join(text.splitlines()[-lines:])


def wait_line(process: subprocess.Popen[bytes], start: bytes, what: str, timeout_s: float) -> None:
    """Wait for the first line of a child's output, which must begin with `start`.

    Raises:
        TestbedError: it said something else, or nothing within `timeout_s`; the child is killed.
    """
    stdout, stderr = process.stdout, process.stderr
    spoke = stdout and select.select([stdout], [], [], timeout_s)[0]
    if stdout and spoke and stdout.readline().startswith(start):
        return
    process.kill()
    said = stderr.read().decode(errors="replace").strip() if stderr else ""
    raise TestbedError(f"{what}: {said or f'no answer within {timeout_s:g} s'}")


def stop(process: subprocess.Popen[bytes], grace_s: float = 5) -> None:
    """End a child process, by SIGTERM and after `grace_s` by SIGKILL, and reap it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    forget(process.pid)
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def children(pid: int) -> list[int]:
    """Return the direct children of a process; empty if it is gone."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in listing.read_text().split()]
    return found


def tree(pid: int) -> list[int]:
    """Return a process and its descendants, parents first."""
    return [pid, *(each for child in children(pid) for each in tree(child))]


def wait_gone(pids: Iterable[int], timeout_s: float = 20) -> None:
    """Wait until none of these pids is in use, reaping those that are our own children.

    A zombie keeps its pid and its session's, so CRIU cannot restore there; some machines' init
    takes a second to reap.
    """
    left = list(pids)

    def all_gone() -> bool:
        for pid in left.copy():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if not Path(f"/proc/{pid}").exists():
                left.remove(pid)
        return not left

    try:
        wait_until(all_gone, f"the end of processes {left}", timeout_s)
    except TestbedError as error:
        raise TestbedError(f"processes {left} would not end") from error


def kill_child(pid: int, timeout_s: float = 20) -> None:
    """Kill a child of ours and its descendants, and wait until all are gone.

    Nothing is done if it is no child of ours: it has ended, and its pid may be another's.
    """
    forget(pid)
    if pid not in children(os.getpid()):
        return
    pids = tree(pid)
    for each in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    wait_gone(pids, timeout_s)

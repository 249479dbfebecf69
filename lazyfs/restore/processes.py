"""Processes that restore and are restored: whose children they are, and how they end for sure.

What CRIU forks becomes a child of the nearest *subreaper* when CRIU ends or is killed. A process
that is one finds all that is left among its descendants, whatever their pids and sessions.

Sources: prctl(2), PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG; proc_pid_stat(5).
"""

import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAUSE_S = 0.005

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have this process killed when the thread that forked it ends; for between fork and exec.

    `parent` is that thread's process: if it has ended already, so do we.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def descendants(of: int, spared: Collection[int] = ()) -> list[int]:
    """Return the children of a process and theirs, parents first; none below those spared."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)

    def below(pid: int) -> Iterator[int]:
        for child in children.get(pid, ()):
            if child not in spared:
                yield child
                yield from below(child)

    return list(below(of))


def kill_descendants(spared: Collection[int] = (), timeout_s: float = 10.0) -> list[int]:
    """Kill all descendants of this process but those spared and theirs; return what is left.

    All that end are reaped. Nothing is left, but for a process that the kernel keeps.
    """
    deadline_s = time.monotonic() + timeout_s
    while left := descendants(os.getpid(), spared):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() >= deadline_s:
            return left
        time.sleep(_PAUSE_S)
    return []


def reap(spared: Collection[int] = ()) -> None:
    """Reap children that have ended, but those spared."""
    for pid, parent in _parents().items():
        if parent == os.getpid() and pid not in spared:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _parents() -> Mapping[int, int]:
    """Return the parent of each process there is."""
    found = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                text = (each / "stat").read_bytes()
                found[int(each.name)] = int(text.rpartition(b")")[2].split()[1])
    return found


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits to be reaped (proc_pid_stat(5), `state`)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state in "ZX"

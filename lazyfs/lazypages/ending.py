"""The end of tasks whose memory will not come: killed, before anybody lets go of it.

The kernel fills what is missing with zeros as soon as the last descriptor of a userfaultfd is
closed, so that is done only when nobody is left who could read them. Whoever waits for a page, or
in fork(2) or mremap(2) for an event to be read, can be killed all the same; and while nobody
reads events such a task has no children that are not its own yet.

Blocks; for a thread, or a process of its own. Source: Linux, fs/userfaultfd.c
(userfaultfd_release, userfaultfd_event_wait_completion).
"""

import os
import re
import select
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lazyfs.lazypages.uffd import Userfaultfd

_PROC = Path("/proc")
_PAUSE_S = 0.01
_PAUSE_MOST_S = 1.0


def end_tasks(pidfds: Iterable[int], uffds: Sequence[int], patience_s: float | None = None) -> bool:
    """Kill tasks and all that descends from them; come back when their memory is gone.

    `uffds`: those of the tasks and of their children; they stay the caller's. False: after
    `patience_s` somebody still has such memory, whom nobody knows: a child of theirs whose parent
    has exited. It goes on, and waits for the first page that it misses, for as long as the
    descriptor is held.
    """
    tasks = list(pidfds)
    with suppress(OSError):  # no descriptor is left to look with
        for pid in _descendants({pid for pidfd in tasks if (pid := pid_of(pidfd)) > 0}):
            with suppress(OSError):  # it has gone
                _kill(os.pidfd_open(pid), close=True)
    for pidfd in tasks:
        _kill(pidfd)
    for pidfd in tasks:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(None if patience_s is None else patience_s * 1000)
    deadline_s = None if patience_s is None else time.monotonic() + patience_s
    left = [Userfaultfd(each) for each in uffds]
    pause_s = _PAUSE_S
    while left := [each for each in left if each.is_alive()]:
        if deadline_s is not None and time.monotonic() >= deadline_s:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _PAUSE_MOST_S)
    return True


def pid_of(pidfd: int) -> int:
    """Return the pid here of whom a pidfd stands for; -1 if it has ended, 0 if it is not seen."""
    try:
        text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    except OSError:
        return -1
    found = re.search(r"^Pid:\s*(-?\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else -1


def _kill(pidfd: int, *, close: bool = False) -> None:
    with suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    if close:
        os.close(pidfd)


def _descendants(pids: set[int]) -> list[int]:
    """Return all processes that have one of these among their parents."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir(_PROC):  # noqa: PTH208 - of thousands, in a hurry
        if entry.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = (_PROC / entry / "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    todo = list(pids)
    while todo:
        for child in children.get(todo.pop(), ()):
            if child not in pids:
                found.append(child)
                todo.append(child)
    return found

"""The last resort against stray processes: what is watched dies with this process.

Blocks end their processes when they are left, but not if this process is killed. So a shell in
the background holds a pipe to it and a list of pids, and kills them when the pipe is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess

_SCRIPT = """
pids=
while read -r sign pid; do
    kept=
    for each in $pids; do [ "$each" = "$pid" ] || kept="$kept $each"; done
    pids=$kept
    [ "$sign" = - ] || pids="$pids $pid"
done
[ -z "$pids" ] || kill -KILL $pids
"""


def watch(pid: int) -> None:
    """Have a process killed when this one ends, whatever way it does."""
    _tell(f"+ {pid}\n")


def forget(pid: int) -> None:
    """Take back `watch`: the process has ended, and its pid may become another's."""
    _tell(f"- {pid}\n")


def _tell(line: str) -> None:
    stdin = _guard(os.getpid()).stdin
    if stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            stdin.write(line.encode())


@functools.cache
def _guard(_our_pid: int) -> subprocess.Popen[bytes]:
    """Start the guard of this very process (a fork has its own)."""
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )
    atexit.register(guard.communicate)
    return guard

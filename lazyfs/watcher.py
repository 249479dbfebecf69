"""Who watches for the end of a recording, and tells the daemon that records.

The daemon that records is told over a socket pair, a line of JSON a message (`recorder.py` is the
other end). What it is told: `{"mark": NAME, "at_s": T}`, and last `{"end": WHY, "at_s": T,
"phases": [[NAME, BEGAN_S, ENDED_S]]}`, which it answers by what it has written. It says
`{"ready": true}` once its mount answers. Times are of `time.monotonic`, which all processes share.
"""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from lazyfs.background import close_inherited
from lazyfs.ground.errors import LazyfsError
from lazyfs.until import Until

GIVEN_UP_S = 600.0
"""What has not come by then is waited for no longer: memory would never be home. SECONDS are
what was asked for: they pass."""
TICK_S = 0.02
_ANSWER_TIMEOUT_S = 60.0
_LINE_MOST_BYTES = 1 << 20


class Link:
    """Our end of the socket pair; the daemon that records has the other."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._heard = b""
        self._has_ended = False

    @classmethod
    def pair(cls) -> "tuple[Link, socket.socket]":
        """Return our end, and the daemon's."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def fileno(self) -> int:
        """Return what can be read when the daemon says something, or is gone."""
        return self._link.fileno()

    def mark(self, name: str, at_s: float | None = None) -> None:
        """Tell of a moment."""
        self._say({"mark": name, "at_s": at_s if at_s is not None else time.monotonic()})

    def end(
        self, why: str, phases: Sequence[tuple[str, float, float]] = (), at_s: float | None = None
    ) -> Mapping[str, Any]:
        """Say that it is over; return what has been written, or why nothing was.

        Only what is told first counts; then nothing is returned.
        """
        if self._has_ended:
            return {}
        self._has_ended = True
        at_s = at_s if at_s is not None else time.monotonic()
        self._say({"end": why, "at_s": at_s, "phases": phases})
        told = self.hear(_ANSWER_TIMEOUT_S)
        while told is not None and "ready" in told:
            told = self.hear(_ANSWER_TIMEOUT_S)
        return told or {"error": "no trace has been written: whoever records has gone"}

    def hear(self, timeout_s: float | None) -> dict[str, Any] | None:
        """Return what the daemon says; None if it is gone."""
        self._link.settimeout(timeout_s)
        try:
            while b"\n" not in self._heard and len(self._heard) < _LINE_MOST_BYTES:
                piece = self._link.recv(1 << 16)
                if not piece:
                    return None
                self._heard += piece
            line, _, self._heard = self._heard.partition(b"\n")
            told = json.loads(line)
        except (OSError, ValueError):
            return None
        return told if isinstance(told, dict) else None

    def close(self) -> None:
        """Say nothing more."""
        self._link.close()

    def _say(self, words: Mapping[str, Any]) -> None:
        with suppress(OSError):
            self._link.settimeout(_ANSWER_TIMEOUT_S)
            self._link.sendall(json.dumps(words).encode() + b"\n")


def start_watcher(until: Until) -> socket.socket:
    """Fork a process that looks until it is so, and tells; return the daemon's end of the link.

    It ends with the daemon. This process must have no other threads.

    Raises:
        LazyfsError: it cannot be started.
    """
    link, theirs = Link.pair()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how children end
    try:
        pid = os.fork()
    except OSError as error:
        raise LazyfsError(f"nobody can watch for --until: {error.strerror}") from None
    if pid == 0:
        _watch(until, link)
    os.waitpid(pid, 0)
    link.close()
    return theirs


def _watch(until: Until, link: Link) -> NoReturn:
    """Be the watcher."""
    try:
        os.setsid()
        if os.fork():  # whoever started us does not wait for us
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        close_inherited({link.fileno()})
        told = link.hear(None)
        if told is not None and told.get("ready"):
            why = wait_until(until, link)
            if why is not None:
                link.end(why)
    finally:
        os._exit(0)


def wait_until(until: Until, link: Link, *, given_up_after_s: float = GIVEN_UP_S) -> str | None:
    """Come back when it is so, or has been given up, and say why; None if the daemon is gone."""
    given_up_s = time.monotonic() + given_up_after_s + until.least_s
    check = until.begin()
    poll = select.poll()
    poll.register(link, select.POLLIN)
    try:
        while (why := check.poll()) is None:
            if poll.poll(TICK_S * 1000):
                return None
            if time.monotonic() >= given_up_s:
                return given_up(until)
        return why
    finally:
        check.close()


def given_up(until: Until) -> str:
    """Return what is said of what has not come."""
    return f"given up: not within {GIVEN_UP_S:g} s, {until.name}"


def process_began_s() -> float:
    """Return when this process was started, by `time.monotonic`, to a hundredth of a second.

    Source: proc_pid_stat(5), `starttime`.
    """
    now_s = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return now_s
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now_s - max(0.0, age_s)

"""What an engine really asks of its OCI runtime: a runtime that notes each call, and then obeys.

It stands where the engine names its runtime. Of each call it notes the words, the environment, the
open descriptors, the working directory, the umask, the cgroups, the signals, who called, and what
lies in the directories that a restore names; then it is the real runtime. `tests/data/engines` has
the calls of the testbed's engines.
"""

from __future__ import annotations

import json
from typing import Any

from .session import Session

_LOG = "/run/recorder/calls"

_PROGRAM = """#!/usr/bin/python3 -IS
import ctypes, json, os, sys

LOG, REAL, TO_BE = %r, %r, %r
umask = os.umask(0)
os.umask(umask)
descriptors = {}
for number in sorted(map(int, os.listdir("/proc/self/fd"))):
    try:
        target = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        continue  # the listing's own
    descriptors[number] = target.partition(":[")[0]
with open("/proc/self/status") as file:
    status = dict(line.split(":\\t", 1) for line in file if ":\\t" in line)
with open("/proc/self/cgroup") as file:
    cgroup = file.read().split()
try:
    with open(f"/proc/{os.getppid()}/cmdline") as file:
        parent = file.read().split("\\0")[:-1]
except OSError:
    parent = None  # of another pid namespace
deathsig = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(deathsig), 0, 0, 0)
words = sys.argv[1:]
listings = {}
if "restore" in words:
    for option in ("--image-path", "--work-path", "--bundle"):
        if option in words[:-1]:
            folder = words[words.index(option) + 1]
            listings[option] = sorted(os.listdir(folder)) if os.path.isdir(folder) else None
call = {
    "argv": sys.argv,
    "environ": dict(os.environ),
    "descriptors": descriptors,
    "cwd": os.getcwd(),
    "umask": f"{umask:04o}",
    "cgroup": cgroup,
    "parent": parent,
    "leads_its_group": os.getpgid(0) == os.getpid(),
    "leads_its_session": os.getsid(0) == os.getpid(),
    "parent_death_signal": deathsig.value,
    "signals_blocked": status["SigBlk"].strip(),
    "listings": listings,
}
with open(LOG, "a") as file:
    file.write(json.dumps(call) + "\\n")
if TO_BE is not None and "restore" in words:
    sys.exit(TO_BE)
os.execv(REAL, [REAL] + words)
"""


class Recorder:
    """A runtime in a session, at `path`, that notes what it is asked before it does it."""

    def __init__(
        self,
        session: Session,
        path: str = "/usr/local/bin/recorder",
        *,
        real: str = "/usr/sbin/runc",
        restores_with: int | None = None,
    ) -> None:
        """Put it there.

        Args:
            session: where; its /run must be writable.
            path: what the engine is told to run.
            real: what it is afterwards.
            restores_with: do not restore, but end with this code.
        """
        self.path = path
        self._log = session.path(_LOG)
        self._log.parent.mkdir(exist_ok=True)
        program = session.path(path)
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(_PROGRAM % (_LOG, real, restores_with))
        program.chmod(0o755)

    def calls(self, command: str | None = None) -> list[dict[str, Any]]:
        """Return what was asked so far, oldest first: all, or the calls with this word."""
        if not self._log.exists():
            return []
        calls = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [call for call in calls if command is None or command in call["argv"][1:]]

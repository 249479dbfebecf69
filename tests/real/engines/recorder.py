"""What an engine calls its runtime with: a runtime that writes it down, and is then the real one.

It is a shell script, so that what it writes is what it was given: a shell changes neither signals
nor descriptors, but for the script itself, which it reads from a descriptor of its own.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed import Session

RECORDER = """\
#!/bin/sh
call=$(mktemp -d {records}/$(date +%s%N).XXXXXX)
(
    exec > "$call/written"
    for file in cmdline environ status cgroup stat; do cat /proc/$$/$file > "$call/$file"; done
    for each in /proc/$$/fd/*; do echo "${{each##*/}} $(readlink "$each")"; done > "$call/fd"
    cat /proc/$PPID/cmdline > "$call/parent"
    readlink /proc/$$/cwd > "$call/cwd"
)
exec {runtime} "$@"
"""
_PASSING = {
    r"(pipe|socket):\[\d+\]": r"\1:[]",
    r"\b[0-9a-f]{64}\b": "<random>",
    r"exec-process-\d+": "exec-process-<random>",
}
_STATUS = ("Umask", "NoNewPrivs", "SigBlk", "SigIgn")


def install(session: Session, records: str, path: str, runtime: str) -> None:
    """Put a runtime that writes down its calls below `records` at `path` of a session."""
    session.path(records).mkdir(parents=True)
    script = session.path(path)
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(RECORDER.format(records=records, runtime=runtime))
    script.chmod(0o755)


def calls(session: Session, records: str) -> list[dict[str, Any]]:
    """Return the calls that were written down, in their order."""
    return [_call(folder, session) for folder in sorted(session.path(records).iterdir())]


def _call(folder: Path, session: Session) -> dict[str, Any]:
    def text(name: str) -> str:
        return (folder / name).read_text(errors="surrogateescape")

    # The kernel puts the shell before a script's words, and the script's path for its name.
    argv = text("cmdline").split("\0")[1:-1]
    status = dict(line.split(":", 1) for line in text("status").splitlines() if ":" in line)
    descriptors = dict(line.split(" ", 1) for line in text("fd").splitlines())
    script = argv[0]
    pid, session_id = int(status["Pid"]), int(text("stat").rpartition(")")[2].split()[3])
    return {
        "argv": argv,
        "environ": dict(pair.split("=", 1) for pair in text("environ").split("\0") if "=" in pair),
        "cwd": text("cwd").strip(),
        "descriptors": {
            number: target for number, target in descriptors.items() if target not in ("", script)
        },
        "leads_session": pid == session_id,
        "parent": text("parent").split("\0")[0],
        "cgroups": _cgroups(text("cgroup"), session.name),
        **{name: status[name].strip() for name in _STATUS},
    }


def _cgroups(told: str, name: str) -> list[str]:
    """Return the cgroups that are the engine's doing, of whichever hierarchy."""
    paths = {line.split(":", 2)[2] for line in told.splitlines()}
    return sorted(path for path in paths if f"/{name}" in path)


def anonymous(call: Mapping[str, Any], words: Mapping[str, str]) -> Any:
    """Return a call with what differs from run to run replaced: names of things for the things."""
    written = json.dumps(call)
    for word, name in words.items():
        written = written.replace(word, f"<{name}>")
    for pattern, name in _PASSING.items():
        written = re.sub(pattern, name, written)
    return json.loads(written)

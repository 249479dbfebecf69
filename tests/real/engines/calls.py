"""Recorded calls of a runtime without what is of one machine, or of one run."""

import json
import re
from collections.abc import Mapping
from typing import Any

from testbed import Session

_PASSING = {
    r"\b[0-9a-f]{64}\b": "<random>",
    r"tmpfs-dev-\d+": "tmpfs-dev-<number>",
    r"exec-process-\d+": "exec-process-<random>",
    r"/tmp/(runc-process|ctrd-checkpoint)\d+": r"/tmp/\1<random>",
}


def portable(call: Mapping[str, Any], session: Session) -> dict[str, Any]:
    """Return a call without what is this machine's: of its cgroups those that are the engine's."""
    paths = {line.split(":", 2)[2] for line in call["cgroup"]}
    cgroup = sorted(path for path in paths if f"/{session.name}" in path)
    return {**call, "cgroup": cgroup, "parent": call["parent"][0] if call["parent"] else None}


def anonymous(step: Mapping[str, Any], words: Mapping[str, str]) -> Any:
    """Return a step with what differs from run to run replaced: names of things for the things."""
    written = json.dumps(step)
    for word, name in words.items():
        written = written.replace(word, f"<{name}>")
    for pattern, name in _PASSING.items():
        written = re.sub(pattern, name, written)
    return json.loads(written)

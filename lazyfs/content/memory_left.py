"""How much memory there is for this process: of the machine, and within its control groups.

A daemon in a container has what the container was given, whatever the machine has. What its
groups hold of files counts as available, as it does in the machine's own figure.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_NO_LIMIT = 1 << 60
"""A group without a limit says "max", or (cgroup v1) a number that no machine has."""


class Memory(NamedTuple):
    """In bytes."""

    all_bytes: int
    available_bytes: int


def memory_left(root: Path = Path("/")) -> Memory:
    """Look how much memory there is, below `root`, where /proc and /sys are.

    Sources: proc_meminfo(5); the kernel's cgroup-v2.rst ("memory.max", "memory.current",
    "memory.stat") and cgroup-v1/memory.rst. Where nothing tells, there is enough.
    """
    told = _numbers(root / "proc/meminfo")
    all_bytes = told.get("MemTotal:", _NO_LIMIT >> 10) << 10
    available_bytes = told.get("MemAvailable:", _NO_LIMIT >> 10) << 10
    for group, limit_name, used_name in _groups(root):
        limit_bytes = _number(group / limit_name)
        if limit_bytes is None or limit_bytes >= _NO_LIMIT:
            continue
        used_bytes = _number(group / used_name) or 0
        files_bytes = _numbers(group / "memory.stat").get("inactive_file", 0)
        left_bytes = max(0, limit_bytes - max(0, used_bytes - files_bytes))
        all_bytes = min(all_bytes, limit_bytes)
        available_bytes = min(available_bytes, left_bytes)
    return Memory(all_bytes, available_bytes)


def _groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the directories of this process's groups, and of all above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            names = "memory.max", "memory.current"
            top = mounted / "unified" if (mounted / "unified").is_dir() else mounted
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            top = mounted / "memory"
        else:
            continue
        group = top / path.lstrip("/")
        if ".." not in group.parts:
            for each in (group, *group.parents):
                if each.is_relative_to(top):
                    yield (each, *names)


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Return the second word of each line by the first, where it is a number."""
    found = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) >= 2 and words[1].isdecimal():
                found[words[0]] = int(words[1])
    return found

"""What the benchmarks share: the machine's description, lazyfs mounts, medians, JSON."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "contrib" / "testbed"))


def _lazyfs_words() -> list[str]:
    """Return the words of this clone's command, also where another clone is installed."""
    installed = json.loads(distribution("lazyfs").read_text("direct_url.json") or "{}")
    if installed.get("url") == REPOSITORY.as_uri():
        return [str(Path(sys.executable).with_name("lazyfs"))]
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    return [sys.executable, "-P", "-m", "lazyfs"]


LAZYFS = str(Path(sys.executable).with_name("lazyfs"))
"""The command that is installed, be it this clone's or not."""
LAZYFS_WORDS = _lazyfs_words()


def machine() -> dict[str, Any]:
    """Describe what was measured, and on what."""
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    packages = ("pyfuse3", "trio", "requests", "urllib3", "xxhash", "zstandard", "msgspec")
    return {
        "commit": commit.stdout.strip() or "unknown",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("lazyfs", *packages)},
    }


class Mount:
    """A lazyfs mount that is being measured."""

    def __init__(self, directory: Path, seconds: float) -> None:
        self.directory = directory
        self.seconds = seconds
        """From the start of `lazyfs mount` until it returned."""

    def status(self) -> dict[str, Any]:
        """Return the mount's own account."""
        state: dict[str, Any] = json.loads(os.getxattr(self.directory, "user.lazyfs.status"))
        return state

    def memory(self) -> dict[str, int]:
        """Return the daemon's memory now and at its peak, in bytes."""
        return process_memory(self.status()["pid"])


def process_memory(pid: int) -> dict[str, int]:
    """Return a process's anonymous memory now and its whole peak, in bytes."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    names = {"anonymous_bytes": "RssAnon", "peak_bytes": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


@contextmanager
def mounted(reference: str, work: Path, *options: str, keep_cache: bool = False) -> Iterator[Mount]:
    """Mount on `work`/mount with the cache `work`/cache, which begins empty unless kept."""
    directory, cache = work / "mount", work / "cache"
    directory.mkdir(parents=True, exist_ok=True)
    if not keep_cache:
        shutil.rmtree(cache, ignore_errors=True)
    began = time.monotonic()
    command = [
        *LAZYFS_WORDS,
        "mount",
        "--cache-dir",
        str(cache),
        *options,
        reference,
        str(directory),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    try:
        yield Mount(directory, seconds)
    finally:
        subprocess.run([*LAZYFS_WORDS, "umount", str(directory)], check=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Keep a result for whoever wants to compute with it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{path} written")

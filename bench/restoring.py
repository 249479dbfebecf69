"""What the benchmarks of restores share: a process that was checkpointed, and ways to resume it."""

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness import mounted, spread
from rich.console import Console
from rich.table import Table
from testbed import Restored, Testbed, Workload, restore
from testbed.process import wait_until

ONE_WAY_MS = 5
RATE_MBIT = 1000


@dataclass
class Bench:
    """What all ways have in common."""

    testbed: Testbed
    work: Path
    registry: str
    workload: Workload
    memory: tuple[str, ...]
    blobs: dict[str, str] = field(default_factory=dict)
    """URL of each baseline's blob."""
    references: dict[str, str] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        """Where a mount serves lazy pages itself."""
        return self.work / "w" / "lazy-pages.socket"

    def resume(self, images: Path, *, lazy: bool | Path = False) -> Restored:
        """Restore the process from a directory of images.

        `lazy`: with `criu lazy-pages`, or with who serves that socket already.
        """
        return restore(self.testbed, images, self.work / "w", self.workload.status, lazy_pages=lazy)

    def finish(self, restored: Restored, began: float, row: dict[str, Any]) -> None:
        """Wait for the first loop, account, compare the memory."""
        row["first_loop_s"] = restored.started_s + restored.wait_first_loop() - began
        row["criu_restore_s"] = restored.seconds
        if restored.lazy_pages is not None:
            row["criu_read_bytes"] = _read_by(restored.lazy_pages.pid)

    def compare(self, restored: Restored) -> None:
        """Refuse to measure what restores wrongly."""
        if restored.memory_hash(timeout_s=300) != self.memory:
            raise SystemExit("the process's memory is not what it was: nothing here counts")


def _read_by(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    return 0


def local(bench: Bench, *, lazy: bool) -> dict[str, Any]:
    """Restore from the local disk, page cache warm."""
    images = bench.work / "images"
    for file in images.iterdir():
        file.read_bytes()
    row: dict[str, Any] = {"fetched_bytes": 0}
    began = time.time()
    with bench.resume(images, lazy=lazy) as restored:
        bench.finish(restored, began, row)
        bench.compare(restored)
    return row


def pull(bench: Bench, *, name: str, unpack: str) -> dict[str, Any]:
    """Pull and unpack in one pipe, then restore."""
    target = bench.work / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    row: dict[str, Any] = {}
    began = time.time()
    pipe = f"set -o pipefail; curl -sSf {bench.blobs[name]} | {unpack} -C {target}"
    subprocess.run(["bash", "-c", pipe], check=True)
    row["pull_s"] = time.time() - began
    with bench.resume(target / "checkpoint") as restored:
        bench.finish(restored, began, row)
        bench.compare(restored)
    row["fetched_bytes"] = _content_length(bench.blobs[name])
    shutil.rmtree(target)
    return row


def _content_length(url: str) -> int:
    head = subprocess.run(["curl", "-sfI", url], capture_output=True, text=True, check=True)
    lengths = [
        line.split(":")[1]
        for line in head.stdout.splitlines()
        if line.lower().startswith("content-length:")
    ]
    return int(lengths[-1])


def lazyfs(
    bench: Bench, *, name: str, lazy: bool | Literal["own"], again: bool = False
) -> dict[str, Any]:
    """Mount an image that was never here, and restore from the mount.

    Or, `again`, one whose bytes an earlier mount has left in the cache. Pages come lazily by
    `criu lazy-pages`, or by the mount's own server.
    """
    row: dict[str, Any] = {}
    options = ["--plain-http"]
    if lazy == "own":
        bench.socket.parent.mkdir(exist_ok=True)
        options += ["--lazy-pages", str(bench.socket.parent)]
    began = time.time()
    reference, work = bench.references[name], bench.work / "lazyfs"
    with (
        mounted(reference, work, *options, keep_cache=again) as mount,
        bench.resume(mount.directory, lazy=bench.socket if lazy == "own" else lazy) as restored,
    ):
        bench.finish(restored, began, row)
        state = mount.status()
        row["mount_s"] = mount.seconds
        row["fetched_bytes"] = state["bytes_fetched"]
        row["served_bytes"] = state["bytes_read"]
        row["requests"] = state["requests"]
        if lazy == "own":
            row["lazy_pages"] = state["lazy_pages"]
            wait_until(lambda: _are_home(mount.status()), "all memory is home", 300)
            row["all_home_s"] = time.time() - began
        bench.compare(restored)
        if lazy is True:
            row["all_home_s"] = restored.wait_lazy_pages() + restored.started_s - began
        row.update(mount.memory())
    return row


def _are_home(state: dict[str, Any]) -> bool:
    told = state["lazy_pages"]
    if told["failed"]:
        raise SystemExit(f"the memory has not come: {told['failed']}")
    return bool(told["state"] == "home")


Way = Callable[[Bench], dict[str, Any]]


def measure(bench: Bench, ways: dict[str, Way], runs: int) -> dict[str, list[dict[str, Any]]]:
    """Measure every way in turn, run after run, and say what came out."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    console = Console(width=120)
    for run in range(runs):
        for name, way in ways.items():
            row = way(bench)
            rows[name].append(row)
            fetched = f", {row['fetched_bytes'] / 1e6:.1f} MB" if "fetched_bytes" in row else ""
            console.print(f"run {run + 1} {name}: {row['first_loop_s']:.2f} s{fetched}")
    return rows


def report(rows: dict[str, list[dict[str, Any]]], layer_bytes: int, link_s: float) -> Table:
    """Put medians into a table."""
    table = Table(
        title=f"{layer_bytes / 1e6:,.0f} MB over {RATE_MBIT} Mbit/s, {2 * ONE_WAY_MS} ms; "
        f"the link alone needs {link_s:.1f} s",
        title_justify="left",
    )
    table.add_column("way")
    for column in ("first loop, s", "min - max", "x link time", "fetched, MB", "of what CRIU read"):
        table.add_column(column, justify="right")
    for name, measured in rows.items():
        loop = spread([row["first_loop_s"] for row in measured])
        sizes = [row["fetched_bytes"] for row in measured if "fetched_bytes" in row]
        fetched = spread(sizes)["median"] if sizes else None
        reads = [row["criu_read_bytes"] for row in measured if row.get("criu_read_bytes")]
        ratio = f"{fetched / spread(reads)['median']:.2f}" if reads and fetched else ""
        table.add_row(
            name,
            f"{loop['median']:.2f}",
            f"{loop['min']:.2f} - {loop['max']:.2f}",
            f"{loop['median'] / link_s:.2f}",
            f"{fetched / 1e6:,.1f}" if fetched is not None else "",
            ratio,
        )
    return table

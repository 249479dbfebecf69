#!/usr/bin/env python3
"""How soon does a process run whose memory comes lazily, from what is already on this machine?

A process is restored, run after run, each way in turn: eagerly and with CRIU's lazy-pages server,
from a local disk and from a mount whose cache is warm; and with the mount's own server. Seconds
from the start of the restore (the mount is there) to the first loop, and until all memory is home;
processor seconds of whoever served it. The memory is compared each time.

    bench/lazypages.py [--size 1024] [--percent 5] [--pattern regions|scattered] [--runs 5]
                       [--only WAY …] [--json FILE]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from harness import machine, mounted, spread, write_json
from rich.console import Console
from rich.table import Table
from testbed import (
    Layer,
    Restored,
    Testbed,
    Workload,
    dump,
    restore,
    tar_checkpoint,
    write_oci_layout,
)
from testbed.process import wait_until

Row = dict[str, Any]
SOCKET_NAME = "lazy-pages.socket"


class Bench:
    """What all ways have in common."""

    def __init__(self, testbed: Testbed, work: Path, workload: Workload) -> None:
        self.testbed, self.work, self.workload = testbed, work, workload
        self.memory = workload.memory_hash()
        self.reference = f"oci:{work / 'layout'}"

    def resume(self, images: Path, lazy_pages: bool | Path) -> Restored:
        """Restore the process from a directory of images."""
        return restore(
            self.testbed, images, self.work / "w", self.workload.status, lazy_pages=lazy_pages
        )

    def finish(self, restored: Restored, home: Callable[[], float]) -> Row:
        """Wait for the first loop and for all memory; compare it."""
        row = {"first_loop_s": restored.wait_first_loop(300), "criu_restore_s": restored.seconds}
        row["all_home_s"] = home()
        if restored.memory_hash(timeout_s=300) != self.memory:
            raise SystemExit("the process's memory is not what it was: nothing here counts")
        return row


def local(bench: Bench, *, lazy: bool) -> Row:
    """Restore from the local disk, page cache warm; with CRIU's server or without."""
    images = bench.work / "images"
    for file in images.iterdir():
        file.read_bytes()
    with bench.resume(images, lazy) as restored:
        return bench.finish(restored, restored.wait_lazy_pages)


def mount(bench: Bench, *, lazy: bool) -> Row:
    """Restore from a mount whose cache is warm; with CRIU's server or without."""
    with (
        mounted(bench.reference, bench.work / "lazyfs", keep_cache=True) as mounted_,
        bench.resume(mounted_.directory, lazy) as restored,
    ):
        return bench.finish(restored, restored.wait_lazy_pages)


def own(bench: Bench) -> Row:
    """Restore from a mount whose cache is warm, with the mount's own server."""
    socket = bench.work / "w" / SOCKET_NAME
    options = ("--lazy-pages", str(socket.parent))
    with (
        mounted(bench.reference, bench.work / "lazyfs", *options, keep_cache=True) as mounted_,
        bench.resume(mounted_.directory, socket) as restored,
    ):
        pid = mounted_.status()["pid"]
        before_s = processor_s(pid)

        def told() -> Row | None:
            state: Row = mounted_.status()["lazy_pages"]
            return state if state["state"] in ("home", "failed") else None

        def home() -> float:
            wait_until(told, "all memory is home", 300)
            return time.time() - restored.started_s

        row = bench.finish(restored, home)
        row["processor_s"] = processor_s(pid) - before_s
        row["lazy_pages"] = {key: value for key, value in (told() or {}).items() if key != "socket"}
        return row


def processor_s(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


WAYS: dict[str, Callable[[Bench], Row]] = {
    "local disk, eager": partial(local, lazy=False),
    "local disk, criu lazy-pages": partial(local, lazy=True),
    "mount, eager": partial(mount, lazy=False),
    "mount, criu lazy-pages": partial(mount, lazy=True),
    "mount, its own server": own,
}


def report(rows: dict[str, list[Row]]) -> Table:
    """Put medians into a table."""
    table = Table(title="seconds, median (least - most)", title_justify="left")
    for column in ("way", "first loop", "all home"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, measured in rows.items():
        cells = []
        for key in ("first_loop_s", "all_home_s"):
            found = spread([row[key] for row in measured])
            cells.append(f"{found['median']:.2f} ({found['min']:.2f} - {found['max']:.2f})")
        table.add_row(name, *cells)
    return table


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of memory")
    parser.add_argument("--percent", type=float, default=5)
    parser.add_argument("--pattern", choices=["regions", "scattered"], default="regions")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if not options.only or name in options.only}
    testbed = Testbed.locate()
    console = Console(width=120)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        (work / "w").mkdir()
        workload = stack.enter_context(
            Workload(
                testbed,
                work / "status",
                size_mib=options.size,
                percent=options.percent,
                pattern=options.pattern,
            )
        )
        bench = Bench(testbed, work, workload)
        dump(testbed, workload.pid, work / "images", work / "dump")
        tar_checkpoint(work / "images", work / "checkpoint.tar")
        write_oci_layout(work / "layout", None, [Layer(work / "checkpoint.tar")])
        mount(bench, lazy=False)  # which warms the cache
        rows: dict[str, list[Row]] = {name: [] for name in ways}
        for run in range(options.runs):
            for name, way in ways.items():
                row = way(bench)
                rows[name].append(row)
                loop_s, home_s = row["first_loop_s"], row["all_home_s"]
                console.print(f"run {run + 1} {name}: {loop_s:.2f} s, all home {home_s:.2f} s")
    console.print(report(rows))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {
            "size_mib": options.size,
            "percent": options.percent,
            "pattern": options.pattern,
            "runs": options.runs,
        },
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

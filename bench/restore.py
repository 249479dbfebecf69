#!/usr/bin/env python3
"""How soon does a checkpointed process of 1 GiB run again, over a link of 1 Gbit/s and 10 ms?

Each way, in turn, run after run: seconds from an empty machine to the process's first loop, and
the bytes that had crossed the link by then. The process's memory is compared each time. The
baselines are at their best: a pull is `curl | tar`, unpacked while it arrives, which no engine
does; the local restores have their images in the page cache.

    bench/restore.py [--size 1024] [--runs 5] [--pattern regions|scattered] [--only WAY …]
                     [--json FILE]
"""

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import machine, mounted, spread, write_json
from rich.console import Console
from rich.table import Table
from testbed import (
    Layer,
    Registry,
    Restored,
    Testbed,
    Wan,
    Workload,
    dump,
    push_oci_image,
    restore,
    tar_checkpoint,
)

ONE_WAY_MS = 5
RATE_MBIT = 1000
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
CHUNKED = "zstd:chunked"


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


def local(bench: Bench, lazy: bool) -> dict[str, Any]:
    """Restore from the local disk, page cache warm."""
    images = bench.work / "images"
    for file in images.iterdir():
        file.read_bytes()
    row: dict[str, Any] = {"fetched_bytes": 0}
    began = time.time()
    with restore(
        bench.testbed, images, bench.work / "w", bench.workload.status, lazy_pages=lazy
    ) as restored:
        bench.finish(restored, began, row)
        bench.compare(restored)
    return row


def pull(bench: Bench, name: str, unpack: str) -> dict[str, Any]:
    """Pull and unpack in one pipe, then restore."""
    target = bench.work / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    row: dict[str, Any] = {}
    began = time.time()
    pipe = f"set -o pipefail; curl -sSf {bench.blobs[name]} | {unpack} -C {target}"
    subprocess.run(["bash", "-c", pipe], check=True)
    row["pull_s"] = time.time() - began
    with restore(
        bench.testbed, target / "checkpoint", bench.work / "w", bench.workload.status
    ) as restored:
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


def lazyfs(bench: Bench, name: str, lazy: bool) -> dict[str, Any]:
    """Mount an image that was never here, and restore from the mount."""
    row: dict[str, Any] = {}
    began = time.time()
    with (
        mounted(bench.references[name], bench.work / "lazyfs", "--plain-http") as mount,
        restore(
            bench.testbed, mount.directory, bench.work / "w", bench.workload.status, lazy_pages=lazy
        ) as restored,
    ):
        bench.finish(restored, began, row)
        state = mount.status()
        row["mount_s"] = mount.seconds
        row["fetched_bytes"] = state["bytes_fetched"]
        row["served_bytes"] = state["bytes_read"]
        row["requests"] = state["requests"]
        bench.compare(restored)
        if lazy:
            row["all_home_s"] = restored.wait_lazy_pages() + restored.started_s - began
        row.update(mount.memory())
    return row


def prepare(testbed: Testbed, work: Path, stack: ExitStack, options: Any) -> Bench:
    """Checkpoint the process and push it beyond the link."""
    wan = stack.enter_context(Wan(testbed, one_way_ms=ONE_WAY_MS, rate_mbit=RATE_MBIT))
    registry = stack.enter_context(
        Registry(testbed, work / "registry", ip=wan.far_ip, enter=wan.enter)
    )
    workload = stack.enter_context(
        Workload(testbed, work / "status", size_mib=options.size, pattern=options.pattern)
    )
    bench = Bench(testbed, work, registry.address, workload, workload.memory_hash())
    dump(testbed, workload.pid, work / "images", work / "dump")
    tar, packed = work / "checkpoint.tar", work / "checkpoint.tar.zst"
    tar_checkpoint(work / "images", tar)
    subprocess.run(["zstd", "-q", "-3", "-T0", str(tar), "-o", str(packed)], check=True)
    for name, layer in (("tar", Layer(tar)), ("zstd", Layer(packed, ZSTD))):
        image = push_oci_image(registry.address, f"bench/{name}", "1", [layer])
        digest = image.layers[0].digest
        bench.blobs[name] = f"http://{registry.address}/v2/bench/{name}/blobs/{digest}"
        bench.references[name] = f"{registry.address}/bench/{name}:1"
    if options.chunked:
        source, target = (f"docker://{registry.address}/bench/{name}:1" for name in ("tar", "zc"))
        subprocess.run(
            [
                *testbed.host_command("skopeo"),
                "copy",
                "--insecure-policy",
                "--src-tls-verify=false",
                "--dest-tls-verify=false",
                f"--dest-compress-format={CHUNKED}",
                source,
                target,
            ],
            check=True,
            capture_output=True,
        )
        bench.references[CHUNKED] = f"{registry.address}/bench/zc:1"
    return bench


WAYS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "local eager": lambda bench: local(bench, lazy=False),
    "local lazy-pages": lambda bench: local(bench, lazy=True),
    "pull tar": lambda bench: pull(bench, "tar", "tar -x"),
    "pull zstd": lambda bench: pull(bench, "zstd", "tar --zstd -x"),
    "lazyfs tar eager": lambda bench: lazyfs(bench, "tar", lazy=False),
    "lazyfs tar lazy-pages": lambda bench: lazyfs(bench, "tar", lazy=True),
    "lazyfs zstd:chunked eager": lambda bench: lazyfs(bench, CHUNKED, lazy=False),
    "lazyfs zstd:chunked lazy-pages": lambda bench: lazyfs(bench, CHUNKED, lazy=True),
}


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
        fetched = spread([row["fetched_bytes"] for row in measured])["median"]
        reads = [row["criu_read_bytes"] for row in measured if row.get("criu_read_bytes")]
        ratio = f"{fetched / spread(reads)['median']:.2f}" if reads and fetched else ""
        table.add_row(
            name,
            f"{loop['median']:.2f}",
            f"{loop['min']:.2f} - {loop['max']:.2f}",
            f"{loop['median'] / link_s:.2f}",
            f"{fetched / 1e6:,.1f}",
            ratio,
        )
    return table


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of memory")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pattern", choices=["regions", "scattered"], default="regions")
    parser.add_argument("--chunked", action="store_true", help="also zstd:chunked (minutes more)")
    parser.add_argument("--only", nargs="*", choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = {
        name: way
        for name, way in WAYS.items()
        if (name in options.only if options.only else options.chunked or CHUNKED not in name)
    }
    options.chunked = any(CHUNKED in name for name in ways)
    testbed = Testbed.locate()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    console = Console(width=120)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        bench = prepare(testbed, work, stack, options)
        layer_bytes = (work / "checkpoint.tar").stat().st_size
        link_s = layer_bytes * 8 / (RATE_MBIT * 1e6)
        for run in range(options.runs):
            for name, way in ways.items():
                row = way(bench)
                rows[name].append(row)
                fetched = row["fetched_bytes"] / 1e6
                console.print(
                    f"run {run + 1} {name}: {row['first_loop_s']:.2f} s, {fetched:.1f} MB"
                )
        console.print(report(rows, layer_bytes, link_s))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "pattern": options.pattern, "runs": options.runs},
        "link": {"mbit": RATE_MBIT, "round_trip_ms": 2 * ONE_WAY_MS},
        "layer_bytes": layer_bytes,
        "link_s": link_s,
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

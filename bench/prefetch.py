#!/usr/bin/env python3
"""Does what is fetched ahead delay a read that somebody waits for? 1 Gbit/s, 10 ms, or as told.

Random reads of 4 to 64 KiB, one at a time, of what is not fetched ahead: each has to go to the
source. So in turn, run after run: with nothing else going on; while a trace is replayed; while all
that a restore reads is fetched; and, for comparison, beside somebody else's downloads, as many as
readahead begins with. Percentiles over all reads. On a machine that is busy with other things a
slower link with as much on its way (--rate-mbit 200 --one-way-ms 25) tells more.

    bench/prefetch.py [--size 768] [--runs 5] [--reads 100] [--only WAY …] [--json FILE]
                      [--rate-mbit 1000] [--one-way-ms 5]
"""

import argparse
import json
import os
import random
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from harness import Mount, machine, mounted, write_json
from rich.console import Console
from rich.table import Table
from testbed import Layer, Registry, Testbed, Wan, push_oci_image

from lazyfs.checkpoint.trace import Need, Trace, TracedFile, TracedLayer, dump_trace

KIB, MIB = 1024, 1024 * 1024
PAGES = "pages-1.img"
OTHERS = 2
"""Somebody else's downloads: as many connections as readahead begins with."""


class Bench:
    """An image beyond the link, and a trace of its first half."""

    def __init__(self, work: Path, registry: Registry, size_mib: int) -> None:
        """Push it: what else CRIU has of a checkpoint is not looked at."""
        self.work = work
        self.pages_bytes = size_mib * MIB
        tar = work / "checkpoint.tar"
        write_checkpoint(tar, self.pages_bytes)
        image = push_oci_image(registry.address, "bench/prefetch", "1", [Layer(tar)])
        self.reference = f"{registry.address}/bench/prefetch:1"
        self.blob = f"http://{registry.address}/v2/bench/prefetch/blobs/{image.layers[0].digest}"
        self.trace = work / "trace"
        self.trace.write_bytes(dump_trace(self._trace(image.layers[0].digest, tar)))

    def _trace(self, digest: str, tar: Path) -> Trace:
        """Name pieces of 1 MiB all over the first half, in no order."""
        starts = list(range(0, self.pages_bytes // 2, MIB))
        random.Random(2).shuffle(starts)
        return Trace(
            layers=[TracedLayer(digest, tar.stat().st_size)],
            files=[TracedFile(f"checkpoint/{PAGES}", 0, self.pages_bytes)],
            needs=[Need(0, start, MIB, float(at)) for at, start in enumerate(starts)],
        )


def write_checkpoint(path: Path, pages_bytes: int) -> None:
    """Write what looks like a checkpoint: random memory, and files that CRIU begins with."""
    small = {name: os.urandom(500) for name in ("inventory.img", "pstree.img", "core-1.img")}
    with tarfile.open(path, "w") as tar:
        for name, data in small.items():
            info = tarfile.TarInfo(f"checkpoint/{name}")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
        info = tarfile.TarInfo(f"checkpoint/{PAGES}")
        info.size = pages_bytes
        tar.addfile(info, _Randomness())


class _Randomness:
    """A file without end."""

    def read(self, size: int = -1) -> bytes:
        return os.urandom(size)


@contextmanager
def downloads(bench: Bench) -> Iterator[None]:
    """Keep the link busy with what somebody else wants."""
    command = ["curl", "-s", "-o", "/dev/null", bench.blob]
    running = [subprocess.Popen(command) for _ in range(OTHERS)]
    try:
        time.sleep(0.3)  # until they are at full speed
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def read_at_random(bench: Bench, mount: Mount, reads: int, seed: int) -> list[float]:
    """Return how long reads of the second half take, in seconds, each where none was before.

    One in each MiB at most: fewer than `reads` where there is no room.
    """
    dice = random.Random(seed)
    half = bench.pages_bytes // 2
    room = range(half, bench.pages_bytes - MIB, MIB)
    places = dice.sample(room, min(reads, len(room)))
    descriptor = os.open(mount.directory / PAGES, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        found = []
        for place in places:
            size = dice.choice((4, 16, 64)) * KIB
            began = time.perf_counter()
            data = os.pread(descriptor, size, place)
            found.append(time.perf_counter() - began)
            if len(data) != size:
                raise SystemExit("a short read: nothing here counts")
        return found
    finally:
        os.close(descriptor)


def measure(
    bench: Bench, reads: int, seed: int, *, options: tuple[str, ...] = (), busy: bool = False
) -> dict[str, Any]:
    """Mount what was never here, and read."""
    with mounted(bench.reference, bench.work / "lazyfs", "--plain-http", *options) as mount:
        if not busy:
            return _row(mount, partial(read_at_random, bench, mount, reads, seed))
        with downloads(bench):
            return _row(mount, partial(read_at_random, bench, mount, reads, seed))


def _row(mount: Mount, read: Callable[[], list[float]]) -> dict[str, Any]:
    before = mount.status()
    began = time.perf_counter()
    latencies = read()
    seconds = time.perf_counter() - began
    after = mount.status()
    return {
        "latencies_s": latencies,
        "reads_waited": after["reads_waited"] - before["reads_waited"],
        "background_mbytes_per_s": (after["bytes_fetched"] - before["bytes_fetched"])
        / seconds
        / 1e6,
        "prefetch": after["prefetch"],
    }


def percentile(values: list[float], part: float) -> float:
    """Return the value that so large a part of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return percentiles of all runs of a way together, in milliseconds."""
    values = [each for row in rows for each in row["latencies_s"]]
    found = {f"p{part}_ms": percentile(values, part / 100) * 1000 for part in (50, 90, 99)}
    rates = [row["background_mbytes_per_s"] for row in rows]
    return {**found, "mbytes_per_s": sum(rates) / len(rates)}


def table(found: dict[str, dict[str, float]]) -> Table:
    """Put percentiles into a table, beside those of reads with nothing else."""
    shown = Table(title="a read of 4 to 64 KiB that has to wait", title_justify="left")
    shown.add_column("beside it")
    for column in ("p50, ms", "p90, ms", "p99, ms", "p99 / alone", "MB/s in all"):
        shown.add_column(column, justify="right")
    alone = found.get("nothing", {}).get("p99_ms")
    for name, row in found.items():
        ratio = f"{row['p99_ms'] / alone:.2f}" if alone else ""
        milliseconds = [f"{row[f'p{part}_ms']:.1f}" for part in (50, 90, 99)]
        shown.add_row(name, *milliseconds, ratio, f"{row['mbytes_per_s']:.1f}")
    return shown


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--one-way-ms", type=float, default=5)
    parser.add_argument("--rate-mbit", type=float, default=1000)
    parser.add_argument("--size", type=int, default=768, help="MiB of memory")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--reads", type=int, default=100, help="of each run")
    parser.add_argument("--only", nargs="*", choices=["nothing", "trace", "everything", "others"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    testbed = Testbed.locate()
    rows: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        wan = stack.enter_context(
            Wan(testbed, one_way_ms=options.one_way_ms, rate_mbit=options.rate_mbit)
        )
        registry = stack.enter_context(
            Registry(testbed, work / "registry", ip=wan.far_ip, enter=wan.enter)
        )
        bench = Bench(work, registry, options.size)
        (work / "criu").mkdir()
        restores = ("--lazy-pages", str(work / "criu"), "--trace")
        ways: dict[str, dict[str, Any]] = {
            "nothing": {"options": ("--trace", "off")},
            "trace": {"options": (*restores, str(bench.trace))},
            "everything": {"options": (*restores, "off")},
            "others": {"options": ("--trace", "off"), "busy": True},
        }
        for run in range(options.runs):
            for name, way in ways.items():
                if options.only and name not in options.only:
                    continue
                row = measure(bench, options.reads, run, **way)
                rows.setdefault(name, []).append(row)
                print(f"run {run + 1} beside {name}: {json.dumps(summary([row]))}", flush=True)
    found = {name: summary(each) for name, each in rows.items()}
    Console(width=100).print(table(found))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "runs": options.runs, "reads": options.reads},
        "link": {"mbit": options.rate_mbit, "round_trip_ms": 2 * options.one_way_ms},
        "summary": found,
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

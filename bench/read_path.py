#!/usr/bin/env python3
"""What does a read through lazyfs cost, beside the raw file and beside curl?

Cold and warm, sequential and random, on loopback and over a link of 1 Gbit/s and 10 ms; how long
`lazyfs mount` takes to a directory that answers; the daemon's CPU time and memory. Each figure
stands beside its baseline of the same run; trust the ratios.

    bench/read_path.py [--size 512] [--runs 5] [--json FILE]
"""

import argparse
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Mount, machine, mounted, spread, write_json
from rich.console import Console
from rich.table import Table
from testbed import Layer, Registry, Testbed, Wan, push_oci_image, tar_checkpoint

ONE_WAY_MS = 5
RATE_MBIT = 1000
MIB = 1 << 20
PAGE = 4096
RANDOM_READS = 4000
COLD_FAULTS = 20


@dataclass
class Remote:
    """The image behind one registry."""

    reference: str
    url: str
    """Of its layer."""
    options: tuple[str, ...] = ()


def sequential(path: Path) -> float:
    """Read a file from start to end in steps of 1 MiB; return MB/s."""
    buffer = memoryview(mmap.mmap(-1, MIB))
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    began = time.monotonic()
    offset = 0
    while offset < size:
        offset += os.preadv(descriptor, [buffer], offset)
    seconds = time.monotonic() - began
    os.close(descriptor)
    return size / seconds / 1e6


def at_random(path: Path, reads: int) -> float:
    """Read single pages here and there; return reads a second."""
    dice = random.Random(7)
    descriptor = os.open(path, os.O_RDONLY)
    pages = os.fstat(descriptor).st_size // PAGE
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    offsets = [dice.randrange(pages) * PAGE for _ in range(reads)]
    began = time.monotonic()
    for offset in offsets:
        os.pread(descriptor, PAGE, offset)
    seconds = time.monotonic() - began
    os.close(descriptor)
    return reads / seconds


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def curl(url: str, target: str) -> float:
    """Fetch a blob whole; return MB/s."""
    began = time.monotonic()
    done = subprocess.run(
        ["curl", "-sSf", "-o", target, "-w", "%{size_download}", url],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout) / (time.monotonic() - began) / 1e6


def curl_ranges(url: str, size: int) -> float:
    """Fetch single pages one after the other on one connection; return ms a page."""
    dice = random.Random(8)
    words = ["curl", "-sSf"]
    for _ in range(COLD_FAULTS + 1):
        start = dice.randrange(size // PAGE - 1) * PAGE
        words += ["-r", f"{start}-{start + PAGE - 1}", "-o", "/dev/null", url, "--next", "-sSf"]
    words = words[:-2]
    began = time.monotonic()
    first = ["curl", "-sSf", "-r", "0-0", "-o", "/dev/null", url]
    subprocess.run(first, check=True)
    once = time.monotonic() - began
    began = time.monotonic()
    subprocess.run(words, check=True)
    return (time.monotonic() - began - once) / COLD_FAULTS * 1e3


def cold_faults(path: Path) -> float:
    """Read single pages that are not here yet, one after the other; return the median ms."""
    dice = random.Random(9)
    descriptor = os.open(path, os.O_RDONLY)
    pages = os.fstat(descriptor).st_size // PAGE
    taken = []
    for _ in range(COLD_FAULTS):
        began = time.monotonic()
        os.pread(descriptor, PAGE, dice.randrange(pages) * PAGE)
        taken.append((time.monotonic() - began) * 1e3)
    os.close(descriptor)
    return spread(taken)["median"]


def cold(remote: Remote, work: Path, row: dict[str, float], where: str) -> None:
    """Measure a file that was never here."""
    with mounted(remote.reference, work, *remote.options) as mount:
        row[f"mount {where} s"] = mount.seconds
        row[f"cold 4 KiB {where} ms"] = cold_faults(mount.directory / "pages-1.img")
    with mounted(remote.reference, work, *remote.options) as mount:
        pid = mount.status()["pid"]
        used = cpu_seconds(pid)
        row[f"cold {where} MB/s"] = sequential(mount.directory / "pages-1.img")
        used = cpu_seconds(pid) - used
        row[f"cold {where} CPU s/GB"] = used / (mount.status()["bytes_fetched"] / 1e9)
        row["daemon anonymous MB"] = mount.memory()["anonymous_bytes"] / 1e6


def warm(mount: Mount, raw: Path, row: dict[str, float]) -> None:
    """Measure a file that is in the cache, then in the kernel."""
    file = mount.directory / "pages-1.img"
    row["disk-warm, first check MB/s"] = sequential(file)
    row["kernel-warm MB/s"] = sequential(file)
    forget(file)
    row["disk-warm MB/s"] = sequential(file)
    forget(file)
    row["disk-warm 4 KiB reads/s"] = at_random(file, RANDOM_READS)
    sequential(raw)
    row["raw MB/s"] = sequential(raw)
    row["raw 4 KiB reads/s"] = at_random(raw, RANDOM_READS)


def measure(near: Remote, far: Remote, raw: Path, work: Path) -> dict[str, float]:
    """Do one run."""
    row: dict[str, float] = {}
    work.mkdir(parents=True, exist_ok=True)
    target = work / "curled"
    row["curl loopback MB/s"] = curl(near.url, "/dev/null")
    row["curl to file loopback MB/s"] = curl(near.url, str(target))
    target.unlink()
    cold(near, work, row, "loopback")
    with mounted(near.reference, work, *near.options, keep_cache=True) as mount:
        warm(mount, raw, row)
    row["curl link MB/s"] = curl(far.url, "/dev/null")
    row["curl 4 KiB link ms"] = curl_ranges(far.url, raw.stat().st_size)
    cold(far, work, row, "link")
    shutil.rmtree(work / "cache")
    return row


RATIOS = {
    "cold sequential, loopback / curl to /dev/null": (
        "cold loopback MB/s",
        "curl loopback MB/s",
        ">= 0.5",
    ),
    "cold sequential, loopback / curl to a file": (
        "cold loopback MB/s",
        "curl to file loopback MB/s",
        ">= 1.2",
    ),
    "cold sequential, link / curl": ("cold link MB/s", "curl link MB/s", ">= 0.9"),
    "kernel-warm / raw page cache": ("kernel-warm MB/s", "raw MB/s", ">= 0.85"),
    "disk-warm / raw page cache": ("disk-warm MB/s", "raw MB/s", ">= 0.25"),
}
"""What is divided by what, and what performance asks for."""


def report(rows: list[dict[str, float]], console: Console) -> dict[str, Any]:
    """Print figures and ratios; return both."""
    figures = {name: spread([row[name] for row in rows]) for name in rows[0]}
    table = Table(title="Figures", title_justify="left")
    for column in ("figure", "median", "min", "max"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, values in figures.items():
        cells = [f"{values[key]:,.2f}" for key in ("median", "min", "max")]
        table.add_row(name, *cells)
    console.print(table)
    ratios = {
        name: spread([row[over] / row[under] for row in rows])
        for name, (over, under, _) in RATIOS.items()
    }
    table = Table(title="Ratios, run by run", title_justify="left")
    for column in ("ratio", "median", "min", "max", "aim"):
        table.add_column(column, justify="left" if column == "ratio" else "right")
    for name, (_, _, aim) in RATIOS.items():
        values = ratios[name]
        table.add_row(name, *(f"{values[key]:.2f}" for key in ("median", "min", "max")), aim)
    console.print(table)
    return {"figures": figures, "ratios": ratios}


def publish(registry: Registry, tar: Path) -> Remote:
    """Push the image."""
    image = push_oci_image(registry.address, "bench/read", "1", [Layer(tar)])
    digest = image.layers[0].digest
    return Remote(
        f"{registry.address}/bench/read:1",
        f"http://{registry.address}/v2/bench/read/blobs/{digest}",
        ("--plain-http",),
    )


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=512, help="MiB of pages")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=110)
    testbed = Testbed.locate()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        images = work / "images"
        images.mkdir()
        (images / "inventory.img").write_bytes(b"none that CRIU would read")
        raw = images / "pages-1.img"
        with raw.open("wb") as file:
            for _ in range(options.size):
                file.write(os.urandom(MIB))
        tar_checkpoint(images, work / "layer.tar")
        wan = stack.enter_context(Wan(testbed, one_way_ms=ONE_WAY_MS, rate_mbit=RATE_MBIT))
        near = stack.enter_context(Registry(testbed, work / "near"))
        far = stack.enter_context(Registry(testbed, work / "far", ip=wan.far_ip, enter=wan.enter))
        remotes = publish(near, work / "layer.tar"), publish(far, work / "layer.tar")
        rows = []
        for run in range(options.runs):
            rows.append(measure(*remotes, raw, work / "run"))
            console.print(f"run {run + 1} done")
        result = report(rows, console)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "runs": options.runs},
        "link": {"mbit": RATE_MBIT, "round_trip_ms": 2 * ONE_WAY_MS},
        **result,
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

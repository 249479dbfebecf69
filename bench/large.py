#!/usr/bin/env python3
"""Does a checkpoint of 16 GiB, of 100,000 chunks or files, cost more than a small one?

Each image, in turn, run after run, the small beside the large: seconds to a directory that answers
and CPU seconds by then, the daemon's own memory and its peak, the first random read of 4 KiB and
what was fetched for it, how long the mount's own account takes, a second mount by digest. The
images are synthetic (`large_images.py`), their registry is here on loopback: what is measured is
what a size costs, not a link.

    bench/large.py [--runs 3] [--only IMAGE …] [--json FILE]
"""

import argparse
import compileall
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import large_images as images
from harness import LAZYFS, REPOSITORY, machine, mounted, spread, write_json
from rich.console import Console
from rich.table import Table

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
IMAGES: dict[str, Callable[[], images.Layer]] = {
    "tar, 16 MiB": partial(images.tar, 16 * MIB),
    "tar, 16 GiB": partial(images.tar, 16 * GIB),
    "zstd:chunked, 100 chunks": partial(images.chunked, 1, 100, 32 * KIB),
    "zstd:chunked, 100,000 chunks": partial(images.chunked, 1, 100_000, 32 * KIB),
    "zstd:chunked, 100,000 files": partial(images.chunked, 100_000, 1, 4 * KIB),
    "seekable zstd, 100 frames": partial(images.seekable, 100, 160 * KIB),
    "seekable zstd, 100,000 frames": partial(images.seekable, 100_000, 160 * KIB),
}


def measure(reference: str, work: Path, seed: int) -> dict[str, Any]:
    """Mount it, read at random, look at the account, mount it again."""
    row: dict[str, Any] = {}
    options = ("--plain-http",)
    with mounted(reference, work, *options) as mount:
        row["mount_s"] = mount.seconds
        state = mount.status()
        row["cpu_s"] = _cpu_s(state["pid"])
        row["requests"], row["fetched_bytes"] = state["requests"], state["bytes_fetched"]
        pages = mount.directory / "pages-1.img"
        size_bytes = pages.stat().st_size
        offset = random.Random(seed).randrange(size_bytes // 4096) * 4096
        with pages.open("rb", buffering=0) as file:
            began_s = time.monotonic()
            if len(os.pread(file.fileno(), 4096, offset)) != 4096:
                raise SystemExit("a short read: nothing here counts")
            row["first_read_s"] = time.monotonic() - began_s
        began_s = time.monotonic()
        state = mount.status()
        row["status_s"] = time.monotonic() - began_s
        row["read_fetched_bytes"] = state["bytes_fetched"] - row["fetched_bytes"]
        row.update(mount.memory())
    with mounted(reference, work, *options, keep_cache=True) as mount:
        row["again_s"] = mount.seconds
        row["again_requests"] = mount.status()["requests"]
    row["cache_bytes"] = _disk_bytes(work / "cache")
    verify = [LAZYFS, "cache", "verify", "--cache-dir", str(work / "cache")]
    began_s = time.monotonic()
    subprocess.run(verify, check=True, capture_output=True)
    row["verify_s"] = time.monotonic() - began_s
    shutil.rmtree(work / "cache")
    return row


def _cpu_s(pid: int) -> float:
    """Return what a process has used up to now: proc(5), utime and stime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _disk_bytes(directory: Path) -> int:
    """Return what is allocated: files of a cache are as long as a layer, and mostly holes."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def table_of(rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Put medians into a table."""
    table = Table(title="small beside large", title_justify="left")
    table.add_column("image")
    columns: dict[str, tuple[str, float, str]] = {
        "mount, s": ("mount_s", 1, ".2f"),
        "CPU s": ("cpu_s", 1, ".2f"),
        "requests": ("requests", 1, ".0f"),
        "fetched, MB": ("fetched_bytes", 1e6, ".2f"),
        "memory, MB": ("anonymous_bytes", 1e6, ".0f"),
        "peak, MB": ("peak_bytes", 1e6, ".0f"),
        "read, ms": ("first_read_s", 1e-3, ".1f"),
        "status, ms": ("status_s", 1e-3, ".1f"),
        "again, s": ("again_s", 1, ".2f"),
        "cache, MB": ("cache_bytes", 1e6, ".1f"),
        "verify, s": ("verify_s", 1, ".2f"),
    }
    for name in columns:
        table.add_column(name, justify="right")
    for image, measured in rows.items():
        cells = []
        for key, unit, form in columns.values():
            cells.append(format(spread([row[key] for row in measured])["median"] / unit, form))
        table.add_row(image, *cells)
    return table


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="images whose names begin so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compileall.compile_dir(str(REPOSITORY / "lazyfs"), quiet=1)
    chosen = {
        name: make()
        for name, make in IMAGES.items()
        if not options.only or name.startswith(tuple(options.only))
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        references = stack.enter_context(images.registry(chosen))
        for run in range(options.runs):
            for name, reference in references.items():
                rows[name].append(measure(reference, work, run))
    Console(width=160).print(table_of(rows))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"runs": options.runs},
        "layer_bytes": {name: layer.blob.size_bytes for name, layer in chosen.items()},
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

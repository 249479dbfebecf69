#!/usr/bin/env python3
"""How long is it from `lazyfs mount` to a directory that answers, and what is its floor?

Each way in turn, run after run, over two links of 1 Gbit/s, of 10 ms and of 110 ms: seconds from
the start of the command to its end, CPU seconds of the command and its daemon, requests. What the
longer link adds, divided by what each of its round trips is longer, is how many round trips one
has to wait for, after another; those that pass while something else is done are not among them.

Beside them the floor: an interpreter that does nothing; one that imports what a mount imports; and
the project's aim, three round trips and 0.15 s. "restore": from `lazyfs restore` to the moment
when CRIU is started (a stand-in that notes the time and refuses).

    bench/startup.py [--size 256] [--runs 7] [--only WAY …] [--json FILE]
"""

import argparse
import compileall
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import LAZYFS, REPOSITORY, Mount, machine, spread, write_json
from rich.console import Console
from rich.table import Table
from testbed import (
    Layer,
    Registry,
    Testbed,
    Wan,
    Workload,
    dump,
    push_oci_image,
    tar_checkpoint,
)

RATE_MBIT = 1000
NEAR_MS, FAR_MS = 10, 110
AIM_ROUND_TRIPS, AIM_CPU_S = 3, 0.15
TAR, GZIP, CHUNKED = "tar", "gzip", "zstd:chunked"
_GZIP_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_IMPORTS = (
    "import gc; gc.set_threshold(100_000); import lazyfs.cli.main, lazyfs.cli.mount, "
    "lazyfs.checkpoint.ahead, lazyfs.transport.http, lazyfs.transport.mirrors, lazyfs.mount"
)


@dataclass
class Link:
    """A registry beyond a link, with the images in it."""

    round_trip_ms: int
    work: Path
    tags: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, str] = field(default_factory=dict)
    """By the name of the format: the same by digest."""


def push(testbed: Testbed, registry: str, link: Link, images: dict[str, Layer]) -> None:
    """Put the images into the registry; zstd:chunked is made there."""
    for name, layer in images.items():
        image = push_oci_image(registry, f"bench/{name}", "1", [layer])
        link.tags[name] = f"{registry}/bench/{name}:1"
        link.pinned[name] = f"{registry}/bench/{name}@{image.manifest.digest}"
    source, target = (f"docker://{registry}/bench/{name}:1" for name in (TAR, "chunked"))
    command = ["copy", "--insecure-policy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    command += ["--dest-compress-format=zstd:chunked", source, target]
    subprocess.run([*testbed.host_command("skopeo"), *command], check=True, capture_output=True)
    link.tags[CHUNKED] = f"{registry}/bench/chunked:1"


def warm(link: Link, reference: str, cache: Path) -> None:
    """Have all of an image in a cache of its own."""
    command = [LAZYFS, "warm", "--plain-http", "--cache-dir", str(cache), reference]
    subprocess.run(command, check=True, capture_output=True)


def mount(
    link: Link, *, name: str, by_digest: bool = False, cache: Path | None = None
) -> dict[str, Any]:
    """Mount, with an empty cache or with one that has been warmed."""
    directory, empty = link.work / "mount", link.work / "empty"
    directory.mkdir(exist_ok=True)
    shutil.rmtree(empty, ignore_errors=True)
    reference = (link.pinned if by_digest else link.tags)[name]
    command = [LAZYFS, "mount", "--plain-http", "--cache-dir", str(cache or empty)]
    began_s = time.monotonic()
    process = subprocess.Popen([*command, reference, str(directory)], stdout=subprocess.DEVNULL)
    _, wait_status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began_s
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    if process.returncode:
        raise SystemExit(f"lazyfs mount failed: {process.returncode}")
    try:
        state = Mount(directory, seconds).status()
        cpu_s = usage.ru_utime + usage.ru_stime + _cpu_s(state["pid"])
        requests: int = state["requests"]
        return {"seconds": seconds, "cpu_s": cpu_s, "requests": requests}
    finally:
        subprocess.run([LAZYFS, "umount", str(directory)], check=True)


def _cpu_s(pid: int) -> float:
    """Return what a process has used up to now: proc(5), utime and stime."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def restore(link: Link, *, name: str) -> dict[str, Any]:
    """Restore with a stand-in for CRIU, which tells when it was started."""
    told, criu, empty = link.work / "told", link.work / "criu", link.work / "empty"
    criu.write_text(
        f"#!/bin/sh\ncase $* in *restore*) cat /proc/uptime > {told}; exit 1;; esac\n"
        "echo 'Version: 4.1.1'\n"
    )
    criu.chmod(0o755)
    told.unlink(missing_ok=True)
    shutil.rmtree(empty, ignore_errors=True)
    command = [LAZYFS, "restore", "--plain-http", "--force", "--cache-dir", str(empty)]
    command += ["--criu", str(criu), "--work-dir", str(link.work / "criu-work")]
    (link.work / "criu-work").mkdir(exist_ok=True)
    began_s = float(Path("/proc/uptime").read_text().split()[0])
    subprocess.run([*command, link.tags[name]], check=False, capture_output=True)
    if not told.exists():
        raise SystemExit("lazyfs restore has not started CRIU")
    return {"seconds": float(told.read_text().split()[0]) - began_s}


def interpreter(code: str) -> dict[str, Any]:
    """Run a little Python, and nothing else."""
    began_s = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code])
    _, wait_status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began_s
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime}


def ways_of(link: Link) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is measured over a link; warms what is to be warm."""
    warmed = {name: link.work / f"warm-{number}" for number, name in enumerate((TAR, GZIP))}
    for name, cache in warmed.items():
        warm(link, link.pinned[name], cache)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        f"{name}, cold": partial(mount, link, name=name) for name in (TAR, CHUNKED, GZIP)
    }
    ways["gzip with its kept index, by tag"] = partial(mount, link, name=GZIP, cache=warmed[GZIP])
    for name in warmed:
        ways[f"{name}, all here, by digest"] = partial(
            mount, link, name=name, by_digest=True, cache=warmed[name]
        )
    ways["restore of tar, cold: CRIU starts"] = partial(restore, link, name=TAR)
    return ways


FLOORS: dict[str, Callable[[], dict[str, Any]]] = {
    "python -c pass": partial(interpreter, "pass"),
    "what a mount imports": partial(interpreter, _IMPORTS),
}


def table_of(rows: dict[str, dict[int, list[dict[str, Any]]]]) -> Table:
    """Put medians, minima and round trips into a table."""
    table = Table(title=f"to a directory that answers; {RATE_MBIT} Mbit/s", title_justify="left")
    table.add_column("way")
    names = (f"s at {NEAR_MS} ms", "min", "CPU s", "requests", f"s at {FAR_MS} ms", "round trips")
    for name in names:
        table.add_column(name, justify="right")
    for way, links in rows.items():
        near = links[NEAR_MS]
        seconds = spread([row["seconds"] for row in near])
        cells = [f"{seconds['median']:.3f}", f"{seconds['min']:.3f}"]
        cpu = [row["cpu_s"] for row in near if "cpu_s" in row]
        requests = [row["requests"] for row in near if "requests" in row]
        cells.append(f"{spread(cpu)['median']:.2f}" if cpu else "")
        cells.append(f"{spread(requests)['median']:.0f}" if requests else "")
        if FAR_MS in links:
            far = spread([row["seconds"] for row in links[FAR_MS]])
            trips = round_trips(links)
            cells += [f"{far['median']:.3f}", f"{trips:.1f}"]
        table.add_row(way, *cells)
    aim_s = AIM_ROUND_TRIPS * NEAR_MS / 1000 + AIM_CPU_S
    table.add_row("the aim: 3 round trips + 0.15 s", f"{aim_s:.3f}")
    return table


def round_trips(links: dict[int, list[dict[str, Any]]]) -> float:
    """Return how many round trips one waits for, by the quickest run over each link."""
    near, far = (min(row["seconds"] for row in links[ms]) for ms in (NEAR_MS, FAR_MS))
    return float((far - near) / ((FAR_MS - NEAR_MS) / 1000))


def prepare(testbed: Testbed, work: Path, stack: ExitStack, size_mib: int) -> list[Link]:
    """Checkpoint a process and push it beyond both links."""
    with Workload(testbed, work / "status", size_mib=size_mib) as workload:
        dump(testbed, workload.pid, work / "images", work / "dump")
    tar, packed = work / "checkpoint.tar", work / "checkpoint.tar.gz"
    tar_checkpoint(work / "images", tar)
    with tar.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target, 1 << 20)
    links = []
    for round_trip_ms in (NEAR_MS, FAR_MS):
        link = Link(round_trip_ms, work / f"{round_trip_ms}ms")
        link.work.mkdir()
        one_way_ms = round_trip_ms / 2
        wan = stack.enter_context(Wan(testbed, one_way_ms=one_way_ms, rate_mbit=RATE_MBIT))
        registry = stack.enter_context(
            Registry(testbed, link.work / "registry", ip=wan.far_ip, enter=wan.enter)
        )
        images = {TAR: Layer(tar), GZIP: Layer(packed, _GZIP_TYPE)}
        push(testbed, registry.address, link, images)
        links.append(link)
    return links


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=256, help="MiB of memory")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="ways whose names begin so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # What is installed is compiled; a clone may not be, and is not where PYTHONDONTWRITEBYTECODE is
    # set: 0.3 s of every start.
    compileall.compile_dir(str(REPOSITORY / "lazyfs"), quiet=1)
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        links = prepare(Testbed.locate(), work, stack, options.size)
        ways = {link.round_trip_ms: ways_of(link) for link in links}
        for _ in range(options.runs):
            for name, floor in FLOORS.items():
                rows.setdefault(name, {}).setdefault(NEAR_MS, []).append(floor())
            for link in links:
                for name, way in ways[link.round_trip_ms].items():
                    if not options.only or name.startswith(tuple(options.only)):
                        measured = rows.setdefault(name, {}).setdefault(link.round_trip_ms, [])
                        measured.append(way())
    Console(width=120).print(table_of(rows))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "runs": options.runs},
        "links": {"mbit": RATE_MBIT, "round_trips_ms": [NEAR_MS, FAR_MS]},
        "round_trips": {
            name: round_trips(measured) for name, measured in rows.items() if FAR_MS in measured
        },
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

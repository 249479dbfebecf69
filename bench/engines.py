#!/usr/bin/env python3
"""How soon does Podman have a checkpointed container running, on a machine that has nothing of it?

From `podman pull` on an empty storage, by `podman container restore`, to the container's first
loop, over a link of 1 Gbit/s and 10 ms: as Podman does it, pulling the checkpoint image, and with
lazyfs's runtime before runc, pulling the image's stub. Each way in turn, run after run, each on a
machine of its own; the container's memory is compared each time. All pull the container's own
image too (2 MB), as part of the restore. Podman's storage, its temporary files and lazyfs's cache
are on disk, where `TMPDIR` says.

    bench/engines.py [--size 100] [--runs 5] [--pattern regions|scattered] [--chunked]
                     [--only WAY …] [--json FILE]

For each `--size`, once; of 4096 it needs 30 GB of disk and 10 GB of memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import machine, spread, write_json
from rich.console import Console
from rich.table import Table
from stage import ONE_WAY_MS, RATE_MBIT
from testbed import Registry, Session, Testbed, Wan, get_manifest, skopeo_copy
from testbed.podman import Podman
from testbed.portable import portable_lazyfs
from testbed.process import tree, wait_until

NAME = "workload"
PLAIN, CHUNKED = "uncompressed", "zstd:chunked"
LONG_S = 3600


@dataclass(frozen=True)
class Way:
    """How a container is restored."""

    form: str
    """The real image's format."""
    policy: str | None = None
    """What /etc/lazyfs/runtime.toml says; None: Podman by itself, from the real image."""


EAGER, LAZY = 'lazy-pages = "never"\n', 'lazy-pages = "always"\n'
WAYS = {
    "Podman gzip": Way("gzip"),
    "Podman zstd": Way("zstd"),
    "lazyfs uncompressed eager": Way(PLAIN, EAGER),
    "lazyfs uncompressed lazy-pages": Way(PLAIN, LAZY),
    "lazyfs zstd:chunked eager": Way(CHUNKED, EAGER),
    "lazyfs zstd:chunked lazy-pages": Way(CHUNKED, LAZY),
}


class Bench:
    """A checkpointed container in a registry beyond the link, in all the ways' formats."""

    def __init__(self, stack: ExitStack, work: Path, options: Any) -> None:
        self.testbed = Testbed.locate()
        self.work = work
        self.lazyfs = portable_lazyfs(self.testbed)
        self._wan = stack.enter_context(
            Wan(self.testbed, one_way_ms=ONE_WAY_MS, rate_mbit=RATE_MBIT)
        )
        self._registry = stack.enter_context(
            Registry(self.testbed, work / "registry", ip=self._wan.far_ip, enter=self._wan.enter)
        )
        self._name = f"lazyfs-bench-{os.getpid()}"
        self.memory: tuple[str, ...] = ()
        self.layers: dict[str, int] = {}
        """Size of each format's layer."""
        self._prepare(options)

    def reference(self, form: str, *, stub: bool = False) -> str:
        """Return the name of an image."""
        tag = form.replace(":", "-") + ("-stub" if stub else "")
        return f"{self._registry.address}/bench:{tag}"

    def _machine(self, stack: ExitStack) -> Podman:
        """Return a Podman that has nothing, on disk."""
        storage = self.work / "storage"
        stack.callback(shutil.rmtree, storage, ignore_errors=True)
        storage.mkdir()
        folders = [self.work, self.lazyfs]
        session = stack.enter_context(Session(self.testbed, folders, name=self._name))
        return Podman(session, registries=[self._registry.address], storage=storage)

    def _prepare(self, options: Any) -> None:
        forms = {WAYS[name].form for name in options.only}
        with ExitStack() as stack:
            podman = self._machine(stack)
            base = f"{self._registry.address}/base:1"
            podman.push_base(self.work, base)
            running = podman.run_workload(
                base, NAME, size_mib=options.size, pattern=options.pattern
            )
            self.memory = running.memory_hash(timeout_s=300)
            image = self.reference("local")
            words = ["container", "checkpoint", "--create-image", image, NAME]
            podman(*words, timeout_s=LONG_S)
            for form in sorted(forms):
                self._push(podman, image, form)
                if any(WAYS[name].policy for name in options.only if WAYS[name].form == form):
                    real, stub = self.reference(form), self.reference(form, stub=True)
                    lazyfs: list[str | Path] = [self.lazyfs / "bin/lazyfs", "stub", "--plain-http"]
                    podman.session.run([*lazyfs, real, stub], timeout_s=LONG_S)
                tag = self.reference(form).rpartition(":")[2]
                _, manifest = get_manifest(self._registry.address, "bench", tag)
                self.layers[form] = sum(layer["size"] for layer in manifest["layers"])

    def _push(self, podman: Podman, image: str, form: str) -> None:
        target = f"docker://{self.reference(form)}"
        if form != PLAIN:
            push = ["push", "--quiet", "--compression-format", form, "--force-compression"]
            podman(*push, image, target, timeout_s=LONG_S)
            return
        folder, gzip = self.work / "plain", f"docker://{self.reference('for-plain')}"
        podman("push", "--quiet", "--compression-level", "1", image, gzip, timeout_s=LONG_S)
        skopeo_copy(podman.session, gzip, f"dir:{folder}", "--dest-decompress")
        skopeo_copy(podman.session, f"dir:{folder}", target, "--preserve-digests")
        shutil.rmtree(folder)

    def measure(self, way: Way) -> dict[str, Any]:
        """Restore on a machine that has nothing; return what it took."""
        row: dict[str, Any] = {}
        with ExitStack() as stack:
            cache = self.work / "cache"
            stack.callback(shutil.rmtree, cache, ignore_errors=True)
            podman = self._machine(stack)
            if way.policy is not None:
                address = self._registry.address
                policy = f'{way.policy}cache-dir = "{cache}"\n'
                policy += f'[registries."{address}"]\nplain-http = true\n'
                podman.put_lazyfs_before(self.lazyfs / "bin", policy)
            image = self.reference(way.form, stub=way.policy is not None)
            os.sync()
            crossed = self._crossed_bytes()
            began_s = time.time()
            podman("pull", "--quiet", image, timeout_s=LONG_S)
            row["pull_s"] = time.time() - began_s
            podman("container", "restore", image, timeout_s=LONG_S)
            row["restored_s"] = time.time() - began_s
            container = podman.container(NAME)
            loop = container.status.wait_loop(began_s, timeout_s=300)
            row["first_loop_s"] = loop.at_s - began_s
            row["fetched_bytes"] = self._crossed_bytes() - crossed
            if way.policy == LAZY:
                wait_until(lambda: not self._lazyfs_runs(podman), "all pages are home", LONG_S)
                row["all_home_s"] = time.time() - began_s
            if container.memory_hash(timeout_s=300) != self.memory:
                raise SystemExit("the container's memory is not what it was: nothing here counts")
            podman("rm", "--force", "--time", "0", NAME)
        return row

    def _crossed_bytes(self) -> int:
        """Return what has come over the link so far."""
        listed = subprocess.run(
            ["ip", "-json", "-4", "address"], capture_output=True, text=True, check=True
        )
        for link in json.loads(listed.stdout):
            if any(each.get("local") == self._wan.near_ip for each in link["addr_info"]):
                counter = Path(f"/sys/class/net/{link['ifname']}/statistics/rx_bytes")
                return int(counter.read_text())
        raise SystemExit(f"no interface has {self._wan.near_ip}")

    def _lazyfs_runs(self, podman: Podman) -> bool:
        for pid in tree(podman.session.pid):
            try:
                program = Path(f"/proc/{pid}/exe").readlink()
            except OSError:
                continue
            if program.is_relative_to(self.lazyfs):
                return True
        return False


def report(rows: dict[str, list[dict[str, Any]]], bench: Bench, size_mib: int) -> Table:
    """Put medians into a table."""
    table = Table(
        title=f"A container of {size_mib} MiB, restored by Podman on an empty machine; "
        f"{RATE_MBIT} Mbit/s, {2 * ONE_WAY_MS} ms",
        title_justify="left",
    )
    table.add_column("way")
    for column in (
        "first loop, s",
        "min - max",
        "pull, s",
        "x link time",
        "fetched, MB",
        "home, s",
    ):
        table.add_column(column, justify="right")
    for name, measured in rows.items():
        loop = spread([row["first_loop_s"] for row in measured])
        pull = spread([row["pull_s"] for row in measured])
        fetched = spread([row["fetched_bytes"] for row in measured])
        home = [row["all_home_s"] for row in measured if "all_home_s" in row]
        link_s = bench.layers[WAYS[name].form] * 8 / (RATE_MBIT * 1e6)
        table.add_row(
            name,
            f"{loop['median']:.2f}",
            f"{loop['min']:.2f} - {loop['max']:.2f}",
            f"{pull['median']:.2f}",
            f"{loop['median'] / link_s:.2f}",
            f"{fetched['median'] / 1e6:,.1f}",
            f"{spread(home)['median']:.2f}" if home else "",
        )
    return table


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=100, help="MiB of memory")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pattern", choices=["regions", "scattered"], default="regions")
    parser.add_argument("--chunked", action="store_true", help="also zstd:chunked (minutes more)")
    parser.add_argument("--only", nargs="*", choices=list(WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.only = options.only or [
        name for name in WAYS if options.chunked or WAYS[name].form != CHUNKED
    ]
    console = Console(width=120)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        bench = Bench(stack, work, options)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
        for run in range(options.runs):
            for name in options.only:
                row = bench.measure(WAYS[name])
                rows[name].append(row)
                fetched = f"{row['fetched_bytes'] / 1e6:.1f} MB"
                console.print(f"run {run + 1} {name}: {row['first_loop_s']:.2f} s, {fetched}")
        console.print(report(rows, bench, options.size))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "pattern": options.pattern, "runs": options.runs},
        "link": {"mbit": RATE_MBIT, "round_trip_ms": 2 * ONE_WAY_MS},
        "layer_bytes": bench.layers,
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

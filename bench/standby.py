#!/usr/bin/env python3
"""What does a standby save a mount?

`lazyfs mount` of an image of 8 MiB on this machine's disk, so that nothing but starting takes time:
alone with an empty cache, alone from the cache, and several at once from one cache; with a standby
and without, in turn. Seconds until the command has returned, by when its directory answers; for
several, until the last has. CPU seconds of all that takes part, standby included, until then. The
memory of the daemons, and of the standby, as the share of each (PSS); and an interpreter that does
nothing, the floor of it all.

    bench/standby.py [--runs 7] [--at-once 8] [--json FILE]
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness import REPOSITORY, machine, spread, write_json
from rich.console import Console
from rich.table import Table

MIB = 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


def write_image(layout: Path) -> str:
    """Write an OCI layout with one uncompressed layer; return its reference."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, size in (
            ("inventory.img", 64),
            ("pagemap-1.img", 4096),
            ("pages-1.img", 8 * MIB),
        ):
            member = tarfile.TarInfo(f"checkpoint/{name}")
            member.size = size
            tar.addfile(member, io.BytesIO(os.urandom(size)))
    oci = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{oci}.manifest.v1+json",
        "config": put(b"{}", f"{oci}.config.v1+json"),
        "layers": [put(layer.getvalue(), f"{oci}.layer.v1.tar")],
    }
    index = put(json.dumps(manifest).encode(), f"{oci}.manifest.v1+json")
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{layout}"


class Bench:
    """Mounts in one directory, with a standby that is there for those that want it."""

    def __init__(self, work: Path, reference: str) -> None:
        self.work = work
        self.reference = reference
        self.environment = {
            **os.environ,
            "LAZYFS_RUN_DIR": str(work / "run"),
            "PYTHONPATH": str(REPOSITORY),
        }
        self.standby = 0

    def words(self, *words: str) -> list[str]:
        """Return a command, run as an installed script is."""
        return [sys.executable, "-c", "from lazyfs.__main__ import main; main()", *words]

    @contextmanager
    def standing_by(self) -> Iterator[None]:
        """Have a standby."""
        words = self.words("standby")
        environment = self.environment
        with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as process:
            if process.stdout is None or not process.stdout.readline():
                raise SystemExit("there is no standby")
            self.standby = process.pid
            yield
            process.terminate()

    def mount(self, count: int, *, ready_made: bool) -> dict[str, Any]:
        """Mount on so many directories at once, and unmount; return a row."""
        environment = {**self.environment, "LAZYFS_STANDBY": "must" if ready_made else "off"}
        directories = [self.work / f"mnt{number}" for number in range(count)]
        for directory in directories:
            directory.mkdir(exist_ok=True)
        before_s = self._cpu_s()
        began_s = time.monotonic()
        option = f"--cache-dir={self.work}/cache"
        started = [
            subprocess.Popen(
                self.words("mount", option, self.reference, str(directory)),
                stdout=subprocess.DEVNULL,
                env=environment,
            )
            for directory in directories
        ]
        codes = [process.wait() for process in started]
        row: dict[str, Any] = {"seconds": time.monotonic() - began_s}
        if any(codes):
            raise SystemExit("a mount has failed")
        pids = [int(os.getxattr(directory, "user.lazyfs.pid")) for directory in directories]
        row["cpu_s"] = self._cpu_s() - before_s + sum(map(_ran_s, pids))
        row["daemon_pss_bytes"] = sum(map(_pss_bytes, pids)) / count
        row["standby_pss_bytes"] = _pss_bytes(self.standby)
        for directory in directories:
            subprocess.run(
                self.words("umount", str(directory)),
                check=True,
                env={**self.environment, "LAZYFS_STANDBY": "off"},
            )
        return row

    def _cpu_s(self) -> float:
        """Return what our children have used, and what the standby and its have."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime + _ran_s(self.standby, with_children=True)


def _ran_s(pid: int, *, with_children: bool = False) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if with_children else 13])) / _TICKS


def _pss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lazyfs-bench-") as home:
        work = Path(home)
        bench = Bench(work, write_image(work / "layout"))

        def cold(*, ready_made: bool) -> dict[str, Any]:
            shutil.rmtree(work / "cache", ignore_errors=True)
            return bench.mount(1, ready_made=ready_made)

        def warm(*, ready_made: bool) -> dict[str, Any]:
            return bench.mount(1, ready_made=ready_made)

        def several(*, ready_made: bool) -> dict[str, Any]:
            return bench.mount(options.at_once, ready_made=ready_made)

        ways: Mapping[str, Callable[..., dict[str, Any]]] = {
            "one, cold cache": cold,
            "one, warm cache": warm,
            f"{options.at_once} at once, warm cache": several,
        }
        rows: dict[str, dict[str, list[dict[str, Any]]]] = {
            name: {"without": [], "standby": []} for name in ways
        }
        floor = []
        with bench.standing_by():
            for _ in range(options.runs):
                began_s = time.monotonic()
                subprocess.run([sys.executable, "-c", "pass"], check=True)
                floor.append(time.monotonic() - began_s)
                for name, way in ways.items():
                    for kind in ("without", "standby"):
                        rows[name][kind].append(way(ready_made=kind == "standby"))
    result = {
        "machine": machine(),
        "runs": options.runs,
        "interpreter_s": spread(floor),
        "ways": {
            name: {
                kind: {key: spread([row[key] for row in several]) for key in several[0]}
                for kind, several in kinds.items()
            }
            for name, kinds in rows.items()
        },
    }
    _show(result)
    write_json(options.json, result)


def _show(result: Mapping[str, Any]) -> None:
    table = Table(title=f"lazyfs mount; an interpreter: {result['interpreter_s']['median']:.3f} s")
    for heading in ("", "", "seconds (least)", "CPU s (least)", "a daemon", "the standby"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, kinds in result["ways"].items():
        for kind, row in kinds.items():
            table.add_row(
                *(name, kind),
                *(
                    f"{row[key]['median']:.3f} ({row[key]['min']:.3f})"
                    for key in ("seconds", "cpu_s")
                ),
                *(
                    f"{row[key]['median'] / MIB:.0f} MiB"
                    for key in ("daemon_pss_bytes", "standby_pss_bytes")
                ),
            )
    Console().print(table)


if __name__ == "__main__":
    main()

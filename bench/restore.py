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
import subprocess
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from harness import machine, write_json
from restoring import ONE_WAY_MS, RATE_MBIT, Bench, Way, lazyfs, local, measure, pull, report
from rich.console import Console
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

ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
CHUNKED = "zstd:chunked"


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


WAYS: dict[str, Way] = {
    "local eager": partial(local, lazy=False),
    "local lazy-pages": partial(local, lazy=True),
    "pull tar": partial(pull, name="tar", unpack="tar -x"),
    "pull zstd": partial(pull, name="zstd", unpack="tar --zstd -x"),
    "lazyfs tar eager": partial(lazyfs, name="tar", lazy=False),
    "lazyfs tar lazy-pages": partial(lazyfs, name="tar", lazy=True),
    "lazyfs tar own server": partial(lazyfs, name="tar", lazy="own"),
    "lazyfs zstd:chunked eager": partial(lazyfs, name=CHUNKED, lazy=False),
    "lazyfs zstd:chunked lazy-pages": partial(lazyfs, name=CHUNKED, lazy=True),
    "lazyfs zstd:chunked own server": partial(lazyfs, name=CHUNKED, lazy="own"),
}


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
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        bench = prepare(testbed, work, stack, options)
        layer_bytes = (work / "checkpoint.tar").stat().st_size
        link_s = layer_bytes * 8 / (RATE_MBIT * 1e6)
        rows = measure(bench, ways, options.runs)
        Console(width=120).print(report(rows, layer_bytes, link_s))
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

#!/usr/bin/env python3
"""Does the processor keep up with the link, whatever a layer is packed with?

All of a checkpoint is brought through the content floor - received from a registry on loopback,
decoded, proven, stored - in a process of its own that may use one core, or two; and, beside it,
the same content is decompressed and hashed straight from memory, by as many threads. What comes
out is compared with what links bring: 125 MB/s of the blob at 1 Gbit/s, 1250 MB/s at 10 Gbit/s.

    bench/decoding.py [--size 256] [--runs 3] [--formats NAME ...] [--json FILE]

With one core the registry has the other one; with two it shares them, where there are no more.
gzip and zstd without an index can only be decoded from their start, one after the other; `soci-v2`
is gzip with an index, as lazyfs keeps one of its own of each gzip layer it has once decoded.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aims import middle
from formats import push_formats
from harness import machine, write_json
from rich.console import Console
from rich.table import Table
from testbed import Registry, Session, Testbed, Workload, dump, tar_checkpoint

FORMATS = ("tar", "gzip", "soci-v2", "estargz", "zstd", "seekable", "chunked")
_PACKED_BY = {
    "tar": "hash",
    "gzip": "deflate",
    "soci-v2": "deflate",
    "estargz": "deflate",
    "zstd": "zstd",
    "seekable": "zstd",
    "chunked": "zstd",
}
_FROM_ITS_START = {"gzip", "zstd"}
_CORES = (1, 2)
_LINKS_MB_S = {"1 Gbit/s": 125.0, "10 Gbit/s": 1250.0}
_PIECE_BYTES = 1 << 20
_LONG_S = 3600


def bring(reference: str, cache_dir: Path) -> dict[str, Any]:
    """Bring all of a checkpoint into an empty cache; say what that took, imports left out."""
    from lazyfs.cli.opening import with_checkpoint
    from lazyfs.cli.options import SourceOptions
    from lazyfs.ground.settings import ContentSettings, TransportSettings
    from lazyfs.whole import Progress, complete

    async def job(checkpoint: Any) -> dict[str, Any]:
        began_s, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        await complete(checkpoint, Progress(checkpoint), alone=True)
        took_s, after = time.monotonic() - began_s, resource.getrusage(resource.RUSAGE_SELF)
        (layer,) = checkpoint.image_layers
        return {
            "seconds": took_s,
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "content_bytes": layer.content.here_bytes(),
            "blob_bytes": checkpoint.counters.bytes_fetched,
            "proven": layer.content.proven or layer.blob_proven,
        }

    source = SourceOptions(
        cache_dir=cache_dir,
        transport=TransportSettings(plain_http=True, mirrors="none"),
        content=ContentSettings(),
        referrers="auto",
        cache_kind="disk",
    )
    return with_checkpoint(reference, source, job)


def brought(reference: str, work: Path, cores: int) -> dict[str, Any]:
    """Run `bring` in a process that may use so many cores, which ends as this one began."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    words = ["taskset", "-c", allowed, sys.executable, __file__, "--bring", reference, str(cache)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_LONG_S)
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{reference} could not be brought:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def bare(pieces: Sequence[bytes], kind: str, cores: int, *, one_by_one: bool) -> float:
    """Return MB/s of content that comes of decompressing and hashing, and nothing else.

    `one_by_one`: decoded by one thread, hashed by another, as a stream has to be.
    """
    import zstandard
    from zlib_ng import zlib_ng

    if kind == "deflate":
        packed = [zlib_ng.compress(piece, 6) for piece in pieces]
        unpack: Callable[[bytes], bytes] = zlib_ng.decompress
    elif kind == "zstd":
        packed = [zstandard.compress(piece, 3) for piece in pieces]
        unpack = zstandard.decompress
    else:
        packed, unpack = list(pieces), bytes

    def decode(part: bytes) -> None:
        unpack(part)

    def both(part: bytes) -> None:
        hashlib.sha256(unpack(part)).digest()

    def hashed(part: bytes) -> None:
        hashlib.sha256(part).digest()

    began_s = time.monotonic()
    with ThreadPoolExecutor(cores) as pool:
        if one_by_one and cores > 1:
            jobs = [pool.submit(lambda: [*map(decode, packed)])]
            jobs.append(pool.submit(lambda: [*map(hashed, packed)]))
            for job in jobs:
                job.result()
        else:
            list(pool.map(hashed if kind == "hash" else both, packed))
    return sum(map(len, pieces)) / (time.monotonic() - began_s) / 1e6


def bare_in_a_process(tar: Path, kind: str, cores: int, *, one_by_one: bool) -> float:
    """Measure `bare` in a process that may use so many cores."""
    allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    words = ["taskset", "-c", allowed, sys.executable, __file__, "--bare", str(tar), kind]
    words += [str(cores), str(int(one_by_one))]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_LONG_S)
    return float(said.stdout)


def prepare(stack: ExitStack, testbed: Testbed, work: Path, options: Any) -> Registry:
    """Checkpoint a process and push it in all formats."""
    workload = stack.enter_context(Workload(testbed, work / "status", size_mib=options.size))
    dump(testbed, workload.pid, work / "images", work / "dump")
    tar_checkpoint(work / "images", work / "checkpoint.tar")
    shutil.rmtree(work / "images")
    registry = stack.enter_context(Registry(testbed, work / "registry"))
    with Session(testbed, [work]) as session:
        push_formats(session, registry, work / "checkpoint.tar", ["tar", *options.formats])
    return registry


def reference_of(registry: Registry, name: str) -> str:
    """Return the image of a format."""
    tag = "soci-v1:enabled" if name == "soci-v2" else f"{name}:1"
    return f"{registry.address}/bench/{tag}"


def measure(registry: Registry, work: Path, options: Any) -> dict[str, list[dict[str, Any]]]:
    """Measure every format with every number of cores in turn, run after run."""
    console = Console(width=140)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in options.formats}
    cores_had = len(os.sched_getaffinity(0))
    for run in range(options.runs):
        for name in options.formats:
            row: dict[str, Any] = {}
            for cores in [count for count in _CORES if count <= cores_had]:
                found = brought(reference_of(registry, name), work, cores)
                row["content_bytes"], row["proven"] = found["content_bytes"], found["proven"]
                row["blob_bytes"] = found["blob_bytes"]
                row[f"content_mb_s_{cores}"] = found["content_bytes"] / found["seconds"] / 1e6
                row[f"blob_mb_s_{cores}"] = found["blob_bytes"] / found["seconds"] / 1e6
                row[f"cpu_s_gb_{cores}"] = found["cpu_s"] / found["content_bytes"] * 1e9
                row[f"bare_mb_s_{cores}"] = bare_in_a_process(
                    work / "checkpoint.tar",
                    _PACKED_BY[name],
                    cores,
                    one_by_one=name in _FROM_ITS_START,
                )
            rows[name].append(row)
            told = ", ".join(f"{key} {value:,.0f}" for key, value in row.items() if "mb_s" in key)
            console.print(f"run {run + 1} {name}: {told}", highlight=False)
    return rows


def report(rows: dict[str, list[dict[str, Any]]], size_mib: int) -> Table:
    """Put medians into a table."""
    table = Table(title=f"{size_mib} MiB, all of it: medians", title_justify="left")
    table.add_column("format")
    for cores in _CORES:
        for words in (
            "content, MB/s",
            "of bare",
            "CPU s/GB",
            *(f"x {name}" for name in _LINKS_MB_S),
        ):
            table.add_column(f"{words}\n{cores} core{'s' * (cores > 1)}", justify="right")
    for name, measured in rows.items():
        cells = []
        for cores in _CORES:
            content = middle(measured, f"content_mb_s_{cores}")
            blob, plain = (middle(measured, f"{key}_mb_s_{cores}") for key in ("blob", "bare"))
            if content is None or blob is None or plain is None:
                cells += [""] * (3 + len(_LINKS_MB_S))
                continue
            cells += [f"{content:,.0f}", f"{content / plain:.2f}"]
            cells.append(f"{middle(measured, f'cpu_s_gb_{cores}'):.2f}")
            cells += [f"{blob / rate:.2f}" for rate in _LINKS_MB_S.values()]
        table.add_row(name, *cells)
    table.caption = (
        "of bare: of what decompression and sha256 alone do with as many threads. "
        "x link: what is taken in of the blob, of what the link brings: 1 and more never waits."
    )
    return table


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=256, help="MiB of memory")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bring", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--bare", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bring:
        print(json.dumps(bring(options.bring[0], Path(options.bring[1]))))
        return
    if options.bare:
        tar, kind, cores, one_by_one = options.bare
        with Path(tar).open("rb") as file:
            pieces = list(iter(lambda: file.read(_PIECE_BYTES), b""))
        print(bare(pieces, kind, int(cores), one_by_one=one_by_one == "1"))
        return
    began_s = time.monotonic()
    testbed = Testbed.locate()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        registry = prepare(stack, testbed, work, options)
        rows = measure(registry, work, options)
        Console(width=150).print(report(rows, options.size))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "runs": options.runs},
        "links_mb_s": _LINKS_MB_S,
        "took_s": round(time.monotonic() - began_s, 1),
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What does a layer's format cost a restore, over a link of 1 Gbit/s and 10 ms?

One process of 1 GiB, checkpointed once, pushed in each format that people have. Each way, in
turn, run after run: seconds from nothing to the process's first loop, eagerly and with CRIU's lazy
pages, the bytes that had crossed the link by then, and the same again from the cache that the
first mount has left. Beside them what a user would do otherwise: pull and unpack (`curl | tar`, at
its best), and SOCI's own snapshotter on the same gzip image. Memory is compared each time.

    bench/formats.py [--size 1024] [--runs 5] [--formats NAME …] [--no-snapshotter] [--json FILE]
"""

import argparse
import tempfile
import time
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
    Session,
    Testbed,
    Wan,
    Workload,
    dump,
    get_manifest,
    push_oci_image,
    tar_checkpoint,
)
from testbed.containerd import Containerd
from testbed.convert import skopeo_copy
from testbed.soci import push_soci_enabled, soci_index, soci_mounted
from testbed.zstd_seekable import write_seekable

ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
FORMATS = ("tar", "gzip", "soci-v1", "soci-v2", "estargz", "zstd", "seekable", "chunked")
_UNPACK = {"tar": "tar -x", "gzip": "tar -xz", "zstd": "tar --zstd -x"}


def snapshotter(bench: Bench, *, lazy: bool) -> dict[str, Any]:
    """Mount by soci-snapshotter, and restore from what it shows.

    Its programs run already, and its index comes by way of an nginx here (`testbed.soci`).
    """
    row: dict[str, Any] = {}  # what it fetches is not measured
    image, index = "bench/soci-v1:1", bench.references["soci index"]
    with soci_mounted(bench.testbed, bench.work / "soci", bench.registry, image, index) as mount:
        began = time.time() - mount.seconds
        with bench.resume(mount.directory / "checkpoint", lazy=lazy) as restored:
            bench.finish(restored, began, row)
            bench.compare(restored)
    row["mount_s"] = mount.seconds
    return row


def prepare(testbed: Testbed, work: Path, stack: ExitStack, options: Any) -> Bench:
    """Checkpoint the process, push it in all formats, and put the registry beyond the link."""
    workload = stack.enter_context(Workload(testbed, work / "status", size_mib=options.size))
    memory = workload.memory_hash()
    dump(testbed, workload.pid, work / "images", work / "dump")
    tar = work / "checkpoint.tar"
    tar_checkpoint(work / "images", tar)
    with Registry(testbed, work / "registry") as near, Session(testbed, [work]) as session:
        index = push_formats(session, near, tar, options.formats)
    wan = stack.enter_context(Wan(testbed, one_way_ms=ONE_WAY_MS, rate_mbit=RATE_MBIT))
    registry = stack.enter_context(
        Registry(testbed, work / "registry", ip=wan.far_ip, enter=wan.enter)
    )
    bench = Bench(testbed, work, registry.address, workload, memory)
    bench.references["soci index"] = index
    for name in options.formats:
        bench.references[name] = f"{registry.address}/bench/{name}:1"
    bench.references["soci-v2"] = f"{registry.address}/bench/soci-v1:enabled"
    for name in _UNPACK.keys() & {"tar", *options.formats}:
        _, manifest = get_manifest(registry.address, f"bench/{name}", "1")
        digest = manifest["layers"][0]["digest"]
        bench.blobs[name] = f"http://{registry.address}/v2/bench/{name}/blobs/{digest}"
    return bench


def push_formats(session: Session, near: Registry, tar: Path, formats: list[str]) -> str:
    """Push the checkpoint in each format; return the digest of its SOCI index, if it has one."""
    at = near.address

    def convert(name: str, *words: str) -> None:
        target = f"docker://{at}/bench/{name}:1"
        skopeo_copy(session, f"docker://{at}/bench/tar:1", target, *words)

    push_oci_image(at, "bench/tar", "1", [Layer(tar)])
    for name, compression in (("gzip", "gzip"), ("zstd", "zstd"), ("chunked", "zstd:chunked")):
        if name in formats:
            convert(name, f"--dest-compress-format={compression}")
    if "seekable" in formats:
        packed = tar.with_suffix(".seekable")
        write_seekable(tar, packed)
        push_oci_image(at, "bench/seekable", "1", [Layer(packed, ZSTD)])
        packed.unlink()
    if not {"soci-v1", "soci-v2", "estargz"} & set(formats):
        return ""
    with Containerd(session, tar.parent / "containerd.log") as containerd:
        convert("soci-v1", "--dest-compress-format=gzip")
        index = soci_index(session, containerd, f"{at}/bench/soci-v1:1")
        if "soci-v2" in formats:
            push_soci_enabled(at, "bench/soci-v1", "enabled", "1", index)
        if "estargz" in formats:
            source, target = f"{at}/bench/soci-v1:1", f"{at}/bench/estargz:1"
            convert_words = ["ctr-remote", "image", "convert", "--estargz", "--oci"]
            session.run([*convert_words, source, target], timeout_s=1200)  # it packs tightly
            containerd.ctr("image", "push", "--plain-http", target)
    return index


def ways_of(options: Any) -> dict[str, Way]:
    """Return what is measured, in the order in which it is told."""
    ways: dict[str, Way] = {"local eager": partial(local, lazy=False)}
    for name in options.formats:
        if name in _UNPACK:
            ways[f"pull {name}"] = partial(pull, name=name, unpack=_UNPACK[name])
        ways[f"lazyfs {name} eager"] = partial(lazyfs, name=name, lazy=False)
        ways[f"lazyfs {name} eager, again"] = partial(lazyfs, name=name, lazy=False, again=True)
        ways[f"lazyfs {name} lazy-pages"] = partial(lazyfs, name=name, lazy=True)
        ways[f"lazyfs {name} lazy-pages, again"] = partial(lazyfs, name=name, lazy=True, again=True)
    if "soci-v1" in options.formats and options.snapshotter:
        ways["SOCI snapshotter eager"] = partial(snapshotter, lazy=False)
        ways["SOCI snapshotter lazy-pages"] = partial(snapshotter, lazy=True)
    return ways


def main() -> None:
    """Measure, interleaved; print a table; write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of memory")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--no-snapshotter", dest="snapshotter", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    testbed = Testbed.locate()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        bench = prepare(testbed, work, stack, options)
        layer_bytes = (work / "checkpoint.tar").stat().st_size
        link_s = layer_bytes * 8 / (RATE_MBIT * 1e6)
        rows = measure(bench, ways_of(options), options.runs)
        Console(width=120).print(report(rows, layer_bytes, link_s))
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "options": {"size_mib": options.size, "formats": options.formats, "runs": options.runs},
        "link": {"mbit": RATE_MBIT, "round_trip_ms": 2 * ONE_WAY_MS},
        "layer_bytes": layer_bytes,
        "link_s": link_s,
        "rows": rows,
    }
    write_json(options.json, result)


if __name__ == "__main__":
    main()

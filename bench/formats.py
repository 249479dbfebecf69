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
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from aims import Conditions, middle, table
from harness import machine, write_json
from measuring import measure
from resuming import (
    LINKS,
    UNPACK,
    Case,
    Way,
    content_length,
    local,
    mounted,
    pull,
    soci,
    warm_images,
)
from rich.console import Console
from stage import ONE_WAY_MS, RATE_MBIT
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
from testbed.soci import push_soci_enabled, soci_index
from testbed.zstd_seekable import write_seekable

ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
FORMATS = ("tar", "gzip", "soci-v1", "soci-v2", "estargz", "zstd", "seekable", "chunked")
_PATIENCE_S = 120.0


def prepare(testbed: Testbed, work: Path, stack: ExitStack, options: Any) -> Case:
    """Checkpoint the process, push it in all formats, and put the registry beyond the link."""
    status = work / "report/status"
    status.parent.mkdir()
    with Workload(testbed, status, size_mib=options.size) as workload:
        memory, pid = workload.memory_hash(), workload.pid
        dump(testbed, pid, work / "images", work / "dump")
    tar = work / "checkpoint.tar"
    tar_checkpoint(work / "images", tar)
    with Registry(testbed, work / "registry") as near, Session(testbed, [work]) as session:
        index = push_formats(session, near, tar, options.formats)
    tar.unlink()
    wan = stack.enter_context(Wan(testbed, one_way_ms=ONE_WAY_MS, rate_mbit=RATE_MBIT))
    registry = stack.enter_context(
        Registry(testbed, work / "registry", ip=wan.far_ip, enter=wan.enter)
    )
    at, images = registry.address, work / "images"
    case = Case(testbed, work, images, status, pid, at, memory, _PATIENCE_S, soci_index=index)
    for name in options.formats:
        case.references[name] = f"{at}/bench/{name}:1"
    case.references["soci-v2"] = f"{at}/bench/soci-v1:enabled"
    for name in UNPACK.keys() & {"tar", *options.formats}:
        _, manifest = get_manifest(at, f"bench/{name}", "1")
        digest = manifest["layers"][0]["digest"]
        case.blobs[name] = f"http://{at}/v2/bench/{name}/blobs/{digest}"
    return case


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
    ways = {"link, uncompressed": LINKS["link, uncompressed"]}
    ways["local disk, eager"] = Way(partial(local, lazy=False), begin=warm_images)
    for name in options.formats:
        if name in UNPACK:
            ways[f"pull {name}"] = Way(partial(pull, name=name))
        for words, lazy in (("eager", False), ("lazy-pages", True)):
            way = partial(mounted, name=name, lazy=lazy, cache=f"{name}-{words}")
            forget = partial(Case.forget, name=f"{name}-{words}")
            ways[f"lazyfs {name} {words}"] = Way(way, begin=forget)
            ways[f"lazyfs {name} {words}, again"] = Way(way)
    if "soci-v1" in options.formats and options.snapshotter:
        for words, lazy in (("eager", False), ("lazy-pages", True)):
            way = partial(soci, lazy=lazy, image="bench/soci-v1:1")
            ways[f"SOCI snapshotter {words}"] = Way(way)
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
    console = Console(width=150)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lazyfs-bench-")))
        case = prepare(testbed, work, stack, options)
        rows = measure(case, ways_of(options), console, at_once=1, runs=options.runs)
        layer_bytes = content_length(case.blobs["tar"])
    link_s = middle(rows["link, uncompressed"], "link_s")
    console.print(table(Conditions(options.size, "regions", "1gbit", 1), rows, link_s=link_s))
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
    sys.exit(1 if any("failed" in row for found in rows.values() for row in found) else 0)


if __name__ == "__main__":
    main()

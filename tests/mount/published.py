"""Checkpoint images as a registry, a layout on disk or a web server gives them."""

import hashlib
import json
import random
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lazyfs.checkpoint.soci_index import INDEX_DIGEST_KEY, INDEX_V1, INDEX_V2, LAYER_DIGEST_KEY
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, Resource, digest_of
from tests.images import Files, Layer, tar_layer, zstd_chunked
from tests.layers.stargz_writer import estargz, stargz_zstd
from tests.mount.mounting import Mount, wait_until
from tests.mount.writers import gzip_layer, seekable_layer, soci_layer, zstd_layer

KIB = 1024
MIB = 1024 * KIB
Writer = Callable[[Files], Layer]
STREAMS: dict[str, Writer] = {"gzip": gzip_layer, "zstd": zstd_layer}
"""What can only be decoded from its start, for as long as no mount has done so."""
AT_RANDOM: dict[str, Writer] = {
    "tar": tar_layer,
    "zstd:chunked": zstd_chunked,
    "estargz": estargz,
    "stargz-zstd": stargz_zstd,
    "zstd:seekable": seekable_layer,
    "soci": soci_layer,
}
LAYERS = {**AT_RANDOM, **STREAMS}
FEW = ["tar", "zstd:chunked", "gzip"]
"""One of each kind: chunks that nothing proves, that prove themselves, and a stream."""
EMPTY = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": digest_of(b"{}"),
    "size": 2,
}


def some_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def checkpoint_files(
    pages_bytes: int = 3 * MIB + 123, inside: str = "checkpoint/"
) -> dict[str, bytes]:
    """A checkpoint as far as names go: CRIU's files in `inside`, an engine's beside them."""
    names = ["inventory.img", "pstree.img", "core-1.img", "mm-1.img", "pagemap-1.img"]
    files = {inside + name: some_bytes(700 + 100 * at, at) for at, name in enumerate(names)}
    files[inside + "empty.img"] = b""
    files[inside + "pages-1.img"] = some_bytes(pages_bytes)
    files["config.dump"] = b'{"id": "1"}'
    return files


def manifest_of(
    layer: Layer,
    annotations: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config or EMPTY,
        "layers": [
            {
                "mediaType": layer.media_type,
                "digest": layer.digest,
                "size": len(layer.blob),
                "annotations": layer.annotations,
            }
        ],
        "annotations": {"io.podman.annotations.checkpoint.name": "web", **(annotations or {})},
        **more,
    }


def publish(server: FaultServer, layer: Layer, tag: str = "1") -> str:
    """Put an image into the registry, its zTOC too; return its reference."""
    server.add_blob(b"{}")
    server.add_blob(layer.blob)
    annotations = {}
    if layer.ztoc:
        annotations[INDEX_DIGEST_KEY] = server.add_manifest(soci_index(server, layer, INDEX_V2))
    server.add_manifest(manifest_of(layer, annotations), tag)
    return f"{server.host}/{server.repository}:{tag}"


def soci_index(server: FaultServer, layer: Layer, kind: str) -> dict[str, Any]:
    """Serve a layer's zTOC, and return the manifest of the index that holds it."""
    ztoc = {
        "mediaType": "application/octet-stream",
        "digest": server.add_blob(layer.ztoc),
        "size": len(layer.ztoc),
        "annotations": {LAYER_DIGEST_KEY: layer.digest},
    }
    index = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind}
    return {**index, "config": {**EMPTY, "mediaType": kind}, "layers": [ztoc]}


def publish_referring(server: FaultServer, layer: Layer, tag: str = "1") -> str:
    """Put an image into the registry, and its zTOC beside it, as anybody may; return its name."""
    reference = publish(server, replace(layer, ztoc=b""), tag)
    index = soci_index(server, layer, INDEX_V1)
    data = json.dumps(index).encode()
    listed = {"mediaType": OCI_MANIFEST, "size": len(data), "artifactType": INDEX_V1}
    listed["digest"] = server.add_manifest(data)
    referrers = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [listed]}
    image = digest_of(json.dumps(manifest_of(layer)).encode())
    path = f"/v2/{server.repository}/referrers/{image}"
    server.resources[path] = Resource(json.dumps(referrers).encode(), OCI_INDEX)
    return reference


def publish_many(
    server: FaultServer, layers: Sequence[Layer], tag: str = "many", **more: Any
) -> str:
    """Put an image of several layers into the registry; return its reference."""
    server.add_blob(b"{}")
    for layer in layers:
        server.add_blob(layer.blob)
    rows = [manifest_of(layer)["layers"][0] for layer in layers]
    server.add_manifest({**manifest_of(layers[0]), "layers": rows, **more}, tag)
    return f"{server.host}/{server.repository}:{tag}"


_made: deque[tuple[str, list[object], Layer]] = deque(maxlen=4)


def publish_files(server: FaultServer, files: Files, kind: str = "tar", tag: str = "1") -> str:
    """Publish a layer of `files`; one that was packed a moment ago is not packed again."""
    wanted: list[object] = list(files.items() if isinstance(files, Mapping) else files)
    for made, packed, layer in _made:
        if (made, packed) == (kind, wanted):
            return publish(server, layer, tag)
    layer = LAYERS[kind](files)
    _made.append((kind, wanted, layer))
    return publish(server, layer, tag)


def write_layout(directory: Path, layer: Layer) -> str:
    """Write an OCI layout of one image; return its reference."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    manifest = json.dumps(manifest_of(layer)).encode()
    for data in (b"{}", manifest, layer.blob):
        (blobs / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entry = {"mediaType": OCI_MANIFEST, "digest": digest_of(manifest), "size": len(manifest)}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    (directory / "index.json").write_text(json.dumps(index))
    return f"oci:{directory}"


def extract(blob: bytes, directory: Path) -> Path:
    """Unpack a tar as root does: owners, modes and times as archived."""
    directory.mkdir()
    subprocess.run(["tar", "xp", "--numeric-owner", "-C", directory], input=blob, check=True)
    return directory


def settled(server: FaultServer, layer: Layer, mount: Mount) -> int:
    """Wait until a mount has all that it fetches unasked; return how many ranges it asked for.

    Of a zstd:chunked layer: the table of contents, what lies before the pages, what lies behind.
    Whoever counts requests, or lets the next of them fail, must not take these for a reader's.
    """

    def is_settled() -> bool:
        asked = asked_ranges(server, layer)
        wanted_bytes = sum(stop - start for start, stop in set(asked))
        fetched_bytes = mount.status()["bytes_fetched"]
        return len(asked) - mount.asked_again() == 3 and fetched_bytes >= wanted_bytes

    wait_until(is_settled, "the table of contents, what is before the pages, and what is behind")
    return len(asked_ranges(server, layer))


def asked_ranges(server: FaultServer, layer: Layer) -> list[tuple[int, int]]:
    """List the half-open ranges of a layer's blob that were asked for."""
    ranges = []
    for seen in server.seen:
        if layer.digest in seen.path:
            start, _, last = seen.headers["Range"].removeprefix("bytes=").partition("-")
            ranges.append((int(start), int(last) + 1))
    return ranges

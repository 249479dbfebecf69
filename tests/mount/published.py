"""Checkpoint images as a registry, a layout on disk or a web server gives them."""

import hashlib
import json
import random
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, digest_of
from tests.images import Files, Layer, tar_layer, zstd_chunked

KIB = 1024
MIB = 1024 * KIB
LAYERS = {"tar": tar_layer, "zstd:chunked": zstd_chunked}
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
    """Put an image into the registry; return its reference."""
    server.add_blob(b"{}")
    server.add_blob(layer.blob)
    server.add_manifest(manifest_of(layer), tag)
    return f"{server.host}/{server.repository}:{tag}"


def publish_files(server: FaultServer, files: Files, kind: str = "tar", tag: str = "1") -> str:
    return publish(server, LAYERS[kind](files), tag)


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


def asked_ranges(server: FaultServer, layer: Layer) -> list[tuple[int, int]]:
    """List the half-open ranges of a layer's blob that were asked for."""
    ranges = []
    for seen in server.seen:
        if layer.digest in seen.path:
            start, _, last = seen.headers["Range"].removeprefix("bytes=").partition("-")
            ranges.append((int(start), int(last) + 1))
    return ranges

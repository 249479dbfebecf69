"""The documents of a stub: the real image's own, edited. Sans-I/O.

Source: OCI image-spec, manifest.md, descriptor.md, config.md (`rootfs.diff_ids`); Docker's image
manifest version 2, schema 2.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lazyfs.checkpoint import containerd
from lazyfs.checkpoint.manifest import IMAGE_TYPES
from lazyfs.checkpoint.placed import PlacedLayer
from lazyfs.checkpoint.stub_layer import Written
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError

_TITLE = "org.opencontainers.image.title"
_KEPT_ANNOTATIONS = (_TITLE, "io.deis.oras.content.unpack")
"""Of a layer; the others speak of its bytes."""
_OF_INDEXES = ("com.amazon.soci.",)
"""Annotations of a manifest that speak of its layers' bytes."""
_OCI_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
_DOCKER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"


def parse_document(data: bytes, name: str) -> dict[str, Any]:
    """Read a manifest or an index as it is, to be edited; `name` is for messages.

    Raises:
        MalformedError: it is none.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{name}: its manifest cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise MalformedError(f"{name}: its manifest is no object")
    return document


def write_document(document: Mapping[str, Any]) -> bytes:
    """Return a document's bytes."""
    return json.dumps(document, separators=(",", ":")).encode()


def annotate(document: dict[str, Any], name: str, value: str) -> None:
    """Give a document an annotation, and take those that speak of its layers' bytes."""
    annotations = {
        key: text
        for key, text in (document.get("annotations") or {}).items()
        if not key.startswith(_OF_INDEXES)
    }
    document["annotations"] = {**annotations, name: value}


def gzip_type(kind: str) -> str:
    """Return the media type of a gzip layer in a manifest of this media type."""
    return _DOCKER_GZIP if kind == IMAGE_TYPES[1] else _OCI_GZIP


def compression(placed: PlacedLayer) -> Literal["gzip", "none"]:
    """Return what a layer's engine takes: containerd unpacks its own tar only as it is."""
    if placed.descriptor.media_type in (containerd.CRIU_TAR, containerd.PRE_DUMP_TAR):
        return "none"
    title = placed.descriptor.annotations.get(_TITLE, "").lower()
    return "none" if title.endswith(".tar") else "gzip"


def describe(before: dict[str, Any], layer: Written, packed: str) -> dict[str, Any]:
    """Return a descriptor of what stands in a layer's place.

    `packed`: the media type of a gzip layer; empty: its own is kept.
    """
    after = {name: value for name, value in before.items() if name not in ("urls", "data")}
    annotations = {
        name: value
        for name, value in (before.get("annotations") or {}).items()
        if name in _KEPT_ANNOTATIONS or not packed
    }
    after |= {"digest": str(layer.digest), "size": layer.size_bytes}
    after.pop("annotations", None)
    if annotations:
        after["annotations"] = annotations
    if packed:
        plain = str(before["mediaType"]).removesuffix("+gzip").removesuffix("+zstd")
        after["mediaType"] = plain if layer.diff_id == layer.digest else packed
    return after


def edit_config(
    before: bytes, layers: Sequence[Digest | None], written: Mapping[int, Written]
) -> bytes:
    """Return an image's config with the diff ids of layers that have become others."""
    try:
        config = json.loads(before)
    except (ValueError, RecursionError):
        return before
    rootfs = config.get("rootfs") if isinstance(config, dict) else None
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        return before  # an artifact's
    for number, layer in written.items():
        diff_ids[number] = str(layer.diff_id)
    return write_document(config)


def in_tree(placed: PlacedLayer, path: str) -> str:
    """Return where in the tree an entry of a layer is."""
    if placed.kind != "layer" or not placed.place:
        return path
    return f"{placed.place}/{path}" if path else placed.place


def in_layer(placed: PlacedLayer, path: str) -> str | None:
    """Return what a path of the tree is called in a layer; None: it cannot be there."""
    if placed.kind != "layer" or not placed.place:
        return path
    if path == placed.place:
        return ""
    prefix = f"{placed.place}/"
    return path.removeprefix(prefix) if path.startswith(prefix) else None

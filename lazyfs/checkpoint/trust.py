"""What of one opened checkpoint is proven by what, and when; and what `--verify=strict` refuses.

One table for `inspect`, the status of a mount and ARCHITECTURE.md ("What is trusted, and why").
"""

from typing import TYPE_CHECKING

import msgspec

from lazyfs.ground.errors import UsageError

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.opened_layer import OpenedLayer

_TABLES = {
    "zstd:chunked": "in the table of contents that the manifest names",
    "estargz": "in the table of contents that the manifest names",
    "zstd:stargz": "in the table of contents that the manifest names",
    "soci": "in the SOCI index that the manifest names",
    "gzip": "noted on this host while a whole pass was proven",
}


class Trust(msgspec.Struct, frozen=True):
    """One kind of bytes."""

    what: str
    proven_by: str
    """"nothing" where nothing is."""
    when: str


def trust_of(checkpoint: "OpenedCheckpoint") -> list[Trust]:
    """Return what is proven by what, in the order in which it is read."""
    image = checkpoint.image
    rows = []
    if image.digest is None:
        rows.append(Trust("checkpoint", "nothing: it was named by a path or URL", "never"))
    elif checkpoint.by_digest:
        rows.append(Trust("manifest", "the digest asked for", "before it is parsed"))
    else:
        nothing = f"nothing: a tag was asked for; what follows keeps to {image.digest}"
        rows.append(Trust("manifest", nothing, "never"))
    if image.config is not None and image.config.digest is not None:
        rows.append(Trust("config", "its digest in the manifest", "before it is parsed"))
    several = len(checkpoint.image_layers) > 1
    for number, layer in enumerate(checkpoint.image_layers, 1):
        rows.append(_layer(checkpoint, layer, f"layer {number}" if several else "layer"))
    return rows


def insist_on_digest(checkpoint: "OpenedCheckpoint") -> None:
    """Refuse a reference that anybody might move.

    Raises:
        UsageError: the checkpoint was not asked for by a digest.
    """
    if checkpoint.by_digest:
        return
    if checkpoint.image.digest is None:
        raise UsageError(
            f"--verify=strict: {checkpoint.reference} is named by nothing that could prove it; "
            "make an image of it, and name that by its digest"
        )
    raise UsageError(
        "--verify=strict takes an image by its digest only: a tag can be moved. "
        f"If you trust what it names now: {checkpoint.reference}"
    )


def insist_on_proof(checkpoint: "OpenedCheckpoint") -> None:
    """Refuse layers that nothing proves.

    Raises:
        UsageError: there is one.
    """
    for number, layer in enumerate(checkpoint.image_layers, 1):
        if layer.proof == "none":
            raise UsageError(
                f"--verify=strict: nothing proves layer {number} of {checkpoint.reference}"
            )


def _layer(checkpoint: "OpenedCheckpoint", layer: "OpenedLayer", what: str) -> Trust:
    if layer.proof == "none":
        return Trust(what, "nothing: it has no digest", "never")
    if layer.proof == "chunk":
        unit = "span" if layer.format_name.startswith(("gzip", "soci")) else "chunk"
        family = next((name for name in _TABLES if layer.format_name.startswith(name)), "")
        table = f", {_TABLES[family]}" if family else ""
        return Trust(what, f"the digest of each {unit}{table}", "before a byte of it is served")
    if checkpoint.desk.config.content.proves_first:
        when = "before the first byte is served"
    elif layer.is_stream:
        when = "when all of it has been decoded; what is read before then is not proven yet"
    else:
        when = "when all of it is here; what is read before then is not proven yet"
    return Trust(what, "its digest in the manifest", when)

"""Attaching a trace to an image: the hint as a blob, and an artifact whose subject is the image.

What is written is for strangers: the hint alone, never what was recorded beside it. Each workload
has one trace in the end, the newest; registries that keep the lists themselves keep the older ones,
too, and whoever looks for one takes the newest.

Source: OCI image-spec 1.1, manifest.md ("Guidelines for Artifact Usage", "Guidance for an Empty
Descriptor"); annotations.md (`org.opencontainers.image.created`).
"""

import io
import json
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
from msgspec.structs import asdict

from lazyfs.checkpoint.attached import (
    CREATED_KEY,
    WORKLOAD_MOST,
    is_of,
    layers_of,
)
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.referrals import TRACE_TYPE
from lazyfs.checkpoint.trace import (
    BLOB_KEY,
    BLOB_SIZE_KEY,
    HINT_LIMIT_BYTES,
    TRACE_BLOB_TYPE,
    WORKLOAD_KEY,
    Trace,
    dump_trace,
    parse_hint,
)
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError, UsageError
from lazyfs.transport.target import Target

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_EMPTY = b"{}"
_SHOWN_MOST = 5


class AttachReport(msgspec.Struct, frozen=True):
    """A trace that has been attached; the keys are in docs/json.md."""

    reference: str
    """The image, pinned."""
    artifact: str
    """The digest of the manifest that refers to it."""
    trace: str
    """The digest of the document."""
    trace_bytes: int
    workload: str
    until: str
    needed_bytes: int
    created: str
    listed_by: str
    """"api", "tag" (the fallback, where a registry has no API), "index" of a layout."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def attach_trace(
    image: ResolvedImage, target: Target, trace: Trace, workload: str | None, created: datetime
) -> AttachReport:
    """Write the hint of a trace where the image is. Blocks, in a thread.

    `workload`: whose it is to be; None: whose the trace says that it is.

    Raises:
        UsageError: the trace is of other layers, or of none that has a digest; or a partial one.
        MalformedError: it is larger than anybody would take.
        SourceError: the image's manifest is not to be had, or nothing is taken.
    """
    if trace.is_partial:
        raise UsageError(
            "the trace was recorded --as-usual, and tells only in part what is needed: record one "
            "without that"
        )
    _insist_on_layers(trace, image)
    name = trace.workload if workload is None else workload
    if len(name) > WORKLOAD_MOST or not (name.isprintable() or not name):
        raise UsageError(f"a workload's name has at most {WORKLOAD_MOST} characters, all printable")
    hint = msgspec.structs.replace(trace.hint(), workload=name)
    document = dump_trace(hint)
    if len(document) > HINT_LIMIT_BYTES:
        raise MalformedError(
            f"the trace has {len(document)} bytes without its recording; mounts take at most "
            f"{HINT_LIMIT_BYTES}: record a shorter time"
        )
    parse_hint(document, "the trace")
    blob = Digest.of(document)
    annotations = {
        BLOB_KEY: str(blob),
        BLOB_SIZE_KEY: str(len(document)),
        CREATED_KEY: created.astimezone(UTC).isoformat(timespec="milliseconds"),
    }
    if name:
        annotations[WORKLOAD_KEY] = name
    subject, digest = _subject(image)
    empty = {"mediaType": _EMPTY_TYPE, "digest": str(Digest.of(_EMPTY)), "size": len(_EMPTY)}
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "artifactType": TRACE_TYPE,
        "config": empty,
        "layers": [{"mediaType": TRACE_BLOB_TYPE, "digest": str(blob), "size": len(document)}],
        "subject": subject,
        "annotations": annotations,
    }
    data = json.dumps(manifest, separators=(",", ":")).encode()
    artifact = str(Digest.of(data))
    entry = {
        "mediaType": _MANIFEST_TYPE,
        "digest": artifact,
        "size": len(data),
        "artifactType": TRACE_TYPE,
        "annotations": annotations,
    }
    for piece in (_EMPTY, document):
        target.put_blob(Digest.of(piece), len(piece), partial(io.BytesIO, piece))
    listed_by = target.attach(data, digest, entry, WORKLOAD_KEY)
    return AttachReport(
        image.reference,
        artifact,
        str(blob),
        len(document),
        name,
        trace.until,
        trace.needed_bytes,
        annotations[CREATED_KEY],
        listed_by,
    )


def _insist_on_layers(trace: Trace, image: ResolvedImage) -> None:
    """Refuse a trace that nobody who mounts the image would follow.

    Raises:
        UsageError: it is one.
    """
    if is_of(trace, image):
        return
    theirs = _few([layer.digest for layer in trace.layers])
    raise UsageError(
        f"the trace is of other layers than {image.reference}: it names {theirs}, and the image "
        f"has {_few(layers_of(image))}"
    )


def _few(digests: "list[str] | set[str]") -> str:
    named = sorted(each for each in digests if each)
    more = f" and {len(named) - _SHOWN_MOST} more" if len(named) > _SHOWN_MOST else ""
    return (", ".join(named[:_SHOWN_MOST]) or "none that has a digest") + more


def _subject(image: ResolvedImage) -> tuple[dict[str, Any], Digest]:
    """Return the descriptor of the image's manifest.

    Raises:
        UsageError: it has none.
        SourceError: it cannot be had.
    """
    if image.digest is None or image.source is None:
        raise UsageError(f"{image.reference} is no image: nothing can be attached to it")
    served = image.source.manifest(str(image.digest))
    described = {
        "mediaType": image.media_type or served.media_type or _MANIFEST_TYPE,
        "digest": str(image.digest),
        "size": len(served.data),
    }
    return described, image.digest

"""Traces for tests, and how a registry lists those that are attached to an image."""

import json
from typing import Any

from lazyfs.checkpoint.attached import CREATED_KEY
from lazyfs.checkpoint.referrals import TRACE_TYPE
from lazyfs.checkpoint.trace import (
    BLOB_KEY,
    BLOB_SIZE_KEY,
    TRACE_BLOB_TYPE,
    WORKLOAD_KEY,
    Need,
    Trace,
    TracedFile,
    TracedLayer,
    dump_trace,
)
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, Resource, digest_of

KIB = 1024


def trace_of(*layers: str, workload: str = "", pages_bytes: int = 2 << 20, **more: Any) -> Trace:
    """Return a trace that needed two ranges of the pages of the first of these layers."""
    files = [TracedFile("checkpoint/pages-1.img", 0, pages_bytes)] if layers else []
    needs = [Need(0, 64 * KIB, 4 * KIB, 12.5), Need(0, 0, 8 * KIB, 20.0)] if layers else []
    return Trace(
        workload=workload,
        made_by="tests",
        until="port 8080 answered",
        layers=[TracedLayer(layer, 10) for layer in layers],
        files=files,
        needs=needs,
        **more,
    )


def annotations_of(
    document: bytes, workload: str = "", created: str = "2026-01-02T03:04:05Z"
) -> dict[str, str]:
    """Return what an artifact says of its document."""
    said = {
        BLOB_KEY: digest_of(document),
        BLOB_SIZE_KEY: str(len(document)),
        CREATED_KEY: created,
    }
    return {**said, WORKLOAD_KEY: workload} if workload else said


def listed(annotations: dict[str, str], data: bytes = b"an artifact's manifest") -> dict[str, Any]:
    """Return a row of a list of referrers."""
    return {
        "mediaType": OCI_MANIFEST,
        "digest": digest_of(data),
        "size": len(data),
        "artifactType": TRACE_TYPE,
        "annotations": annotations,
    }


def artifact_of(document: bytes, annotations: dict[str, str]) -> bytes:
    """Return an artifact's manifest."""
    layer = {"mediaType": TRACE_BLOB_TYPE, "digest": digest_of(document), "size": len(document)}
    return json.dumps({"schemaVersion": 2, "layers": [layer], "annotations": annotations}).encode()


def index_of(*rows: dict[str, Any]) -> bytes:
    """Return a list of referrers."""
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows}).encode()


def attach(server: FaultServer, subject: str, *rows: dict[str, Any], by_tag: bool = False) -> None:
    """Have the server list these rows as referrers of a manifest."""
    if by_tag:
        server.add_manifest(index_of(*rows), subject.replace(":", "-"), OCI_INDEX)
    else:
        path = f"/v2/{server.repository}/referrers/{subject}"
        server.resources[path] = Resource(index_of(*rows), OCI_INDEX)


def attach_trace(server: FaultServer, subject: str, trace: Trace, **more: Any) -> str:
    """Attach a trace by the API; return its document's digest."""
    document = dump_trace(trace)
    attach(server, subject, listed(annotations_of(document, trace.workload, **more)))
    return server.add_blob(document)

"""What a mount tells of itself: its state as JSON, for people, scripts and metrics.

Keys are kept, new ones may come (`docs/json.md`). Nothing here waits for anything.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict

import lazyfs
from lazyfs.activity import Activity
from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.checkpoint.opened_layer import OpenedLayer
from lazyfs.checkpoint.trust import trust_of

_LISTED_MOST = 64
_LISTED_PLACES_MOST = 16
_TEXT_MOST = 2000
_XATTR_MOST_BYTES = 64 * 1024
"""Linux, `include/uapi/linux/limits.h`, XATTR_SIZE_MAX."""
_LEFT_OUT_FIRST = ("fetches", "reading", "trust", "layers", "warnings", "places")
"""What is shortened, in this order, where all of it would be too long."""


class MountState(msgspec.Struct):
    """A mount whose state can be told at any time."""

    directory: Path
    view: str
    checkpoint: OpenedCheckpoint
    activity: Activity
    warnings: Sequence[str]
    mounted_at_s: float
    completion: Callable[[], Mapping[str, Any] | None]
    """What has become of the wish to fetch all of it; None if nobody had it."""
    restores: str | None = None
    """What it is mounted for, if only for that."""
    lazy_pages: Callable[[], Mapping[str, Any] | None] = lambda: None
    """How it is with the tasks whose memory is served as it is wanted; None if that is not done."""
    prefetch: Callable[[], Mapping[str, Any] | None] = lambda: None
    """How it is with what is fetched before anybody asks."""

    def as_json(self) -> dict[str, Any]:
        """Return what `docs/json.md` describes."""
        checkpoint, activity = self.checkpoint, self.activity
        layers = [_layer(layer) for layer in checkpoint.image_layers]
        main = layers[checkpoint.images.layer if checkpoint.images is not None else 0]
        poison = checkpoint.poison
        return {
            "reference": checkpoint.reference,
            "stub": checkpoint.stub,
            "directory": str(self.directory),
            "view": self.view,
            "restores": self.restores and self.restores[:_TEXT_MOST],
            "pid": os.getpid(),
            "version": lazyfs.__version__,
            "mounted_at": _iso(self.mounted_at_s),
            "state": "serving" if poison is None else "failed",
            "cache": str(checkpoint.desk.config.cache),
            "layer_digest": main["digest"],
            "layer_format": main["format"],
            "layer_bytes": sum(layer["size_bytes"] for layer in layers),
            "content_bytes": _sum(layer["content_bytes"] for layer in layers),
            "here_bytes": sum(layer["here_bytes"] for layer in layers),
            "proven_bytes": sum(layer["proven_bytes"] for layer in layers),
            "chunks_proven": all(layer["proof"] == "chunk" for layer in layers),
            "blob_proven": all(layer["blob_proven"] for layer in layers),
            "served_proven": is_served_proven(checkpoint, self.view),
            "safe_offline": is_safe_offline(checkpoint),
            "safe_unmount": activity.is_unused,
            "open_files": activity.open_files,
            "open_directories": activity.open_directories,
            "reads_waiting": activity.reads_waiting,
            "longest_wait_s": round(activity.longest_wait_s, 3),
            "reading": [_plain(asdict(each)) for each in activity.reading()],
            "fetches": [_plain(asdict(each)) for each in checkpoint.desk.fetcher.waiting()],
            "places": _places(checkpoint),
            "trace": _trace(checkpoint),
            "completion": self.completion(),
            "lazy_pages": self.lazy_pages(),
            "prefetch": self.prefetch(),
            "failed": str(poison) if poison is not None else None,
            "last_error": activity.last_error and activity.last_error[:_TEXT_MOST],
            "last_error_at": _iso(activity.last_error_at_s) if activity.last_error else None,
            "trust": [asdict(row) for row in trust_of(checkpoint)][:_LISTED_MOST],
            "layers": layers[:_LISTED_MOST],
            **checkpoint.counters.snapshot(),
            "warnings": list(self.warnings),
        }

    def figures(self) -> dict[str, Any]:
        """Return the numbers of it, for a recording."""
        layers = self.checkpoint.image_layers
        return {
            "layer_bytes": sum(layer.descriptor.size_bytes for layer in layers),
            "content_bytes": _sum(layer.content_bytes for layer in layers),
            "here_bytes": sum(layer.content.here_bytes() for layer in layers),
            "lazy_pages": self.lazy_pages(),
            "trace": _trace(self.checkpoint),
            **self.checkpoint.counters.snapshot(),
        }

    def as_xattr(self) -> bytes:
        """Return it as JSON that an extended attribute can hold."""
        return bounded(self.as_json(), _XATTR_MOST_BYTES)


def is_served_proven(checkpoint: OpenedCheckpoint, view: str) -> bool:
    """Whether nothing that has been served can turn out to be wrong any more.

    What a container changed in its files is a layer of its own in containerd's checkpoints, of
    which the view of CRIU's images shows nothing.
    """
    return all(
        layer.proof != "layer"
        or layer.blob_proven
        or (view == "criu" and layer.placed.kind == "diff")
        for layer in checkpoint.image_layers
    )


def is_safe_offline(checkpoint: OpenedCheckpoint) -> bool:
    """Whether nothing will be asked of the source any more: all is here, and proven if it can be.

    An archive within the checkpoint is made of what is here.
    """
    filling = checkpoint.tree.root.filling
    return (
        checkpoint.poison is None
        and (filling is None or filling.ended)
        and all(layer.is_local and layer.is_settled for layer in checkpoint.image_layers)
    )


def bounded(state: Mapping[str, Any], most_bytes: int) -> bytes:
    """Return JSON of at most so many bytes: lists are halved until they fit."""
    shown = dict(state)
    text = json.dumps(shown).encode()
    for key in _LEFT_OUT_FIRST:
        while len(text) > most_bytes and shown.get(key):
            shown[key] = shown[key][: len(shown[key]) // 2]
            text = json.dumps(shown).encode()
    return text


def _layer(layer: OpenedLayer) -> dict[str, Any]:
    return {
        "digest": str(layer.descriptor.digest) if layer.descriptor.digest else None,
        "format": layer.format_name,
        "proof": layer.proof,
        "size_bytes": layer.descriptor.size_bytes,
        "content_bytes": layer.content_bytes,
        "here_bytes": layer.content.here_bytes(),
        "proven_bytes": layer.proven_bytes(),
        "blob_proven": layer.blob_proven,
    }


def _places(checkpoint: OpenedCheckpoint) -> list[dict[str, Any]]:
    source = checkpoint.image.source
    healths = source.healths() if source is not None else ()
    return [health.snapshot() for health in healths[:_LISTED_PLACES_MOST]]


def _trace(checkpoint: OpenedCheckpoint) -> dict[str, Any] | None:
    trace = checkpoint.trace
    if trace is None:
        return None
    return {
        "source": checkpoint.trace_source,
        "workload": trace.workload[:_TEXT_MOST],
        "needed_bytes": checkpoint.trace_bytes,
    }


def _plain(value: Any) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, float):
        return round(value, 3)
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)[:_TEXT_MOST]


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")


def _sum(sizes: Iterable[int | None]) -> int | None:
    """Add up, unless one is not known yet."""
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)

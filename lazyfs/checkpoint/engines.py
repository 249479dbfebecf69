"""Who made a checkpoint, and of what: each engine's handwriting, recognised.

Everything here was written by the engine or by whoever pushed the image, and proves nothing. It
is for people to read, and decides neither what is fetched nor what is shown.

A new engine is an entry in one of the tables. Sources are asked in this order, and the first that
knows a thing is believed: annotations, the dumps beside the images directory, media types, names.

Source: Podman, pkg/checkpoint, libpod/define/annotations.go, libpod/container_internal_common.go;
CRI-O, internal/annotations and internal/lib/checkpoint.go; containerd, client/container.go,
internal/cri/annotations and internal/cri/server/container_checkpoint_linux.go; checkpointctl,
lib/metadata.go, lib/annotations.go and internal/container.go; OCI image-spec, annotations.md and
issue 962.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import msgspec

from lazyfs.ground.errors import MalformedError

DUMPS = ("config.dump", "spec.dump", "status.dump")
"""Files beside the images directory that `origin_of` understands."""

_LONGEST_TEXT = 1000


class Origin(msgspec.Struct, frozen=True):
    """Where a checkpoint comes from, as far as anybody wrote it down; None where nobody did."""

    engine: str | None = None
    engine_version: str | None = None
    recognised_by: str | None = None
    """What gave the engine away."""
    container_id: str | None = None
    container_name: str | None = None
    container_created_at: str | None = None
    pod_name: str | None = None
    pod_namespace: str | None = None
    base_image_name: str | None = None
    base_image_digest: str | None = None
    base_image_id: str | None = None
    criu_version: str | None = None
    runtime_name: str | None = None
    runtime_version: str | None = None
    host_kernel: str | None = None
    host_architecture: str | None = None
    distribution_name: str | None = None
    distribution_version: str | None = None
    cgroup_version: str | None = None
    checkpointed_at: str | None = None


Found: TypeAlias = Iterator[tuple[str, object]]
"""Fields of Origin by name, as read."""

Dump: TypeAlias = Mapping[str, Any]


class _AnnotationMark(msgspec.Struct, frozen=True):
    """Annotations that begin with `prefix` are written by `engine`, or by no engine of its own."""

    prefix: str
    engine: str | None
    keys: Mapping[str, str]
    """What follows the prefix, and the field of Origin it fills. Earlier keys win."""


_LIBPOD_KEYS = {
    "name": "container_name",
    "rootfsImageName": "base_image_name",
    "rawImageName": "base_image_name",
    "rootfsImageID": "base_image_id",
    "criu.version": "criu_version",
    "runtime.name": "runtime_name",
    "runtime.version": "runtime_version",
    "host.arch": "host_architecture",
    "host.kernel": "host_kernel",
    "cgroups.version": "cgroup_version",
    "distribution.name": "distribution_name",
    "distribution.version": "distribution_version",
}

_ANNOTATION_MARKS = (
    _AnnotationMark(
        "io.podman.annotations.checkpoint.",
        "Podman",
        {**_LIBPOD_KEYS, "podman.version": "engine_version"},
    ),
    _AnnotationMark(
        "io.kubernetes.cri-o.annotations.checkpoint.",
        "CRI-O",
        {**_LIBPOD_KEYS, "cri-o.version": "engine_version", "crio.version": "engine_version"},
    ),
    _AnnotationMark(
        "io.kubernetes.containerd.annotations.checkpoint.",
        "containerd",
        {**_LIBPOD_KEYS, "containerd.version": "engine_version"},
    ),
    _AnnotationMark("io.containerd.checkpoint.", "containerd", {"runtime": "runtime_name"}),
    _AnnotationMark(
        "org.criu.checkpoint.",
        None,
        {
            **_LIBPOD_KEYS,
            "engine.name": "engine",
            "engine.version": "engine_version",
            "container.name": "container_name",
            "pod.name": "pod_name",
            "pod.namespace": "pod_namespace",
            "rootfsImageUserRequested": "base_image_name",
            "rootfsImageSha": "base_image_digest",
            "cgroup.version": "cgroup_version",
        },
    ),
    _AnnotationMark(
        "org.opencontainers.image.checkpoint.",
        None,
        {
            "engine": "engine",
            "name": "container_name",
            "id": "container_id",
            "runtime": "runtime_name",
            "base.name": "base_image_name",
            "base.digest": "base_image_digest",
            "created": "checkpointed_at",
            "checkpointer": "criu_version",
        },
    ),
    _AnnotationMark(
        "org.opencontainers.image.",
        None,
        {
            "base.name": "base_image_name",
            "base.digest": "base_image_digest",
            "created": "checkpointed_at",
        },
    ),
)

_MANAGERS = {"libpod": "Podman", "cri-o": "CRI-O"}
"""spec.dump's annotation io.container.manager."""

_SPEC_MARKS = (("io.kubernetes.cri-o.", "CRI-O"), ("io.kubernetes.cri.", "containerd"))
"""Annotations in spec.dump that begin so."""

_SPEC_KEYS = {
    "io.kubernetes.container.name": "container_name",
    "io.kubernetes.cri.container-name": "container_name",
    "io.kubernetes.pod.name": "pod_name",
    "io.kubernetes.cri.sandbox-name": "pod_name",
    "io.kubernetes.pod.namespace": "pod_namespace",
    "io.kubernetes.cri.sandbox-namespace": "pod_namespace",
    "io.kubernetes.cri.image-name": "base_image_name",
}

_CONFIG_KEYS = {
    "id": "container_id",
    "name": "container_name",
    "createdTime": "container_created_at",
    "checkpointedTime": "checkpointed_at",
    "rootfsImageName": "base_image_name",
    "rootfsImage": "base_image_name",
    "RawImageName": "base_image_name",
    "rootfsImageRef": "base_image_id",
    "rootfsImageID": "base_image_id",
    "runtime": "runtime_name",
}

_MEDIA_TYPE_MARKS = (
    ("application/vnd.containerd.container.criu.checkpoint.", "containerd"),
    ("application/vnd.containerd.container.checkpoint.", "containerd"),
)

_NAME_MARKS = (
    ("io.kubernetes.cri-o.LogPath", "CRI-O"),
    ("bind.mounts", "CRI-O"),
    ("container.log", "containerd"),
    ("network.status", "Podman"),
    ("devshm-checkpoint.tar", "Podman"),
    ("status", "containerd"),
    ("descriptors.json", "runc or crun"),
    ("inventory.img", "CRIU"),
)
"""Names at the top of the layer, the most telling first; the last two say: no engine at all.

CRI-O does put the container's log there under an annotation's name."""

_RUNTIME = re.compile(r"io\.containerd\.([a-z][a-z0-9-]*)\.v[0-9]+")
"""What containerd calls its runtime shims: io.containerd.runc.v2."""

_CRIU = re.compile(r"criu(?:[ /]+(?:version:? +)?v?(?P<version>[0-9.]+))?", re.IGNORECASE)
"""How CRIU is named where it is named with its version, or alone."""

_CGROUP = re.compile(r"/[^/]+/(?P<id>[^/:]+)|[^/]*:[^/:]*:(?P<systemd_id>[^/:]+)")
"""The path that a container's cgroup is given by its engine: /NAMESPACE/ID by containerd, and for
systemd SLICE:PREFIX:ID by all (runtime-spec, config-linux.md; containerd, pkg/oci/spec.go)."""


def parse_dump(data: bytes, what: str) -> Dump:
    """Read a file of `DUMPS`; `what` is its name.

    Raises:
        MalformedError: it is no JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"{what} is not a JSON object: {error}") from error


def origin_of(
    annotations: Mapping[str, str],
    dumps: Mapping[str, Dump],
    media_types: Iterable[str],
    names: Collection[str],
) -> Origin:
    """Put together what is known. Never fails: what makes no sense is not believed.

    `annotations`: of the manifest; `dumps`: `DUMPS` that are there, by name, parsed; `names`: at
    the top of the layer.
    """
    known: dict[str, str] = {}
    sources = (
        _from_annotations(annotations),
        _from_spec(dumps.get("spec.dump", {})),
        _from_status(dumps.get("status.dump", {})),
        _from_config(dumps.get("config.dump", {})),
        _from_marks(media_types, names),
        _from_cgroup(dumps.get("spec.dump", {})),
    )
    for source in sources:
        for field, value in source:
            text = _clean(field, value)
            if text:
                known.setdefault(field, text)
    if "base_image_digest" not in known:
        _, at, digest = known.get("base_image_name", "").partition("@")
        if at:
            known["base_image_digest"] = digest
    return Origin(**known)


def _from_annotations(annotations: Mapping[str, str]) -> Found:
    for mark in _ANNOTATION_MARKS:
        seen = next((key for key in annotations if key.startswith(mark.prefix)), None)
        if seen is None:
            continue
        if mark.engine is not None:
            yield "engine", mark.engine
            yield "recognised_by", f"annotations {mark.prefix}*"
        for key, field in mark.keys.items():
            value = annotations.get(mark.prefix + key)
            yield field, value
            if field == "engine" and value:
                yield "recognised_by", f"annotation {mark.prefix}{key}"


def _from_spec(spec: Dump) -> Found:
    annotations = _mapping(spec.get("annotations"))
    manager = annotations.get("io.container.manager")
    if isinstance(manager, str) and manager in _MANAGERS:
        yield "engine", _MANAGERS[manager]
        yield "recognised_by", f"io.container.manager in spec.dump is {manager}"
    for prefix, engine in _SPEC_MARKS:
        if any(key.startswith(prefix) for key in annotations):
            yield "engine", engine
            yield "recognised_by", f"annotations {prefix}* in spec.dump"
    for key, field in _SPEC_KEYS.items():
        yield field, annotations.get(key)


def _from_status(status: Dump) -> Found:
    labels = _mapping(status.get("labels"))
    yield "container_id", status.get("id")
    yield "container_name", _mapping(status.get("metadata")).get("name")
    yield "pod_name", labels.get("io.kubernetes.pod.name")
    yield "pod_namespace", labels.get("io.kubernetes.pod.namespace")
    yield "base_image_name", _mapping(status.get("image")).get("image")
    yield "base_image_id", status.get("image_ref")


def _from_config(config: Dump) -> Found:
    for key, field in _CONFIG_KEYS.items():
        yield field, config.get(key)


def _from_cgroup(spec: Dump) -> Found:
    """Of a spec that comes alone, as containerd's does: where else the container's id is."""
    path = _mapping(spec.get("linux")).get("cgroupsPath")
    found = _CGROUP.fullmatch(path) if isinstance(path, str) else None
    if found is not None:
        yield "container_id", found["id"] or found["systemd_id"]


def _from_marks(media_types: Iterable[str], names: Collection[str]) -> Found:
    for media_type in media_types:
        for prefix, engine in _MEDIA_TYPE_MARKS:
            if media_type.startswith(prefix):
                yield "engine", engine
                yield "recognised_by", f"media type {media_type}"
    for name, engine in _NAME_MARKS:
        if name in names:
            yield "engine", engine
            yield "recognised_by", f"{name} at the top of the layer"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _clean(field: str, value: object) -> str:
    """Return a value worth showing, or nothing."""
    if not isinstance(value, str):
        return ""
    text = value.strip()[:_LONGEST_TEXT]
    if field.endswith("_at"):
        return "" if text.startswith("0001-") else text  # Go's zero time: it never happened
    if field == "runtime_name":
        shim = _RUNTIME.fullmatch(text)
        return shim[1] if shim is not None else text
    if field == "criu_version" and (named := _CRIU.fullmatch(text)) is not None:
        return named["version"] or ""
    if field == "criu_version" and text.isdecimal() and len(text) >= 5:
        return f"{int(text[:-4])}.{int(text[-4:-2])}.{int(text[-2:])}"  # CRIU's RPC: 40101
    if field == "runtime_version":
        return _version_in(text)
    return text


def _version_in(text: str) -> str:
    r"""Of "runc version 1.1.15\ncommit: …", what `runc --version` prints, the version."""
    line = text.partition("\n")[0]
    return line.rpartition(" version ")[2].strip()

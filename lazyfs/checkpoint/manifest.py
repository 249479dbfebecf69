"""Manifests and indexes as they are written: JSON in, frozen values out. Sans-I/O.

Strict in what lazyfs relies on (digests, sizes, that a layer is described), and blind to what
it does not know, as image-spec asks. Sources: OCI image-spec, manifest.md, image-index.md,
descriptor.md, config.md; Docker's image manifest version 2, schema 2; the artifact manifest of
image-spec 1.1-rc.
"""

import platform as _platform
from collections.abc import Mapping
from typing import Annotated

import msgspec

from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError, NotACheckpoint
from lazyfs.layers.model import LayerDescriptor

IMAGE_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
ARTIFACT_TYPE = "application/vnd.oci.artifact.manifest.v1+json"
INDEX_ARTIFACTS = (
    "application/vnd.amazon.soci.index.v1+json",
    "application/vnd.amazon.soci.index.v2+json",
)
"""SOCI's indexes of an image lie beside it, and carry its platform: `soci/soci_convert.go`."""
_SCHEMA_1_PREFIX = "application/vnd.docker.distribution.manifest.v1+"
_IMAGE_CONFIG_TYPES = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
EMPTY_TYPES = (
    "application/vnd.oci.empty.v1+json",
    "application/vnd.oci.scratch.v1+json",
)
"""Of a config or a layer that is only there because there must be one: its content is `{}`."""
_LAYERS_MOST = 10_000
_LISTED_MOST = 20
_UNKNOWN_OS = "unknown"
"""What buildkit gives to attestations beside an image, so that nobody takes them for one."""
_TELLING = ("checkpoint", "ref.name", "title")
_SIZE_MOST = 1 << 60
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i686": "386",
    "i386": "386",
    "ppc64le": "ppc64le",
    "loongarch64": "loong64",
}


class Platform(msgspec.Struct, frozen=True):
    """What an image is for, in Go's words: linux/amd64, linux/arm64/v8."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def this_platform() -> Platform:
    """Return the machine's own platform."""
    machine = _platform.machine()
    return Platform("linux", _MACHINES.get(machine, machine))


class _Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str
    size: Annotated[int, msgspec.Meta(ge=0, le=_SIZE_MOST)]
    annotations: dict[str, str] | None = None
    artifact_type: str | None = None
    platform: _Platform | None = None


class _Document(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int | None = None
    media_type: str | None = None
    artifact_type: str | None = None
    config: _Descriptor | None = None
    layers: list[_Descriptor] | None = None
    blobs: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None
    annotations: dict[str, str] | None = None


class ImageManifest(msgspec.Struct, frozen=True):
    """An image manifest, or an artifact's, which is the same to us."""

    media_type: str
    artifact_type: str
    config: LayerDescriptor | None
    layers: tuple[LayerDescriptor, ...]
    annotations: Mapping[str, str]


class IndexEntry(msgspec.Struct, frozen=True):
    """A manifest (or whatever else) that an index points at."""

    descriptor: LayerDescriptor
    artifact_type: str
    platform: Platform | None

    @property
    def digest(self) -> Digest:
        """What to ask the source for."""
        if self.descriptor.digest is None:  # an index's entries all have one
            raise MalformedError("an entry of an index has no digest")
        return self.descriptor.digest

    @property
    def is_manifest(self) -> bool:
        """Whether it is something that can be resolved further."""
        return self.descriptor.media_type in (*IMAGE_TYPES, *INDEX_TYPES, ARTIFACT_TYPE)


class ImageIndex(msgspec.Struct, frozen=True):
    """Several manifests under one name, usually one a platform."""

    media_type: str
    entries: tuple[IndexEntry, ...]
    annotations: Mapping[str, str]


def parse_manifest(data: bytes, media_type: str, name: str) -> ImageManifest | ImageIndex:
    """Read a manifest or an index; `media_type` is the source's label, `name` for messages.

    Raises:
        MalformedError: it is neither; or it contradicts itself.
        NotACheckpoint: it is of a kind that cannot describe one (schema 1).
    """
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"{name}: its manifest cannot be read: {error}") from None
    kind = document.media_type or media_type
    if document.schema_version == 1 or kind.startswith(_SCHEMA_1_PREFIX):
        raise NotACheckpoint(
            f"{name} is an image of the old schema 1, which no engine writes checkpoints in; "
            "push it anew with a current engine"
        )
    parts = (document.manifests, document.layers, document.blobs)
    if sum(part is not None for part in parts) != 1:
        raise MalformedError(
            f"{name}: its manifest ({kind[:100] or 'without a media type'}) must have one of "
            "layers, manifests, blobs"
        )
    if max(len(part) for part in parts if part is not None) > _LAYERS_MOST:
        raise MalformedError(f"{name}: its manifest lists more than {_LAYERS_MOST} things")
    annotations = document.annotations or {}
    if document.manifests is not None:
        if kind in IMAGE_TYPES:
            raise MalformedError(f"{name}: its manifest is labelled {kind}, but is an index")
        entries = tuple(_entry(each, name) for each in document.manifests)
        return ImageIndex(kind or INDEX_TYPES[0], entries, annotations)
    if kind in INDEX_TYPES:
        raise MalformedError(f"{name}: its manifest is labelled {kind}, but is an image's")
    layers = document.layers if document.layers is not None else document.blobs or []
    config = document.config
    return ImageManifest(
        media_type=kind or IMAGE_TYPES[0],
        artifact_type=document.artifact_type or _artifact_by_config(config),
        config=None if config is None else _descriptor(config, name),
        layers=tuple(_descriptor(each, name) for each in layers),
        annotations=annotations,
    )


def choose(index: ImageIndex, platform: Platform, name: str) -> IndexEntry:
    """Return the entry for `platform`; an index's only manifest, if it names no platform.

    Of several for the same platform, one that calls itself a checkpoint, then the first.

    Raises:
        NotACheckpoint: there is none, or there are several; the message lists what there is.
    """
    manifests = [
        each
        for each in index.entries
        if each.is_manifest
        and each.artifact_type not in INDEX_ARTIFACTS
        and (each.platform is None or each.platform.os != _UNKNOWN_OS)
    ]
    if not manifests:
        kinds = sorted({each.descriptor.media_type[:100] for each in index.entries})
        raise NotACheckpoint(
            f"{name} is an index that points at no image manifest"
            + (f", but at {', '.join(kinds[:10])}" if kinds else "")
        )
    wanted = (platform.os, platform.architecture)
    fitting = [
        each
        for each in manifests
        if each.platform is not None and (each.platform.os, each.platform.architecture) == wanted
    ]
    if fitting:
        return next((each for each in fitting if _says_checkpoint(each)), fitting[0])
    unnamed = [each for each in manifests if each.platform is None]
    if len(manifests) == len(unnamed) == 1:
        return unnamed[0]
    if unnamed:
        listed = "; ".join(map(_summary, manifests[:_LISTED_MOST]))
        more = "; …" if len(manifests) > _LISTED_MOST else ""
        raise NotACheckpoint(
            f"{name} holds several images, and none of them says that it is for {platform}. Name "
            f"the one you want by its digest: {listed}{more}"
        )
    platforms = ", ".join(sorted({str(each.platform) for each in manifests}))
    raise NotACheckpoint(
        f"{name} has no image for {platform}; it has {platforms[:500]}. To see one of those, name "
        "it by its digest"
    )


def _says_checkpoint(entry: IndexEntry) -> bool:
    words = (entry.artifact_type, *entry.descriptor.annotations)
    return any("checkpoint" in word for word in words)


def _summary(entry: IndexEntry) -> str:
    """Return an entry's digest and what may tell a person which one it is."""
    facts = [str(entry.platform)[:60]] if entry.platform is not None else []
    facts += [entry.artifact_type[:100]] if entry.artifact_type else []
    annotations = entry.descriptor.annotations
    telling = [key for key in annotations if any(word in key for word in _TELLING)]
    for key in (telling or sorted(annotations))[:3]:
        facts.append(f"{key[:100]}={annotations[key][:100]}")
    return f"{entry.digest}" + (f" ({', '.join(facts)})" if facts else "")


class _ContainerConfig(msgspec.Struct, frozen=True, rename="pascal"):
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None


class _ImageConfig(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""
    config: _ContainerConfig | None = None


def describe(manifest: ImageManifest, config: bytes) -> str:
    """Say in a short phrase what an image is; `config` is its config blob, or empty."""
    if manifest.artifact_type:
        kinds = {"application/vnd.cncf.helm.config.v1+json": "a Helm chart"}
        kind = manifest.artifact_type[:100]
        return kinds.get(kind, f"an artifact of type {kind}")
    count = len(manifest.layers)
    facts = [f"{count} layer" + ("" if count == 1 else "s")]
    try:
        parsed = msgspec.json.decode(config, type=_ImageConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"an image of {facts[0]}"
    platform = Platform(parsed.os, parsed.architecture, parsed.variant)
    if parsed.os:
        facts.insert(0, str(platform)[:60])
    starts = parsed.config and (parsed.config.entrypoint or parsed.config.cmd)
    if not starts:
        return f"an image without a program to start ({', '.join(facts)})"
    label = "entrypoint" if parsed.config and parsed.config.entrypoint else "command"
    facts.append(f"{label} {' '.join(starts)[:80]}")
    return f"an ordinary container image ({', '.join(facts)})"


def _descriptor(written: _Descriptor, name: str) -> LayerDescriptor:
    try:
        digest = Digest.parse(written.digest)
    except MalformedError as error:
        raise MalformedError(f"{name}: its manifest: {error}") from None
    return LayerDescriptor(written.media_type, digest, written.size, written.annotations or {})


def _entry(written: _Descriptor, name: str) -> IndexEntry:
    platform = written.platform
    return IndexEntry(
        _descriptor(written, name),
        written.artifact_type or "",
        None
        if platform is None
        else Platform(platform.os, platform.architecture, platform.variant),
    )


def _artifact_by_config(config: _Descriptor | None) -> str:
    """Before artifactType, an artifact's type was its config's media type."""
    if config is None or config.media_type in (*_IMAGE_CONFIG_TYPES, *EMPTY_TYPES):
        return ""
    return config.media_type

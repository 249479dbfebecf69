"""From a reference to an image: its manifest, its layers, and a way to read them.

Blocks throughout and is called in worker threads. What a source needs is imported when there is
one: an archive on this machine is opened without loading an HTTP library. A checkpoint archive
outside of any image is an image of one layer without a digest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lazyfs.checkpoint import manifest as manifests
from lazyfs.checkpoint.manifest import ImageIndex, ImageManifest, Platform
from lazyfs.checkpoint.reference import (
    ArchiveReference,
    LayoutReference,
    Reference,
    RegistryReference,
)
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, MalformedError, SourceError, UnsupportedLayer
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.layers.model import LayerDescriptor
from lazyfs.transport.blob import Blob
from lazyfs.transport.source import ImageSource, Manifest

_NESTED_MOST = 4
_PATIENCE_MOST_S = 20.0
"""A person waits at the prompt: a name that is wrong should not take a minute to say so."""
_MAGIC_BYTES = 4
_MAGICS = (
    (b"\x1f\x8b", "application/vnd.oci.image.layer.v1.tar+gzip"),
    (b"\x28\xb5\x2f\xfd", "application/vnd.oci.image.layer.v1.tar+zstd"),
)
_TAR = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """An image whose manifest has been read and proven; its source is open until `close()`.

    The methods block and are called in worker threads; the values are just that.
    """

    reference: str
    """As given, pinned by digest where there is one: `host/repository@sha256:…`."""
    digest: Digest | None
    """Of the manifest; None for an archive."""
    manifest: ImageManifest
    platform: Platform | None
    """As the index says; None where there is no index or it does not say."""
    annotations: Mapping[str, str]
    """The index's descriptor's and the manifest's own, which win."""
    _source: ImageSource | None = field(repr=False)
    _archive: Blob | None = field(repr=False, default=None)

    @property
    def media_type(self) -> str:
        """Of the manifest."""
        return self.manifest.media_type

    @property
    def artifact_type(self) -> str:
        """What the manifest says that it is, where it is no container image; or empty."""
        return self.manifest.artifact_type

    @property
    def config(self) -> LayerDescriptor | None:
        """The config's descriptor; None for an archive and for some artifacts."""
        return self.manifest.config

    @property
    def layers(self) -> tuple[LayerDescriptor, ...]:
        """The layers, from the base up."""
        return self.manifest.layers

    def sole_layer(self) -> LayerDescriptor:
        """Return the only layer.

        Raises:
            UnsupportedLayer: there are several, or none.
        """
        if len(self.layers) != 1:
            raise UnsupportedLayer(
                f"{self.reference} has {len(self.layers)} layers; a checkpoint image that can be "
                "shown has one"
            )
        return self.layers[0]

    def open_blob(self, layer: LayerDescriptor) -> Blob:
        """Return the layer's blob, to be read by range; it is closed with the image.

        Raises:
            SourceError: it is not to be had.
            IntegrityError: it is not as large as promised.
        """
        if layer.digest is not None and self._source is not None:
            return self._source.blob(layer.digest, layer.size_bytes)
        if self._archive is not None:
            return self._archive
        raise MalformedError(f"{self.reference}: a layer without a digest")

    def read_config(self) -> bytes:
        """Return the config blob, proven; empty where there is none.

        Raises:
            SourceError: it is not to be had.
            MalformedError: it is too large to be one.
            IntegrityError: it is not what its digest promised.
        """
        if self.config is None or self.config.digest is None or self._source is None:
            return b""
        return self._source.read_blob(self.config.digest, self.config.size_bytes)

    def describe(self) -> str:
        """Say in a short phrase what the image is, for "not a checkpoint: it is …"."""
        if self._source is None:
            return "an archive"
        config = b""
        if not self.artifact_type:
            try:
                config = self.read_config()
            except LazyfsError:
                config = b""  # it is an image of so many layers then
        return manifests.describe(self.manifest, config)

    def close(self) -> None:
        """Let go of the source and of the blobs it gave."""
        if self._archive is not None:
            self._archive.close()
        if self._source is not None:
            self._source.close()


def resolve(
    reference: Reference,
    settings: TransportSettings,
    counters: Counters,
    *,
    authfile: Path | None = None,
) -> ResolvedImage:
    """Open the source and read the manifest. Blocks, in a thread.

    Raises:
        SourceError: the image cannot be had.
        MalformedError: its manifest is not one.
        NotACheckpoint: no manifest here can describe a checkpoint for this machine.
        IntegrityError: bytes contradict their digest.
    """
    patient = replace(settings, deadline_s=min(settings.deadline_s, _PATIENCE_MOST_S))
    if isinstance(reference, ArchiveReference):
        return _resolve_archive(reference, settings, patient, counters)
    source = _open_source(reference, patient, counters, authfile)
    try:
        return _resolve_in(source, reference)
    except BaseException:
        source.close()
        raise


def _open_source(
    reference: RegistryReference | LayoutReference,
    settings: TransportSettings,
    counters: Counters,
    authfile: Path | None,
) -> ImageSource:
    if isinstance(reference, LayoutReference):
        from lazyfs.transport.files import LayoutSource

        return LayoutSource(reference.directory, counters=counters)
    from lazyfs.transport.registry import RegistrySource

    return RegistrySource(
        reference.host,
        reference.repository,
        settings=settings,
        counters=counters,
        authfile=authfile,
    )


def _resolve_in(
    source: ImageSource, reference: RegistryReference | LayoutReference
) -> ResolvedImage:
    served = source.manifest(reference.wanted)
    annotations = dict(served.annotations)
    platform: Platform | None = None
    for _ in range(_NESTED_MOST):
        parsed = _parse(source, served)
        if isinstance(parsed, ImageManifest):
            return ResolvedImage(
                reference=str(reference.pinned(served.digest)),
                digest=served.digest,
                manifest=parsed,
                platform=platform,
                annotations={**annotations, **parsed.annotations},
                _source=source,
            )
        entry = manifests.choose(parsed, manifests.this_platform(), str(reference))
        annotations |= entry.descriptor.annotations
        platform = entry.platform or platform
        served = source.manifest(str(entry.digest))
    raise MalformedError(f"{reference}: indexes within indexes, {_NESTED_MOST} deep")


def _parse(source: ImageSource, served: Manifest) -> ImageManifest | ImageIndex:
    name = f"{source.name}@{served.digest}"
    return manifests.parse_manifest(served.data, served.media_type, name)


class _Head:
    """The sink of an archive's first bytes."""

    def __init__(self, size_bytes: int) -> None:
        self._data = bytearray(size_bytes)
        self._fill = 0

    def space(self) -> memoryview:
        return memoryview(self._data)[self._fill :]

    def advance(self, count: int) -> None:
        self._fill += count

    def taken(self) -> bytes:
        return bytes(self._data[: self._fill])


def _resolve_archive(
    reference: ArchiveReference,
    settings: TransportSettings,
    patient: TransportSettings,
    counters: Counters,
) -> ResolvedImage:
    blob: Blob
    if reference.is_url:
        from lazyfs.transport.client import HttpClient
        from lazyfs.transport.httpblob import open_url
        from lazyfs.transport.retry import attempts

        client = HttpClient(settings)
        try:
            blob = attempts(
                str(reference),
                lambda: open_url(client, reference.url),
                settings=patient,
                counters=counters,
            )
        except BaseException:
            client.close()
            raise
    else:
        from lazyfs.transport.files import open_file

        blob = open_file(reference.path)
    try:
        head = _read_head(blob, patient, counters)
    except BaseException:
        blob.close()
        raise
    media_type = next((kind for magic, kind in _MAGICS if head.startswith(magic)), _TAR)
    layer = LayerDescriptor(media_type, None, blob.size_bytes, {})
    return ResolvedImage(
        reference=str(reference),
        digest=None,
        manifest=ImageManifest("", "", None, (layer,), {}),
        platform=None,
        annotations={},
        _source=None,
        _archive=blob,
    )


def _read_head(blob: Blob, settings: TransportSettings, counters: Counters) -> bytes:
    if blob.size_bytes == 0:
        raise SourceError(f"{blob.name} is empty")
    byte_range = ByteRange(0, min(_MAGIC_BYTES, blob.size_bytes))

    def read() -> bytes:
        head = _Head(byte_range.size_bytes)
        blob.read_into(byte_range, head)
        return head.taken()

    from lazyfs.transport.retry import attempts

    return attempts(blob.name, read, settings=settings, counters=counters)

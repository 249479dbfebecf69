"""From a reference to an image: its manifest, its layers, and a way to read them.

Blocks throughout and is called in worker threads. What a source needs is imported when there is
one: an archive on this machine is opened without loading an HTTP library. A checkpoint archive
outside of any image is an image of one layer without a digest, and so is an unpacked one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from lazyfs.checkpoint import containerd
from lazyfs.checkpoint import manifest as manifests
from lazyfs.checkpoint.engines import Dump
from lazyfs.checkpoint.manifest import ImageIndex, ImageManifest, Platform
from lazyfs.checkpoint.placed import PlacedLayer, place_layers
from lazyfs.checkpoint.reference import (
    ArchiveReference,
    DirectoryReference,
    ImageArchiveReference,
    ImageReference,
    LayoutReference,
    Reference,
    RegistryReference,
)
from lazyfs.checkpoint.referrals import Referrals
from lazyfs.checkpoint.remembered import RememberingSource, is_remembered
from lazyfs.content.documents import Documents
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import LazyfsError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.layers.model import LayerDescriptor
from lazyfs.transport.blob import Blob
from lazyfs.transport.source import ImageSource, Manifest

__all__ = ["PlacedLayer", "ResolvedImage", "resolve"]

_NESTED_MOST = 4
_MAGIC_BYTES = 4
_MAGICS = (
    (b"\x1f\x8b", "application/vnd.oci.image.layer.v1.tar+gzip"),
    (b"\x28\xb5\x2f\xfd", "application/vnd.oci.image.layer.v1.tar+zstd"),
)
_TAR = "application/vnd.oci.image.layer.v1.tar"


class ResolvedImage(Discreet, frozen=True):
    """An image whose manifest has been read and proven; its source is open until `close()`.

    The methods block and are called in worker threads; the values are just that.
    """

    unprinted = ("source", "referrals", "_archive")
    reference: str
    """As given, pinned by digest where there is one: `host/repository@sha256:…`."""
    digest: Digest | None
    """Of the manifest, or of containerd's index; None for an archive."""
    manifest: ImageManifest
    platform: Platform | None
    """As the index says; None where there is no index or it does not say."""
    annotations: Mapping[str, str]
    """The index's, its descriptor's, and the manifest's own, each over the one before."""
    source: ImageSource | None
    """Where manifests and blobs come from; None for an archive."""
    referrals: Referrals | None = None
    """Who refers to it; None for an archive."""
    _archive: Blob | None = None

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

    @property
    def repository(self) -> str:
        """Its name without a digest: what only this repository holds is kept under it."""
        return self.reference.partition("@")[0]

    @property
    def is_remote(self) -> bool:
        """Whether it is had from a registry, and what that says is worth keeping."""
        return isinstance(self.source, RememberingSource)

    def placed_layers(self) -> tuple[PlacedLayer, ...]:
        """Return the layers with what each makes of the tree, in the order of laying them over.

        Raises:
            UnsupportedLayer: there are none, or one is encrypted.
            MalformedError: one has a title that is no path.
        """
        return place_layers(self.layers, self.reference)

    def open_blob(self, layer: LayerDescriptor) -> Blob:
        """Return the layer's blob, to be read by range; it is closed with the image.

        Raises:
            SourceError: it is not to be had.
            IntegrityError: it is not as large as promised.
        """
        if layer.digest is not None and self.source is not None:
            return self.source.blob(layer.digest, layer.size_bytes)
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
        return b"" if self.config is None else self.read_small(self.config)

    def read_small(self, descriptor: LayerDescriptor) -> bytes:
        """Return a small blob of the image whole, proven; empty where it has no digest.

        Raises: as `read_config`.
        """
        if descriptor.digest is None or self.source is None:
            return b""
        return self.source.read_blob(descriptor.digest, descriptor.size_bytes)

    def dumps(self) -> Mapping[str, Dump]:
        """Return what the image says in a form of its own of what others put into dumps, by name.

        Of containerd's, its container's spec, as "spec.dump". Raises: as `read_config`.
        """
        for layer in self.layers:
            if layer.media_type == containerd.CONFIG:
                what = containerd.FILE_NAMES[containerd.CONFIG]
                return {"spec.dump": containerd.parse_config(self.read_small(layer), what)}
        return {}

    def describe(self) -> str:
        """Say in a short phrase what the image is, for "not a checkpoint: it is …"."""
        if self.source is None:
            directory = self.reference.startswith("dir:")
            return "a directory of other files" if directory else "an archive of other files"
        config = b""
        if not self.artifact_type:
            try:
                config = self.read_config()
            except LazyfsError:
                config = b""  # it is an image of so many layers then
        return manifests.describe(self.manifest, config)

    def save(self) -> None:
        """Keep for later mounts what was asked for by digest, and note that it is used."""
        if isinstance(self.source, RememberingSource):
            self.source.save()

    def close(self) -> None:
        """Let go of the source and of the blobs it gave."""
        if self._archive is not None:
            self._archive.close()
        if self.source is not None:
            self.source.close()


def resolve(
    reference: Reference,
    settings: TransportSettings,
    counters: Counters,
    *,
    authfile: Path | None = None,
    documents: Documents | None = None,
    early: Iterable[str] = (),
) -> ResolvedImage:
    """Open the source and read the manifest. Blocks, in a thread.

    `documents`: where manifests are that earlier mounts have read, and where `save` keeps them.
    `early`: types of referrers that are asked for beside a manifest that is named by its digest, if
    nothing is remembered of it.

    Raises:
        SourceError: the image cannot be had.
        MalformedError: its manifest is not one.
        NotACheckpoint: no manifest here can describe a checkpoint for this machine.
        IntegrityError: bytes contradict their digest.
    """
    patient = settings.at_the_prompt
    if isinstance(reference, ArchiveReference):
        return _resolve_archive(reference, settings, patient, counters)
    if isinstance(reference, DirectoryReference):
        from lazyfs.transport.directory import UnpackedDirectory, holds_image

        if reference.digest is None and not holds_image(reference.directory):
            return _outside_of_images(str(reference), UnpackedDirectory(reference.directory), _TAR)
    source = _open_source(reference, patient, counters, authfile)
    referrals = Referrals(source)
    if isinstance(reference, RegistryReference):
        name = f"{reference.host}/{reference.repository}"
        digest = reference.digest if source.is_settled else None
        if digest is not None and not _is_known(digest, name, documents):
            referrals.begin(digest, early)
        if documents is not None:
            source = RememberingSource(source, documents, name)
    return _resolve_in(source, reference, referrals)


def _is_known(digest: Digest, name: str, documents: Documents | None) -> bool:
    """Whether something is remembered of an image, or of what was attached to it."""
    return documents is not None and any(
        is_remembered(documents, digest, name, kind) for kind in ("manifest", "trace")
    )


def _open_source(
    reference: ImageReference,
    settings: TransportSettings,
    counters: Counters,
    authfile: Path | None,
) -> ImageSource:
    if isinstance(reference, LayoutReference):
        from lazyfs.transport.files import LayoutSource

        return LayoutSource(reference.directory, counters=counters)
    if isinstance(reference, DirectoryReference):
        from lazyfs.transport.directory import DirectorySource

        return DirectorySource(reference.directory, counters=counters)
    if isinstance(reference, ImageArchiveReference):
        from lazyfs.transport.files import open_file

        return _open_image_archive(reference, open_file(reference.path), counters)
    from lazyfs.transport.mirrors import open_repository

    return open_repository(
        reference.host,
        reference.repository,
        by_digest=reference.digest is not None,
        settings=settings,
        counters=counters,
        authfile=authfile,
    )


def _open_image_archive(
    reference: ImageArchiveReference, archive: Blob, counters: Counters
) -> ImageSource:
    from lazyfs.checkpoint.archive import read_members
    from lazyfs.transport.archives import DockerArchive, OciArchive

    kind = DockerArchive if reference.scheme == "docker-archive" else OciArchive
    try:
        members = read_members(archive)
    except BaseException:
        archive.close()
        raise
    return kind(archive, members, counters=counters)


def _resolve_in(
    source: ImageSource, reference: ImageReference, referrals: Referrals
) -> ResolvedImage:
    """Read manifests until one describes layers. Closes `source` if none does."""
    try:
        return _follow(source, reference, referrals)
    except BaseException:
        source.close()
        raise


def _follow(source: ImageSource, reference: ImageReference, referrals: Referrals) -> ResolvedImage:
    served = source.manifest(reference.wanted)
    annotations: dict[str, str] = {}
    platform: Platform | None = None
    for _ in range(_NESTED_MOST):
        annotations |= served.annotations
        parsed = _parse(source, served)
        if isinstance(parsed, ImageIndex):
            as_image = containerd.as_image(parsed)
            if as_image is not None:
                parsed, platform = as_image.manifest, as_image.platform or platform
        if isinstance(parsed, ImageManifest):
            return ResolvedImage(
                reference=str(reference.pinned(served.digest)),
                digest=served.digest,
                manifest=parsed,
                platform=platform,
                annotations={**annotations, **parsed.annotations},
                source=source,
                referrals=referrals,
            )
        entry = manifests.choose(parsed, manifests.this_platform(), str(reference))
        annotations = {**parsed.annotations, **annotations, **entry.descriptor.annotations}
        platform = entry.platform or platform
        served = source.manifest(str(entry.digest))
    raise MalformedError(f"{reference}: indexes within indexes, {_NESTED_MOST} deep")


def _parse(source: ImageSource, served: Manifest) -> ImageManifest | ImageIndex:
    name = f"{source.name}@{served.digest}"
    return manifests.parse_manifest(served.data, served.media_type, name)


def _resolve_archive(
    reference: ArchiveReference,
    settings: TransportSettings,
    patient: TransportSettings,
    counters: Counters,
) -> ResolvedImage:
    blob: Blob
    if reference.is_url:
        from lazyfs.transport.address import Address
        from lazyfs.transport.attempts import attempts
        from lazyfs.transport.client import HttpClient
        from lazyfs.transport.httpblob import open_url
        from lazyfs.transport.registry import endpoints_of
        from lazyfs.transport.urls import origin_of

        server = Address(str(origin_of(reference.url)), "")
        client = HttpClient(settings, endpoints=endpoints_of(server, settings))
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
        scheme = _scheme_of(blob)
        if scheme is not None:
            found = ImageArchiveReference(scheme, reference.path)
            source = _open_image_archive(found, blob, counters)
            return _resolve_in(source, found, Referrals(source))
    try:
        head = _read_head(blob, patient, counters)
    except BaseException:
        blob.close()
        raise
    media_type = next((kind for magic, kind in _MAGICS if head.startswith(magic)), _TAR)
    return _outside_of_images(str(reference), blob, media_type)


def _outside_of_images(reference: str, blob: Blob, media_type: str) -> ResolvedImage:
    """Return what makes an image of one layer that nothing vouches for."""
    layer = LayerDescriptor(media_type, None, blob.size_bytes, {})
    return ResolvedImage(
        reference=reference,
        digest=None,
        manifest=ImageManifest("", "", None, (layer,), {}),
        platform=None,
        annotations={},
        source=None,
        _archive=blob,
    )


def _scheme_of(archive: Blob) -> str | None:
    """Tell an archive of images, which needs not be called one, from a checkpoint's own."""
    from lazyfs.checkpoint.archive import scheme_of

    try:
        return scheme_of(archive)
    except BaseException:
        archive.close()
        raise


def _read_head(blob: Blob, settings: TransportSettings, counters: Counters) -> bytes:
    if blob.size_bytes == 0:
        raise SourceError(f"{blob.name} is empty")
    byte_range = ByteRange(0, min(_MAGIC_BYTES, blob.size_bytes))
    from lazyfs.transport.archives import read_range
    from lazyfs.transport.attempts import attempts

    return attempts(
        blob.name,
        lambda: read_range(blob, byte_range),
        settings=settings,
        counters=counters,
    )

"""Checkpoint archives and OCI images made of them, without an engine.

Written by hand rather than by skopeo so that tests can make images that no tool would: any media
types, annotations, artifact types and configs, and compressed layers that are already compressed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from .errors import TestbedError

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"

_no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Layer:
    """A layer to be: a file's bytes as they are, and what the manifest says of them."""

    path: Path
    media_type: str = LAYER_TAR
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """A config to be. The default image config is made when none is given."""

    content: bytes
    media_type: str


@dataclass(frozen=True)
class Descriptor:
    """An OCI descriptor."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Return it as it stands in a manifest."""
        plain: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest}
        plain["size"] = self.size
        if self.annotations:
            plain["annotations"] = dict(self.annotations)
        return plain


@dataclass(frozen=True)
class Image:
    """An image as it was stored."""

    manifest: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Store(Protocol):
    def put_blob(self, content: Path | bytes, digest: str) -> None: ...

    def put_manifest(self, content: bytes, descriptor: Descriptor) -> None: ...


def push_oci_image(
    registry: str,
    repository: str,
    tag: str | None,
    layers: Sequence[Layer],
    *,
    annotations: Mapping[str, str] | None = None,
    config: Config | None = None,
    artifact_type: str | None = None,
    subject: Descriptor | None = None,
) -> Image:
    """Push an image to a registry that is spoken to over plain HTTP, without authentication.

    Args:
        registry: `host:port`.
        repository: its name there.
        tag: None pushes it by digest only.
        layers: in order; most checkpoints have one.
        annotations: the manifest's.
        config: an ordinary image config by default.
        artifact_type: the manifest's `artifactType`.
        subject: the manifest that this one refers to (for registries with a referrers API).

    Raises:
        TestbedError: the registry refused.
    """
    store = _RegistryStore(registry, repository, tag)
    return _store(store, layers, annotations or {}, config, artifact_type, subject)


def write_oci_layout(
    layout: Path,
    tag: str | None,
    layers: Sequence[Layer],
    *,
    annotations: Mapping[str, str] | None = None,
    config: Config | None = None,
    artifact_type: str | None = None,
    subject: Descriptor | None = None,
) -> Image:
    """Write an image into an OCI layout directory, made if need be; a tag is replaced."""
    store = _LayoutStore(layout, tag)
    return _store(store, layers, annotations or {}, config, artifact_type, subject)


def push_manifest(
    registry: str, repository: str, reference: str | None, content: bytes, media_type: str
) -> Descriptor:
    """Push a manifest or index, byte for byte, by tag or (None) by its digest."""
    descriptor = Descriptor(media_type, _digest(content), len(content))
    _RegistryStore(registry, repository, reference).put_manifest(content, descriptor)
    return descriptor


def push_blob(registry: str, repository: str, content: bytes) -> Descriptor:
    """Push a blob that a manifest will name."""
    descriptor = Descriptor("application/octet-stream", _digest(content), len(content))
    _RegistryStore(registry, repository, None).put_blob(content, descriptor.digest)
    return descriptor


def write_manifest(layout: Path, tag: str, content: bytes, media_type: str) -> Descriptor:
    """Write a manifest or index into an OCI layout, byte for byte."""
    descriptor = Descriptor(media_type, _digest(content), len(content))
    _LayoutStore(layout, tag).put_manifest(content, descriptor)
    return descriptor


def get_manifest(registry: str, repository: str, reference: str) -> tuple[str, dict[str, Any]]:
    """Return the digest and the content of a manifest or index in a registry.

    Raises:
        TestbedError: it is not there.
    """
    url = f"http://{registry}/v2/{repository}/manifests/{reference}"
    request = urllib.request.Request(url, headers={"Accept": f"{IMAGE_MANIFEST}, {IMAGE_INDEX}"})
    try:
        with _no_proxy.open(request, timeout=60) as response:
            content: bytes = response.read()
    except OSError as error:
        raise TestbedError(f"{url}: {error}") from error
    return _digest(content), json.loads(content)


def tar_checkpoint(images_dir: Path, out_path: Path, prefix: str = "checkpoint/") -> None:
    """Write an uncompressed tar of an images directory as Podman does.

    An entry for the directory, of mode 0600, if `prefix` names one; then its files by name.
    `prefix` may be empty (containerd's shape). Files are streamed, whatever their size.
    """
    with tarfile.open(out_path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.copybufsize = 1 << 20  # type: ignore[attr-defined]  # not in typeshed
        if prefix:
            folder = tarfile.TarInfo(prefix.rstrip("/"))
            folder.type, folder.mode = tarfile.DIRTYPE, 0o600
            folder.mtime = int(images_dir.stat().st_mtime)
            archive.addfile(folder)
        for path in sorted(images_dir.iterdir()):
            archive.add(path, prefix + path.name, recursive=False)


def _store(
    store: _Store,
    layers: Sequence[Layer],
    annotations: Mapping[str, str],
    config: Config | None,
    artifact_type: str | None,
    subject: Descriptor | None,
) -> Image:
    stored = []
    for layer in layers:
        size = layer.path.stat().st_size
        described = Descriptor(layer.media_type, _digest(layer.path), size, layer.annotations)
        store.put_blob(layer.path, described.digest)
        stored.append(described)
    config = config or _image_config(stored)
    described_config = Descriptor(
        config.media_type, _digest(config.content), len(config.content), {}
    )
    store.put_blob(config.content, described_config.digest)

    manifest: dict[str, object] = {"schemaVersion": 2, "mediaType": IMAGE_MANIFEST}
    if artifact_type:
        manifest["artifactType"] = artifact_type
    manifest["config"] = described_config.as_json()
    manifest["layers"] = [layer.as_json() for layer in stored]
    if subject:
        manifest["subject"] = subject.as_json()
    if annotations:
        manifest["annotations"] = dict(annotations)
    content = json.dumps(manifest).encode()
    described_manifest = Descriptor(IMAGE_MANIFEST, _digest(content), len(content))
    store.put_manifest(content, described_manifest)
    return Image(described_manifest, described_config, tuple(stored))


def _image_config(layers: Sequence[Descriptor]) -> Config:
    """An ordinary image's config. Its diff_ids are right for uncompressed layers only."""
    content = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
    }
    return Config(json.dumps(content).encode(), IMAGE_CONFIG)


def _digest(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return "sha256:" + hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class _RegistryStore:
    """The push half of the distribution API: monolithic uploads."""

    def __init__(self, registry: str, repository: str, tag: str | None) -> None:
        self._base = f"http://{registry}/v2/{repository}/"
        self._tag = tag

    def put_blob(self, content: Path | bytes, digest: str) -> None:
        if self._ask("HEAD", f"{self._base}blobs/{digest}", accept_missing=True) is not None:
            return
        location = self._ask("POST", f"{self._base}blobs/uploads/") or ""
        target = urllib.parse.urljoin(self._base, location)
        target += ("&" if "?" in target else "?") + urllib.parse.urlencode({"digest": digest})
        if isinstance(content, bytes):
            self._ask("PUT", target, content, len(content), "application/octet-stream")
            return
        with content.open("rb") as file:
            size = content.stat().st_size
            self._ask("PUT", target, file, size, "application/octet-stream")

    def put_manifest(self, content: bytes, descriptor: Descriptor) -> None:
        url = f"{self._base}manifests/{self._tag or descriptor.digest}"
        self._ask("PUT", url, content, len(content), descriptor.media_type)

    def _ask(
        self,
        method: str,
        url: str,
        content: bytes | BinaryIO | None = None,
        size: int = 0,
        media_type: str | None = None,
        *,
        accept_missing: bool = False,
    ) -> str | None:
        """Send a request; return its Location header, or None for an accepted 404."""
        headers = {"Content-Length": str(size)}
        if media_type:
            headers["Content-Type"] = media_type
        request = urllib.request.Request(url, data=content, headers=headers, method=method)
        try:
            with _no_proxy.open(request, timeout=300) as response:
                location: str = response.headers.get("Location", "")
                return location
        except urllib.error.HTTPError as error:
            with error:
                if accept_missing and error.code == 404:
                    return None
                said = error.read(2000).decode(errors="replace")
            raise TestbedError(f"{method} {url}: {error.code} {said}") from error
        except OSError as error:
            raise TestbedError(f"{method} {url}: {error}") from error


class _LayoutStore:
    """An OCI image layout directory."""

    def __init__(self, layout: Path, tag: str | None) -> None:
        self._layout, self._tag = layout, tag
        (layout / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put_blob(self, content: Path | bytes, digest: str) -> None:
        blob = self._layout / "blobs" / digest.replace(":", "/")
        if isinstance(content, bytes):
            blob.write_bytes(content)
        else:
            shutil.copyfile(content, blob)

    def put_manifest(self, content: bytes, descriptor: Descriptor) -> None:
        self.put_blob(content, descriptor.digest)
        index_file = self._layout / "index.json"
        name_key = "org.opencontainers.image.ref.name"
        manifests: list[dict[str, object]] = []
        if index_file.exists():
            manifests = json.loads(index_file.read_text())["manifests"]
        if self._tag:
            kept = []
            for each in manifests:
                names = each.get("annotations", {})
                if not (isinstance(names, dict) and names.get(name_key) == self._tag):
                    kept.append(each)
            manifests = kept
        named = {name_key: self._tag} if self._tag else {}
        described = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size, named)
        manifests.append(described.as_json())
        index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": manifests}
        index_file.write_text(json.dumps(index))

"""Images within a tar on this machine: blobs are byte ranges of it, and nothing is unpacked.

Where the members lie is found out on the floor above, which knows tar; here they are a mapping
from names to ranges. Two kinds: a tar of an OCI layout, and what `docker save` and `podman save`
write: a `manifest.json` that lists images by their config and layers. That has no manifest in
OCI's sense, so one is made, as containers/image does; its digest names the image as well as one
from a registry would, being made of the config's digest and the layers'. Current Docker writes
both at once; OCI's part is preferred there, since only it has annotations.

Source: OCI image-spec, image-layout.md; containers/image, docker/internal/tarfile (types.go,
src.go, reader.go); moby, image/tarexport/save.go (`io.containerd.image.name`, members called
`blobs/sha256/…`).
"""

import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.files import LayoutSource
from lazyfs.transport.place import Health
from lazyfs.transport.source import MANIFEST_LIMIT_BYTES, Manifest

_PIECE_BYTES = 1 << 20
_MAGIC_BYTES = 4
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zX")
_IMAGES_MOST = 1000
_LAYERS_MOST = 1000
_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_OCI_LAYOUT = "oci-layout"
_OCI_INDEX = "index.json"
_DOCKER_LIST = "manifest.json"
_IMAGE_NAME = "io.containerd.image.name"


class Stretch:
    """A range of another blob, as a blob. Safe in as many threads as that is."""

    def __init__(self, whole: Blob, byte_range: ByteRange, name: str) -> None:
        """`whole` stays its owner's, to be closed by it."""
        self._whole = whole
        self._range = byte_range
        self._name = name

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self._name

    @property
    def health(self) -> Health | None:
        """Of the source of the whole, if that has one."""
        return getattr(self._whole, "health", None)

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self._range.size_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver the bytes of `byte_range`. See `Blob.read_into`."""
        start, stop = byte_range
        if not 0 <= start <= stop <= self.size_bytes:
            raise SourceError(f"{self._name} has {self.size_bytes} bytes; asked for {byte_range}")
        at = self._range.start
        self._whole.read_into(ByteRange(at + start, at + stop), sink)

    def close(self) -> None:
        """Nothing: the archive is closed as a whole."""


class _Gatherer:
    """The sink of a range that is read whole."""

    def __init__(self, size_bytes: int) -> None:
        self._data = bytearray(size_bytes)
        self._fill = 0

    def space(self) -> memoryview:
        return memoryview(self._data)[self._fill :]

    def advance(self, count: int) -> None:
        self._fill += count

    def taken(self) -> bytes:
        return bytes(self._data[: self._fill])


def read_range(blob: Blob, byte_range: ByteRange) -> bytes:
    """Return a small range whole, in one attempt. Raises as `Blob.read_into`."""
    sink = _Gatherer(byte_range.size_bytes)
    blob.read_into(byte_range, sink)
    return sink.taken()


class OciArchive(LayoutSource):
    """See `ImageSource`: the images of a tar of an OCI layout."""

    def __init__(
        self, archive: Blob, members: Mapping[str, ByteRange], *, counters: Counters
    ) -> None:
        """Take over `archive`; `members`: where its files lie in it, by normalised name.

        What a layout directory is to `LayoutSource` the members are here, so its own opening of a
        directory is left out.

        Raises:
            SourceError: it is no such archive.
        """
        self._path = Path(archive.name)
        self._archive = archive
        self._members = members
        self._counters = counters
        self._blobs: list[Blob] = []
        if not self._is_one():
            shown = ", ".join(sorted(members)[:5]) or "nothing"
            self.close()
            raise SourceError(f"{self.name} is no such archive: in it there is {shown[:300]!r}")

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"oci-archive:{self._archive.name}"

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. See `ImageSource.blob`.

        Raises:
            SourceError: there is none.
            IntegrityError: it is not as large as promised.
        """
        what = f"{self.name}@{digest}"
        byte_range = self._where(digest)
        if byte_range is None:
            raise SourceError(f"{what} is not in the archive")
        if byte_range.size_bytes != size_bytes:
            raise IntegrityError(
                f"{what} has {byte_range.size_bytes} bytes, though {size_bytes} were promised"
            )
        return Stretch(self._archive, byte_range, what)

    def close(self) -> None:
        """Close the archive, and with it the blobs it gave."""
        self._archive.close()

    def _is_one(self) -> bool:
        return _OCI_LAYOUT in self._members and _OCI_INDEX in self._members

    def _where(self, digest: Digest) -> ByteRange | None:
        return self._members.get(f"blobs/{digest.algorithm}/{digest.hex}")

    def _read(self, *names: str) -> bytes:
        """Return a small file whole; `LayoutSource` reads all its documents by this."""
        path = "/".join(names)
        what = f"{path} in {self._archive.name}"
        byte_range = self._members.get(path)
        if byte_range is None and len(names) == 3:
            byte_range = self._where(Digest.parse(f"{names[1]}:{names[2]}"))
        if byte_range is None:
            raise SourceError(f"{what}: there is no such file")
        return self._read_range(byte_range, what)

    def _read_range(self, byte_range: ByteRange, what: str) -> bytes:
        if byte_range.size_bytes > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{what} is too large to be read")
        self._counters.requests += 1
        self._counters.bytes_fetched += byte_range.size_bytes
        return read_range(self._archive, byte_range)


class _SavedImage(msgspec.Struct, frozen=True, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class _RootFilesystem(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class _Config(msgspec.Struct, frozen=True):
    rootfs: _RootFilesystem


class _Listed(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    annotations: dict[str, str] | None = None


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Listed]


class DockerArchive(OciArchive):
    """See `ImageSource`: the images that `docker save` or `podman save` wrote into a tar.

    They go by their full names, `docker.io/library/alpine:3`.
    """

    def __init__(
        self, archive: Blob, members: Mapping[str, ByteRange], *, counters: Counters
    ) -> None:
        """As of `OciArchive`."""
        super().__init__(archive, members, counters=counters)
        self._known: dict[Digest, ByteRange] = {}
        self._hashed: dict[ByteRange, Digest] = {}

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"docker-archive:{self._archive.name}"

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest with this name or digest, or the only one. See `ImageSource`."""
        asked = _as_digest(reference)
        if self._has_layout():
            listed = self._listed(reference)
            if listed is not None:
                return super().manifest(listed)
            if asked is not None and self._where(asked) is not None:
                return super().manifest(reference)
        images = self._images()
        if asked is not None:
            made = (self._make(image) for image in images)
            for manifest in made:
                if manifest.digest == asked:
                    return manifest
            raise SourceError(f"{self.name}: there is no image {asked}")
        if reference is not None:
            images = [image for image in images if reference in _names(image.repo_tags)]
        if len(images) != 1:
            raise SourceError(f"{self.name}: {self._unclear(reference, len(images))}")
        return self._make(images[0])

    def _is_one(self) -> bool:
        return _DOCKER_LIST in self._members

    def _has_layout(self) -> bool:
        return _OCI_LAYOUT in self._members and _OCI_INDEX in self._members

    def _where(self, digest: Digest) -> ByteRange | None:
        known = self._known.get(digest)
        return known if known is not None else super()._where(digest)

    def _listed(self, reference: str | None) -> str | None:
        """Return the digest of what OCI's index lists under this name, if that is one thing."""
        try:
            index = msgspec.json.decode(self._read(_OCI_INDEX), type=_Index)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        found = {
            each.digest
            for each in index.manifests
            if reference in (None, each.digest)
            or reference in _names([(each.annotations or {}).get(_IMAGE_NAME, "")])
        }
        return found.pop() if len(found) == 1 else None

    def _images(self) -> Sequence[_SavedImage]:
        data = self._read(_DOCKER_LIST)
        try:
            images = msgspec.json.decode(data, type=list[_SavedImage])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedError(f"{_DOCKER_LIST} in {self._archive.name}: {error}") from None
        if len(images) > _IMAGES_MOST or any(len(each.layers) > _LAYERS_MOST for each in images):
            raise MalformedError(f"{_DOCKER_LIST} in {self._archive.name} lists too many things")
        return images

    def _make(self, image: _SavedImage) -> Manifest:
        """Write the manifest that the image would have in a registry."""
        config, config_range = self._member(image.config, "its config")
        data = self._read_range(config_range, config)
        try:
            diff_ids = msgspec.json.decode(data, type=_Config).rootfs.diff_ids
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedError(f"{config} in {self._archive.name}: {error}") from None
        if len(diff_ids) != len(image.layers):
            raise MalformedError(
                f"{self.name}: {len(image.layers)} layers are listed, and {len(diff_ids)} digests "
                "of layers"
            )
        layers = [
            self._layer(path, diff_id) for path, diff_id in zip(image.layers, diff_ids, strict=True)
        ]
        document = {
            "schemaVersion": 2,
            "mediaType": _DOCKER_MANIFEST,
            "config": self._descriptor(_DOCKER_CONFIG, Digest.of(data), config_range),
            "layers": layers,
        }
        written = msgspec.json.encode(document)
        return Manifest(written, _DOCKER_MANIFEST, Digest.of(written))

    def _layer(self, path: str, diff_id: str) -> dict[str, Any]:
        what, byte_range = self._member(path, "a layer")
        return self._descriptor(
            _DOCKER_LAYER, self._layer_digest(what, diff_id, byte_range), byte_range
        )

    def _layer_digest(self, path: str, diff_id: str, byte_range: ByteRange) -> Digest:
        """Return the digest of a layer as it is stored."""
        head = read_range(
            self._archive,
            ByteRange(byte_range.start, min(byte_range.start + _MAGIC_BYTES, byte_range.stop)),
        )
        if not head.startswith(_COMPRESSED):
            return Digest.parse(diff_id)
        parts = path.split("/")
        if len(parts) == 3 and parts[0] == "blobs":
            return Digest.parse(f"{parts[1]}:{parts[2]}")
        # Nobody has promised a digest of the compressed bytes: they are taken as they are.
        if byte_range not in self._hashed:
            self._hashed[byte_range] = self._hash(byte_range)
        return self._hashed[byte_range]

    def _hash(self, byte_range: ByteRange) -> Digest:
        hasher = hashlib.sha256()
        for start in range(byte_range.start, byte_range.stop, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, byte_range.stop)
            hasher.update(read_range(self._archive, ByteRange(start, stop)))
        return Digest("sha256", hasher.hexdigest())

    def _descriptor(self, media_type: str, digest: Digest, where: ByteRange) -> dict[str, Any]:
        self._known[digest] = where
        return {"mediaType": media_type, "size": where.size_bytes, "digest": str(digest)}

    def _member(self, path: str, role: str) -> tuple[str, ByteRange]:
        path = posixpath.normpath(path)
        byte_range = self._members.get(path)
        if byte_range is None:
            raise MalformedError(
                f"{self.name}: {role}, {path[:200]!r}, is listed and not in the archive"
            )
        return path, byte_range

    def _unclear(self, reference: str | None, count: int) -> str:
        names = sorted({name for each in self._images() for name in each.repo_tags or ()})
        shown = ", ".join(name[:100] for name in names[:20]) + (", …" if len(names) > 20 else "")
        having = f"it has {shown}" if names else "its images have no names"
        if reference is None:
            return f"which image? {having}" if count else "there is no image in it"
        if count:
            return f"{reference!r} names several images"
        return f"no image is called {reference!r} there; {having}"


def _names(tags: Sequence[str] | None) -> set[str]:
    """Return names as they are in full: `alpine` is `docker.io/library/alpine:latest`.

    Source: distribution/reference, normalize.go.
    """
    full = set()
    for tag in tags or ():
        host, slash, rest = tag.partition("/")
        if not slash or not (set(host) & set(".:") or host == "localhost"):
            host, rest = "docker.io", tag
        host = "docker.io" if host == "index.docker.io" else host
        if host == "docker.io" and "/" not in rest:
            rest = f"library/{rest}"
        full.add(f"{host}/{rest}" if ":" in rest else f"{host}/{rest}:latest")
    return full


def _as_digest(reference: str | None) -> Digest | None:
    try:
        return Digest.parse(reference or "")
    except MalformedError:
        return None

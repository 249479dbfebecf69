"""Images within a tar, as both kinds of writers make it."""

import gzip
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.archives import DockerArchive, OciArchive, Stretch, read_range
from lazyfs.transport.files import open_file
from lazyfs.transport.source import ImageSource
from tests.blobs import MemoryBlob
from tests.transport.gather import read

DATA = random.Random(4).randbytes(300_000)
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Tar:
    """Members one after the other: what the floor above finds in a tar."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.members: dict[str, ByteRange] = {}
        self.data = b"some header"
        for name, data in files.items():
            start = len(self.data)
            self.data += data + b"padding"
            self.members[name] = ByteRange(start, start + len(data))

    def oci(self) -> OciArchive:
        return OciArchive(MemoryBlob(self.data, "a.tar"), self.members, counters=Counters())

    def docker(self) -> DockerArchive:
        return DockerArchive(MemoryBlob(self.data, "d.tar"), self.members, counters=Counters())


def blob_name(data: bytes) -> str:
    return f"blobs/sha256/{Digest.of(data).hex}"


def listed(data: bytes, **annotations: str) -> dict[str, Any]:
    return {
        "mediaType": OCI_MANIFEST,
        "digest": str(Digest.of(data)),
        "size": len(data),
        "annotations": annotations,
    }


def layout(*manifests: bytes, tag: str = "v") -> dict[str, bytes]:
    key = "org.opencontainers.image.ref.name"
    entries = [listed(each, **{key: f"{tag}{n}"}) for n, each in enumerate(manifests)]
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": entries}).encode(),
        **{blob_name(each): each for each in (*manifests, DATA)},
    }


def config(*layers: bytes) -> bytes:
    diff_ids = [str(Digest.of(each)) for each in layers]
    return json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()


def saved(
    images: Mapping[str, tuple[str, ...]], layers: tuple[bytes, ...] = (DATA,)
) -> dict[str, bytes]:
    """What `docker save` of long ago and `podman save` write."""
    files = {f"{number}/layer.tar": each for number, each in enumerate(layers)}
    items = []
    for name, tags in images.items():
        files[f"{name}.json"] = config(*layers) + b" " * len(name)
        tag_list = list(tags) or None
        items.append(
            {"Config": f"{name}.json", "RepoTags": tag_list, "Layers": list(files)[: len(layers)]}
        )
    return {**files, "manifest.json": json.dumps(items).encode()}


def test_stretch() -> None:
    whole = MemoryBlob(DATA)
    part = Stretch(whole, ByteRange(1000, 201_000), "part")
    assert (part.name, part.size_bytes) == ("part", 200_000)
    for start, stop in ((0, 1), (5, 199_999), (0, 200_000), (9, 9)):
        assert read(part, start, stop) == DATA[1000 + start : 1000 + stop]
    for start, stop in ((0, 200_001), (-1, 4), (5, 4)):
        with pytest.raises(SourceError):
            read(part, start, stop)
    part.close()
    assert read_range(whole, ByteRange(3, 5)) == DATA[3:5]


def test_oci_archive() -> None:
    source: ImageSource = Tar(layout(b"{}")).oci()
    assert source.name == "oci-archive:a.tar"
    for reference in (None, "v0", str(Digest.of(b"{}"))):
        manifest = source.manifest(reference)
        assert (manifest.data, manifest.digest) == (b"{}", Digest.of(b"{}"))
        assert manifest.media_type == OCI_MANIFEST
    blob = source.blob(Digest.of(DATA), len(DATA))
    assert read(blob, 0, len(DATA)) == DATA
    assert source.read_blob(Digest.of(b"{}"), 2) == b"{}"
    with pytest.raises(IntegrityError, match="300000 bytes, though 3"):
        source.blob(Digest.of(DATA), 3)
    with pytest.raises(SourceError, match="not in the archive"):
        source.blob(Digest.of(b"none"), 3)
    with pytest.raises(SourceError, match="no such file"):
        source.manifest(str(Digest.of(b"none")))
    with pytest.raises(MalformedError):
        source.read_blob(Digest.of(DATA), 1 << 30)
    source.close()


def test_oci_archive_with_several_images() -> None:
    source = Tar(layout(b"{}", b"[]")).oci()
    assert source.manifest("v1").data == b"[]"
    with pytest.raises(SourceError, match=r"which image\? it has v0, v1"):
        source.manifest(None)
    assert source.referrers(Digest.of(b"{}"), "application/x") == []


def test_oci_archive_whose_bytes_lie() -> None:
    files = layout(b"{}")
    files[blob_name(b"{}")] = b"[]"
    with pytest.raises(IntegrityError):
        Tar(files).oci().manifest(None)
    files["index.json"] = b"[" * 100_000
    with pytest.raises(MalformedError, match=r"a\.tar"):
        Tar(files).oci().manifest(None)
    files["index.json"] = b" " * 5_000_000
    with pytest.raises(MalformedError, match="too large"):
        Tar(files).oci().manifest(None)


def test_what_is_no_such_archive() -> None:
    with pytest.raises(SourceError, match=r"oci-archive:a\.tar is no such archive: .*'b, c'"):
        Tar({"b": b"", "c": b""}).oci()
    with pytest.raises(SourceError, match=r"docker-archive:d\.tar is no such archive"):
        Tar(layout(b"{}")).docker()


def test_docker_archive() -> None:
    source: ImageSource = Tar(saved({"a": ("alpine:3", "localhost/b:1")})).docker()
    manifest = source.manifest(None)
    document = json.loads(manifest.data)
    assert document["mediaType"] == manifest.media_type
    assert document["config"]["digest"] == str(Digest.of(config(DATA) + b" "))
    (layer,) = document["layers"]
    assert (layer["digest"], layer["size"]) == (str(Digest.of(DATA)), len(DATA))
    assert manifest.digest == Digest.of(manifest.data)
    digest = Digest.of(DATA)
    assert read(source.blob(digest, len(DATA)), 5, 99) == DATA[5:99]
    assert source.read_blob(Digest.of(config(DATA) + b" "), 200) == config(DATA) + b" "
    for reference in ("docker.io/library/alpine:3", "localhost/b:1", str(manifest.digest)):
        assert source.manifest(reference) == manifest
    with pytest.raises(SourceError, match=r"no image is called 'x'.*it has alpine:3, localhost/b"):
        source.manifest("x")
    with pytest.raises(SourceError, match=f"there is no image {digest}"):
        source.manifest(str(digest))
    assert source.referrers(digest, "application/x") == []


def test_docker_archive_with_several_images() -> None:
    source = Tar(saved({"a": ("a:1",), "bb": ("index.docker.io/team/b",)})).docker()
    first = source.manifest("docker.io/library/a:1")
    second = source.manifest("docker.io/team/b:latest")
    assert first.digest != second.digest
    assert source.manifest(str(second.digest)) == second
    with pytest.raises(SourceError, match=r"which image\? it has a:1, index\.docker\.io/team/b"):
        source.manifest(None)
    with pytest.raises(SourceError, match="its images have no names"):
        Tar(saved({"a": (), "b": ()})).docker().manifest(None)
    with pytest.raises(SourceError, match="there is no image in it"):
        Tar({"manifest.json": b"[]"}).docker().manifest(None)


def test_docker_archive_with_a_compressed_layer(tmp_path: Path) -> None:
    packed = gzip.compress(b"a tar" * 1000, mtime=0)
    files = saved({"a": ()}, (packed,))
    files["a.json"] = config(b"a tar" * 1000)
    path = tmp_path / "d.tar"
    tar = Tar(files)
    path.write_bytes(tar.data)
    source = DockerArchive(open_file(path), tar.members, counters=Counters())
    (layer,) = json.loads(source.manifest(None).data)["layers"]
    assert layer["digest"] == str(Digest.of(packed)), "as stored; that of the content is another"
    assert read(source.blob(Digest.of(packed), len(packed)), 0, len(packed)) == packed
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.manifest(None)


def test_docker_archive_that_is_a_layout_too() -> None:
    """As Docker writes it since version 25; only OCI's manifest has annotations."""
    manifest = json.dumps({"annotations": {"io.podman.annotations.checkpoint.name": "x"}}).encode()
    blob = blob_name(config(DATA))
    items = [{"Config": blob, "RepoTags": ["alpine:3"], "Layers": [blob_name(DATA)]}]
    name = {"io.containerd.image.name": "docker.io/library/alpine:3"}
    files = layout(manifest) | {
        "index.json": json.dumps({"manifests": [listed(manifest, **name)]}).encode(),
        "manifest.json": json.dumps(items).encode(),
        blob: config(DATA),
    }
    source = Tar(files).docker()
    for reference in (None, "docker.io/library/alpine:3", str(Digest.of(manifest))):
        assert source.manifest(reference).data == manifest
    with pytest.raises(SourceError, match="no image is called"):
        source.manifest("docker.io/library/alpine:4")
    del files["index.json"]
    (layer,) = json.loads(Tar(files).docker().manifest(None).data)["layers"]
    assert layer["digest"] == str(Digest.of(DATA))
    files["index.json"] = b"nonsense"
    assert json.loads(Tar(files).docker().manifest(None).data)["layers"] == [layer]


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": b"{}"},
        {"manifest.json": b"[{}]"},
        {"manifest.json": b"[" * 100_000},
        {"manifest.json": b" " * 5_000_000},
        saved({"a": ()}) | {"a.json": b"{}"},
        saved({"a": ()}) | {"a.json": b'{"rootfs": {"diff_ids": []}}'},
        saved({"a": ()}) | {"a.json": b'{"rootfs": {"diff_ids": ["sha256:x"]}}'},
        {name: data for name, data in saved({"a": ()}).items() if name != "a.json"},
        {name: data for name, data in saved({"a": ()}).items() if name != "0/layer.tar"},
        {"manifest.json": json.dumps([{"Config": "../x", "Layers": []}]).encode()},
        {"manifest.json": json.dumps([{"Config": "x", "Layers": ["x"] * 1001}]).encode()},
        {"manifest.json": json.dumps([{"Config": "x", "Layers": []}] * 1001).encode()},
    ],
)
def test_docker_archives_that_lie(files: dict[str, bytes]) -> None:
    with pytest.raises(MalformedError):
        Tar(files).docker().manifest(None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["x", "y"]),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Config", "Layers", "RepoTags", "rootfs", "diff_ids", "manifests"]),
            each,
        )
    ),
    max_leaves=12,
)


@given(JSON, JSON, JSON, st.sampled_from([None, "x", f"sha256:{'ab' * 32}"]))
def test_any_documents_give_a_manifest_or_an_error(
    saved_list: Any, index: Any, image: Any, reference: str | None
) -> None:
    files = {
        "manifest.json": json.dumps(saved_list).encode(),
        "index.json": json.dumps(index).encode(),
        "oci-layout": b"{}",
        "x": json.dumps(image).encode(),
        "y": b"\x1f\x8b",
    }
    for source in (Tar(files).docker(), Tar(files).oci()):
        try:
            source.manifest(reference)
        except LazyfsError:
            continue

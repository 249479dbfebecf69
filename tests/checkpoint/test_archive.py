"""Images and checkpoints on this machine that are in no registry and in no layout."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.archive import read_members, scheme_of
from lazyfs.checkpoint.image import ResolvedImage, resolve
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import LazyfsError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.archives import read_range
from tests.blobs import MemoryBlob
from tests.faults import OCI_LAYER, OCI_MANIFEST, digest_of
from tests.images import Member, tar_bytes

LAYER = tar_bytes({"checkpoint/": b"", "checkpoint/inventory.img": b"inventory"})
CONFIG = json.dumps({"os": "linux", "rootfs": {"diff_ids": [digest_of(LAYER)]}}).encode()
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest_of(CONFIG),
            "size": len(CONFIG),
        },
        "layers": [{"mediaType": OCI_LAYER, "digest": digest_of(LAYER), "size": len(LAYER)}],
        "annotations": {"io.podman.annotations.checkpoint.name": "x"},
    }
).encode()


def hex_of(data: bytes) -> str:
    return digest_of(data).partition(":")[2]


def layout() -> dict[str, bytes]:
    """What skopeo and `podman save --format oci-archive` put into a tar."""
    listed: dict[str, Any] = {"mediaType": OCI_MANIFEST, "digest": digest_of(MANIFEST)}
    listed |= {"size": len(MANIFEST), "annotations": {"org.opencontainers.image.ref.name": "v1"}}
    return {
        "blobs/": b"",
        "blobs/sha256/": b"",
        **{f"blobs/sha256/{hex_of(each)}": each for each in (LAYER, CONFIG, MANIFEST)},
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode(),
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
    }


def saved() -> list[Member]:
    """What `podman save` writes, with a layer that occurs twice."""
    items = [
        {
            "Config": f"{hex_of(CONFIG)}.json",
            "RepoTags": ["localhost/c:1"],
            "Layers": [f"{'ab' * 32}/layer.tar"],
        }
    ]
    return [
        Member(f"{hex_of(LAYER)}.tar", LAYER),
        Member(f"{hex_of(CONFIG)}.json", CONFIG),
        Member(f"{'ab' * 32}/layer.tar", type=tarfile.SYMTYPE, link=f"../{hex_of(LAYER)}.tar"),
        Member("manifest.json", json.dumps(items).encode()),
    ]


@pytest.fixture
def opened() -> Iterator[list[ResolvedImage]]:
    images: list[ResolvedImage] = []
    yield images
    for image in images:
        image.close()


@pytest.fixture
def open_image(opened: list[ResolvedImage]) -> Callable[[str], ResolvedImage]:
    def open_it(reference: str) -> ResolvedImage:
        image = resolve(parse_reference(reference), TransportSettings(), Counters())
        opened.append(image)
        return image

    return open_it


def content(image: ResolvedImage) -> bytes:
    (placed,) = image.placed_layers()
    blob = image.open_blob(placed.descriptor)
    return read_range(blob, ByteRange(0, blob.size_bytes))


def test_members() -> None:
    files = layout()
    data = tar_bytes({f"./{name}": each for name, each in files.items()})
    members = read_members(MemoryBlob(data))
    assert {name: data[slice(*where)] for name, where in members.items()} == {
        name: each for name, each in files.items() if not name.endswith("/")
    }


def test_links_among_members() -> None:
    data = tar_bytes(
        [
            Member("a/layer.tar", b"layer"),
            Member("b/layer.tar", type=tarfile.SYMTYPE, link="../a/layer.tar"),
            Member("c/layer.tar", type=tarfile.LNKTYPE, link="a/layer.tar"),
            Member("out", type=tarfile.SYMTYPE, link="../../etc/passwd"),
            Member("loop", type=tarfile.SYMTYPE, link="loop"),
        ]
    )
    members = read_members(MemoryBlob(data))
    assert set(members) == {"a/layer.tar", "b/layer.tar", "c/layer.tar"}
    assert len(set(members.values())) == 1


@pytest.mark.parametrize(
    ("pack", "program"),
    [
        (gzip.compress, "gunzip"),
        (zstandard.compress, "unzstd"),
        (lzma.compress, "unxz"),
        (bz2.compress, "bunzip2"),
    ],
)
def test_an_archive_that_is_compressed_as_a_whole(
    tmp_path: Path, pack: Callable[[bytes], bytes], program: str
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(pack(tar_bytes(layout())))
    for scheme in ("oci-archive", "docker-archive"):
        with pytest.raises(SourceError, match=f"compressed as a whole.*{program}"):
            resolve(parse_reference(f"{scheme}:{path}"), TransportSettings(), Counters())


@given(st.binary(max_size=2000), st.integers(0, 5000), st.randoms())
def test_any_archive_is_read_or_refused(data: bytes, at: int, rng: random.Random) -> None:
    tar = bytearray(tar_bytes(saved()))
    at = at % len(tar)
    tar[at : at + len(data)] = data
    for each in (data, bytes(tar), bytes(tar[: rng.randrange(len(tar))])):
        blob = MemoryBlob(each)
        try:
            members = read_members(blob)
        except LazyfsError:
            continue
        assert all(0 <= start <= stop <= len(each) for start, stop in members.values())
        scheme_of(blob)


def test_oci_archive(tmp_path: Path, open_image: Callable[[str], ResolvedImage]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(layout()))
    pinned = f"oci-archive:{path}@{digest_of(MANIFEST)}"
    for text in (f"oci-archive:{path}", f"oci-archive:{path}:v1", pinned, str(path)):
        image = open_image(text)
        assert image.reference == pinned
        assert image.annotations["io.podman.annotations.checkpoint.name"] == "x"
        assert content(image) == LAYER
        assert image.describe() == "an image without a program to start (linux, 1 layer)"
    with pytest.raises(SourceError, match="it has v1"):
        open_image(f"oci-archive:{path}:v2")
    with pytest.raises(SourceError, match="is no such archive"):
        open_image(f"docker-archive:{path}")


def test_docker_archive(tmp_path: Path, open_image: Callable[[str], ResolvedImage]) -> None:
    path = tmp_path / "d.tar"
    path.write_bytes(tar_bytes(saved()))
    texts = (f"docker-archive:{path}", f"docker-archive:{path}:localhost/c:1", str(path))
    images = [open_image(text) for text in texts]
    assert len({image.digest for image in images}) == 1
    assert images[0].reference == f"docker-archive:{path}@{images[0].digest}"
    assert open_image(images[0].reference).digest == images[0].digest
    assert content(images[0]) == LAYER
    assert images[0].read_config() == CONFIG
    with pytest.raises(SourceError, match="it has localhost/c:1"):
        open_image(f"docker-archive:{path}:c")


def test_a_checkpoint_is_not_taken_for_an_archive_of_images(
    tmp_path: Path, open_image: Callable[[str], ResolvedImage]
) -> None:
    path = tmp_path / "c.tar"
    for files in ({"a": b""}, {"blobs/a": b""}, {"index.json": b"", "inventory.img": b""}):
        path.write_bytes(tar_bytes(files))
        image = open_image(str(path))
        assert (image.reference, image.digest) == (str(path), None)
    data = tar_bytes(layout())
    path.write_bytes(data[: len(data) // 2])
    assert open_image(str(path)).digest is None


def test_an_archive_that_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(MalformedError, match=str(path)):
        resolve(parse_reference(f"oci-archive:{path}"), TransportSettings(), Counters())
    path.unlink()
    with pytest.raises(SourceError, match=r"a\.tar cannot be opened"):
        resolve(parse_reference(f"oci-archive:{path}"), TransportSettings(), Counters())


def test_directory_as_skopeo_copies(
    tmp_path: Path, open_image: Callable[[str], ResolvedImage]
) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFEST)
    for each in (LAYER, CONFIG):
        (tmp_path / hex_of(each)).write_bytes(each)
    pinned = f"dir:{tmp_path}@{digest_of(MANIFEST)}"
    for text in (f"dir:{tmp_path}", pinned):
        image = open_image(text)
        assert image.reference == pinned
        assert content(image) == LAYER
        assert image.read_config() == CONFIG


def test_directory_of_an_unpacked_checkpoint(
    tmp_path: Path, open_image: Callable[[str], ResolvedImage]
) -> None:
    with tarfile.open(fileobj=io.BytesIO(LAYER)) as tar:
        tar.extractall(tmp_path, filter="data")
    image = open_image(f"dir:{tmp_path}")
    assert (image.reference, image.digest, image.source) == (f"dir:{tmp_path}", None, None)
    assert image.describe() == "a directory of other files"
    (layer,) = image.layers
    assert (layer.media_type, layer.digest) == (OCI_LAYER, None)
    with tarfile.open(fileobj=io.BytesIO(content(image))) as tar:
        assert tar.getnames() == ["checkpoint", "checkpoint/inventory.img"]
    with pytest.raises(SourceError, match=r"manifest\.json cannot be opened"):
        open_image(f"dir:{tmp_path}@{digest_of(MANIFEST)}")

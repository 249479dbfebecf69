"""Wherever real tools put a checkpoint image, the same layer is found there."""

import gzip
from pathlib import Path

import pytest
from testbed import Layer, Session
from testbed.images import write_oci_layout

from lazyfs.checkpoint.image import ResolvedImage, resolve
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.ground.counters import Counters
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.layers.model import LayerDescriptor
from lazyfs.transport.archives import read_range
from tests.images import tar_bytes
from tests.real.conftest import Store

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

PAGES = bytes(range(256)) * 5000
LAYER = tar_bytes(
    {"checkpoint/": b"", "checkpoint/inventory.img": b"i", "checkpoint/pages-1.img": PAGES}
)


def opened(reference: str) -> ResolvedImage:
    return resolve(parse_reference(reference), TransportSettings(), Counters())


def content(image: ResolvedImage, layer: LayerDescriptor) -> bytes:
    blob = image.open_blob(layer)
    data = read_range(blob, ByteRange(0, blob.size_bytes))
    if layer.digest is not None:
        layer.digest.check(data, "the layer")
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


@pytest.fixture
def layout(work: Path) -> Path:
    (work / "layer.tar").write_bytes(LAYER)
    write_oci_layout(work / "layout", "v1", [Layer(work / "layer.tar")])
    return work / "layout"


@pytest.mark.parametrize(
    "place",
    [
        "oci:{}/out:v1",
        "oci-archive:{}/out.tar:v1",
        "docker-archive:{}/out.tar:localhost/c:v1",
        "dir:{}/out",
    ],
)
def test_where_skopeo_copies_an_image(store: Store, layout: Path, work: Path, place: str) -> None:
    reference = place.format(work)
    with Session(store.testbed, [work]) as session:
        session.run(["skopeo", "copy", f"oci:{layout}:v1", reference])
    image = opened(reference)
    (placed,) = image.placed_layers()
    assert content(image, placed.descriptor) == LAYER
    assert image.describe().startswith("an image without a program to start")
    again = opened(image.reference)
    assert again.digest == image.digest
    for each in (image, again):
        each.close()


def test_what_podman_saves(store: Store, layout: Path, work: Path) -> None:
    save = ["podman", "save", "--quiet"]
    with Session(store.testbed, [work]) as session:
        session.run(["skopeo", "copy", f"oci:{layout}:v1", "containers-storage:localhost/c:v1"])
        for kind in ("oci-archive", "docker-archive"):
            session.run([*save, f"--format={kind}", "-o", work / kind, "localhost/c:v1"])
    for kind in ("oci-archive", "docker-archive"):
        for reference in (f"{kind}:{work / kind}", str(work / kind)):
            image = opened(reference)
            assert image.reference == f"{kind}:{work / kind}@{image.digest}"
            (placed,) = image.placed_layers()
            assert content(image, placed.descriptor) == LAYER
            image.close()


def test_what_oras_pushes(store: Store, work: Path) -> None:
    folder = work / "images"
    folder.mkdir()
    (folder / "inventory.img").write_bytes(b"i")
    (folder / "pages-1.img").write_bytes(PAGES)
    (work / "c.tar").write_bytes(LAYER)
    push = f"cd {work} && oras push --plain-http {store.address}/oras"
    with Session(store.testbed, [work]) as session:
        session.run(["sh", "-c", f"{push}:folder images"])
        session.run(["sh", "-c", f"{push}:files images/inventory.img images/pages-1.img"])
        session.run(["sh", "-c", f"{push}:archive c.tar"])
    image = opened(f"{store.address}/oras:folder")
    (placed,) = image.placed_layers()
    assert (placed.kind, placed.place) == ("layer", "")
    assert b"images/inventory.img" in content(image, placed.descriptor)
    image.close()
    image = opened(f"{store.address}/oras:files")
    files = {each.place: each for each in image.placed_layers()}
    assert set(files) == {"images/inventory.img", "images/pages-1.img"}
    assert {each.kind for each in files.values()} == {"file"}
    assert content(image, files["images/pages-1.img"].descriptor) == PAGES
    image.close()
    image = opened(f"{store.address}/oras:archive")
    (placed,) = image.placed_layers()
    assert (placed.kind, placed.place, placed.names_a_tar) == ("file", "c.tar", True)
    image.close()

"""Checkpoint images as others hand them on: rebuilt, recompressed, listed for several platforms."""

import json
import platform
from pathlib import Path

import pytest
from testbed import Layer, Session, Testbed, push_manifest, push_oci_image
from testbed.images import IMAGE_INDEX

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.mounts import mounted

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@pytest.fixture(scope="module")
def small(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "small", size_mib=32)


def test_skopeo_makes_it_chunked_in_a_registry(store: Store, small: Checkpoint, work: Path) -> None:
    image = f"{store.address}/{store.push('plain', small)}"
    converted = f"{store.address}/skopeo:chunked"
    _skopeo_copy(store, work, image, f"docker://{converted}")
    _assert_restores(converted, small, work, proven=True)


def test_skopeo_makes_it_chunked_in_a_layout(store: Store, small: Checkpoint, work: Path) -> None:
    image = f"{store.address}/{store.push('plain', small)}"
    _skopeo_copy(store, work, image, f"oci:{work}/layout:1")
    _assert_restores(f"oci:{work}/layout:1", small, work, proven=True)


def test_buildah_makes_an_image_of_an_archive(store: Store, small: Checkpoint, work: Path) -> None:
    """As the documentation of Kubernetes' checkpoint API has it done."""
    built = f"{store.address}/buildah:1"
    name = "io.kubernetes.cri-o.annotations.checkpoint.name=workload"
    push = ["buildah", "push", "--tls-verify=false", "--compression-format=zstd:chunked"]
    with Session(store.testbed, [small.layer.parent]) as session:
        container = session.run(["buildah", "from", "scratch"]).strip()
        session.run(["buildah", "add", container, small.layer, "/"])
        session.run(["buildah", "config", f"--annotation={name}", container])
        session.run(["buildah", "commit", container, "built"])
        session.run([*push, "built", f"docker://{built}"])
    _assert_restores(built, small, work, proven=True)


def test_an_index_leads_to_this_machines_image(store: Store, small: Checkpoint, work: Path) -> None:
    here = _ARCHITECTURES[platform.machine()]
    elsewhere = "arm64" if here == "amd64" else "amd64"
    other = work / "other.tar"
    other.write_bytes(bytes(10240))
    images = {
        elsewhere: push_oci_image(store.address, "several", None, [Layer(other)]),
        here: push_oci_image(store.address, "several", None, [Layer(small.layer)]),
    }
    manifests = [
        image.manifest.as_json() | {"platform": {"os": "linux", "architecture": architecture}}
        for architecture, image in images.items()
    ]
    index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": manifests}
    push_manifest(store.address, "several", "1", json.dumps(index).encode(), IMAGE_INDEX)
    reference = f"{store.address}/several:1"
    with mounted(reference, work / "look") as mount:
        assert mount.status()["reference"].endswith(images[here].manifest.digest)
    _assert_restores(reference, small, work, proven=False)


def _skopeo_copy(store: Store, work: Path, image: str, to: str) -> None:
    copy = ["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    copy += ["--dest-compress-format=zstd:chunked"]
    with Session(store.testbed, [work]) as session:
        session.run([*copy, f"docker://{image}", to])


def _assert_restores(reference: str, small: Checkpoint, work: Path, *, proven: bool) -> None:
    with mounted(reference, work) as mount:
        with small.restore(mount.directory, work / "criu") as restored:
            small.before.assert_goes_on(restored)
        state = mount.status()
    assert state["chunks_proven"] == proven
    assert state["failed_reads"] == 0

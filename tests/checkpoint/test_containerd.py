"""Checkpoints of containerd's clients: an index that points straight at blobs."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.containerd import as_image, parse_config
from lazyfs.checkpoint.engines import origin_of
from lazyfs.checkpoint.image import resolve
from lazyfs.checkpoint.manifest import ImageIndex, Platform, parse_manifest
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import LazyfsError, MalformedError
from lazyfs.ground.settings import TransportSettings
from tests.faults import OCI_INDEX, OCI_LAYER, OCI_MANIFEST, FaultServer, digest_of

CONFIG = (Path(__file__).parents[1] / "data/containerd/container-config.pb").read_bytes()
"""Of containerd 1.7.24, by `ctr containers checkpoint --task`."""
CRIU_TAR = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
CONFIG_TYPE = "application/vnd.containerd.container.checkpoint.config.v1+proto"
BASE = b'{"the image": "of the container"}'
IMAGES = b"a tar of images"
SETTINGS = TransportSettings(deadline_s=5, backoff_first_s=0.01, backoff_most_s=0.05)


def entry(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


def written(annotations: dict[str, str] | None = None) -> dict[str, Any]:
    """As ctr writes it, members and annotations alike."""
    here = {"platform": {"os": "linux", "architecture": "amd64"}}
    return {
        "schemaVersion": 2,
        "manifests": [
            entry(BASE, OCI_MANIFEST, annotations={"org.opencontainers.image.ref.name": "latest"}),
            entry(b"rw", OCI_LAYER + "+gzip", **here),
            entry(IMAGES, CRIU_TAR, **here),
            entry(CONFIG, CONFIG_TYPE, **here),
        ],
        "annotations": {
            "io.containerd.checkpoint.runtime": "io.containerd.runc.v2",
            "io.containerd.checkpoint.snapshotter": "overlayfs",
            "org.opencontainers.image.ref.name": "docker.io/library/redis:7",
        }
        if annotations is None
        else annotations,
    }


def parsed(document: dict[str, Any]) -> ImageIndex:
    index = parse_manifest(json.dumps(document).encode(), OCI_INDEX, "it")
    assert isinstance(index, ImageIndex)
    return index


def test_in_a_registry() -> None:
    with FaultServer() as server:
        for data in (CONFIG, IMAGES, b"rw"):
            server.add_blob(data)
        digest = server.add_manifest(written(), "v1", OCI_INDEX)
        reference = parse_reference(f"{server.host}/{server.repository}:v1")
        image = resolve(reference, SETTINGS, Counters())
        assert server.count(digest_of(BASE)) == 0, "the container's image is not asked for"
        assert (str(image.digest), image.media_type) == (digest, OCI_INDEX)
        assert image.platform == Platform("linux", "amd64")
        assert [(each.kind, each.place) for each in image.placed_layers()] == [
            ("diff", "rootfs-diff"),
            ("layer", "checkpoint"),
            ("file", "container-config.pb"),
        ]
        dumps = image.dumps()
        assert dumps["spec.dump"]["process"]["args"][0] == "/workload"
        found = origin_of(image.annotations, dumps, [each.media_type for each in image.layers], ())
        assert (found.engine, found.runtime_name) == ("containerd", "runc")
        assert found.recognised_by == "annotations io.containerd.checkpoint.*"
        assert found.container_id == "workload"
        assert found.base_image_name == "docker.io/library/redis:7"
        assert found.base_image_digest == digest_of(BASE)
        image.close()


def test_of_the_task_alone() -> None:
    """`ctr tasks checkpoint` has other annotations."""
    image = as_image(parsed(written({"image.name": "docker.io/library/redis:7"})))
    assert image is not None
    found = origin_of(image.manifest.annotations, {}, [CRIU_TAR], ())
    assert found.base_image_name == "docker.io/library/redis:7"
    assert found.recognised_by == f"media type {CRIU_TAR}"


def test_what_somebody_wrote_of_the_base_image_stays() -> None:
    annotations = {"org.opencontainers.image.base.digest": "sha256:x"}
    image = as_image(parsed(written(annotations)))
    assert image is not None
    assert image.manifest.annotations == annotations


def test_an_index_of_images_is_none() -> None:
    document = {"schemaVersion": 2, "manifests": [entry(BASE, OCI_MANIFEST)]}
    assert as_image(parsed(document)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"",
        b"\x0a\x01x\x12\x02{}",
        CONFIG[:1000],
        CONFIG.replace(b'{"oci', b'["oci'),
        b"x" * 5_000_000,
    ],
)
def test_a_config_that_is_none(data: bytes) -> None:
    with pytest.raises(MalformedError, match=r"config\.pb"):
        parse_config(data, "container-config.pb")


@given(st.binary(max_size=100) | st.binary(max_size=50).map(lambda tail: CONFIG[:80] + tail))
def test_any_config_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        assert isinstance(parse_config(data, "it"), dict)


TYPES = st.sampled_from([CRIU_TAR, CONFIG_TYPE, OCI_LAYER, OCI_MANIFEST, OCI_INDEX, "x"])


@given(st.lists(TYPES, max_size=6), st.dictionaries(st.text(), st.text(), max_size=3))
def test_any_index_is_a_checkpoint_or_not(kinds: list[str], annotations: dict[str, str]) -> None:
    document = {
        "manifests": [entry(bytes([number]), kind) for number, kind in enumerate(kinds)],
        "annotations": annotations,
    }
    try:
        index = parsed(document)
    except LazyfsError:
        return
    image = as_image(index)
    assert (image is None) == (not {CRIU_TAR, CONFIG_TYPE} & set(kinds))
    if image is not None:
        assert {each.media_type for each in image.manifest.layers} & {CRIU_TAR, CONFIG_TYPE}
        assert not {each.media_type for each in image.manifest.layers} & {OCI_MANIFEST, OCI_INDEX}

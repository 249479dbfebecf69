import gzip

import pytest
import zstandard

from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import UnsupportedLayer
from lazyfs.layers.model import HEAD_BYTES, LayerDescriptor
from lazyfs.layers.table import choose, choose_by_words, is_mislabelled
from tests.images import tar_layer, zstd_chunked
from tests.layers.driving import descriptor

OCI = "application/vnd.oci.image.layer.v1.tar"
DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
TAR = tar_layer({"a": b"1"}).blob
BYTES = {
    "tar": TAR,
    "gzip": gzip.compress(TAR),
    "zstd": zstandard.compress(TAR),
}


@pytest.mark.parametrize("label", [OCI, OCI + "+gzip", OCI + "+zstd", DOCKER + ".gzip", "x/y", ""])
@pytest.mark.parametrize(
    ("bytes_are", "name"), [("tar", "tar"), ("gzip", "gzip"), ("zstd", "zstd:seekable")]
)
def test_bytes_decide(label: str, bytes_are: str, name: str) -> None:
    head = BYTES[bytes_are][:HEAD_BYTES]
    assert choose(LayerDescriptor(label, None, len(head), {}), head).name == name


def test_annotations_that_name_a_digest_need_no_bytes() -> None:
    chunked = zstd_chunked({"a": b"1"})
    found = choose_by_words(descriptor(chunked))
    assert found is not None
    assert found.name == "zstd:chunked"
    assert choose_by_words(descriptor(tar_layer({}))) is None


def test_bytes_that_are_no_zstd_are_not_chunked() -> None:
    annotations = zstd_chunked({"a": b"1"}).annotations
    layer = LayerDescriptor(OCI + "+zstd", None, 100, annotations)
    assert choose(layer, BYTES["gzip"]).name == "gzip"


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"\xfd7zXZ\0" + bytes(100), "xz"),
        (b"BZh9" + bytes(100), "bzip2"),
        (b"\x7fELF" + bytes(1000), "an ELF program"),
        (b"hello", "68 65 6c 6c 6f"),
        (b"", "begin"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_can(head: bytes, what: str) -> None:
    with pytest.raises(UnsupportedLayer) as caught:
        choose(LayerDescriptor("text/plain", None, 1, {}), head)
    for part in (what, "'text/plain'", "gzip", "zstd", "SOCI"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("label", "format_name", "wrong"),
    [
        (OCI, "tar", False),
        (OCI, "gzip", True),
        (OCI + "+gzip", "gzip", False),
        (OCI + "+gzip", "estargz", False),
        (OCI + "+gzip", "soci", False),
        (DOCKER + ".gzip", "gzip", False),
        (OCI + "+gzip", "zstd:chunked", True),
        (OCI + "+zstd", "zstd:seekable", False),
        (OCI + "+zstd", "gzip", True),
        (OCI + "+zstd", "tar", True),
        ("application/octet-stream", "gzip", False),
        ("application/vnd.containerd.container.criu.checkpoint.criu.tar", "gzip", True),
    ],
)
def test_labels_that_the_bytes_contradict(label: str, format_name: str, wrong: bool) -> None:
    layer = LayerDescriptor(label, Digest.of(b""), 1, {})
    assert is_mislabelled(layer, format_name) is wrong


def test_an_archive_has_no_label_to_contradict() -> None:
    assert not is_mislabelled(LayerDescriptor(OCI, None, 1, {}), "gzip")

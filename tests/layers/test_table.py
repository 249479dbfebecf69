import pytest

from lazyfs.ground.errors import UnsupportedLayer
from lazyfs.layers.model import LayerDescriptor
from lazyfs.layers.table import FORMATS, choose
from tests.images import tar_layer, zstd_chunked
from tests.layers.driving import descriptor

OCI = "application/vnd.oci.image.layer.v1.tar"


def test_a_tar_and_a_zstd_chunked_layer_are_recognised() -> None:
    assert choose(descriptor(tar_layer({}))).name == "tar"
    assert choose(descriptor(zstd_chunked({}))).name == "zstd:chunked"
    criu = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
    assert choose(LayerDescriptor(criu, None, 0, {})).name == "tar"


@pytest.mark.parametrize(
    ("media_type", "reason"),
    [
        (OCI + "+gzip", "gzip has no index"),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip has no index"),
        (OCI + "+zstd", "plain zstd has no index"),
        (OCI + "+encrypted", "encrypted"),
        (OCI + "+gzip+encrypted", "encrypted"),
        (OCI + "+zstd+encrypted", "encrypted"),
        ("text/plain", "not known"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_can(media_type: str, reason: str) -> None:
    annotations = zstd_chunked({}).annotations if "encrypted" in media_type else {}
    with pytest.raises(UnsupportedLayer) as caught:
        choose(LayerDescriptor(media_type, None, 1, annotations))
    message = str(caught.value)
    assert repr(media_type) in message
    assert reason in message
    for item in FORMATS:
        assert item.name in message
        assert all(name in message for name in item.media_types)

"""Where layers belong, by media type and title; and which are encrypted for whom."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.encryption import check_not_encrypted, key_protocols
from lazyfs.checkpoint.placed import PlacedLayer, place_layers
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.layers.model import LayerDescriptor
from lazyfs.layers.names import entry_path

TAR = "application/vnd.oci.image.layer.v1.tar"
CRIU_TAR = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
PROTO = "application/vnd.containerd.container.checkpoint."
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
KEYS = "org.opencontainers.image.enc.keys."
DIGEST = Digest("sha256", "ab" * 32)


def layer(media_type: str = TAR, **annotations: str) -> LayerDescriptor:
    return LayerDescriptor(media_type, DIGEST, 100, annotations)


def titled(title: str, media_type: str = TAR, **annotations: str) -> LayerDescriptor:
    return LayerDescriptor(media_type, DIGEST, 100, {TITLE: title, **annotations})


def places(*layers: LayerDescriptor) -> list[tuple[str, str]]:
    return [(each.kind, each.place) for each in place_layers(layers, "it")]


@pytest.mark.parametrize(
    "media_type",
    [
        TAR,
        TAR + "+gzip",
        TAR + "+zstd",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/x-tar",
        "application/vnd.somebody.else",
    ],
)
def test_an_ordinary_layer_fills_the_root(media_type: str) -> None:
    assert places(layer(media_type), layer(media_type)) == [("layer", "")] * 2


def test_containerds_blobs() -> None:
    assert places(
        layer(TAR + "+gzip"),
        layer(CRIU_TAR),
        layer(PROTO + "config.v1+proto"),
        layer(PROTO + "options.v1+proto"),
        layer(PROTO + "runtime.options+proto"),
        layer(PROTO + "runtime.name"),
    ) == [
        ("diff", "rootfs-diff"),
        ("layer", "checkpoint"),
        ("file", "container-config.pb"),
        ("file", "checkpoint-options.pb"),
        ("file", "runtime-options.pb"),
        ("file", "runtime-name"),
    ]
    rw = "application/vnd.containerd.container.rw.tar"
    assert places(layer(rw)) == [("diff", "rootfs-diff")]


def test_a_pre_dump_lies_below() -> None:
    pre_dump = "application/vnd.containerd.container.criu.checkpoint.predump.tar"
    placed = place_layers([layer(CRIU_TAR), layer(pre_dump), layer(CRIU_TAR)], "it")
    assert [each.descriptor.media_type for each in placed] == [pre_dump, CRIU_TAR, CRIU_TAR]
    assert {(each.kind, each.place) for each in placed} == {("layer", "checkpoint")}


def test_containerds_blobs_that_oras_pushed() -> None:
    assert places(
        titled("criu.tar", CRIU_TAR),
        titled("rw.tar.gz", TAR + "+gzip"),
        titled("spec.dump", TAR),
        titled("config.bin", PROTO + "config.v1+proto"),
    ) == [
        ("layer", "checkpoint"),
        ("diff", "rootfs-diff"),
        ("file", "spec.dump"),
        ("file", "container-config.pb"),
    ]


def test_what_oras_pushed() -> None:
    assert places(titled("images", TAR + "+gzip", **{UNPACK: "true"})) == [("layer", "")]
    assert places(titled("inventory.img"), titled("./checkpoint//pages-1.img".replace("//", "/")))
    assert places(titled("inventory.img"), titled("./checkpoint/core-1.img")) == [
        ("file", "inventory.img"),
        ("file", "checkpoint/core-1.img"),
    ]


@pytest.mark.parametrize("name", ["c.tar", "c.tar.gz", "c.TGZ", "a/c.tar.zst", "c.tzst"])
def test_a_title_may_name_a_tar(name: str) -> None:
    assert place_layers([titled(name)], "it") == (
        PlacedLayer(titled(name), name, "file", names_a_tar=True),
    )
    assert not place_layers([titled(name + ".img")], "it")[0].names_a_tar


@pytest.mark.parametrize("title", ["../a", "a/../b", "a//b", "\0", ".", "/", "./", "x" * 256])
def test_a_title_that_is_no_name(title: str) -> None:
    with pytest.raises(MalformedError, match="it: the title of a layer"):
        place_layers([titled(title)], "it")


@given(st.lists(st.tuples(st.text(), st.sampled_from([TAR, CRIU_TAR, "x"]), st.booleans())))
def test_any_titles_are_places_or_refused(items: list[tuple[str, str, bool]]) -> None:
    layers = [
        titled(title, kind, **({UNPACK: "true"} if unpack else {})) for title, kind, unpack in items
    ]
    with contextlib.suppress(MalformedError, UnsupportedLayer):
        for each in place_layers(layers, "it"):
            assert entry_path(each.place) == each.place


def test_no_layers() -> None:
    empty = layer("application/vnd.oci.empty.v1+json")
    for layers in ([], [empty], [layer("application/vnd.oci.scratch.v1+json")]):
        with pytest.raises(UnsupportedLayer, match="it has no layers"):
            place_layers(layers, "it")
    assert places(empty, layer()) == [("layer", "")]


@pytest.mark.parametrize(
    ("annotations", "protocols"),
    [
        ({}, []),
        ({KEYS + "jwe": "a", "org.opencontainers.image.enc.pubopts": "b"}, ["jwe"]),
        ({KEYS + "pkcs7": "", KEYS + "pgp": "", KEYS + "pkcs11": ""}, ["pgp", "pkcs11", "pkcs7"]),
        ({KEYS + "provider.attestation": ""}, ["key provider 'attestation'"]),
        ({KEYS + "provider.": "", KEYS: "", KEYS + "x": "", "jwe": ""}, []),
    ],
)
def test_encrypted_layers(annotations: dict[str, str], protocols: list[str]) -> None:
    encrypted = layer(TAR + "+gzip+encrypted", **annotations)
    assert key_protocols(encrypted) == protocols
    wanted = " or ".join(protocols) or "somebody whom the manifest does not name"
    with pytest.raises(UnsupportedLayer) as caught:
        place_layers([layer(), encrypted], "it")
    assert f"layer {DIGEST} is encrypted for {wanted}" in str(caught.value)
    assert "skopeo copy --decryption-key" in str(caught.value)
    check_not_encrypted(layer(TAR, **annotations))

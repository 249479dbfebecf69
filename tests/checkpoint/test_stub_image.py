"""Stubs of images of all shapes, in a layout; and whoever opens one gets what it stands for."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazyfs.checkpoint import containerd
from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.follow import RealImageMissing, find_stub, open_followed
from lazyfs.checkpoint.opened import open_checkpoint
from lazyfs.checkpoint.stub import ANNOTATION, MARKER, Stub, read_stub, write_stub
from lazyfs.checkpoint.stub_image import StubReport, write_stub_of
from lazyfs.content.cache import Cache
from lazyfs.ground.errors import LazyfsError, MalformedError, NotACheckpoint, UnsupportedLayer
from lazyfs.ground.settings import ContentSettings
from lazyfs.transport.layout_writer import LayoutTarget
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, digest_of
from tests.images import Layer, Member, tar_bytes, tar_layer
from tests.mount.published import (
    LAYERS,
    checkpoint_files,
    manifest_of,
    publish,
    publish_files,
    publish_many,
    some_bytes,
)
from tests.transport.gather import QUICK

PAGES_BYTES = 300_000
FILES = checkpoint_files(PAGES_BYTES)
TAG = "stub"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


def _members(files: Mapping[str, bytes]) -> list[Member]:
    return [Member(name, data) for name, data in files.items()]


def config(verify: Any = "full", **more: Any) -> OpenConfig:
    return OpenConfig(Cache.memory(), QUICK, ContentSettings(verify=verify), **more)


@dataclass(frozen=True)
class Made:
    """A stub in a layout."""

    report: StubReport
    layout: Path

    @property
    def reference(self) -> str:
        return f"oci:{self.layout}:{TAG}"

    def blob(self, digest: str) -> bytes:
        return (self.layout / "blobs" / digest.replace(":", "/")).read_bytes()

    def manifest(self) -> dict[str, Any]:
        index = json.loads((self.layout / "index.json").read_bytes())
        found: dict[str, Any] = json.loads(self.blob(index["manifests"][0]["digest"]))
        return found

    def members(self, layer: Mapping[str, Any]) -> dict[str, tarfile.TarInfo | bytes]:
        """What is in a layer: files' bytes, and other members, by name."""
        with tarfile.open(fileobj=io.BytesIO(self.blob(layer["digest"]))) as archive:
            return {
                each.name: stream.read()
                if each.isreg() and (stream := archive.extractfile(each))
                else each
                for each in archive
            }


async def make(reference: str, directory: Path, **options: Any) -> Made:
    layout = directory / "layout"
    async with open_checkpoint(reference, config()) as checkpoint:
        options = {"real": checkpoint.reference, **options}
        report = await write_stub_of(checkpoint, LayoutTarget(layout), TAG, **options)
    return Made(report, layout)


# -- what is in a stub --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
async def test_of_every_format_all_stays_but_memory(
    server: FaultServer, tmp_path: Path, kind: str
) -> None:
    reference = publish_files(server, FILES, kind)
    made = await make(reference, tmp_path, lazy_pages=True, made_by="a test")
    (layer,) = made.manifest()["layers"]
    assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    assert "annotations" not in layer
    members = made.members(layer)
    marker = members.pop(f"checkpoint/{MARKER}")
    link = members.pop("checkpoint/pages-1.img")
    assert isinstance(link, tarfile.TarInfo)
    assert (link.issym(), link.linkname) == (True, "pages-1.img/not-in-this-stub")
    expected = {name: data for name, data in FILES.items() if "pages-" not in name}
    assert {name: members[name] for name in expected} == expected
    assert isinstance(marker, bytes)
    stub = read_stub(marker)
    assert stub.reference == made.report.stands_for
    assert [(each.name, each.size_bytes) for each in stub.pages] == [("pages-1.img", PAGES_BYTES)]
    assert (stub.lazy_pages, stub.made_by) == (True, "a test")
    assert stub.checkpoint_bytes == sum(
        len(data) for name, data in FILES.items() if name.startswith("checkpoint/")
    )
    assert made.report.real_image_bytes == stub.image_bytes
    assert made.report.image_bytes == layer["size"] < 20_000
    assert made.report.largest_file is None


async def test_the_marker_comes_before_the_inventory_and_the_rest_in_its_order(
    server: FaultServer, tmp_path: Path
) -> None:
    made = await make(publish_files(server, FILES), tmp_path)
    names = list(made.members(made.manifest()["layers"][0]))
    assert names == [f"checkpoint/{MARKER}", *FILES]


async def test_the_same_image_has_the_same_stub(server: FaultServer, tmp_path: Path) -> None:
    reference = publish_files(server, FILES)
    first = await make(reference, tmp_path / "1")
    second = await make(reference, tmp_path / "2")
    one, other = (made.report.reference.partition("@")[2] for made in (first, second))
    assert one == other


async def test_entries_keep_owner_mode_time_links_and_odd_names(
    server: FaultServer, tmp_path: Path
) -> None:
    odd = "checkpoint/" + "n\udcff" + "x" * 120
    entries = [
        Member("checkpoint/", type=tarfile.DIRTYPE, mode=0o700, uid=1, gid=2, mtime=5),
        Member("checkpoint/inventory.img", b"i", mode=0o600, uid=100_000, gid=3_000_000),
        Member("checkpoint/pages-1.img", b"memory"),
        Member("checkpoint/same.img", type=tarfile.LNKTYPE, link="checkpoint/inventory.img"),
        Member("checkpoint/pages", type=tarfile.LNKTYPE, link="checkpoint/pages-1.img"),
        Member("link", type=tarfile.SYMTYPE, link="a/" * 80 + "b", mode=0o777),
        Member(odd, b"odd", mtime=3),
        Member("time", b"t", pax={"mtime": "1700000000.123456789"}),
        Member("pages-9.img", b"not in CRIU's directory"),
    ]
    made = await make(publish_files(server, entries), tmp_path)
    (layer,) = made.manifest()["layers"]
    with tarfile.open(fileobj=io.BytesIO(made.blob(layer["digest"]))) as archive:
        found = {each.name: each for each in archive}
        pages = archive.extractfile("checkpoint/pages")
        assert pages is not None
        assert pages.read() == b"memory", "a name that is not CRIU's keeps its bytes"
    top = found["checkpoint"]
    assert (top.mode, top.uid, top.gid, top.mtime) == (0o700, 1, 2, 5)
    inventory = found["checkpoint/inventory.img"]
    assert (inventory.mode, inventory.uid, inventory.gid) == (0o600, 100_000, 3_000_000)
    assert found["checkpoint/same.img"].linkname == "checkpoint/inventory.img"
    assert found["link"].linkname == "a/" * 80 + "b"
    assert found[odd].size == 3
    assert found["time"].pax_headers["mtime"] == "1700000000.123456789"
    assert found["pages-9.img"].isreg()


async def test_config_and_annotations_stay_and_diff_ids_are_the_layers_own(
    server: FaultServer, tmp_path: Path
) -> None:
    base, memory = tar_layer({"etc/name": b"x"}), tar_layer(FILES)
    image_config = {
        "os": "linux",
        "history": [{"created_by": "checkpoint"}],
        "rootfs": {"type": "layers", "diff_ids": [base.digest, memory.digest]},
    }
    data = json.dumps(image_config).encode()
    described = {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": server.add_blob(data),
        "size": len(data),
    }
    annotations = {"io.example": "1", "com.amazon.soci.index-digest": "sha256:0"}
    reference = publish_many(
        server, [base, memory], config=described, annotations=annotations, subject=described
    )
    made = await make(reference, tmp_path)
    manifest = made.manifest()
    assert manifest["annotations"] == {"io.example": "1", ANNOTATION: made.report.stands_for}
    assert "subject" not in manifest
    assert manifest["layers"][0]["digest"] == base.digest, "no memory in it: the same blob"
    assert made.blob(base.digest) == base.blob
    told = json.loads(made.blob(manifest["config"]["digest"]))
    plain = gzip.decompress(made.blob(manifest["layers"][1]["digest"]))
    expected = {"type": "layers", "diff_ids": [base.digest, digest_of(plain)]}
    assert told == {**image_config, "rootfs": expected}


async def test_a_docker_manifest_stays_one(server: FaultServer, tmp_path: Path) -> None:
    docker = "application/vnd.docker.distribution.manifest.v2+json"
    layer = tar_layer(FILES)
    server.add_blob(layer.blob)
    server.add_blob(b"{}")
    document = {**manifest_of(layer), "mediaType": docker}
    server.add_manifest(document, "1", docker)
    made = await make(f"{server.host}/{server.repository}:1", tmp_path)
    manifest = made.manifest()
    assert manifest["mediaType"] == docker
    (described,) = manifest["layers"]
    assert described["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"


@pytest.mark.parametrize("kind", ["tar", "gzip"])
async def test_of_an_incremental_checkpoint_no_memory_stays_however_deep(
    server: FaultServer, tmp_path: Path, kind: str
) -> None:
    files = [
        *(Member(name, data) for name, data in FILES.items()),
        Member("checkpoint/parent", type=tarfile.SYMTYPE, link="../pre"),
        *(Member(name, data) for name, data in checkpoint_files(5000, "pre/").items()),
    ]
    made = await make(publish_files(server, files, kind), tmp_path)
    (layer,) = made.manifest()["layers"]
    members = made.members(layer)
    assert not any(isinstance(data, bytes) and "pages-" in name for name, data in members.items())
    marker = members[f"checkpoint/{MARKER}"]
    assert isinstance(marker, bytes)
    assert [each.name for each in read_stub(marker).pages] == ["pages-1.img", "parent/pages-1.img"]
    assert f"pre/{MARKER}" not in members


async def test_a_layer_for_each_dump(server: FaultServer, tmp_path: Path) -> None:
    below = tar_layer(checkpoint_files(5000))
    link = [Member("checkpoint/parent", type=tarfile.SYMTYPE, link="../1")]
    above = tar_layer([*(Member(name, data) for name, data in FILES.items()), *link])
    made = await make(publish_many(server, [below, above]), tmp_path)
    found = [made.members(layer) for layer in made.manifest()["layers"]]
    assert [f"checkpoint/{MARKER}" in members for members in found] == [False, True]
    assert not any(isinstance(members["checkpoint/pages-1.img"], bytes) for members in found)
    marker = found[1][f"checkpoint/{MARKER}"]
    assert isinstance(marker, bytes)
    assert [each.name for each in read_stub(marker).pages] == ["pages-1.img", "parent/pages-1.img"]


async def test_of_containerds_index_the_container_image_comes_along(
    server: FaultServer, tmp_path: Path
) -> None:
    criu = tar_bytes(checkpoint_files(PAGES_BYTES, ""))
    base = manifest_of(tar_layer({"bin/sh": b"#!"}))
    server.add_blob(b"{}")
    server.add_blob(tar_layer({"bin/sh": b"#!"}).blob)
    kinds = {containerd.CRIU_TAR: criu, containerd.RW_TAR: b"rw", containerd.CONFIG: b"\n\x00"}
    entries: list[dict[str, Any]] = [
        {"mediaType": kind, "digest": server.add_blob(data), "size": len(data)}
        for kind, data in kinds.items()
    ]
    size = len(json.dumps(base).encode())
    entries.insert(
        1, {"mediaType": OCI_MANIFEST, "digest": server.add_manifest(base), "size": size}
    )
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    index["annotations"] = {"io.containerd.checkpoint.snapshotter": "overlayfs"}
    server.add_manifest(index, "1", OCI_INDEX)
    made = await make(f"{server.host}/{server.repository}:1", tmp_path)
    told = made.manifest()
    assert told["annotations"].pop(ANNOTATION) == made.report.stands_for
    assert told["annotations"] == index["annotations"]
    changed = [at for at, each in enumerate(entries) if told["manifests"][at] != each]
    assert changed == [0]
    images = told["manifests"][0]
    assert images["mediaType"] == containerd.CRIU_TAR
    names = made.members(images)
    assert MARKER in names
    assert not isinstance(names["pages-1.img"], bytes)
    assert made.blob(images["digest"])[257:262] == b"ustar", "containerd unpacks no other"
    for each in entries[1:]:
        assert digest_of(made.blob(each["digest"])) == each["digest"]
    assert made.blob(base["layers"][0]["digest"]) == tar_layer({"bin/sh": b"#!"}).blob


async def test_a_large_file_that_stays_is_told(server: FaultServer, tmp_path: Path) -> None:
    files = {**FILES, "rootfs-diff.tar": bytes(65 << 20)}
    made = await make(publish_files(server, files), tmp_path)
    assert made.report.largest_file == "rootfs-diff.tar"
    assert made.report.largest_file_bytes == 65 << 20


async def test_extended_attributes_stay_as_they_are(server: FaultServer, tmp_path: Path) -> None:
    attribute = "SCHILY.xattr.user.n"
    odd = Member("odd", b"o", pax={attribute: "\udcff\n=\u00e9"})
    made = await make(publish_files(server, [*_members(FILES), odd]), tmp_path)
    (layer,) = made.manifest()["layers"]
    with tarfile.open(fileobj=io.BytesIO(made.blob(layer["digest"]))) as archive:
        found = {each.name: each for each in archive}
    assert found["odd"].pax_headers[attribute] == "\udcff\n=\u00e9"


# -- what there is no stub of -------------------------------------------------------------------


async def test_an_image_without_a_checkpoint(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"no inventory\.img"):
        await make(publish_files(server, {"etc/passwd": b""}), tmp_path)


async def test_pages_that_were_pushed_as_files(server: FaultServer, tmp_path: Path) -> None:
    title = "org.opencontainers.image.title"
    layers = [
        Layer(data, {title: name}, "application/octet-stream")
        for name, data in checkpoint_files(PAGES_BYTES, "").items()
        if data
    ]
    with pytest.raises(UnsupportedLayer, match="into one image layer"):
        await make(publish_many(server, layers), tmp_path)


async def test_more_pages_files_than_a_marker_can_name(server: FaultServer, tmp_path: Path) -> None:
    """A stub that nobody would restore is not written."""
    more = {f"checkpoint/pages-{number}.img": b"" for number in range(2, 10_002)}
    with pytest.raises(UnsupportedLayer, match="pages"):
        await make(publish_files(server, {**FILES, **more}), tmp_path)
    assert not (tmp_path / "layout/index.json").exists()


async def test_a_name_that_no_tar_can_hold(server: FaultServer, tmp_path: Path) -> None:
    blob = tar_bytes([*_members(FILES), Member("odd", b"o", pax={"SCHILY.xattr.user.XX": "1"})])
    blob = blob.replace(b"user.XX=", b"user.\xff\xff=")
    layer = Layer(blob, {}, "application/vnd.oci.image.layer.v1.tar")
    made = make(publish(server, layer), tmp_path)
    with pytest.raises(UnsupportedLayer, match="odd"):
        await made


async def test_a_stub_has_no_stub(server: FaultServer, tmp_path: Path) -> None:
    made = await make(publish_files(server, FILES), tmp_path)
    with pytest.raises(NotACheckpoint, match="is a stub already"):
        await make(made.reference, tmp_path / "2")
    without = await _publish_stub(server, made, annotated=False)
    with pytest.raises(NotACheckpoint, match="is a stub already"):
        await make(without, tmp_path / "2")


async def test_bytes_that_contradict_their_digest_get_into_no_stub(
    server: FaultServer, tmp_path: Path
) -> None:
    layer = tar_layer(FILES)
    reference = publish(server, layer)
    at = layer.blob.index(FILES["checkpoint/core-1.img"])
    bad = layer.blob[:at] + bytes([layer.blob[at] ^ 1]) + layer.blob[at + 1 :]
    server.resources[f"/v2/{server.repository}/blobs/{layer.digest}"].body = bad
    with pytest.raises(LazyfsError, match="digest"):
        await make(reference, tmp_path)
    assert not (tmp_path / "layout/index.json").exists()


# -- who opens one ------------------------------------------------------------------------------


async def _publish_stub(server: FaultServer, made: Made, *, annotated: bool = True) -> str:
    """Put a stub into the registry beside what it stands for."""
    manifest = made.manifest()
    if not annotated:
        del manifest["annotations"][ANNOTATION]
    for each in (manifest["config"], *manifest["layers"]):
        server.add_blob(made.blob(each["digest"]))
    server.add_manifest(manifest, TAG)
    return f"{server.host}/{server.repository}:{TAG}"


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.parametrize("unpack", [True, False])
async def test_a_stub_is_followed(
    server: FaultServer, tmp_path: Path, annotated: bool, unpack: bool
) -> None:
    made = await make(publish_files(server, FILES), tmp_path)
    reference = await _publish_stub(server, made, annotated=annotated)
    before = len(server.seen)
    async with open_followed(reference, config("background"), unpack=unpack) as checkpoint:
        assert checkpoint.reference == made.report.stands_for
        assert checkpoint.stub is not None
        assert checkpoint.stub.startswith(f"{server.host}/{server.repository}@sha256:")
        pages = await checkpoint.read_file("checkpoint/pages-1.img", PAGES_BYTES)
    assert pages == FILES["checkpoint/pages-1.img"]
    (layer,) = made.manifest()["layers"]
    asked = [seen.path for seen in server.seen[before:]]
    assert any(layer["digest"] in path for path in asked) is not annotated


async def test_a_stub_is_shown_where_that_is_asked_for(server: FaultServer, tmp_path: Path) -> None:
    made = await make(publish_files(server, FILES), tmp_path)
    async with open_followed(made.reference, config(shows_stubs=True)) as checkpoint:
        assert checkpoint.stub is None
        stub = await find_stub(checkpoint)
        assert stub is not None
        assert stub.reference == made.report.stands_for


async def test_what_is_no_stub_is_opened_once(server: FaultServer) -> None:
    reference = publish_files(server, FILES)
    async with open_followed(reference, config("background")) as checkpoint:
        assert (checkpoint.stub, checkpoint.reference.partition("@")[0]) == (
            None,
            f"{server.host}/{server.repository}",
        )
    assert server.count("/manifests/") == 1


async def test_what_a_stub_stands_for_is_gone(server: FaultServer, tmp_path: Path) -> None:
    made = await make(publish_files(server, FILES), tmp_path)
    digest = made.report.stands_for.partition("@")[2]
    del server.resources[f"/v2/{server.repository}/manifests/{digest}"]
    with pytest.raises(RealImageMissing, match=r"layout@sha256:\w+ is a stub of .* no such thing"):
        async with open_followed(made.reference, config()):
            pass


async def test_a_marker_that_lies_behind_the_inventory_is_found(
    server: FaultServer, tmp_path: Path
) -> None:
    """As in a stub that was unpacked and packed anew."""
    made = await make(publish_files(server, FILES), tmp_path)
    marker = write_stub(Stub(reference=made.report.stands_for))
    files = {**FILES, f"checkpoint/{MARKER}": marker}
    for kind in ("tar", "gzip"):
        reference = publish_files(server, files, kind, "again")
        async with open_followed(reference, config("background")) as checkpoint:
            assert checkpoint.reference == made.report.stands_for


async def test_a_marker_is_believed_only_when_its_layer_is_proven(
    server: FaultServer, tmp_path: Path
) -> None:
    marker = write_stub(Stub(reference=f"a.example/b@{digest_of(b'1')}"))
    layer = tar_layer({**FILES, f"checkpoint/{MARKER}": marker})
    reference = publish(server, layer)
    at = layer.blob.index(b"a.example")
    bad = layer.blob[:at] + b"b" + layer.blob[at + 1 :]
    server.resources[f"/v2/{server.repository}/blobs/{layer.digest}"].body = bad
    with pytest.raises(LazyfsError, match="digest"):
        async with open_followed(reference, config("background")):
            pass
    assert server.count("b.example") == 0


@pytest.mark.parametrize("annotated", [True, False])
async def test_a_stub_does_not_stand_for_a_stub(
    server: FaultServer, tmp_path: Path, annotated: bool
) -> None:
    made = await make(publish_files(server, FILES), tmp_path)
    inner = await _publish_stub(server, made, annotated=annotated)
    async with open_checkpoint(inner, config()) as checkpoint:
        real = checkpoint.reference
    layer = tar_layer({"checkpoint/inventory.img": b""})
    server.add_blob(layer.blob)
    server.add_manifest(manifest_of(layer, {ANNOTATION: real}), "outer")
    with pytest.raises(NotACheckpoint, match="is a stub too"):
        async with open_followed(f"{server.host}/{server.repository}:outer", config()):
            pass


@pytest.mark.parametrize(
    "named", ["", "registry.example/a:1", "oci:/etc", "x" * 5000, "/etc/passwd"]
)
async def test_an_annotation_that_names_no_image_by_digest(server: FaultServer, named: str) -> None:
    layer = tar_layer(FILES)
    server.add_blob(layer.blob)
    server.add_manifest(manifest_of(layer, {ANNOTATION: named}), "1")
    with pytest.raises(MalformedError):
        async with open_followed(f"{server.host}/{server.repository}:1", config()):
            pass


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "100.100.100.200:80"])
async def test_a_stub_does_not_lead_to_clouds_metadata(server: FaultServer, host: str) -> None:
    real = f"{host}/a@{digest_of(some_bytes(3))}"
    layer = tar_layer(FILES)
    server.add_blob(layer.blob)
    server.add_manifest(manifest_of(layer, {ANNOTATION: real}), "1")
    with pytest.raises(LazyfsError, match="--allow-local-redirects"):
        async with open_followed(f"{server.host}/{server.repository}:1", config()):
            pass

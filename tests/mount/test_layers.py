"""Images of several layers, checkpoints that build on each other, and labels that are wrong."""

import json
import os
import tarfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.faults import FaultServer
from tests.images import Layer, Member, tar_bytes, tar_layer, zstd_chunked
from tests.mount.mounting import Done, Mounts, Waiter, error_of, lazyfs, wait_until
from tests.mount.published import FEW, KIB, LAYERS, MIB, publish, publish_many, some_bytes
from tests.mount.test_streams import gate
from tests.mount.writers import GZIP_TYPE, ZSTD_TYPE, gzip_layer, gzipped, zstd_layer, zstded

TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"
LINK = tarfile.SYMTYPE
DEPTH = 5


def pages(number: int) -> bytes:
    return some_bytes(300 * KIB, 100 + number)


def dump(number: int, inside: str, parent: str | None = None) -> list[Member]:
    """One of a chain of dumps, with memory of its own."""
    members = [
        Member(f"{inside}inventory.img", f"inventory {number}".encode()),
        Member(f"{inside}pagemap-1.img", b"p" * 500),
    ]
    if parent is not None:
        members.append(Member(f"{inside}parent", type=LINK, link=parent, mode=0o777))
    return [*members, Member(f"{inside}pages-1.img", pages(number))]


def assert_chain(images: Path, depth: int) -> None:
    """See that each dump's parent is the one before, as CRIU sees it: by `openat` of `parent`."""
    where = images
    for number in reversed(range(depth)):
        assert (where / "inventory.img").read_bytes() == f"inventory {number}".encode()
        assert (where / "pages-1.img").read_bytes() == pages(number)
        where = where / "parent"
    assert error_of(lambda: os.lstat(where)) == "ENOENT", "the first has none"


def fails(path: Path) -> bool:
    return error_of(path.read_bytes) == "EIO"


def one_line(done: Done) -> str:
    assert done.err.count("\n") == 1, done.err
    return done.err


# -- layers over each other ---------------------------------------------------------------------

LOWER = {
    "checkpoint/inventory.img": b"old inventory",
    "checkpoint/gone.img": b"gone",
    "checkpoint/kept.img": b"kept",
    "checkpoint/sub/old": b"old",
    "checkpoint/.wh.nothing": b"",
    "config.dump": b"old config",
    "spec.dump": b"gone",
}
MIDDLE = {
    "checkpoint/.wh.gone.img": b"",
    "checkpoint/sub/.wh..wh..opq": b"",
    "checkpoint/sub/new": b"new",
    ".wh.spec.dump": b"",
    "checkpoint/pages-1.img": pages(0),
}
UPPER = {"checkpoint/inventory.img": b"inventory", "config.dump": b"{}"}


@pytest.mark.parametrize(
    "kinds",
    [("tar", "tar", "tar"), ("tar", "zstd:chunked", "estargz"), ("gzip", "zstd", "tar")],
    ids="-".join,
)
def test_later_layers_lie_over_earlier_ones(
    server: FaultServer, mounts: Mounts, kinds: tuple[str, ...]
) -> None:
    layers = [
        LAYERS[kind](files) for kind, files in zip(kinds, (LOWER, MIDDLE, UPPER), strict=True)
    ]
    reference = publish_many(server, layers)
    mount = mounts.mount(reference, "--view=image")
    assert sorted(os.listdir(mount.directory)) == ["checkpoint", "config.dump"]
    names = ["inventory.img", "kept.img", "pages-1.img", "sub"]
    assert sorted(os.listdir(mount / "checkpoint")) == names
    assert os.listdir(mount / "checkpoint/sub") == ["new"]
    assert (mount / "checkpoint/inventory.img").read_bytes() == b"inventory"
    assert (mount / "checkpoint/kept.img").read_bytes() == b"kept"
    assert (mount / "checkpoint/sub/new").read_bytes() == b"new"
    assert (mount / "checkpoint/pages-1.img").read_bytes() == pages(0)
    assert (mount / "config.dump").read_bytes() == b"{}"
    status = mount.status()
    assert [layer["format"] for layer in status["layers"]] == list(kinds)
    assert status["layer_digest"] == layers[2].digest, "the one with the inventory"
    assert mount.umount().code == 0
    mount = mounts.mount(reference)
    assert sorted(os.listdir(mount.directory)) == names


def test_one_wrong_layer_spoils_them_all(server: FaultServer, mounts: Mounts) -> None:
    layers = [tar_layer({"a": some_bytes(MIB)}), zstd_chunked(dict(dumped()))]
    reference = publish_many(server, layers)
    (resource,) = (item for path, item in server.resources.items() if layers[0].digest in path)
    resource.body = bytes([*layers[0].blob[:-1], 1])
    mounts.expect_log("CRITICAL .* does not match its digest.*; every read fails from now on")
    mounts.expect_log("ERROR .* read answered with an error: ")
    mount = mounts.mount(reference)
    wait_until(lambda: mount.status()["failed"] is not None, "the pass has found it")
    wait_until(partial(fails, mount / "pages-1.img"), "nothing is served")
    done = mounts.refuse(reference, "--verify=full", at=_other(mounts))
    assert done.code == 5


def dumped() -> list[tuple[str, bytes]]:
    return [("checkpoint/inventory.img", b"i"), ("checkpoint/pages-1.img", pages(1))]


def _other(mounts: Mounts) -> Path:
    other = mounts.home / "other"
    other.mkdir()
    return other


# -- checkpoints that build on each other -------------------------------------------------------


@pytest.mark.parametrize("kind", FEW)
def test_a_parent_beside_it(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """As Podman's --with-previous leaves it: a directory in one view, a link in the other."""
    members = dump(1, "checkpoint/", "../pre-checkpoint") + dump(0, "pre-checkpoint/")
    reference = publish(server, LAYERS[kind](members))
    mount = mounts.mount(reference)
    assert (mount / "parent").is_dir()
    assert not (mount / "parent").is_symlink()
    assert_chain(mount.directory, 2)
    assert mount.umount().code == 0
    mount = mounts.mount(reference, "--view=image")
    assert os.readlink(mount / "checkpoint/parent") == "../pre-checkpoint"
    assert_chain(mount / "checkpoint", 2)


def test_a_parent_that_comes_late(server: FaultServer, mounts: Mounts) -> None:
    """In a stream nobody knows what the link stands for before all names have come."""
    members = dump(1, "checkpoint/", "../pre-checkpoint") + dump(0, "pre-checkpoint/")
    layer, may_go_on = gzip_layer(members), threading.Event()
    reference = publish(server, layer)
    server.always("/blobs/", gate(len(layer.blob) * 3 // 4, may_go_on))
    mount = mounts.mount(reference)
    assert (mount / "pages-1.img").read_bytes() == pages(1)
    waiting = Waiter("ls", mount / "parent")
    wait_until(waiting.is_waiting, "it has asked")
    may_go_on.set()
    assert waiting.result() == "inventory.img pagemap-1.img pages-1.img"
    assert_chain(mount.directory, 2)


@pytest.mark.parametrize("view", ["criu", "image"])
@pytest.mark.parametrize("kind", ["tar", "gzip"])
def test_a_long_chain_in_one_layer(
    server: FaultServer, mounts: Mounts, kind: str, view: str
) -> None:
    members = dump(0, "0/")
    for number in range(1, DEPTH):
        members += dump(number, f"{number}/", f"../{number - 1}")
    mount = mounts.mount(publish(server, LAYERS[kind](members)), f"--view={view}")
    assert_chain(mount.directory if view == "criu" else mount / str(DEPTH - 1), DEPTH)


@pytest.mark.parametrize("view", ["criu", "image"])
@pytest.mark.parametrize(
    "kinds", [["tar"] * DEPTH, ["gzip", "tar", "soci", "zstd", "zstd:chunked"]]
)
def test_a_layer_for_each_dump(
    server: FaultServer, mounts: Mounts, kinds: list[str], view: str
) -> None:
    """All at one place: a later one does not replace what it builds on."""
    layers = []
    for number, kind in enumerate(kinds):
        parent = f"../{number - 1}" if number else None
        layers.append(replace(LAYERS[kind](dump(number, "checkpoint/", parent)), ztoc=b""))
    mount = mounts.mount(publish_many(server, layers), f"--view={view}")
    assert_chain(mount.directory if view == "criu" else mount / "checkpoint", DEPTH)
    assert mount.status()["failed"] is None


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked"])
@pytest.mark.parametrize(
    ("members", "said"),
    [
        (dump(1, "checkpoint/", "../gone"), "checkpoint/parent -> '../gone' leads nowhere"),
        (dump(1, "checkpoint/", "/var/lib/0"), "builds on an earlier one that is not in it"),
        (dump(1, "checkpoint/", "../0") + dump(0, "0/", "../checkpoint"), "closes a circle"),
        (dump(1, "checkpoint/", "."), "closes a circle"),
    ],
    ids=["gone", "absolute", "circle", "itself"],
)
def test_chains_that_cannot_be(
    server: FaultServer, mounts: Mounts, kind: str, members: list[Member], said: str
) -> None:
    done = mounts.refuse(publish(server, LAYERS[kind](members)))
    assert done.code == 4
    if members[2].link.startswith("/"):
        mounts.expect_log("WARNING .* not shown: the link 'checkpoint/parent'")
    else:
        one_line(done)
    assert said in done.err.splitlines()[-1]
    assert server.host in done.err


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_missing_parent_in_a_stream(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """Found at its end, when the mount is long there: then nothing of it can be read."""
    members = [*dump(1, "checkpoint/", "../gone"), Member("config.dump", b"{}")]
    layer, may_go_on = LAYERS[kind](members), threading.Event()
    reference = publish(server, layer)
    server.always("/blobs/", gate(len(layer.blob) // 2, may_go_on))
    mount = mounts.mount(reference)
    assert (mount / "inventory.img").read_bytes() == b"inventory 1"
    mounts.expect_log("CRITICAL .*builds on an earlier one that is not in it.*; every read fails")
    mounts.expect_log("ERROR .* answered with an error: ")
    waiting = Waiter("stat", mount / "parent")
    may_go_on.set()
    assert waiting.result() == "EIO"
    wait_until(lambda: mount.status()["failed"] is not None, "it is found")
    assert "'../gone' leads nowhere" in mount.status()["failed"]
    for name in ("inventory.img", "pages-1.img"):
        wait_until(partial(fails, mount / name), f"{name} cannot be read")


# -- labels -------------------------------------------------------------------------------------

LABELS = {"tar": TAR_TYPE, "gzip": GZIP_TYPE, "zstd": ZSTD_TYPE}
WRITERS = {"tar": tar_layer, "gzip": gzip_layer, "zstd": zstd_layer}


@pytest.mark.parametrize(
    ("kind", "label"),
    [(kind, label) for kind in WRITERS for label in LABELS if (kind == "tar") or kind != label],
)
def test_the_bytes_decide(server: FaultServer, mounts: Mounts, kind: str, label: str) -> None:
    layer = replace(WRITERS[kind](dump(1, "checkpoint/")), media_type=LABELS[label])
    reference = publish(server, layer)
    mount = mounts.mount(reference)
    assert mount.status()["layer_format"] == kind
    assert (mount / "pages-1.img").read_bytes() == pages(1)
    done = lazyfs("inspect", "--json", *mounts.options(), reference)
    (described,) = json.loads(done.out)["layers"]
    assert (described["format"], described["mislabelled"]) == (kind, kind != label)
    if (kind, label) == ("gzip", "tar"):
        done = lazyfs("inspect", *mounts.options(), reference)
        assert "its media type says otherwise, but its bytes are gzip: they decide" in done.out


# -- files and archives that were pushed as they are --------------------------------------------


def file_of(name: str, data: bytes, media_type: str = TAR_TYPE, **more: str) -> Layer:
    """One file, as oras pushes it."""
    return Layer(data, {"org.opencontainers.image.title": name, **more}, media_type)


@pytest.mark.parametrize("inside", ["", "checkpoint/"])
@pytest.mark.parametrize("media_type", [TAR_TYPE, "application/octet-stream"])
def test_files_one_by_one(
    server: FaultServer, mounts: Mounts, inside: str, media_type: str
) -> None:
    files = {"inventory.img": b"inventory", "pages-1.img": pages(1), "empty.img": b""}
    layers = [file_of(inside + name, data, media_type) for name, data in files.items()]
    mount = mounts.mount(publish_many(server, layers))
    assert sorted(os.listdir(mount.directory)) == sorted(files)
    for name, data in files.items():
        assert (mount / name).read_bytes() == data
    assert {layer["format"] for layer in mount.status()["layers"]} == {"file"}


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzipped), (".zst", zstded)])
def test_an_archive_as_a_file(
    server: FaultServer, mounts: Mounts, suffix: str, pack: type[bytes]
) -> None:
    blob = pack(tar_bytes([*dump(1, "checkpoint/"), Member("config.dump", b"{}")]))
    for layer in (
        file_of(f"web.tar{suffix}", blob),
        file_of("web", blob, **{"io.deis.oras.content.unpack": "true"}),
    ):
        mount = mounts.mount(publish_many(server, [layer]), "--view=image")
        assert sorted(os.listdir(mount.directory)) == ["checkpoint", "config.dump"]
        assert (mount / "checkpoint/pages-1.img").read_bytes() == pages(1)
        assert mount.umount().code == 0

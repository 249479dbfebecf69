"""Layers made to harm: they do not mount, or show nothing that could."""

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.faults import FaultServer
from tests.images import Member, tar_layer, zstd_chunked
from tests.mount.mounting import Mounts, error_of
from tests.mount.published import FEW, MIB, checkpoint_files, publish, publish_files

INVENTORY = Member("checkpoint/inventory.img", b"inventory")
SYMLINK, HARDLINK = tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked", "zstd"])
@pytest.mark.parametrize(
    ("member", "said"),
    [
        (Member("../out", b"x"), "'../out' has an empty or '..' component"),
        (Member("checkpoint/../../out", b"x"), "has an empty or '..' component"),
        (Member("checkpoint/inventory.img/below", b"x"), "which is no directory"),
        (Member("h", type=HARDLINK, link="../../etc/shadow"), "has an empty or '..' component"),
        (Member("h", type=HARDLINK, link="nowhere"), "which is no earlier file"),
        (Member("n" * 300, b"x"), "component of more than 255 bytes"),
    ],
    ids=["..", "hidden ..", "below a file", "hard link out", "hard link to nothing", "long name"],
)
def test_names_that_cannot_be(
    server: FaultServer, mounts: Mounts, kind: str, member: Member, said: str
) -> None:
    done = mounts.refuse(publish_files(server, [INVENTORY, member], kind))
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert said in done.err
    assert server.host in done.err, "of which image it is"


@pytest.mark.parametrize("kind", FEW)
def test_nothing_lies_below_a_link(server: FaultServer, mounts: Mounts, kind: str) -> None:
    members = [INVENTORY, Member("l", type=SYMLINK, link="checkpoint"), Member("l/x", b"x")]
    done = mounts.refuse(publish_files(server, members, kind))
    assert done.code == 4
    assert "lies below 'l', which is no directory" in done.err


@pytest.mark.parametrize("kind", FEW)
def test_absolute_names_are_names_of_the_layer(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    members = [Member("/checkpoint/inventory.img", b"i"), Member("//etc/./passwd/", b"x")]
    mount = mounts.mount(publish_files(server, members, kind), "--view=image")
    assert sorted(os.listdir(mount.directory)) == ["checkpoint", "etc"]
    assert (mount / "checkpoint/inventory.img").read_bytes() == b"i"
    assert (mount / "etc/passwd").read_bytes() == b"x"


@pytest.mark.parametrize("kind", FEW)
def test_what_could_act_on_the_host_is_not_shown(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    """Devices and pipes, links that leave: by themselves, by other links, or by the view."""
    links = {
        "absolute": "/etc/passwd",
        "climbing": "../../etc/passwd",
        "out of the view": "../config.dump",
        "sub/up": "..",
        "sub/by another": "up/../config.dump",
        "sub/by many": "fine/up/../x",
        "sub/fine": "../sub",
        "round": "round",
        "long": "a/" * 2000 + "../" * 10,
    }
    members = [
        INVENTORY,
        Member("config.dump", b"{}"),
        Member("checkpoint/device", type=tarfile.CHRTYPE),
        Member("checkpoint/disk", type=tarfile.BLKTYPE),
        Member("checkpoint/pipe", type=tarfile.FIFOTYPE),
        *[Member(f"checkpoint/{name}", type=SYMLINK, link=to) for name, to in links.items()],
    ]
    reference = publish_files(server, members, kind)
    mounts.expect_log(r"WARNING .* not shown: 'checkpoint/device' is a device, FIFO or socket")
    mounts.expect_log(r"WARNING .* not shown: the link ")
    mounts.expect_log(r"WARNING .* not shown: 'checkpoint/(disk|pipe)'")
    mount = mounts.mount(reference)
    assert sorted(os.listdir(mount.directory)) == ["inventory.img", "long", "sub"]
    assert sorted(os.listdir(mount / "sub")) == ["fine", "up"]
    for name in ("climbing", "out of the view", "sub/by another", "round", "device"):
        assert error_of(partial(os.lstat, mount / name)) == "ENOENT"
    assert os.path.realpath(mount / "sub/fine/up/sub") == str(mount / "sub")
    assert mount.umount().code == 0
    mount = mounts.mount(reference, "--view=image")
    assert os.readlink(mount / "checkpoint/out of the view") == "../config.dump"
    assert error_of(lambda: os.lstat(mount / "checkpoint/climbing")) == "ENOENT"
    assert os.readlink(mount / "checkpoint/sub/by many") == "fine/up/../x"


@pytest.mark.parametrize("kind", FEW)
def test_the_last_of_a_name_holds(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """As when the layer is unpacked."""
    members = [
        INVENTORY,
        Member("checkpoint/twice", b"first"),
        Member("checkpoint/hard", type=HARDLINK, link="checkpoint/twice"),
        Member("checkpoint/twice", b"second"),
        Member("checkpoint/now a link", b"file"),
        Member("checkpoint/now a link", type=SYMLINK, link="hard"),
        Member("checkpoint/now a file/", type=tarfile.DIRTYPE),
        Member("checkpoint/now a file", b"file"),
    ]
    mount = mounts.mount(publish_files(server, members, kind))
    assert (mount / "twice").read_bytes() == b"second"
    assert (mount / "hard").read_bytes() == b"first"
    assert os.stat(mount / "hard").st_ino != os.stat(mount / "twice").st_ino
    assert os.readlink(mount / "now a link") == "hard"
    assert (mount / "now a file").read_bytes() == b"file"


def _pages(toc: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in toc["entries"] if entry["name"].endswith("pages-1.img")]


def _overlap(toc: dict[str, Any]) -> None:
    _pages(toc)[3]["offset"] = _pages(toc)[1]["offset"]


def _outside(toc: dict[str, Any]) -> None:
    for entry in _pages(toc)[1:]:
        entry["offset"] += 1 << 40


def _negative(toc: dict[str, Any]) -> None:
    _pages(toc)[1]["offset"] = -1


def _larger(toc: dict[str, Any]) -> None:
    _pages(toc)[0]["size"] += 4096


def _giant(toc: dict[str, Any]) -> None:
    _pages(toc)[-1]["chunkSize"] = 1 << 62
    _pages(toc)[0]["size"] = (1 << 62) + _pages(toc)[-1]["chunkOffset"]


def _chunk_size(toc: dict[str, Any]) -> None:
    _pages(toc)[2]["chunkSize"] += 1


def _chunk_offset(toc: dict[str, Any]) -> None:
    _pages(toc)[2]["chunkOffset"] = 0


def _no_digest(toc: dict[str, Any]) -> None:
    del _pages(toc)[2]["chunkDigest"]


def _orphan(toc: dict[str, Any]) -> None:
    toc["entries"].insert(0, _pages(toc)[2])


def _nul(toc: dict[str, Any]) -> None:
    toc["entries"][0]["name"] = "checkpoint/\x00"


LIES = [_overlap, _outside, _negative, _larger, _giant]
LIES += [_chunk_size, _chunk_offset, _no_digest, _orphan, _nul]


@pytest.mark.parametrize(
    "lie",
    LIES,
    ids=lambda lie: lie.__name__.strip("_").replace("_", " "),
)
def test_a_toc_that_lies(
    server: FaultServer, mounts: Mounts, lie: Callable[[dict[str, Any]], None]
) -> None:
    done = mounts.refuse(publish(server, zstd_chunked(checkpoint_files(MIB), edit=lie)))
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert server.host in done.err


def test_a_frame_that_is_another_size_than_said(server: FaultServer, mounts: Mounts) -> None:
    """Sizes that agree with each other and not with the frame: found as it is read."""

    def lie(toc: dict[str, Any]) -> None:
        _pages(toc)[0]["size"] += 4096
        _pages(toc)[-1]["chunkSize"] += 4096

    files = checkpoint_files(MIB)
    mount = mounts.mount(publish(server, zstd_chunked(files, edit=lie)))
    size = os.stat(mount / "pages-1.img").st_size
    assert size == MIB + 4096
    mounts.expect_log("CRITICAL .* every read fails from now on")
    mounts.expect_log("ERROR .* read answered with an error: ")
    assert error_of(lambda: (mount / "pages-1.img").read_bytes()) == "EIO"


def test_a_tar_cut_off(server: FaultServer, mounts: Mounts) -> None:
    layer = tar_layer(checkpoint_files(MIB))
    for size in (len(layer.blob) // 2, 700, 3):
        done = mounts.refuse(publish(server, replace(layer, blob=layer.blob[:size])))
        assert done.code == 4
        assert server.host in done.err

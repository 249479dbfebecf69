"""Archives within a checkpoint as directories, laid over their base image by the kernel, too."""

import gzip
import json
import os
import signal
import stat
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.faults import FaultServer, stall
from tests.images import Layer, Member, tar_bytes, tar_layer
from tests.mount import containers
from tests.mount.containers import (
    BASE,
    CAPABILITY,
    DIFF,
    FILES,
    LARGE,
    fingerprint,
    overlaid,
    unpack,
)
from tests.mount.mounting import (
    AT_ONCE_S,
    Mount,
    Mounts,
    Waiter,
    error_of,
    read_at,
    run,
    wait_until,
)
from tests.mount.published import (
    FEW,
    KIB,
    MIB,
    manifest_of,
    publish_files,
    some_bytes,
)
from tests.mount.writers import GZIP_TYPE, gzip_layer, gzipped, zstd_layer, zstded

CHECKPOINT = {
    "checkpoint/inventory.img": b"inventory",
    "checkpoint/pages-1.img": some_bytes(MIB),
    "config.dump": b"{}",
}
LINK, DIRECTORY = tarfile.SYMTYPE, tarfile.DIRTYPE


def with_diff(archive: bytes, deleted: object = None) -> dict[str, bytes]:
    """A checkpoint with a `rootfs-diff.tar`."""
    files = CHECKPOINT | {"rootfs-diff.tar": archive}
    return files if deleted is None else files | {"deleted.files": json.dumps(deleted).encode()}


def opaque(path: Path) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def is_whiteout(path: Path) -> bool:
    seen = path.lstat()
    return stat.S_ISCHR(seen.st_mode) and seen.st_rdev == 0


@pytest.mark.parametrize("packed", ["tar", "gzip"])
@pytest.mark.parametrize("kind", FEW)
def test_laid_over_its_image_it_is_the_container(
    server: FaultServer, mounts: Mounts, kind: str, packed: str
) -> None:
    """By Podman's list of what was removed in a plain tar, by whiteouts in a gzip one."""
    files = CHECKPOINT | containers.podmans()
    if packed == "gzip":
        files = with_diff(gzipped(containers.containerds()))
    home = mounts.home
    base, wanted = unpack(BASE, home / "base"), containers.expected(home / "wanted")
    mount = mounts.mount(publish_files(server, files, kind), "--view=image")
    diff = mount / "rootfs-diff"
    with overlaid(home / "over", diff, base) as over:
        assert fingerprint(over) == fingerprint(wanted)
    with overlaid(home / "writable", diff, base, upper=home / "upper") as over:
        assert fingerprint(over) == fingerprint(wanted)
        (over / "etc/passwd").write_bytes(b"new")
        os.chown(over / LARGE, 1, 1)
        os.rename(over / "bin/su", over / "bin/su2")
        assert (over / LARGE).read_bytes() == FILES[LARGE].data
        assert os.stat(over / LARGE).st_uid == 1
    assert (diff / "etc/passwd").read_bytes() == FILES["etc/passwd"].data
    assert mount.status()["failed"] is None
    assert len(mount.status()["layers"]) == 1


@pytest.mark.parametrize("kind", FEW)
def test_a_containers_files_are_as_they_were(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    files = CHECKPOINT | containers.podmans()
    mount = mounts.mount(publish_files(server, files, kind), "--view=image")
    diff = mount / "rootfs-diff"
    assert os.listdir(diff), "all names have come, and so all links are counted"
    assert sorted(os.listdir(mount.directory)) == sorted(
        ["checkpoint", "config.dump", "deleted.files", "rootfs-diff", "rootfs-diff.tar"]
    )
    assert os.stat(diff / "bin/su").st_mode == stat.S_IFREG | 0o4755
    assert os.stat(diff / "bin/write").st_mode == stat.S_IFREG | 0o2711
    secret = os.stat(diff / "etc/secret")
    assert (secret.st_mode, secret.st_uid) == (stat.S_IFREG | 0o600, 1000)
    assert os.readlink(diff / "etc/localtime") == "/usr/share/zoneinfo/UTC"
    assert os.readlink(diff / "etc/climbs") == "../../../../etc/shadow"
    assert stat.S_ISFIFO((diff / "run/pipe").lstat().st_mode)
    assert os.getxattr(diff / "bin/ping", "security.capability") == CAPABILITY
    assert os.listxattr(diff / "etc/secret") == ["user.note"]
    assert os.getxattr(diff / "srv/data", "user.of") == b"a directory"
    first, second = os.stat(diff / LARGE), os.stat(diff / "srv/data/again")
    assert (first.st_ino, first.st_nlink) == (second.st_ino, 2)
    assert os.stat(diff / "tmp").st_mode == stat.S_IFDIR | 0o1777, "as in every image"
    for name in ("etc/hosts", "etc/old", "tmp/x"):
        assert is_whiteout(diff / name)
    assert opaque(diff / "var/anew"), "removed, and made anew"
    assert "old" not in os.listdir(diff / "turned")
    for name, member in FILES.items():
        assert (diff / name).read_bytes() == member.data
    assert "lazyfs" not in str(os.listxattr(mount.directory))


@pytest.mark.parametrize("pack", [bytes, gzipped, zstded], ids=["tar", "gzip", "zstd"])
def test_whiteouts_of_a_layer(
    server: FaultServer, mounts: Mounts, pack: Callable[[bytes], bytes]
) -> None:
    """Wherever in the archive they stand."""
    members = [
        Member("a/b/.wh.gone"),
        Member("a/.wh.c"),
        Member("a/c/new", b"made anew"),
        Member("d/e", b"e"),
        Member("d/.wh..wh..opq"),
        Member("f/.wh.g/", type=DIRECTORY),
        Member("h/", type=DIRECTORY, pax={"SCHILY.xattr.trusted.overlay.opaque": "y"}),
        Member("i", b"", pax={"SCHILY.xattr.trusted.overlay.redirect": "/etc/shadow"}),
    ]
    files = with_diff(pack(tar_bytes(members)))
    mount = mounts.mount(publish_files(server, files), "--view=image")
    diff = mount / "rootfs-diff"
    assert opaque(diff / "a/c"), "asked before anything else"
    assert sorted(os.listdir(diff)) == ["a", "d", "f", "h", "i"]
    assert is_whiteout(diff / "a/b/gone")
    assert is_whiteout(diff / "f/g")
    assert os.listdir(diff / "d") == ["e"]
    assert [name for name in ("a", "a/b", "a/c", "d", "f", "h") if opaque(diff / name)] == [
        "a/c",
        "d",
    ]
    assert os.listxattr(diff / "i") == [], "what overlayfs keeps for itself is not the archive's"


def test_paths_that_were_removed(server: FaultServer, mounts: Mounts) -> None:
    """In any order, and with parents that are gone as well, or are no directories any more."""
    archive = tar_bytes([Member("now-a-link", type=LINK, link="/etc"), Member("x/y", b"y")])
    deleted = ["/gone/a/b", "/gone/a", "now-a-link/hosts", "/x/y/z", "/x", "/", "/one", "/one"]
    mount = mounts.mount(publish_files(server, with_diff(archive, deleted)), "--view=image")
    diff = mount / "rootfs-diff"
    assert sorted(os.listdir(diff)) == ["gone", "now-a-link", "one", "x"]
    assert is_whiteout(diff / "one")
    assert is_whiteout(diff / "gone/a")
    assert opaque(diff / "x")
    assert (diff / "x/y").read_bytes() == b"y"


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked"])
def test_nothing_is_fetched_before_it_is_read(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    members = [
        Member(f"srv/{number}", some_bytes(3 * MIB, number), mode=0o600) for number in range(5)
    ]
    files = with_diff(tar_bytes(members))
    mount = mounts.mount(publish_files(server, files, kind), "--view=image")
    base = unpack(BASE, mounts.home / "base")
    with overlaid(mounts.home / "over", mount / "rootfs-diff", base) as over:
        assert sorted(os.listdir(over / "srv")) == ["0", "1", "2", "3", "4"]
        before = _settled(mount)
        assert before < 5 * MIB
        assert read_at(over / "srv/3", MIB, 4 * KIB) == members[3].data[MIB:][: 4 * KIB]
        assert _settled(mount) - before < 2 * MIB


def _settled(mount: Mount) -> int:
    """Return what was fetched, once nothing is on its way."""
    fetched = -1
    while fetched != (fetched := mount.status()["bytes_fetched"]):
        time.sleep(0.2)
    return fetched


@pytest.mark.parametrize("kind", FEW)
def test_volumes_and_shared_memory(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """There a name is a name; and a tar in a tar is a file."""
    inner = tar_bytes({"in": b"side"})
    volume = [
        Member("./", type=DIRECTORY, mode=0o750, uid=70, gid=70),
        Member("./db", b"d" * 9000, mode=0o600, uid=70),
        Member("./.wh.odd", b"not a whiteout"),
        Member("./rootfs-diff.tar", inner),
    ]
    files = CHECKPOINT | {
        "rootfs-diff.tar": tar_bytes({"rootfs-diff.tar": inner, "volumes/x.tar": inner}),
        "devshm-checkpoint.tar": gzipped(tar_bytes({"sem.1": b"s"})),
        "volumes/data.tar": tar_bytes(volume),
        "volumes/other.tar": b"",
        "volumes/zeros.tar": bytes(10240),
        "volumes/not a tar": b"x",
        "volumes/.tar": b"x",
        "volumes/..tar": inner,
        "volumes/...tar": inner,
    }
    mount = mounts.mount(publish_files(server, files, kind), "--view=image")
    data = mount / "volumes/data"
    assert sorted(os.listdir(data)) == [".wh.odd", "db", "rootfs-diff.tar"]
    assert (data.stat().st_mode, data.stat().st_uid) == (stat.S_IFDIR | 0o750, 70)
    assert (data / "db").read_bytes() == b"d" * 9000
    assert (data / ".wh.odd").read_bytes() == b"not a whiteout"
    assert (data / "rootfs-diff.tar").read_bytes() == inner
    assert os.listdir(mount / "volumes/other") == os.listdir(mount / "volumes/zeros") == []
    assert (mount / "devshm-checkpoint/sem.1").read_bytes() == b"s"
    assert sorted(os.listdir(mount / "rootfs-diff")) == ["rootfs-diff.tar", "volumes"]
    assert os.listdir(mount / "rootfs-diff/volumes") == ["x.tar"]
    names = [
        "...tar",
        "..tar",
        ".tar",
        "data",
        "data.tar",
        "not a tar",
        "other",
        "other.tar",
        "zeros",
        "zeros.tar",
    ]
    assert sorted(os.listdir(mount / "volumes")) == names


def test_the_default_view_has_none_of_it(server: FaultServer, mounts: Mounts) -> None:
    mount = mounts.mount(publish_files(server, CHECKPOINT | containers.podmans()))
    assert sorted(os.listdir(mount.directory)) == ["inventory.img", "pages-1.img"]


# -- hostile ------------------------------------------------------------------------------------


def _huge() -> bytes:
    info = tarfile.TarInfo("huge")
    info.size = 1 << 40
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def _huge_pax() -> bytes:
    return Member("huge", pax={"size": str(1 << 62)}).info().tobuf(tarfile.PAX_FORMAT) + bytes(1024)


GOOD = tar_bytes({"etc/x": some_bytes(300 * KIB)})
HOSTILE = {
    "up": tar_bytes([Member("ok", b"o"), Member("../out", b"x")]),
    "hidden up": tar_bytes([Member("a/../../out", b"x")]),
    "a link onto a link": tar_bytes([Member("l", type=LINK, link="/etc"), Member("l/x", b"x")]),
    "a hard link out": tar_bytes([Member("h", type=tarfile.LNKTYPE, link="/etc/shadow")]),
    "below a file": tar_bytes([Member("f", b"f"), Member("f/x", b"x")]),
    "cut off": tar_bytes(DIFF)[: 2 * MIB],
    "2^40": _huge(),
    "2^62": _huge_pax(),
    "no tar": b"x" * 5000,
    "another compression": b"BZh91AY&SY" + bytes(5000),
    "gzip of no tar": gzipped(b"x" * 5000),
    "gzip cut off": gzipped(tar_bytes(DIFF))[: 2 * MIB],
    "zstd cut off": zstded(tar_bytes(DIFF))[: 2 * MIB],
}


@pytest.mark.parametrize("kind", FEW)
def test_archives_made_to_harm(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """An error in each directory, and the rest of the mount lives."""
    files = CHECKPOINT | {f"volumes/{name}.tar": data for name, data in HOSTILE.items()}
    files |= {"volumes/good.tar": GOOD}
    mount = mounts.mount(publish_files(server, files, kind), "--view=image")
    mounts.expect_log("WARNING .* cannot be shown as a directory: ")
    mounts.expect_log("ERROR .* (readdir|lookup) answered with an error: ")
    mounts.expect_log("CRITICAL .* the (gzip|zstd) data is cut off .*; every read fails")
    for name in HOSTILE:
        directory = mount / f"volumes/{name}"
        assert (name, Waiter("ls", directory).result()) == (name, "EIO")
        assert error_of(partial(os.stat, directory / "nothing")) == "EIO", "who knows if it is not"
        assert (mount / f"volumes/{name}.tar").read_bytes() == HOSTILE[name]
        assert f"{name} cannot be shown as a directory" in mounts.log()
    assert (mount / "volumes/good/etc/x").read_bytes() == some_bytes(300 * KIB)
    assert (mount / "checkpoint/pages-1.img").read_bytes() == files["checkpoint/pages-1.img"]
    assert mount.status()["failed"] is None


@pytest.mark.parametrize("below", [b"", gzipped(tar_bytes(DIFF))[: 2 * MIB]], ids=["", "gzip"])
def test_what_cannot_be_laid_over_an_image(
    server: FaultServer, mounts: Mounts, below: bytes
) -> None:
    """Nobody may take for a container what is not all there."""
    archive = below or tar_bytes([Member("f", b"f"), Member("x"), Member("f/.wh.x")])
    mount = mounts.mount(publish_files(server, with_diff(archive)), "--view=image")
    mounts.expect_log("WARNING .* rootfs-diff cannot be shown as a directory: ")
    mounts.expect_log("ERROR .* (readdir|lookup|getxattr) answered with an error: ")
    mounts.tolerate_log("CRITICAL .* the gzip data is cut off .*; every read fails")
    base = unpack(BASE, mounts.home / "base")
    with overlaid(mounts.home / "over", mount / "rootfs-diff", base) as over:
        assert error_of(lambda: os.listdir(over)) == "EIO"
        assert error_of((over / "var/log/boot").read_bytes) == "EIO"
    assert (mount / "checkpoint/inventory.img").read_bytes() == b"inventory"


@pytest.mark.parametrize("deleted", [["../../etc"], {"a": 1}, ["x" * 5000]])
def test_lists_of_removed_files_made_to_harm(
    server: FaultServer, mounts: Mounts, deleted: object
) -> None:
    mount = mounts.mount(publish_files(server, with_diff(GOOD, deleted)), "--view=image")
    mounts.expect_log("WARNING .* rootfs-diff cannot be shown as a directory: ")
    mounts.expect_log("ERROR .* answered with an error: ")
    assert error_of(lambda: os.listdir(mount / "rootfs-diff")) == "EIO"
    assert (mount / "checkpoint/inventory.img").read_bytes() == b"inventory"


@pytest.mark.parametrize("damage", ["checksum", "length"])
def test_gzip_that_lies(server: FaultServer, mounts: Mounts, damage: str) -> None:
    """Its names have come before it is found: then its files are what cannot be read."""
    wrong = bytearray(gzipped(GOOD))
    wrong[-6 if damage == "checksum" else -2] ^= 1
    mount = mounts.mount(publish_files(server, with_diff(bytes(wrong))), "--view=image")
    mounts.expect_log("CRITICAL .*; every read fails from now on")
    mounts.expect_log("ERROR .* answered with an error: ")
    mounts.tolerate_log("WARNING .* rootfs-diff cannot be shown as a directory: ")
    error_of(lambda: os.listdir(mount / "rootfs-diff"))
    wait_until(
        lambda: error_of(lambda: (mount / "rootfs-diff/etc/x").read_bytes()) == "EIO", "it is found"
    )
    assert (mount / "checkpoint/pages-1.img").read_bytes() == CHECKPOINT["checkpoint/pages-1.img"]
    assert mount.status()["failed"] is None


def test_a_bomb(server: FaultServer, mounts: Mounts, tmp_path: Path) -> None:
    """It fills what the cache may use, and that is all it does."""
    disk = tmp_path / "disk"
    disk.mkdir()
    assert run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk]).code == 0
    mounts.cache_dir, mounts.log_files = disk / "cache", [mounts.home / "log"]
    bomb = gzip.compress(tar_bytes({"zeros": bytes(200 * MIB)}), 9)
    options = ("--view=image", f"--log-file={mounts.home}/log")
    mount = mounts.mount(publish_files(server, with_diff(bomb)), *options)
    mounts.expect_log("WARNING .* takes no more after .* make room there")
    mounts.expect_log("ERROR .* answered with an error: .* takes no more after .* bytes")
    mounts.tolerate_log("WARNING .* the cache takes no more")
    assert Waiter("ls", mount / "rootfs-diff").result() == "EIO"
    assert (mount / "checkpoint/pages-1.img").read_bytes() == CHECKPOINT["checkpoint/pages-1.img"]
    assert mount.umount().code == 0
    assert run(["umount", disk]).code == 0


# -- bad days -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [bytes, gzipped], ids=["tar", "gzip"])
def test_a_server_that_goes_away_and_comes_back(
    server: FaultServer, mounts: Mounts, pack: Callable[[bytes], bytes]
) -> None:
    """Who looks into it meanwhile gets an error, and not for ever."""
    files = with_diff(pack(tar_bytes([*DIFF[:1], Member("a", some_bytes(6 * MIB)), *DIFF[1:]])))
    mount = mounts.mount(
        publish_files(server, files, "zstd:chunked"), "--view=image", "--deadline=0.3"
    )
    _settled(mount)
    server.stop()
    mounts.expect_log("WARNING .* not all names are known yet: ")
    mounts.expect_log("ERROR .* readdir answered with an error: ")
    mounts.tolerate_log("WARNING .* waiting to go on: ")
    assert Waiter("ls", mount / "rootfs-diff").result() == "EIO"
    server.start()
    wait_until(
        lambda: (
            Waiter("ls", mount / "rootfs-diff").result() == "a bin etc run srv tmp turned turns var"
        ),
        "it is there",
    )
    assert (mount / "rootfs-diff/a").read_bytes() == some_bytes(6 * MIB)


@pytest.mark.parametrize("pack", [bytes, gzipped], ids=["tar", "gzip"])
def test_it_ends_while_somebody_waits(
    server: FaultServer, mounts: Mounts, pack: Callable[[bytes], bytes]
) -> None:
    files = with_diff(pack(tar_bytes({"a": some_bytes(6 * MIB), "b": b"b"})))
    mount = mounts.mount(publish_files(server, files, "zstd:chunked"), "--view=image")
    _settled(mount)
    server.always("/blobs/", stall(until=threading.Event()))
    waiting = Waiter("ls", mount / "rootfs-diff")
    wait_until(waiting.is_waiting, "it has asked")
    began = time.monotonic()
    mount.signal(signal.SIGTERM)
    assert waiting.result() in ("ECONNABORTED", "ENOTCONN", "EIO")
    mount.wait_end()
    assert time.monotonic() - began < AT_ONCE_S


# -- layers of their own ------------------------------------------------------------------------


def publish_ctrs(server: FaultServer, diff: Layer) -> str:
    """An index as containerd's `ctr` writes it: CRIU's files and the changes, a blob each."""
    prefix = "application/vnd.containerd.container."
    images = tar_layer({"inventory.img": b"inventory", "pages-1.img": some_bytes(MIB)})
    rows = [manifest_of(layer)["layers"][0] for layer in (images, diff)]
    rows[0]["mediaType"] = prefix + "criu.checkpoint.criu.tar"
    for layer in (images, diff):
        server.add_blob(layer.blob)
    index = {"schemaVersion": 2, "manifests": rows}
    kind = "application/vnd.oci.image.index.v1+json"
    server.add_manifest({**index, "mediaType": kind}, "ctr", kind)
    return f"{server.host}/{server.repository}:ctr"


@pytest.mark.parametrize("make", [tar_layer, gzip_layer, zstd_layer])
def test_a_layer_of_changes(
    server: FaultServer, mounts: Mounts, make: Callable[[list[Member]], Layer]
) -> None:
    members = [*DIFF, *(Member(name) for name in containers.WHITEOUTS)]
    mount = mounts.mount(publish_ctrs(server, make(members)), "--view=image")
    assert sorted(os.listdir(mount.directory)) == ["checkpoint", "rootfs-diff"]
    home = mounts.home
    base, wanted = unpack(BASE, home / "base"), containers.expected(home / "wanted")
    with overlaid(home / "over", mount / "rootfs-diff", base) as over:
        assert fingerprint(over) == fingerprint(wanted)
    wait_until(lambda: mount.status()["blob_proven"], "both are proven")
    assert len(mount.status()["layers"]) == 2


def stored(members: list[Member]) -> Layer:
    return Layer(gzip.compress(tar_bytes(members), 0), {}, GZIP_TYPE)


@pytest.mark.parametrize("option", ["--verify=background", "--verify=full"])
@pytest.mark.parametrize("make", [tar_layer, stored])
def test_a_layer_of_changes_that_is_not_the_promised_one(
    server: FaultServer, mounts: Mounts, make: Callable[[list[Member]], Layer], option: str
) -> None:
    """Then nothing of the image is served any more."""
    diff = make(DIFF)
    other = [replace(item, data=item.data.swapcase()) for item in DIFF]
    reference = publish_ctrs(server, diff)
    (resource,) = (item for path, item in server.resources.items() if diff.digest in path)
    resource.body = make(other).blob
    assert len(resource.body) == len(diff.blob)
    mount = mounts.mount(reference, "--view=image", option)
    mounts.expect_log("CRITICAL .* does not match its digest.*; every read fails from now on")
    mounts.tolerate_log("(WARNING|ERROR) ")
    said = error_of(lambda: (mount / "rootfs-diff/bin/su").read_bytes())
    assert option != "--verify=full" or said == "EIO"
    wait_until(lambda: mount.status()["failed"] is not None, "it is found")
    wait_until(
        lambda: error_of(lambda: (mount / "checkpoint/inventory.img").read_bytes()) == "EIO",
        "nothing is served",
    )

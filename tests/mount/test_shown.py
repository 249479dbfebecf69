"""What DIR shows: names, attributes, links, and who may do what with them."""

import os
import signal
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lazyfs import mountpoint
from tests.faults import FaultServer
from tests.images import Member, tar_layer, zstd_chunked
from tests.mount.mounting import Mounts, error_of, run
from tests.mount.published import (
    FEW,
    LAYERS,
    checkpoint_files,
    publish,
    publish_files,
    write_layout,
)


@pytest.mark.parametrize("inside", ["checkpoint/", "", "a/b/c/"])
def test_shows_the_images_directory(server: FaultServer, mounts: Mounts, inside: str) -> None:
    files = checkpoint_files(inside=inside)
    mount = mounts.mount(publish_files(server, files))
    shown = {name.removeprefix(inside) for name in files if name.startswith(inside)}
    assert set(os.listdir(mount.directory)) == shown
    assert (mount / "inventory.img").read_bytes() == files[inside + "inventory.img"]


def test_shows_the_whole_image(server: FaultServer, mounts: Mounts) -> None:
    files = checkpoint_files()
    mount = mounts.mount(publish_files(server, files), "--view=image")
    assert sorted(os.listdir(mount.directory)) == ["checkpoint", "config.dump"]
    for name, data in files.items():
        assert (mount / name).read_bytes() == data


@pytest.mark.parametrize("kind", LAYERS)
def test_attributes_are_those_archived(server: FaultServer, mounts: Mounts, kind: str) -> None:
    members = [
        Member("checkpoint/", type=tarfile.DIRTYPE, mode=0o700, mtime=1_600_000_000.5),
        Member("checkpoint/inventory.img", b"i" * 5000, mode=0o600, uid=7, gid=8, mtime=12345.25),
        Member("checkpoint/suid", b"s", mode=0o6755),
        Member("checkpoint/none", b"s", mode=0),
        Member("checkpoint/sub/", type=tarfile.DIRTYPE, mode=0o1770),
        Member("checkpoint/sub/file", b"f" * 513),
    ]
    mount = mounts.mount(publish_files(server, members, kind))
    root, inventory = os.stat(mount.directory), os.stat(mount / "inventory.img")
    part = not kind.startswith(("estargz", "stargz"))  # of a second: those keep none
    assert root.st_mode == stat.S_IFDIR | 0o755
    assert root.st_mtime_ns == 1_600_000_000_000_000_000 + part * 500_000_000
    assert inventory.st_mode == stat.S_IFREG | 0o644, "readable by all"
    assert (inventory.st_uid, inventory.st_gid, inventory.st_size) == (7, 8, 5000)
    assert inventory.st_mtime_ns == 12_345_000_000_000 + part * 250_000_000
    assert inventory.st_blocks == 10
    assert os.stat(mount / "suid").st_mode == stat.S_IFREG | 0o755, "no suid"
    assert os.stat(mount / "none").st_mode == stat.S_IFREG | 0o444
    assert os.stat(mount / "sub").st_mode == stat.S_IFDIR | 0o775, "no sticky bit"
    assert root.st_nlink == 3
    assert os.stat(mount / "sub").st_nlink == 2
    assert os.stat(mount / "sub").st_dev == root.st_dev
    whole = os.statvfs(mount.directory)
    assert whole.f_bavail == 0
    assert whole.f_flag & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV) == (
        os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV
    )


@pytest.mark.parametrize("kind", [*FEW, "soci"])
def test_hard_links_are_one_file(server: FaultServer, mounts: Mounts, kind: str) -> None:
    members = [
        Member("checkpoint/inventory.img", b"one"),
        Member("checkpoint/again", type=tarfile.LNKTYPE, link="checkpoint/inventory.img"),
        Member("outside", b"two"),
        Member("checkpoint/inside", type=tarfile.LNKTYPE, link="outside"),
    ]
    mount = mounts.mount(publish_files(server, members, kind))
    first, second = os.stat(mount / "inventory.img"), os.stat(mount / "again")
    assert (first.st_ino, first.st_nlink) == (second.st_ino, 2)
    assert (mount / "again").read_bytes() == b"one"
    assert (mount / "inside").read_bytes() == b"two"
    assert os.stat(mount / "inside").st_nlink == 2, "one of its names is outside"


@pytest.mark.parametrize("kind", FEW)
def test_symlinks_lead_where_they_did(server: FaultServer, mounts: Mounts, kind: str) -> None:
    members = [
        Member("checkpoint/inventory.img", b"here"),
        Member("checkpoint/link", type=tarfile.SYMTYPE, link="inventory.img"),
        Member("checkpoint/sub/up", type=tarfile.SYMTYPE, link="../inventory.img"),
        Member("checkpoint/dangling", type=tarfile.SYMTYPE, link="nowhere"),
    ]
    mount = mounts.mount(publish_files(server, members, kind))
    assert os.readlink(mount / "link") == "inventory.img"
    assert (mount / "sub/up").read_bytes() == b"here"
    assert os.lstat(mount / "link").st_size == len("inventory.img")
    assert error_of(lambda: os.stat(mount / "dangling")) == "ENOENT"


def test_any_name_that_linux_can_hold(server: FaultServer, mounts: Mounts) -> None:
    names = ["new\nline", " ", "-rf", "日本", "\udcff\udcfe", "n" * 255, "%2e", "a\\b", "*"]
    members = [Member("inventory.img", b"i")] + [
        Member(name, name[:5].encode("utf-8", "surrogateescape")) for name in names
    ]
    layer = tar_layer(members, tarfile.GNU_FORMAT)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    mount = mounts.mount(publish(server, layer), env=environment)
    assert sorted(os.listdir(mount.directory)) == sorted(["inventory.img", *names])
    for name in names:
        assert (mount / name).read_bytes() == os.fsencode(name[:5])


def test_what_was_seen_once_is_known_without_the_daemon(
    server: FaultServer, mounts: Mounts
) -> None:
    """CRIU asks dozens of times for images that are not there."""
    mount = mounts.mount(publish_files(server, checkpoint_files()))
    names = ["route-9.img", "inventory.img"]
    look = f"import os; print([os.path.exists('{mount.directory}/' + n) for n in {names}])"
    assert error_of(lambda: os.stat(mount / "route-9.img")) == "ENOENT"
    assert os.path.exists(mount / "inventory.img")
    mount.signal(signal.SIGSTOP)
    try:
        assert run([sys.executable, "-c", look], timeout=10).out == "[False, True]\n"
    finally:
        mount.signal(signal.SIGCONT)
    assert error_of(lambda: os.stat(mount / "route-9.img")) == "ENOENT"


def test_nothing_can_be_written(server: FaultServer, mounts: Mounts) -> None:
    mount = mounts.mount(publish_files(server, checkpoint_files()))
    file, new = mount / "inventory.img", mount / "new"
    attempts = {
        "open O_RDWR": lambda: os.open(file, os.O_RDWR),
        "open O_WRONLY": lambda: os.open(file, os.O_WRONLY),
        "open O_TRUNC": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
        "creat": lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
        "unlink": lambda: os.unlink(file),
        "rename": lambda: os.rename(file, new),
        "mkdir": lambda: os.mkdir(new),
        "symlink": lambda: os.symlink("x", new),
        "link": lambda: os.link(file, new),
        "mknod": lambda: os.mknod(new),
        "chmod": lambda: os.chmod(file, 0o600),
        "chown": lambda: os.chown(file, 1, 1),
        "utime": lambda: os.utime(file),
        "truncate": lambda: os.truncate(file, 1),
        "setxattr": lambda: os.setxattr(file, "user.x", b"x"),
    }
    assert {name: error_of(action) for name, action in attempts.items()} == dict.fromkeys(
        attempts, "EROFS"
    )


def test_how_the_kernel_mounts_it(server: FaultServer, mounts: Mounts) -> None:
    reference = publish_files(server, checkpoint_files())
    mount = mounts.mount(reference)
    mounted = mountpoint.mounted_at(mount.directory)
    assert mounted is not None
    assert mounted.filesystem == "fuse.lazyfs"
    assert mounted.source == mount.status()["reference"]
    (line,) = [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f" {mount.directory} " in line
    ]
    options = set(line.split(" ")[5].split(",")) | set(line.split(" ")[-1].split(","))
    assert {"ro", "nosuid", "nodev", "allow_other", "default_permissions"} <= options


def test_others_may_read_and_search(tmp_path: Path, mounts: Mounts) -> None:
    """CRIU's tasks have the ids of the container's user namespace."""
    members = [
        Member("checkpoint/", type=tarfile.DIRTYPE, mode=0o700),
        Member("checkpoint/sub/", type=tarfile.DIRTYPE, mode=0o600),
        Member("checkpoint/sub/file", b"data", mode=0o200, uid=3),
        Member("checkpoint/inventory.img", b"i", mode=0o600),
    ]
    mount = mounts.mount(write_layout(tmp_path / "layout", tar_layer(members)))
    directory = os.open(mount.directory, os.O_RDONLY)
    script = "cat sub/file && ls sub && test ! -w sub/file"
    done = subprocess.run(
        ["sh", "-c", script],
        preexec_fn=lambda: os.fchdir(directory),
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        check=False,
    )
    os.close(directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"datafile\n", b"")


def test_no_attributes_to_copy(tmp_path: Path, mounts: Mounts) -> None:
    """The state is asked for by name; a `cp -a` does not carry it along."""
    layer = zstd_chunked(checkpoint_files())
    mount = mounts.mount(write_layout(tmp_path / "layout", layer))
    assert os.listxattr(mount.directory) == []
    assert error_of(lambda: os.getxattr(mount / "inventory.img", "user.lazyfs.pid")) == "ENODATA"
    status = mount.status()
    assert status["layer_format"] == "zstd:chunked"
    assert status["layer_digest"] == layer.digest
    assert (status["failed"], status["chunks_proven"], status["view"]) == (None, True, "criu")
    assert (status["pid"], status["directory"]) == (mount.pid, str(mount.directory))

"""`mount -t lazyfs`, `mount -a` and umount(8), with the helper in /sbin of a mount namespace."""

import os
import sys
from pathlib import Path

import pytest

from tests.images import zstd_chunked
from tests.mount.mounting import Done, run
from tests.mount.published import checkpoint_files, write_layout

FILES = checkpoint_files(100_000)

_HELPER = f"""#!/bin/sh
export PYTHONPATH={os.pathsep.join(path for path in sys.path if path)}
exec {sys.executable} -c 'from lazyfs.__main__ import mount_helper; mount_helper()' "$@"
"""
_ENTER = """
set -e
cd "$1"
mount -t overlay -o lowerdir=helper:/usr/sbin overlay /usr/sbin
exec sh -euc "$2"
"""
"""What is mounted here goes with the namespace, once the daemon has ended with its mount."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "helper").mkdir()
    for name in ("mount.lazyfs", "mount.fuse.lazyfs"):
        (tmp_path / "helper" / name).write_text(_HELPER)
        (tmp_path / "helper" / name).chmod(0o755)
    for name in ("mnt", "a", "b c", "later"):
        (tmp_path / name).mkdir()
    write_layout(tmp_path / "layout", zstd_chunked(FILES))
    (tmp_path / "wanted").write_bytes(FILES["checkpoint/pages-1.img"])
    return tmp_path


def sh(place: Path, script: str) -> Done:
    """Run a script in a namespace of its own, in `place`, with a cache there."""
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "sh", place]
    environment = {**os.environ, "LAZYFS_CACHE_DIR": str(place / "cache")}
    return run([*words, script], env=environment)


def fstab(place: Path, *lines: str) -> None:
    (place / "fstab").write_text("".join(f"{line}\n" for line in lines))


def test_mount_shows_a_checkpoint_and_umount_ends_it(place: Path) -> None:
    done = sh(
        place,
        """
        mount -t lazyfs -o noexec,verify=full "oci:$PWD/layout" mnt
        findmnt -n -o SOURCE,FSTYPE,OPTIONS mnt
        cmp mnt/pages-1.img wanted
        umount "oci:$PWD/layout"
        if findmnt mnt; then exit 9; fi
        """,
    )
    assert (done.code, done.err) == (0, "")
    source, kind, options = done.out.split()
    assert (source, kind) == (f"oci:{place}/layout", "fuse.lazyfs")
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.split(","))
    log = (place / "cache/log").iterdir()
    assert " unmounted " in next(log).read_text()


def test_the_type_may_be_that_which_a_mount_shows(place: Path) -> None:
    done = sh(
        place,
        """
        mount -v -t fuse.lazyfs -o view=image "oci:$PWD/layout" mnt
        ls mnt
        umount mnt
        """,
    )
    assert done.code == 0
    assert done.err.startswith(f"lazyfs: mounted oci:{place}/layout@sha256:")
    assert done.out.split() == ["checkpoint", "config.dump"]


def test_fstab_is_mounted_once_however_strange_its_names(place: Path) -> None:
    strange = place / '#lay,out 2@x\\y"z'
    write_layout(strange, zstd_chunked(FILES))
    written = str(strange).replace("\\", "\\134").replace(" ", "\\040")
    fstab(
        place,
        f"oci:{place}/layout {place}/a lazyfs _netdev,nofail,x-systemd.requires=x.service 0 0",
        f'oci:{written} {place}/b\\040c lazyfs ro,cache-dir="{place}/other,cache",comment=x 0 0',
        f"oci:{place}/nothing {place}/later lazyfs noauto 0 0",
    )
    done = sh(
        place,
        """
        mount -T fstab -a
        cmp a/pages-1.img wanted
        cmp "b c/pages-1.img" wanted
        findmnt -n -o MAJ:MIN a; findmnt -n -o MAJ:MIN 'b c'
        mount -T fstab -a
        findmnt -n -o MAJ:MIN a; findmnt -n -o MAJ:MIN 'b c'
        umount a "b c"
        """,
    )
    assert (done.code, done.err) == (0, "")
    devices = done.out.split()
    assert len(devices) == 4
    assert devices[:2] == devices[2:]
    assert (place / "other,cache").is_dir()
    assert not list((place / "later").iterdir())


def test_what_fails_is_said_by_mounts_own_exit_codes(place: Path) -> None:
    fstab(place, f"oci:{place}/nothing {place}/a lazyfs defaults 0 0")
    done = sh(
        place,
        """
        set +e
        mount -t lazyfs "oci:$PWD/nothing" mnt; echo $?
        mount -t lazyfs -o cachedir=x "oci:$PWD/layout" mnt; echo $?
        mount -t lazyfs -o verify=perhaps "oci:$PWD/layout" mnt; echo $?
        mount -t lazyfs "reg:1:2" mnt; echo $?
        mount -s -f -t lazyfs -o cachedir=x "oci:$PWD/layout" mnt; echo $?
        mount -T fstab -a; echo $?
        if findmnt mnt || findmnt a; then exit 9; fi
        mount -t lazyfs "oci:$PWD/layout" mnt
        mount -t lazyfs -o remount,view=image "oci:$PWD/layout" mnt; echo $?
        mount -t lazyfs "oci:$PWD/layout" mnt; echo $?
        umount mnt
        """,
    )
    assert done.code == 0, done
    assert done.out.split() == ["32", "1", "1", "1", "0", "32", "32", "32"]
    for told in (
        "nothing cannot be opened",
        "option cachedir is not known",
        "'perhaps' is not one of",
        "'reg:1:2' is not a reference",
        "unmount it and mount it again",
        "is a mount already",
    ):
        assert told in done.err

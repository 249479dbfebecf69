"""A container's files: a base image, what was changed in it, and what must come out.

What was removed is said by a list beside the archive (Podman) or by whiteouts in it (containerd).
"""

import hashlib
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.images import Member, tar_bytes
from tests.mount.mounting import run
from tests.mount.published import MIB, some_bytes

DIRECTORY, LINK, HARD, FIFO = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE
CAPABILITY = b"\x01\0\0\x02\0\x20\0\0" + bytes(12)
"""cap_net_raw=ep, as the kernel keeps it (vfs_cap_data, version 2)."""
LARGE = "srv/data/large"

BASE = [
    Member("bin/", type=DIRECTORY, mode=0o755),
    Member("bin/su", b"the image's su", mode=0o4755),
    Member("etc/", type=DIRECTORY, mode=0o755),
    Member("etc/passwd", b"root:x:0:0\n"),
    Member("etc/hosts", b"of the image"),
    Member("etc/old/", type=DIRECTORY, mode=0o755),
    Member("etc/old/file", b"goes with its directory"),
    Member("etc/kept/", type=DIRECTORY, mode=0o750, uid=3, gid=4),
    Member("etc/kept/file", b"stays"),
    Member("var/", type=DIRECTORY, mode=0o755),
    Member("var/log/", type=DIRECTORY, mode=0o755),
    Member("var/log/boot", b"stays too"),
    Member("var/anew/", type=DIRECTORY, mode=0o755),
    Member("var/anew/old", b"was in what was removed and made anew"),
    Member("var/anew/sub/", type=DIRECTORY, mode=0o755),
    Member("var/anew/sub/old", b"and this"),
    Member("tmp/", type=DIRECTORY, mode=0o1777),
    Member("tmp/x", b"x"),
    Member("turned", b"a file that becomes a directory"),
    Member("turns/", type=DIRECTORY, mode=0o755),
    Member("turns/old", b"in a directory that becomes a file"),
]
DIFF = [
    Member("bin/", type=DIRECTORY, mode=0o755),
    Member("bin/su", b"another su", mode=0o4755),
    Member(
        "bin/ping", b"p", mode=0o755, pax={"SCHILY.xattr.security.capability": CAPABILITY.decode()}
    ),
    Member("bin/write", b"w", mode=0o2711, uid=5, gid=6),
    Member("etc/", type=DIRECTORY, mode=0o711, uid=7, gid=8),
    Member("etc/passwd", b"root:x:0:0\napp:x:1000:1000\n", mode=0o640, gid=42, mtime=1.5),
    Member("etc/secret", b"s", mode=0o600, uid=1000, gid=1000, pax={"SCHILY.xattr.user.note": "n"}),
    Member("etc/localtime", type=LINK, link="/usr/share/zoneinfo/UTC", mode=0o777, mtime=77),
    Member("etc/climbs", type=LINK, link="../../../../etc/shadow", mode=0o777),
    Member("etc/日本\n", b"any name"),
    Member("run/", type=DIRECTORY, mode=0o755),
    Member("run/pipe", type=FIFO, mode=0o620, uid=9),
    Member("srv/", type=DIRECTORY, mode=0o3775, uid=100_000, gid=100_000),
    Member("srv/data/", type=DIRECTORY, mode=0o755, pax={"SCHILY.xattr.user.of": "a directory"}),
    Member(LARGE, some_bytes(4 * MIB, 9), uid=100_000, mtime=1_650_000_000.125),
    Member("srv/data/again", type=HARD, link=LARGE, uid=100_000, mtime=1_650_000_000.125),
    Member("srv/empty", b""),
    Member("turned/", type=DIRECTORY, mode=0o755),
    Member("turned/new", b"n"),
    Member("turns", b"f"),
    # Of these directories the archive says nothing.
    Member("var/anew/new", b"n"),
    Member("var/log/app/1.log", b"l" * 5000),
    Member("tmp/y", b"y"),
]
DELETED = ["/etc/hosts", "/etc/old", "/etc/old/file", "/var/anew", "/tmp/x", "/turns/old"]
WHITEOUTS = ["etc/.wh.hosts", "etc/.wh.old", "var/anew/.wh..wh..opq", "tmp/.wh.x"]
FILES = {member.name: member for member in DIFF if member.type == tarfile.REGTYPE}


def podmans() -> dict[str, bytes]:
    """Return what Podman puts beside `checkpoint/`."""
    return {"rootfs-diff.tar": tar_bytes(DIFF), "deleted.files": json.dumps(DELETED).encode()}


def containerds() -> bytes:
    """Return the changes as a layer; some whiteouts come first, some last."""
    above = [Member(name) for name in WHITEOUTS[:2]]
    below = [Member(name) for name in WHITEOUTS[2:]]
    return tar_bytes([*above, *DIFF, *below])


def unpack(members: list[Member], directory: Path) -> Path:
    """Unpack as root does, over what is there."""
    directory.mkdir(exist_ok=True)
    archive = directory.with_suffix(".tar")
    archive.write_bytes(tar_bytes(members))
    options = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    done = run(["tar", "xpf", archive, *options, "-C", directory])
    assert done.code == 0, done
    archive.unlink()
    return directory


def expected(directory: Path) -> Path:
    """Do to a copy of the base what the container did: remove, then change."""
    unpack(BASE, directory)
    for path in DELETED:
        assert run(["rm", "-rf", f"{directory}/{path}"]).code == 0
    for name in ("turned", "turns"):
        assert run(["rm", "-rf", f"{directory}/{name}"]).code == 0
    return unpack(DIFF, directory)


@contextmanager
def overlaid(at: Path, *lower: Path, upper: Path | None = None) -> Iterator[Path]:
    """Lay directories over each other, the first on top."""
    at.mkdir()
    options = "lowerdir=" + ":".join(map(str, lower))
    if upper is not None:
        work = upper.with_suffix(".work")
        for directory in (upper, work):
            directory.mkdir()
        options += f",upperdir={upper},workdir={work}"
    done = run(["mount", "-t", "overlay", "overlay", "-o", options, at])
    assert done.code == 0, done
    try:
        yield at
    finally:
        assert run(["umount", at]).code == 0


def fingerprint(root: Path) -> dict[str, tuple[object, ...]]:
    """Describe all below a directory, so that two that are alike have the same description."""
    found: dict[str, tuple[object, ...]] = {}
    for where, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = Path(where, name)
            found[str(path.relative_to(root))] = _describe(path)
    return found


def _describe(path: Path) -> tuple[object, ...]:
    seen = path.lstat()
    xattrs = {
        key: os.getxattr(path, key, follow_symlinks=False)
        for key in os.listxattr(path, follow_symlinks=False)
        if not key.startswith(("trusted.overlay.", "user.overlay."))
    }
    more: tuple[object, ...] = ()
    if stat.S_ISREG(seen.st_mode):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        more = (seen.st_size, seen.st_mtime_ns, digest)
    elif stat.S_ISLNK(seen.st_mode):
        more = (os.readlink(path),)
    return (oct(seen.st_mode), seen.st_uid, seen.st_gid, xattrs, *more)

"""The portable tree where there is no Python: in the testbed's root, not where it was built."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Session, Testbed, portable_lazyfs

pytestmark = pytest.mark.real

SAMPLE = Path(__file__).parents[3] / "contrib/demo/sample"


@pytest.fixture(scope="module")
def tree(testbed: Testbed) -> Path:
    return portable_lazyfs(testbed)


@pytest.fixture
def session(testbed: Testbed, tree: Path) -> Iterator[Session]:
    """A session that has the tree where it was not built, and no Python."""
    with Session(testbed, [tree, SAMPLE]) as session:
        session.run(["cp", "-r", tree, "/opt/lazyfs"])
        session.run(["sh", "-c", "rm -rf /usr/bin/python3* /usr/lib/python3*"])
        session.run(["ln", "-s", "/opt/lazyfs/bin/lazyfs", "/usr/local/bin/lazyfs"])
        yield session


def test_it_mounts_where_there_is_no_python(session: Session) -> None:
    session.run(["mkdir", "/mnt/sample"])
    reference = f"oci:{SAMPLE}"
    said = session.run(["lazyfs", "mount", reference, "/mnt/sample"])
    assert said.startswith("mounted ")
    try:
        names = session.run(["ls", "/mnt/sample"]).split()
        assert "inventory.img" in names
        for name in ("inventory.img", "pages-1.img"):
            through_mount = session.run(["md5sum", f"/mnt/sample/{name}"]).split()[0]
            by_cat = session.run(["sh", "-c", f"lazyfs cat {reference} {name} | md5sum"]).split()[0]
            assert through_mount == by_cat, name
        status = json.loads(session.run(["lazyfs", "status", "/mnt/sample", "--json"]))
        assert status["failed"] is None
        assert status["failed_reads"] == 0
    finally:
        session.run(["lazyfs", "umount", "/mnt/sample"])


def test_its_mount_helper_is_called_by_mount(session: Session) -> None:
    session.run(["mkdir", "/mnt/sample"])
    session.run(["ln", "-s", "/opt/lazyfs/bin/mount.lazyfs", "/sbin/"])
    line = f"oci:{SAMPLE} /mnt/sample lazyfs view=image,_netdev 0 0"
    session.run(["sh", "-c", f"echo {line} >> /etc/fstab"])
    session.run(["mount", "-a"])
    assert "config.dump" in session.run(["ls", "/mnt/sample"]).split()
    session.run(["umount", "/mnt/sample"])


_AS_NOBODY = """
mknod -m 666 /run/fuse c 10 229
mount --bind /run/fuse /dev/fuse
mkdir -p /home/nobody/mnt
chown -R nobody /home/nobody
ln -sf ../proc/self/mounts /etc/mtab
ln -s /opt/lazyfs/bin/mount.lazyfs /sbin/
echo "oci:$1 /home/nobody/mnt lazyfs user,noauto,cache-dir=/home/nobody/cache 0 0" >> /etc/fstab
exec setpriv --reuid=nobody --regid=nogroup --clear-groups sh -euc '
    export HOME=/home/nobody
    mount /home/nobody/mnt
    findmnt -n -o OPTIONS /home/nobody/mnt
    ls /home/nobody/mnt
    umount /home/nobody/mnt
'
"""


def test_fstab_lets_a_user_mount_and_unmount(session: Session) -> None:
    options, *names = session.run(["sh", "-euc", _AS_NOBODY, "sh", SAMPLE]).split()
    assert {"ro", "noexec", "nosuid", "nodev", "user_id=65534"} <= set(options.split(","))
    assert "inventory.img" in names


def test_its_processes_are_called_lazyfs_and_hold_nothing_of_the_machines(session: Session) -> None:
    session.run(["mkdir", "/mnt/sample"])
    session.run(["lazyfs", "mount", f"oci:{SAMPLE}", "/mnt/sample"])
    try:
        status = json.loads(session.run(["lazyfs", "status", "/mnt/sample", "--json"]))
        pid = status["pid"]
        assert session.run(["cat", f"/proc/{pid}/comm"]).strip() == "lazyfs"
        mapped = session.run(["sh", "-c", f"grep -F .so /proc/{pid}/maps"])
        paths = {line.split(maxsplit=5)[5] for line in mapped.splitlines()}
        assert paths
        assert not [path for path in paths if not path.startswith("/opt/lazyfs/")]
        environment = session.run(["sh", "-c", f"tr '\\0' '\\n' < /proc/{pid}/environ"])
        names = {line.partition("=")[0] for line in environment.splitlines()}
        assert not [name for name in names if name.startswith(("LD_", "PYTHON"))]
    finally:
        session.run(["lazyfs", "umount", "/mnt/sample"])


def test_it_needs_nothing_of_the_machine_but_a_shell(
    testbed: Testbed, tree: Path, tmp_path: Path
) -> None:
    for name in ("bin", "dev"):
        (tmp_path / name).mkdir()
    shutil.copy(testbed.root / "bin/busybox", tmp_path / "bin/sh")  # static
    os.mknod(tmp_path / "dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    shutil.copytree(tree, tmp_path / "lazyfs", symlinks=True)
    shutil.copytree(SAMPLE, tmp_path / "sample")
    inside = ["chroot", tmp_path, "/lazyfs/bin/lazyfs", "cat", "oci:/sample", "inventory.img"]
    done = subprocess.run(inside, capture_output=True, check=True)
    outside = [tree / "bin/lazyfs", "cat", f"oci:{SAMPLE}", "inventory.img"]
    assert done.stdout == subprocess.run(outside, capture_output=True, check=True).stdout
    assert done.stdout
    subprocess.run(["chmod", "-R", "u+w", tmp_path / "lazyfs"], check=True)


def test_it_heeds_no_variable_of_python_or_of_the_dynamic_linker(tree: Path) -> None:
    program = str(tree / "bin" / "lazyfs")
    wrong = {"PYTHONHOME": "/nonexistent", "PYTHONPATH": "/nonexistent", "LD_LIBRARY_PATH": "/"}
    words = [program, "--version"]
    done = subprocess.run(
        words, env={**os.environ, **wrong}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lazyfs ")


def test_it_starts_by_a_relative_link(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    first = tmp_path / "bin" / "first"
    first.symlink_to(os.path.relpath(tree / "bin" / "lazyfs", tmp_path / "bin"))
    (tmp_path / "second").symlink_to("bin/first")
    words = ["./second", "--version"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lazyfs ")
    found = subprocess.run(
        ["sh", "-c", "first --version"],
        env={"PATH": f"{first.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == done.stdout


def test_a_directory_that_holds_something_is_not_built_into(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    build = Path(__file__).parents[3] / "contrib/portable/build.sh"
    done = subprocess.run([build, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "is there and not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

"""Mounting without root, in a mount namespace where anybody may open /dev/fuse."""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Member, tar_bytes, zstd_chunked
from tests.mount.mounting import Done, Mounts, command, lazyfs, run
from tests.mount.published import checkpoint_files, write_layout
from tests.mount.writers import gzip_layer

NOBODY = 65534
FILES = checkpoint_files(300_000)

SETUP = """
set -e
mount -t tmpfs tmpfs "$1/dev"
mknod -m "$2" "$1/dev/fuse" c 10 229
mount --bind "$1/dev/fuse" /dev/fuse
home=$1; shift 2
cd "$home"
exec setpriv --reuid=65534 --regid=65534 --clear-groups \
    --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search "$@"
"""
"""The one capability lets nobody read this interpreter, wherever it lies."""


@pytest.fixture
def home() -> Iterator[Path]:
    program = shutil.which("fusermount3")
    if program is None or not os.stat(program).st_mode & stat.S_ISUID:
        pytest.skip("there is no fusermount3 that is setuid root")
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv")
    home = Path(tempfile.mkdtemp(prefix="lazyfs-user-"))
    for name in ("mnt", "dev", "root"):
        (home / name).mkdir()
    for path in (home, home / "mnt"):
        os.chown(path, NOBODY, NOBODY)
    os.chmod(home, 0o755)
    write_layout(home / "layout", zstd_chunked(FILES))
    write_layout(home / "stream", gzip_layer(FILES))
    changes = tar_bytes([Member("etc/secret", b"s", mode=0o600, uid=1000)])
    write_layout(home / "changed", zstd_chunked({**FILES, "rootfs-diff.tar": changes}))
    mounts = Mounts(home)
    name = str(home / "mnt").strip("/").replace("/", "-")
    mounts.log_files = [home / "xdg/lazyfs/log" / f"{name}.log"]
    yield home
    mounts.close()
    shutil.rmtree(home)


def as_nobody(home: Path, script: str, mode: str = "666") -> Done:
    """Run a script as nobody; in it, `lazyfs` is the program."""
    program = " ".join(f"'{word}'" for word in command())
    prepared: list[str | Path] = ["sh", "-c", SETUP, "sh", home, mode]
    words = [*prepared, "sh", "-c", f'lazyfs() {{ {program} "$@"; }}; {script}']
    environment = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": f"{home}/xdg"}
    environment["PYTHON"] = sys.executable
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return run(["unshare", "-m", *words], env=environment)


def test_a_user_mounts(home: Path) -> None:
    script = """
        lazyfs mount oci:layout mnt || exit 1
        sha256sum < mnt/pages-1.img
        grep " $PWD/mnt " /proc/self/mountinfo
        lazyfs umount mnt || exit 2
        ls mnt
        lazyfs mount oci:stream mnt > /dev/null || exit 3
        sha256sum < mnt/pages-1.img
        lazyfs umount mnt || exit 4
        lazyfs mount --view=image oci:changed mnt > /dev/null || exit 5
        cat mnt/rootfs-diff/etc/secret
        lazyfs umount mnt || exit 6
    """
    done = as_nobody(home, script)
    assert (done.code, done.err) == (0, "")
    said, digest, mounted, of_stream, secret = done.out.splitlines()
    assert of_stream == digest
    assert secret == "s", "who is not root may read what they have mounted"
    assert said.endswith(f" on {home}/mnt")
    assert digest.split()[0] == hashlib.sha256(FILES["checkpoint/pages-1.img"]).hexdigest()
    assert " fuse.lazyfs " in mounted
    assert f"user_id={NOBODY}" in mounted
    assert "nosuid,nodev" in mounted
    assert "allow_other" not in mounted
    assert list(home.glob("xdg/lazyfs/layers/*/content"))


def test_a_mount_of_roots_is_not_a_users_to_end(home: Path) -> None:
    (home / "roots").mkdir()
    home.chmod(0o755)
    words = ["mount", f"oci:{home}/layout", home / "roots", "--cache-dir", home / "c"]
    assert lazyfs(*words).code == 0
    try:
        script = """
            for words in "umount" "umount --lazy" "status" "wait --unused"; do
                lazyfs $words "$PWD/roots"; echo $?
            done
        """
        done = as_nobody(home, script)
        assert done.out.split() == ["2"] * 4
        said = f"lazyfs: {home}/roots was mounted by another user (uid 0): ask as that user, or "
        assert done.err.splitlines() == [said + "as root"] * 4
        assert (home / "roots" / "inventory.img").exists()
    finally:
        assert lazyfs("umount", home / "roots").code == 0


def test_a_users_mount_ends(home: Path) -> None:
    """By a signal; and when its daemon was killed, by hand or by the next mount."""
    script = """
        set -e
        pid() {
            "$PYTHON" -c 'import os; print(os.getxattr("mnt", "user.lazyfs.pid").decode())'
        }
        end() {
            daemon=$(pid)
            kill -$1 $daemon
            while grep -q "^State:.[^Z]" /proc/$daemon/status; do sleep 0.05; done 2> /dev/null
        }
        lazyfs mount oci:layout mnt
        end TERM
        test -z "$(ls mnt)"
        lazyfs mount oci:layout mnt
        end KILL
        lazyfs mount oci:layout mnt
        cat mnt/inventory.img | wc -c
        end KILL
        lazyfs umount mnt
        test -z "$(ls mnt)"
    """
    done = as_nobody(home, script)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == str(len(FILES["checkpoint/inventory.img"]))


def test_a_users_mount_tells_of_itself(home: Path) -> None:
    """To the user, by a socket in a directory of the user's own; where there is none, in /tmp."""
    script = """
        set -e
        state() { "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["state"])'; }
        lazyfs mount oci:layout mnt > /dev/null
        lazyfs status --json mnt | state
        lazyfs wait --complete --unused mnt
        lazyfs status mnt | grep Offline
        stat --format='%a %u' "$RUN" "$RUN"/mount-*.sock
        lazyfs status | cut -f 2
        lazyfs umount mnt
        ls "$RUN"
        lazyfs status
    """
    for setting, run_dir in (
        ("XDG_RUNTIME_DIR=$PWD/xdg-run; mkdir -m 700 $XDG_RUNTIME_DIR", f"{home}/xdg-run/lazyfs"),
        ("unset XDG_RUNTIME_DIR; XDG_RUNTIME_DIR=", f"/tmp/lazyfs-{NOBODY}"),
    ):
        setup = f"{setting}; export XDG_RUNTIME_DIR; RUN={run_dir};"
        done = as_nobody(home, setup + script)
        assert (done.code, done.err) == (0, "")
        assert done.out.splitlines() == [
            "serving",
            "Offline: safe: all is here and proven",
            f"700 {NOBODY}",
            f"600 {NOBODY}",
            "serving",
            "mounting.locks",
        ]


def test_what_others_have_put_in_the_way_is_not_used(home: Path) -> None:
    """A directory for sockets that somebody else has made: the mount goes without one."""
    script = """
        mkdir -m 777 there
        export XDG_RUNTIME_DIR=$PWD XDG_CACHE_HOME=$PWD/other
        ln -s there lazyfs
        lazyfs mount oci:layout mnt || exit 1
        lazyfs status mnt | grep State || exit 2
        lazyfs wait --complete mnt && exit 3
        lazyfs umount mnt || exit 4
        ls -A there
        rm -r other
    """
    done = as_nobody(home, script)
    assert done.code == 0, done
    said, state = done.out.splitlines()
    assert said.startswith("mounted ")
    assert state == "State: serving", "by the extended attribute"
    assert "there is no control socket: " in done.err
    assert "its daemon has no control socket" in done.err


def test_a_user_may_not(home: Path) -> None:
    """Mount on what is not theirs, or without the right to open the device."""
    done = as_nobody(home, "lazyfs mount oci:layout root")
    assert done.code == 1
    assert f"cannot mount on {home}/root: " in done.err
    assert "fusermount3" in done.err
    assert "Traceback" not in done.err
    done = as_nobody(home, "lazyfs mount oci:layout mnt", mode="600")
    assert done.code == 1
    assert done.err.startswith("lazyfs: /dev/fuse cannot be opened: Permission denied; ")


def test_a_users_cache_is_their_own(home: Path) -> None:
    """Others cannot look into it, and nobody's cache is another's."""
    script = """
        lazyfs mount oci:layout mnt > /dev/null || exit 1
        cat mnt/pages-1.img > /dev/null
        lazyfs cache ls
        lazyfs umount mnt || exit 2
        lazyfs cache verify
        lazyfs cache prune --all
        lazyfs cache ls
        lazyfs cache ls --cache-dir=root
        lazyfs mount --cache-dir=root oci:layout mnt
    """
    done = as_nobody(home, script)
    assert done.code == 2
    listed, verified, removed, freed = done.out.splitlines()
    assert listed.split("\t")[6] == "1", "a mount uses it"
    assert verified.endswith(", as stored")
    assert removed.startswith("removed sha256:")
    assert freed.startswith("freed ")
    refusal = "cannot be the cache, which holds secrets: it belongs to another user (uid 0); "
    assert done.err.count(refusal) == 2
    assert (home / "xdg/lazyfs").stat().st_mode & 0o777 == 0o700
    assert list((home / "root").iterdir()) == []


def test_a_users_restore_is_served_in_a_private_directory_that_goes_with_it(home: Path) -> None:
    """Only root has mounts in no directory. The starter is killed: who is left unmounts."""
    script = """
        export LAZYFS_RUN_DIR=$PWD/xdg/run; mkdir -p -m 700 xdg/run xdg/cache
        mkfifo xdg/ask
        $PYTHON -m tests.mount.serving "oci:$PWD/layout" "$PWD/xdg" < xdg/ask > xdg/said &
        keeper=$!
        exec 3> xdg/ask
        until test -s xdg/said; do sleep 0.05; done
        images=$(echo "$PWD"/xdg/run/restore-*/images)
        sha256sum < "$images/pages-1.img"
        stat -c %a "$images/.."
        echo "served.pid" >&3
        until test $(wc -l < xdg/said) = 2; do sleep 0.05; done
        kill -9 $keeper
        daemon=$(tail -n 1 xdg/said)
        while test -d /proc/$daemon; do sleep 0.05; done
        ls -d xdg/run/restore-*
        grep -c "$images" /proc/self/mountinfo
    """
    done = as_nobody(home, script)
    digest, mode, mounted = done.out.splitlines()
    assert digest.split()[0] == hashlib.sha256(FILES["checkpoint/pages-1.img"]).hexdigest()
    assert (mode, mounted) == ("700", "0")

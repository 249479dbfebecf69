"""The socket for lazy pages of a real mount, spoken to by somebody who is no CRIU."""

import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import sample
from tests.images import zstd_chunked
from tests.mount.mounting import Mount, Mounts, is_alive, lazyfs, wait_until
from tests.mount.published import checkpoint_files, write_layout

SOCKET_NAME = "lazy-pages.socket"


@pytest.fixture
def local(tmp_path: Path) -> str:
    return write_layout(tmp_path / "layout", zstd_chunked(checkpoint_files(1 << 20)))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work directory whose path is too long for a socket's."""
    made = tmp_path / ("w" * 120)
    made.mkdir()
    return made


def lazily(mount: Mount) -> dict[str, Any]:
    told: dict[str, Any] = mount.status()["lazy_pages"]
    return told


def connect(work: Path) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    directory = os.open(work, os.O_PATH | os.O_DIRECTORY)
    link.connect(f"/proc/self/fd/{directory}/{SOCKET_NAME}")
    os.close(directory)
    return link


def say(work: Path, *said: bytes) -> None:
    with connect(work) as link:
        for each in said:
            link.sendall(each)


def test_a_mount_listens_where_a_restore_will_look(mounts: Mounts, local: str, work: Path) -> None:
    (work / "other").touch()
    mount = mounts.mount(local, "--lazy-pages", work)
    told = lazily(mount)
    assert (told["state"], told["socket"]) == ("waiting", str(work / SOCKET_NAME))
    assert stat.S_IMODE((work / SOCKET_NAME).stat().st_mode) == 0o600
    assert is_alive(told["guard_pid"])
    documented = (sample.LAYOUT.parents[2] / "docs/json.md").read_text()
    assert not [key for key in told if f"`{key}`" not in documented]
    assert mount.umount().code == 0
    assert not is_alive(told["guard_pid"])
    again = mounts.mount(local, "--lazy-pages", work)
    assert lazily(again)["state"] == "waiting"


def test_a_mount_that_is_not_asked_to_does_not(mounts: Mounts, local: str) -> None:
    assert mounts.mount(local).status()["lazy_pages"] is None


def test_a_restore_without_tasks_is_soon_home(mounts: Mounts, local: str, work: Path) -> None:
    mount = mounts.mount(local, "--lazy-pages", work)
    say(work, struct.pack("=i", -77), struct.pack("=i", 0x52535446))
    wait_until(lambda: lazily(mount)["state"] == "home", "it is home")
    assert lazily(mount)["restores"] == 1


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "given the restore up"),
        (b"\1\0", "given the restore up"),
        (struct.pack("=i", 0), "no task of CRIU's"),
        (struct.pack("=i", 1) + b"x", "without its userfaultfd"),
        (struct.pack("=i", 1), "given the restore up"),
    ],
)
def test_whoever_says_something_else_has_failed_and_the_next_has_not(
    mounts: Mounts, local: str, work: Path, said: bytes, why: str
) -> None:
    mounts.expect_log("a restore has failed")
    mount = mounts.mount(local, "--lazy-pages", work)
    say(work, said)
    wait_until(lambda: lazily(mount)["state"] == "failed", "it has failed")
    assert why in lazily(mount)["failed"]
    assert mount.status()["failed"] is None
    say(work, struct.pack("=i", 0x52535446))
    wait_until(lambda: lazily(mount)["state"] == "home", "the next has not")
    told = lazily(mount)
    assert (told["failed"], told["failures"], told["restores"]) == (None, 1, 1)
    assert why in told["last_failure"], "it is told of still"


def test_a_descriptor_of_something_else_ends_the_restore(
    mounts: Mounts, local: str, work: Path
) -> None:
    mounts.expect_log("a restore has failed")
    mount = mounts.mount(local, "--lazy-pages", work)
    with connect(work) as link, open("/dev/null") as null:
        link.sendall(struct.pack("=i", 1))
        socket.send_fds(link, [b"x"], [null.fileno()])
        assert link.recv(1) == b""
    wait_until(lambda: lazily(mount)["state"] == "failed", "it has failed")
    assert "without its userfaultfd" in lazily(mount)["failed"]


def test_there_has_to_be_such_a_directory(mounts: Mounts, local: str, tmp_path: Path) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    done = lazyfs("mount", "--lazy-pages", tmp_path / "none", local, directory)
    assert done.code == 2
    assert "none" in done.err

"""The cache on disk: it saves fetches, is never believed unchecked, and may be missing or full."""

import mmap
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import FaultServer
from tests.mount.mounting import (
    Mount,
    Mounts,
    error_of,
    open_file,
    read_at,
    run,
    wait_until,
)
from tests.mount.published import AT_RANDOM, KIB, MIB, checkpoint_files, publish, publish_files

FILES = checkpoint_files(16 * MIB)
DATA = FILES["checkpoint/pages-1.img"]


@pytest.fixture(params=["tar", "zstd:chunked"])
def reference(request: pytest.FixtureRequest, server: FaultServer) -> str:
    return publish_files(server, FILES, request.param)


def read_everything(mount: Mount) -> None:
    for name, data in FILES.items():
        if name.startswith("checkpoint/"):
            assert (mount / name.removeprefix("checkpoint/")).read_bytes() == data


def home_of(mounts: Mounts) -> Path:
    (home,) = mounts.cache_dir.glob("layers/*")
    return home


@pytest.mark.parametrize("kind", AT_RANDOM)
def test_a_later_mount_fetches_nothing(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """But the manifest that the tag names, and an index that is not proven yet."""
    layer = AT_RANDOM[kind](FILES)
    reference = publish(server, layer)
    mount = mounts.mount(reference)
    read_everything(mount)
    fetched = mount.status()["bytes_fetched"]
    assert mount.umount().code == 0
    mount = mounts.mount(reference)
    read_everything(mount)
    status = mount.status()
    assert status["bytes_fetched"] < 192 * KIB + len(layer.ztoc) < fetched
    assert status["chunks_from_cache"] > 0
    assert home_of(mounts).stat().st_mode & 0o077 == 0, "others' eyes see no process's memory"


def flip_bits(home: Path) -> None:
    with open(home / "content", "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        for at in range(1000, size, size // 7):
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 8]), at)


def zero_content(home: Path) -> None:
    """As after a power cut: sizes and marks are there, the bytes are not."""
    size = (home / "content").stat().st_size
    os.truncate(home / "content", 0)
    os.truncate(home / "content", size)


def cut_content(home: Path) -> None:
    os.truncate(home / "content", 4 * MIB)


def cut_marks(home: Path) -> None:
    os.truncate(home / "marks", 20)


def random_marks(home: Path) -> None:
    (home / "marks").write_bytes(random.Random(1).randbytes((home / "marks").stat().st_size))


def forged_proof(home: Path) -> None:
    flip_bits(home)
    (home / "proven").write_text("x" * 32)


def no_marks(home: Path) -> None:
    (home / "marks").unlink()


def a_directory(home: Path) -> None:
    (home / "content").unlink()
    (home / "content").mkdir()


DAMAGES = [
    flip_bits,
    zero_content,
    cut_content,
    cut_marks,
    random_marks,
    forged_proof,
    no_marks,
    a_directory,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda it: it.__name__)
def test_a_cache_that_changed_gives_no_wrong_byte(
    mounts: Mounts, reference: str, damage: Callable[[Path], None]
) -> None:
    mount = mounts.mount(reference)
    read_everything(mount)
    mount.signal(signal.SIGKILL)
    mount.wait_end()
    damage(home_of(mounts))
    if damage in (flip_bits, zero_content, random_marks, forged_proof):
        mounts.expect_log("WARNING .* cached chunk .* has changed on disk; fetching it anew")
    mount = mounts.mount(reference)
    read_everything(mount)
    refused = mount.status()["cache_refused"]
    assert (refused > 0) == (damage in (flip_bits, zero_content, random_marks, forged_proof))
    assert mount.status()["failed"] is None
    assert mount.umount().code == 0
    mount = mounts.mount(reference)
    read_everything(mount)
    assert mount.status()["cache_refused"] == 0, "it has been put right"
    assert mount.status()["chunks_from_cache"] > 0


def test_a_cache_that_changes_under_the_mount(mounts: Mounts, reference: str) -> None:
    """Only root and the owner can do that; the marks are for the next mount, not for this one."""
    mount = mounts.mount(reference)
    read_everything(mount)
    (home_of(mounts) / "marks").unlink()
    assert mount.umount().code == 0
    mount = mounts.mount(reference)
    read_everything(mount)


def test_a_cache_disk_that_loses_what_it_had(mounts: Mounts, reference: str) -> None:
    """The kernel copies replies out of a mapping, and alone sees what is gone: EIO, and counted."""
    mount = mounts.mount(reference)
    read_everything(mount)
    wait_until(lambda: mount.status()["here_bytes"] == mount.status()["content_bytes"], "all came")
    if not mount.status()["chunks_proven"]:  # else the pass that proves it may still be reading
        wait_until(lambda: mount.status()["blob_proven"], "it is proven")
    os.truncate(home_of(mounts) / "content", 8 * MIB)
    mounts.expect_log("ERROR .* read answered with an error: the cache's file does not give back")
    with (
        mmap.mmap(-1, 64 * KIB) as target,
        open_file(mount / "pages-1.img", os.O_DIRECT) as file,
    ):
        assert os.preadv(file, [target], 4 * MIB) == 64 * KIB
        assert target[:] == DATA[4 * MIB : 4 * MIB + 64 * KIB]
        assert error_of(lambda: os.preadv(file, [target], 12 * MIB)) == "EIO"
    assert mount.status()["failed_reads"] > 0
    assert "does not give back" in mount.status()["last_error"]
    assert mount.umount().code == 0
    mount = mounts.mount(reference)
    read_everything(mount)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB; it goes after the mounts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk])
    yield disk
    run(["umount", "-l", disk])


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked"])
def test_a_cache_disk_that_fills_up(
    server: FaultServer, small_disk: Path, mounts: Mounts, kind: str
) -> None:
    """More than memory holds, too: then what was read first is fetched again."""
    files = checkpoint_files(40 * MIB)
    data = files["checkpoint/pages-1.img"]
    reference = publish_files(server, files, kind)
    mounts.cache_dir = small_disk / "cache"
    mounts.log_files = [mounts.home / "log"]
    mounts.expect_log("WARNING .* the cache (takes no more|could not be sealed).*No space left")
    for _ in range(2):
        mount = mounts.mount(reference, f"--log-file={mounts.home}/log")
        assert (mount / "pages-1.img").read_bytes() == data
        dice = random.Random(3)
        for _ in range(40):
            offset = dice.randrange(len(data))
            size = dice.choice([1, 4 * KIB, 128 * KIB, MIB])
            assert read_at(mount / "pages-1.img", offset, size) == data[offset : offset + size]
        assert (mount / "inventory.img").read_bytes() == files["checkpoint/inventory.img"]
        assert mount.status()["cache_write_errors"] > 0
        assert mount.status()["failed_reads"] == 0
        assert mount.umount().code == 0


def test_a_cache_disk_that_was_full_before(
    server: FaultServer, small_disk: Path, mounts: Mounts, reference: str
) -> None:
    with open(small_disk / "full", "wb") as file:
        file.write(bytes(MIB))
    mounts.cache_dir = small_disk / "cache"
    mount = mounts.mount(reference)
    assert "Traceback" not in mount.said.err
    read_everything(mount)
    assert mount.status()["failed_reads"] == 0
    assert mount.status()["cache_write_errors"] > 0
    assert mounts.log() == "", "it has no place either"


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked"])
def test_a_cache_disk_that_may_only_be_read(
    server: FaultServer, tmp_path: Path, mounts: Mounts, kind: str
) -> None:
    """What is there is read; what is not is fetched, and kept in memory."""
    mounts.log_files = [mounts.home / "log"]
    mounts.expect_log("WARNING .* the cache takes no more .*Read-only file system")
    mounts.tolerate_log("WARNING .* the cache could not be sealed: .*Read-only file system")
    log = f"--log-file={mounts.home}/log"
    reference = publish_files(server, FILES, kind)
    mount = mounts.mount(reference, log)
    assert read_at(mount / "pages-1.img", 0, MIB) == DATA[:MIB]
    mount.signal(signal.SIGKILL)
    mount.wait_end()
    cut_out(mounts.cache_dir)
    disk = tmp_path / "disk"
    disk.mkdir()
    run(["mount", "--bind", mounts.cache_dir, disk])
    try:
        assert run(["mount", "-o", "remount,bind,ro", disk]).code == 0
        mount = mounts.mount(reference, log, f"--cache-dir={disk}")
        read_everything(mount)
        status = mount.status()
        assert status["chunks_from_cache"] > 0
        assert status["failed_reads"] == status["cache_refused"] == 0
        assert mount.umount().code == 0
    finally:
        run(["umount", "-l", disk])


def cut_out(cache_dir: Path) -> None:
    """Let the cache forget the second half of its layer, as if it had never been fetched."""
    (home,) = cache_dir.glob("layers/*")
    size = (home / "marks").stat().st_size
    os.truncate(home / "marks", size // 16 * 8)
    os.truncate(home / "marks", size)
    (home / "proven").unlink(missing_ok=True)

"""A cache with bounds: it stays within them, serves all the same, and takes from nobody."""

import io
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lazyfs.cli.main import run
from lazyfs.content import janitor, shelf
from tests.faults import FaultServer
from tests.mount.mounting import Mount, Mounts, descriptors, lazyfs, read_at, wait_until
from tests.mount.published import MIB, checkpoint_files, publish_files, some_bytes
from tests.shelves import layers_in

PAGES_BYTES = 12 * MIB
RANDOM = ["tar", "zstd:chunked"]


def image(
    server: FaultServer, number: int, kind: str = "tar", pages_bytes: int = PAGES_BYTES
) -> tuple[str, bytes]:
    """Publish an image of its own; return its reference, and what its pages are."""
    pages = some_bytes(pages_bytes, 100 + number)
    files = {**checkpoint_files(0), "checkpoint/pages-1.img": pages}
    return publish_files(server, files, kind, str(number)), pages


def read_pages(mount: Mount) -> bytes:
    return (mount / "pages-1.img").read_bytes()


def kept_digests(mounts: Mounts) -> list[str]:
    return [str(layer.digest) for layer in shelf.shelved(mounts.cache_dir)]


def cache_json(mounts: Mounts, *words: str) -> Any:
    with redirect_stdout(io.StringIO()) as out:
        assert run(["cache", *words, "--json", f"--cache-dir={mounts.cache_dir}"]) in (0, 5)
    return json.loads(out.getvalue())


@pytest.mark.parametrize("kind", RANDOM)
def test_an_image_larger_than_the_cache_is_read_all_the_same(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    reference, pages = image(server, 0, kind)
    mounts.expect_log(
        "WARNING .* the cache takes no more .*the cache has reached its limit of 4 MiB"
    )
    limit_bytes = 4 * MIB
    credit_bytes = limit_bytes // 64
    for _ in range(2):
        mount = mounts.mount(reference, "--cache-size=4MiB")
        assert read_pages(mount) == pages
        assert read_at(mount / "pages-1.img", 9 * MIB, MIB) == pages[9 * MIB : 10 * MIB]
        status = mount.status()
        assert status["failed_reads"] == 0
        assert status["cache_write_errors"] > 0
        used_bytes = shelf.used_bytes(mounts.cache_dir)
        assert used_bytes <= limit_bytes + 2 * credit_bytes
        assert used_bytes > limit_bytes // 2
        assert mount.umount().code == 0


@pytest.mark.parametrize("kind", RANDOM)
def test_what_is_mounted_no_more_makes_room(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """The oldest first; what is mounted stays, however old."""
    options = ("--cache-size=30M",)
    held, first, second, third = (image(server, number, kind) for number in range(4))
    mount = mounts.mount(held[0], *options, at=mounts.home / "held")
    assert read_pages(mount) == held[1]
    (digest,) = kept_digests(mounts)
    digests = [digest]
    for reference, pages in (first, second, third):
        other = mounts.mount(reference, *options)
        assert read_pages(other) == pages
        assert other.status()["cache_write_errors"] == 0
        assert other.umount().code == 0
        now = kept_digests(mounts)
        assert digest in now
        assert len(now) == 2, "there is room for two"
        assert now[-1] not in digests, "and the new one is one of them"
        digests.append(now[-1])
        assert shelf.used_bytes(mounts.cache_dir) <= 31 * MIB
    fetched = mount.status()["bytes_fetched"]
    assert read_pages(mount) == held[1]
    assert mount.status()["bytes_fetched"] == fetched
    assert not shelf.unfinished(mounts.cache_dir)


@contextmanager
def evicting(directory: Path) -> Iterator[list[int]]:
    """Remove what nobody uses, again and again; gives how often anything went."""
    over = threading.Event()
    removed = [0]

    def evict() -> None:
        while not over.wait(0.002):
            for layer in shelf.shelved(directory):
                with suppress(OSError):
                    removed[0] += janitor.remove(directory, layer) is not None
            janitor.remove_leftovers(directory)

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        yield removed
    finally:
        over.set()
        thread.join()


def test_removing_while_others_mount_and_read(server: FaultServer, mounts: Mounts) -> None:
    """Whatever is unused goes at once: never a wrong byte, never an error."""
    kinds = enumerate([*RANDOM, "gzip"])
    images = [image(server, number, kind, 4 * MIB) for number, kind in kinds]
    mounts.tolerate_log("WARNING .* no cache in .*: what is read is kept in memory")
    mounts.tolerate_log("WARNING .* the cache could not be sealed")
    with evicting(mounts.cache_dir) as removed:
        for turn in range(2):
            with ThreadPoolExecutor(len(images)) as pool:
                jobs = [
                    pool.submit(mounts.mount, reference, at=mounts.home / f"mnt{number}")
                    for number, (reference, _) in enumerate(images)
                ]
                live = [job.result() for job in jobs]
            for mount, (_, pages) in zip(live, images, strict=True):
                assert (
                    read_at(mount / "pages-1.img", turn * MIB, MIB)
                    == (pages[turn * MIB : (turn + 1) * MIB])
                )
                assert read_pages(mount) == pages
                assert mount.status()["failed_reads"] == 0
                assert mount.status()["failed"] is None
            with ThreadPoolExecutor(len(live)) as pool:
                assert [done.code for done in pool.map(Mount.umount, live)] == [0] * len(live)
    assert removed[0] > 0


def _has_fetched_all(mount: Mount) -> bool:
    """Whether all was fetched; that is counted as a fetch ends, a moment after it is read."""
    return bool(mount.status()["bytes_fetched"] >= PAGES_BYTES)


@pytest.mark.parametrize("kind", RANDOM)
def test_in_memory_nothing_gets_to_the_disk(server: FaultServer, mounts: Mounts, kind: str) -> None:
    reference, pages = image(server, 0, kind)
    options = ("--cache=memory", "--cache-size=64M")
    for _ in range(2):
        mount = mounts.mount(reference, *options)
        assert read_pages(mount) == pages
        wait_until(partial(_has_fetched_all, mount), "a fetch for this mount alone")
        assert mount.status()["cache_write_errors"] == 0
        assert [path.name for path in mounts.cache_dir.iterdir()] == ["log"]
        names = descriptors(mount.pid).values()
        assert any(name.startswith("/memfd:lazyfs") for name in names)
        assert not any(
            name.startswith(str(mounts.cache_dir / "l")) and "log/" not in name for name in names
        )
        assert mount.umount().code == 0
    for file in mounts.cache_dir.glob("log/*"):
        assert pages[:16] not in file.read_bytes()


def memory_of(pid: int) -> int:
    """Return what a daemon's content takes up in memory."""
    sizes = {}
    for number, name in descriptors(pid).items():
        if name.startswith("/memfd:lazyfs"):
            stat = os.stat(f"/proc/{pid}/fd/{number}")
            sizes[stat.st_ino] = stat.st_blocks * 512
    return sum(sizes.values())


def test_memory_is_bounded_too(server: FaultServer, mounts: Mounts) -> None:
    reference, pages = image(server, 0, "zstd:chunked")
    mounts.expect_log("WARNING .*the cache in memory has reached its limit of 4 MiB")
    mount = mounts.mount(reference, "--cache=memory", "--cache-size=4M")
    assert read_pages(mount) == pages
    assert read_at(mount / "pages-1.img", 0, MIB) == pages[:MIB]
    assert mount.status()["failed_reads"] == 0
    assert memory_of(mount.pid) <= 4 * MIB + 2 * (4 * MIB // 64)


@pytest.mark.parametrize("kind", ["tar", "zstd:chunked", "soci", "gzip"])
def test_the_caches_own_commands_beside_mounts(
    server: FaultServer, mounts: Mounts, kind: str
) -> None:
    reference, pages = image(server, 0, kind)
    mount = mounts.mount(reference)
    assert read_pages(mount) == pages
    if kind != "gzip":  # which is there when the pass has ended
        (row,) = cache_json(mounts, "ls")["layers"]
        assert row["used_by"] == [mount.pid]
        assert row["here_bytes"] >= PAGES_BYTES
        done = lazyfs("cache", "prune", "--all", f"--cache-dir={mounts.cache_dir}")
        assert done.code == 0
        assert "in use: " in done.out
        assert cache_json(mounts, "verify")["damaged_chunks"] == 0
    assert mount.umount().code == 0
    (row,) = cache_json(mounts, "ls")["layers"]
    assert row["used_by"] == []
    assert row["here_bytes"] == row["content_bytes"] >= PAGES_BYTES
    (found,) = cache_json(mounts, "verify")["layers"]
    assert found["unknown"] is None
    assert found["damaged"] == []
    assert found["checked_bytes"] >= PAGES_BYTES
    assert found["digest_matches"] == (True if kind == "tar" else None)
    (home,) = layers_in(mounts.cache_dir)
    at = row["content_bytes"] // 2
    with open(home / "content", "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    (found,) = cache_json(mounts, "verify")["layers"]
    (damaged,) = found["damaged"]
    assert damaged["start"] <= at < damaged["stop"]
    assert found["dropped"]
    mount = mounts.mount(reference)
    assert read_pages(mount) == pages
    status = mount.status()
    assert status["cache_refused"] == 0
    assert status["failed"] is None
    assert mount.umount().code == 0
    assert cache_json(mounts, "verify")["damaged_chunks"] == 0


def test_a_cache_that_is_not_private_is_refused(server: FaultServer, mounts: Mounts) -> None:
    reference, _ = image(server, 0)
    mounts.cache_dir.mkdir(mode=0o700)
    mounts.cache_dir.chmod(0o777)
    done = mounts.refuse(reference)
    assert done.code == 2
    assert "others may write to it; `chmod 700` keeps them out" in done.err
    assert not list(mounts.cache_dir.iterdir())
    mounts.cache_dir.rmdir()
    (mounts.home / "elsewhere").mkdir()
    mounts.cache_dir.symlink_to(mounts.home / "elsewhere")
    done = mounts.refuse(reference)
    assert done.code == 2
    assert "it is a symbolic link; name the directory itself" in done.err
    assert not list((mounts.home / "elsewhere").iterdir())

"""What programs read is what they would read from a local copy, and it is fetched once."""

import hashlib
import itertools
import mmap
import os
import random
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults import FaultServer, stall
from tests.images import Member, tar_bytes, tar_layer, zstd_chunked
from tests.layers.test_tar_rounds import pagemap
from tests.mount.mounting import Mounts, Reader, open_file, read_at, run, wait_until
from tests.mount.published import (
    FEW,
    KIB,
    LAYERS,
    MIB,
    asked_ranges,
    checkpoint_files,
    extract,
    publish,
    publish_files,
    settled,
    some_bytes,
    write_layout,
)

PAGES = "checkpoint/pages-1.img"


def members() -> list[Member]:
    """A checkpoint with all that a directory can hold."""
    directory, link, hard = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
    found = [
        Member("checkpoint/", type=directory, mode=0o755, mtime=1_600_000_000),
        Member("checkpoint/sub/", type=directory, mode=0o755, mtime=1_500_000_000.25),
        Member("checkpoint/sub/link", type=link, link="../pages-1.img", mode=0o777, mtime=77),
        Member("checkpoint/sub/a name\nwith all 日本", b"x", mtime=1.5, uid=12, gid=13),
        Member("checkpoint/sub/deep/", type=directory, mode=0o755, mtime=5),
        Member("checkpoint/sub/deep/er/", type=directory, mode=0o755, mtime=6),
    ]
    for name, data in checkpoint_files().items():
        found.append(Member(name, data, mtime=1_650_000_000.125))
    found.append(Member("checkpoint/hard", type=hard, link=PAGES, mtime=1_650_000_000.125))
    return found


PRINTED = "find . ! -type d -printf '%p %y %m %s %T+ %U %G %l %n\n' | sort"
TOOLS = [
    PRINTED,
    "find . -type d -printf '%p %y %m %n %T+ %U %G\n' | sort",
    "ls -lAR --time-style=full-iso | grep -v '^[dt]' | tr -s ' '",
    "find . -type f -newer inventory.img | wc -l",
    "find . -mindepth 3",
    "find . -type f -exec du -bl {} + | sort -k2",
    "tar c --sort=name --numeric-owner . | sha256sum",
    "find . -type f -print0 | sort -z | xargs -0 sha256sum",
    "grep -rlF x . | sort",
    "cat pages-1.img | wc -c",
    "head -c 5000 pages-1.img | tail -c 100 | sha256sum",
    "dd if=pages-1.img bs=4k skip=3 count=2 status=none | sha256sum",
    "wc -c *.img",
]


@pytest.mark.parametrize("kind", FEW)
def test_tools_see_a_local_copy(server: FaultServer, mounts: Mounts, kind: str) -> None:
    everything = members()
    mount = mounts.mount(publish_files(server, everything, kind))
    local = extract(tar_bytes(everything), mounts.home / "local") / "checkpoint"
    for tool in TOOLS:
        seen, wanted = (run(["sh", "-c", tool], cwd=at) for at in (mount.directory, local))
        assert (seen.out, seen.err) == (wanted.out, wanted.err)
    copy = mounts.home / "copy"
    assert run(["cp", "-a", mount.directory, copy]).code == 0
    assert run(["diff", "-r", local, copy]).code == 0
    assert run(["sh", "-c", PRINTED], cwd=copy) == run(["sh", "-c", PRINTED], cwd=local)


@pytest.mark.parametrize("kind", LAYERS)
def test_random_reads_by_many_readers(server: FaultServer, mounts: Mounts, kind: str) -> None:
    files = checkpoint_files(6 * MIB + 777)
    layer = LAYERS[kind](files)
    mount = mounts.mount(publish(server, layer), "--view=image")
    names = sorted(files, key=lambda name: len(files[name]))

    def read(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(60):
            name = dice.choice([names[-1], dice.choice(names)])
            offset = dice.randrange(len(files[name]) + 10)
            size = dice.choice([1, 100, 4 * KIB, 64 * KIB, 300 * KIB, 2 * MIB])
            assert read_at(mount / name, offset, size) == files[name][offset : offset + size]

    with ThreadPoolExecutor(8) as readers:
        assert list(readers.map(read, range(8))) == [None] * 8
    for name, data in files.items():
        assert (mount / name).read_bytes() == data
    assert mount.status()["bytes_fetched"] <= 1.5 * len(layer.blob), "some twice, if it is slow"


def test_readers_of_one_chunk_cost_one_request(server: FaultServer, mounts: Mounts) -> None:
    files = checkpoint_files(24 * MIB)
    layer = zstd_chunked(files)
    mount = mounts.mount(publish(server, layer))
    asked, may_go_on = settled(server, layer, mount), threading.Event()
    asked_again = mount.asked_again()
    server.always("/blobs/", stall(until=may_go_on))
    at = 20 * MIB
    readers = [Reader(mount / "pages-1.img", at + 4096 * number, 4096) for number in range(8)]
    server.wait_count("/blobs/", asked + 1)
    wait_until(lambda: all(reader.is_waiting() for reader in readers), "all have asked")
    may_go_on.set()
    for number, reader in enumerate(readers):
        data = files[PAGES][at + 4096 * number :][:4096]
        assert reader.result() == f"4096 {hashlib.sha256(data).hexdigest()}"
    ranges = sorted(asked_ranges(server, layer)[asked:])
    overlaps = [one for one, other in itertools.pairwise(ranges) if one[1] > other[0]]
    again = mount.asked_again() - asked_again
    assert len(overlaps) <= again, "every byte is asked for once, whoever reads it"


@pytest.mark.parametrize("kind", FEW)
def test_mapped_files(server: FaultServer, mounts: Mounts, kind: str) -> None:
    """In a process of its own: a fault on a mapping holds the GIL, and the server needs it."""
    files = checkpoint_files()
    mount = mounts.mount(publish_files(server, files, kind))
    script = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
        with mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as data:
            backwards = b"".join(data[at:at + 65536] for at in reversed(range(0, len(data), 65536)))
            print(data[-1], hashlib.sha256(data).hexdigest())
"""
    data = files[PAGES]
    expected = f"{data[-1]} {hashlib.sha256(data).hexdigest()}\n" * 2
    done = run([sys.executable, "-c", script, mount / "pages-1.img"])
    assert (done.out, done.err) == (expected, "")


def test_one_giant_preadv(server: FaultServer, mounts: Mounts) -> None:
    """As CRIU restores: one call for all, into as many places as the kernel takes."""
    files = checkpoint_files(12 * MIB)
    mount = mounts.mount(publish_files(server, files))
    target = bytearray(12 * MIB)
    piece = 12 * KIB
    views = [memoryview(target)[at * piece : (at + 1) * piece] for at in range(1023)]
    with open_file(mount / "pages-1.img") as file:
        assert os.preadv(file, views, 0) == 1023 * piece
    assert target[: 1023 * piece] == files[PAGES][: 1023 * piece]
    assert server.count("/blobs/") < 40


@pytest.mark.parametrize("size", [4 * KIB, MIB, 8 * MIB])
def test_direct_reads(server: FaultServer, mounts: Mounts, size: int) -> None:
    files = checkpoint_files(3 * MIB + 123)
    mount = mounts.mount(publish_files(server, files))
    with mmap.mmap(-1, size) as target, open_file(mount / "pages-1.img", os.O_DIRECT) as file:
        for offset in (0, 4 * KIB, 2 * MIB, 3 * MIB, 4 * MIB):
            expected = files[PAGES][offset : offset + size]
            assert os.preadv(file, [target], offset) == len(expected)
            assert target[: len(expected)] == expected


def test_the_end_of_a_file(server: FaultServer, mounts: Mounts) -> None:
    files = checkpoint_files()
    end = len(files[PAGES])
    mount = mounts.mount(publish_files(server, files))
    pages = mount / "pages-1.img"
    assert read_at(pages, end - 1, 100) == files[PAGES][-1:]
    assert read_at(pages, end, 100) == b""
    assert read_at(pages, end + 10**12, 100) == b""
    assert read_at(mount / "empty.img", 0, 100) == b""
    with open_file(pages) as file:
        assert os.lseek(file, 0, os.SEEK_END) == end
        assert os.lseek(file, -4, os.SEEK_END) == end - 4
        assert os.read(file, 100) == files[PAGES][-4:]


def test_opening_again_costs_no_read(server: FaultServer, mounts: Mounts) -> None:
    """CRIU opens its pages files again for the big read."""
    mount = mounts.mount(publish_files(server, checkpoint_files()))
    data = (mount / "pages-1.img").read_bytes()
    reads = mount.status()["reads"]
    assert (mount / "pages-1.img").read_bytes() == data
    assert mount.status()["reads"] == reads


def test_zeros_cost_no_fetch(server: FaultServer, mounts: Mounts) -> None:
    one, other = some_bytes(64 * KIB, 1), some_bytes(64 * KIB, 2)
    files = checkpoint_files() | {PAGES: one + bytes(64 * MIB) + other}
    layer = zstd_chunked(files)
    mount = mounts.mount(publish(server, layer))
    read = hashlib.sha256()
    with open(mount / "pages-1.img", "rb") as file:
        while piece := file.read(MIB):
            read.update(piece)
    assert read.digest() == hashlib.sha256(files[PAGES]).digest()
    assert mount.status()["bytes_fetched"] <= len(layer.blob) + 4 * KIB
    assert len(layer.blob) < MIB


def test_a_hundred_pages_files_in_few_requests(server: FaultServer, mounts: Mounts) -> None:
    files = {"checkpoint/inventory.img": b"i" * 100}
    for number in range(1, 101):
        files[f"checkpoint/core-{number}.img"] = some_bytes(1500, number)
        files[f"checkpoint/mm-{number}.img"] = some_bytes(800, number)
        files[f"checkpoint/pagemap-{number}.img"] = pagemap(number, [number % 37 + 60])
        files[f"checkpoint/pages-{number}.img"] = bytes([number]) * 4 * KIB * (number % 37 + 60)
    layer = tar_layer({name: files[name] for name in sorted(files)})
    assert len(layer.blob) > 30 * MIB
    mount = mounts.mount(publish(server, layer))
    requests = mount.status()["requests"]
    assert requests <= 45, requests
    assert (mount / "pages-77.img").read_bytes() == files["checkpoint/pages-77.img"]


def test_small_files_are_there_before_they_are_asked_for(
    server: FaultServer, mounts: Mounts
) -> None:
    files = checkpoint_files(40 * MIB)
    layer = zstd_chunked(files)
    mount = mounts.mount(publish(server, layer))
    asked = settled(server, layer, mount)
    for name in sorted(set(files) - {PAGES, "config.dump"}):
        assert (mount / name.removeprefix("checkpoint/")).read_bytes() == files[name]
    assert len(asked_ranges(server, layer)) == asked


def test_readers_on_a_layout_and_an_archive(mounts: Mounts, tmp_path: Path) -> None:
    """Nothing is fetched from afar, and all is the same."""
    files = checkpoint_files()
    layout = write_layout(tmp_path / "layout", zstd_chunked(files))
    archive = tmp_path / "checkpoint.tar"
    archive.write_bytes(tar_bytes(files))
    for reference in (layout, str(archive)):
        mount = mounts.mount(reference)
        for name, data in files.items():
            if name.startswith("checkpoint/"):
                assert (mount / name.removeprefix("checkpoint/")).read_bytes() == data
        assert mount.umount().code == 0

"""Many mounts of one image on one host, each a daemon of its own, over one cache."""

import random
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.faults import FaultServer, stall
from tests.images import Layer
from tests.mount.mounting import Mount, Mounts, Reader, read_at, wait_until
from tests.mount.published import KIB, LAYERS, MIB, checkpoint_files, publish
from tests.mount.test_bad_days import said_of
from tests.mount.test_wrong_bytes import everything_fails, flip

FILES = checkpoint_files(16 * MIB)
DATA = FILES["checkpoint/pages-1.img"]
KINDS = ["tar", "zstd:chunked"]
LOOKED_AT_BYTES = 192 * KIB
"""What a mount asks for itself at most: the format, a table of contents."""


def mount_many(mounts: Mounts, reference: str, count: int, *options: str) -> list[Mount]:
    def mount(number: int) -> Mount:
        return mounts.mount(reference, *options, at=mounts.home / f"mnt-{number}")

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(mount, range(count)))


def roam(mount: Mount, seed: int) -> None:
    """Read the pages in pieces of 1 MiB at most, in an order of its own."""
    dice = random.Random(seed)
    offsets = list(range(0, len(DATA), 512 * KIB))
    dice.shuffle(offsets)
    for offset in offsets:
        size = dice.choice([4 * KIB, 512 * KIB, MIB])
        assert read_at(mount / "pages-1.img", offset, size) == DATA[offset : offset + size]
    assert (mount / "pages-1.img").read_bytes() == DATA


def roam_all(many: Sequence[Mount]) -> None:
    with ThreadPoolExecutor(len(many)) as pool:
        list(pool.map(roam, many, range(len(many))))


def sum_of(many: Sequence[Mount], counter: str) -> int:
    return sum(mount.status()[counter] for mount in many)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def layer(kind: str) -> Layer:
    return _layer(kind)


@cache
def _layer(kind: str) -> Layer:
    return LAYERS[kind](FILES)


def test_eight_mounts_fetch_each_byte_once(
    server: FaultServer, mounts: Mounts, layer: Layer, kind: str
) -> None:
    many = mount_many(mounts, publish(server, layer), 8)
    roam_all(many)
    assert sum_of(many, "failed_reads") == sum_of(many, "cache_refused") == 0
    assert sum_of(many, "chunks_shared") > 0
    fetched = sum_of(many, "bytes_fetched") - 8 * LOOKED_AT_BYTES
    assert fetched <= 1.25 * len(layer.blob), "but for what came too slowly for a reader"
    if kind == "tar":
        wait_until(lambda: all(mount.status()["blob_proven"] for mount in many), "all is proven")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_ends_or_stops_while_it_fetches(
    server: FaultServer, mounts: Mounts, layer: Layer, end: signal.Signals
) -> None:
    one, two, three = mount_many(mounts, publish(server, layer), 3)
    held = threading.Event()
    asked = server.count(layer.digest)
    server.script(layer.digest, stall(after=100_000, until=held))
    reader = Reader(one / "pages-1.img", 4 * MIB, 2 * MIB)
    server.wait_count(layer.digest, asked + 1)
    waiting = [Reader(each / "pages-1.img", 4 * MIB, 2 * MIB) for each in (two, three)]
    one.signal(end)
    for each in waiting:
        assert each.result() == said_of(DATA[4 * MIB : 6 * MIB])
    roam_all([two, three])
    held.set()
    if end == signal.SIGSTOP:
        one.signal(signal.SIGCONT)
        assert reader.result() == said_of(DATA[4 * MIB : 6 * MIB])
        roam_all([one, two, three])
        assert sum_of([one, two, three], "cache_refused") == 0
    else:
        reader.kill()
        one.wait_end()
    assert sum_of([two, three], "failed_reads") == 0


def test_one_that_is_stopped_again_and_again(
    server: FaultServer, mounts: Mounts, layer: Layer
) -> None:
    """At moments of its own: between a lock and its bytes, between bytes and their mark."""
    one, two = mount_many(mounts, publish(server, layer), 2)
    dice = random.Random(1)
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(dice.random() / 20):
            one.signal(signal.SIGSTOP)
            over.wait(dice.random() / 5)
            one.signal(signal.SIGCONT)

    tormentor = threading.Thread(target=stop_and_go)
    tormentor.start()
    try:
        roam_all([one, two])
    finally:
        over.set()
        tormentor.join()
    assert sum_of([one, two], "failed_reads") == sum_of([one, two], "cache_refused") == 0


def test_killed_at_random_again_and_again(
    server: FaultServer, mounts: Mounts, layer: Layer
) -> None:
    reference = publish(server, layer)
    dice = random.Random(2)
    (two,) = mount_many(mounts, reference, 1)
    roamers = ThreadPoolExecutor(1)
    roaming = roamers.submit(roam, two, 7)
    for _ in range(4):
        one = mounts.mount(reference, at=mounts.home / "mortal")
        reader = Reader(one / "pages-1.img", 0, 8 * MIB)
        threading.Event().wait(dice.random() / 10)
        one.signal(signal.SIGKILL)
        one.wait_end()
        length, _, _ = (result := reader.result()).partition(" ")
        if length not in ("EIO", "ENOTCONN", "ECONNABORTED"):
            assert result == said_of(DATA[: int(length)]), "what came before the end is right"
    roaming.result(timeout=60)
    roamers.shutdown()
    one = mounts.mount(reference, at=mounts.home / "mortal")
    roam(one, 3)
    assert sum_of([one, two], "cache_refused") == 0


def test_a_bit_flipped_under_two_mounts(server: FaultServer, mounts: Mounts, layer: Layer) -> None:
    one, two = mount_many(mounts, publish(server, layer), 2)
    roam(one, 1)
    (home,) = mounts.cache_dir.glob("layers/*")
    flip_in(home / "content", range(5 * MIB, 8 * MIB, MIB))
    mounts.expect_log("WARNING .* cached chunk .* has changed on disk; fetching it anew")
    roam(two, 2)
    assert two.status()["cache_refused"] == 3
    assert two.umount().code == one.umount().code == 0
    mount = mounts.mount(publish(server, layer))
    roam(mount, 3)
    assert mount.status()["cache_refused"] == 0, "it has been put right"


def flip_in(path: Path, positions: Sequence[int]) -> None:
    with open(path, "r+b") as file:
        for position in positions:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 4]))


def test_a_blob_that_lies_to_all(server: FaultServer, mounts: Mounts) -> None:
    """One finds out and takes the layer from the cache; each of the others finds out for itself."""
    layer = LAYERS["tar"](FILES)
    reference = publish(server, layer)
    flip(server, layer, 8 * MIB)
    mounts.expect_log("CRITICAL .* does not match its digest.*; every read fails from now on")
    mounts.tolerate_log("ERROR .* read answered with an error: ")
    mounts.tolerate_log("WARNING .* the kernel's copies")
    many = mount_many(mounts, reference, 3)
    wait_until(lambda: all(mount.status()["failed"] for mount in many), "all have found it", 40)
    for mount in many:
        wait_until(lambda mount=mount: everything_fails(mount), "every read fails")  # type: ignore[misc]
    assert not list(mounts.cache_dir.glob("layers/*"))

"""Mounts of one stream at the same time: one of them decodes, whatever becomes of it."""

import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults import Exchange, Fault, FaultServer
from tests.images import Layer
from tests.mount.mounting import Mount, Mounts, Reader, read_at, wait_until
from tests.mount.published import KIB, MIB, publish
from tests.mount.test_streams import (
    DATA,
    HALF,
    LAYERS,
    everything_is_right,
    gate,
    kept_of,
    said_of,
)

GZIP = LAYERS["gzip"]
HEADS_BYTES = 192 * KIB
"""What a mount asks for before it knows what the layer is."""


def mount_all(
    mounts: Mounts, tmp_path: Path, reference: str, count: int, *options: str
) -> list[Mount]:
    """Mount side by side; they come up when they like."""
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(mounts.mount, reference, *options, at=tmp_path / f"mnt-{number}")
            for number in range(count)
        ]
        return [job.result() for job in jobs]


def half_open(
    server: FaultServer,
    mounts: Mounts,
    tmp_path: Path,
    may_go_on: threading.Event,
    fault: Fault | None = None,
    layer: Layer = GZIP,
    count: int = 3,
) -> tuple[Mount, list[Mount]]:
    """Mount side by side, with the second half held back; return who decodes, and the others."""
    reference = publish(server, layer)
    server.always("/blobs/", fault or gate(HALF, may_go_on))
    all_of_them = mount_all(mounts, tmp_path, reference, count)
    wait_until(
        lambda: all(each.status()["here_bytes"] > 7 * MIB for each in all_of_them), "half is here"
    )
    all_of_them.sort(key=lambda each: each.status()["bytes_fetched"])
    *others, leader = all_of_them
    assert leader.status()["bytes_fetched"] > 4 * MIB
    assert all(each.status()["bytes_fetched"] <= HEADS_BYTES for each in others)
    return leader, others


def users_of_stream(mounts: Mounts) -> int:
    """Count who holds the content that comes (proc(5), /proc/locks: inode numbers in decimal)."""
    inodes = [path.stat().st_ino for path in mounts.cache_dir.glob("incoming/*/content")]
    lines = Path("/proc/locks").read_text().splitlines()
    return sum(f":{inode} " in line for inode in inodes for line in lines)


@pytest.mark.parametrize("kind", LAYERS)
def test_six_at_once_fetch_it_once(
    server: FaultServer, mounts: Mounts, tmp_path: Path, kind: str
) -> None:
    layer = LAYERS[kind]
    may_go_on = threading.Event()
    leader, others = half_open(server, mounts, tmp_path, may_go_on, layer=layer, count=6)
    may_go_on.set()
    all_of_them = [leader, *others]
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(everything_is_right, all_of_them))
    kept_of(mounts)
    for mount in all_of_them:
        wait_until(lambda mount=mount: mount.status()["blob_proven"], "it is proven")
    fetched = sum(mount.status()["bytes_fetched"] for mount in all_of_them)
    assert fetched <= len(layer.blob) + 6 * HEADS_BYTES
    for mount in all_of_them:
        assert mount.umount().code == 0
    assert not list(mounts.cache_dir.glob("incoming/*/content"))


def test_verified_before_by_one_for_all(
    server: FaultServer, mounts: Mounts, tmp_path: Path
) -> None:
    may_go_on = threading.Event()
    server.always("/blobs/", gate(HALF, may_go_on))
    with ThreadPoolExecutor(1) as pool:
        mounting = pool.submit(
            mount_all, mounts, tmp_path, publish(server, GZIP), 3, "--verify=full"
        )
        wait_until(lambda: users_of_stream(mounts) == 3, "all take part", 40)
        may_go_on.set()
        all_of_them = mounting.result()
    for mount in all_of_them:
        assert mount.status()["blob_proven"]
        assert everything_is_right(mount)
    fetched = sum(mount.status()["bytes_fetched"] for mount in all_of_them)
    assert fetched <= len(GZIP.blob) + 3 * HEADS_BYTES


def is_killed(leader: Mount) -> None:
    leader.signal(signal.SIGKILL)
    leader.wait_end()


def is_unmounted(leader: Mount) -> None:
    assert leader.umount().code == 0


def is_stopped(leader: Mount) -> None:
    leader.signal(signal.SIGSTOP)


@pytest.mark.parametrize("leader_does", [is_killed, is_unmounted, is_stopped])
def test_without_who_decodes_it_goes_on(
    server: FaultServer, mounts: Mounts, tmp_path: Path, leader_does: Callable[[Mount], None]
) -> None:
    may_go_on = threading.Event()
    leader, others = half_open(server, mounts, tmp_path, may_go_on)
    waiting = [Reader(each / "pages-1.img", 12 * MIB, MIB) for each in others]
    leader_does(leader)
    for each in others:  # nobody waits for what has come
        assert read_at(each / "pages-1.img", 4 * MIB, MIB) == DATA[4 * MIB : 5 * MIB]
    may_go_on.set()
    for reader in waiting:
        assert reader.result() == said_of(DATA[12 * MIB : 13 * MIB])
    for each in others:
        assert everything_is_right(each)
        status = each.status()
        assert (status["failed"], status["failed_reads"]) == (None, 0)
    fetched = sum(each.status()["bytes_fetched"] for each in others)
    assert fetched <= len(GZIP.blob) + 2 * HEADS_BYTES
    kept_of(mounts)
    if leader_does is is_stopped:
        leader.signal(signal.SIGCONT)
        assert everything_is_right(leader)
        wait_until(lambda: leader.status()["blob_proven"], "it is proven")


def test_who_decodes_is_fed_wrong_bytes(
    server: FaultServer, mounts: Mounts, tmp_path: Path
) -> None:
    """It is condemned; the others have served nothing wrong, begin anew, and go on."""
    may_go_on = threading.Event()
    held_back = gate(HALF, may_go_on)
    at, fed = len(GZIP.blob) - 300_000, []

    def wrong_once(exchange: Exchange) -> None:
        code, sent, body = exchange.normal()
        asked = re.match(r"bytes=(\d+)", exchange.seen.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if fed or not start <= at < start + len(body):
            held_back(exchange)
            return
        fed.append(start)
        assert exchange.wait(None, may_go_on)
        wrong = bytearray(body)
        wrong[at - start] ^= 0x10
        exchange.answer(code, sent, bytes(wrong))

    leader, others = half_open(server, mounts, tmp_path, may_go_on, wrong_once)
    mounts.expect_log("CRITICAL .* every read fails from now on")
    mounts.expect_log("WARNING .* what another lazyfs has decoded is not served any more")
    mounts.tolerate_log("WARNING .* not all names are known yet")
    may_go_on.set()
    for each in others:
        wait_until(lambda each=each: each.status()["blob_proven"], "it is proven", 40)
        assert everything_is_right(each)
        assert each.status()["failed"] is None
    assert leader.status()["failed"] is not None
    assert fed
    kept_of(mounts)

"""Layers that are decoded from their start: what is there when, and what later mounts find."""

import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.faults import Exchange, Fault, FaultServer, stall
from tests.images import Layer, tar_bytes
from tests.mount.mounting import (
    AT_ONCE_S,
    Mount,
    Mounts,
    Reader,
    Waiter,
    error_of,
    read_at,
    run,
    wait_until,
)
from tests.mount.published import (
    KIB,
    MIB,
    STREAMS,
    checkpoint_files,
    publish,
    publish_referring,
    write_layout,
)
from tests.mount.writers import gzipped, soci_layer, zstded

PAGES = "checkpoint/pages-1.img"
FILES = checkpoint_files(16 * MIB)
DATA = FILES[PAGES]
SMALL = {
    name.removeprefix("checkpoint/"): data
    for name, data in FILES.items()
    if name.startswith("checkpoint/") and name != PAGES
}
FILES["checkpoint/zlast.img"] = LATE = b"l" * 5000
"""Behind the memory, as CRIU has some files."""
ALL = " ".join(sorted([*SMALL, "pages-1.img", "zlast.img"]))
LAYERS = {kind: make(FILES) for kind, make in STREAMS.items()}
HALF = len(LAYERS["gzip"].blob) // 2


@pytest.fixture(params=STREAMS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return LAYERS[request.param]


def gate(at: int, until: threading.Event) -> Fault:
    """Answer as ever, but with nothing that lies behind byte `at` of the blob before the event.

    What asks for the blob's last bytes alone, where an index would be, is answered.
    """

    def fault(exchange: Exchange) -> None:
        code, sent, body = exchange.normal()
        asked = re.match(r"bytes=(\d+)", exchange.seen.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        passes = max(0, at - start)
        assert exchange.resource is not None
        is_tail = start and len(exchange.resource.body) - start <= 64 * KIB
        if until.is_set() or len(body) <= passes or is_tail:
            exchange.answer(code, sent, body)
            return
        exchange.head(code, {**sent, "Content-Length": str(len(body))})
        exchange.write(body[:passes])
        if exchange.wait(None, until):
            exchange.write(body[passes:])
        else:
            exchange.close()

    return fault


def half_open(
    server: FaultServer, mounts: Mounts, layer: Layer, *options: str
) -> tuple[Mount, threading.Event]:
    """Mount with the second half of the blob held back until the event."""
    reference, may_go_on = publish(server, layer), threading.Event()
    server.always("/blobs/", gate(HALF, may_go_on))
    mount = mounts.mount(reference, *options)
    wait_until(lambda: mount.status()["here_bytes"] > 7 * MIB, "half is here")
    # While somebody waits for a name, the kernel finds no other in that directory but these.
    for name in (*SMALL, "pages-1.img"):
        assert (mount / name).exists()
    return mount, may_go_on


def said_of(data: bytes) -> str:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}"


def everything_is_right(mount: Mount) -> bool:
    assert " ".join(sorted(os.listdir(mount.directory))) == ALL
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert (mount / "zlast.img").read_bytes() == LATE
    return all((mount / name).read_bytes() == data for name, data in SMALL.items())


def everything_fails(mount: Mount) -> bool:
    """Whether nothing can be read any more, not even what the kernel had a copy of."""
    paths = [mount / name for name in (*SMALL, "pages-1.img", "zlast.img") if name != "empty.img"]
    return all(error_of(partial(read_at, path, 0, 4096)) == "EIO" for path in paths)


def kept_of(mounts: Mounts) -> Path:
    """Return the directory in which later mounts find the layer, once it is there."""
    wait_until(lambda: bool(list(mounts.cache_dir.glob("layers/*/proven"))), "it is kept")
    (proven,) = mounts.cache_dir.glob("layers/*/proven")
    return proven.parent


# -- while it comes -----------------------------------------------------------------------------


def test_what_has_passed_is_there_and_the_rest_is_waited_for(
    server: FaultServer, mounts: Mounts, layer: Layer
) -> None:
    mount, may_go_on = half_open(server, mounts, layer)
    for name, data in SMALL.items():
        assert (mount / name).read_bytes() == data
    assert read_at(mount / "pages-1.img", 4 * MIB, MIB) == DATA[4 * MIB : 5 * MIB]
    assert os.stat(mount / "pages-1.img").st_size == len(DATA)
    waiting: dict[str, Waiter | Reader] = {
        "late": Waiter("stat", mount / "zlast.img"),
        "absent": Waiter("stat", mount / "route-9.img"),
        "listing": Waiter("ls", mount.directory),
        "behind": Reader(mount / "pages-1.img", 12 * MIB, MIB),
        "across": Reader(mount / "pages-1.img", 0, len(DATA)),
        "killed": Reader(mount / "pages-1.img", 11 * MIB, MIB),
        "killed too": Waiter("stat", mount / "zlast.img"),
    }
    wait_until(lambda: all(each.is_waiting() for each in waiting.values()), "all have asked")
    killed = [waiting.pop("killed"), waiting.pop("killed too")]
    for each in killed:
        each.kill()
    assert not mount.status()["blob_proven"]
    may_go_on.set()
    assert {name: each.result() for name, each in waiting.items()} == {
        "late": str(len(LATE)),
        "absent": "ENOENT",
        "listing": ALL,
        "behind": said_of(DATA[12 * MIB : 13 * MIB]),
        "across": said_of(DATA),
    }
    wait_until(lambda: all(each.has_ended() for each in killed), "they are gone")
    assert everything_is_right(mount)
    status = mount.status()
    assert (status["failed_reads"], status["failed"], status["layer_format"]) == (
        0,
        None,
        "gzip" if layer is LAYERS["gzip"] else "zstd",
    )
    wait_until(lambda: mount.status()["blob_proven"], "it is proven")
    assert mount.status()["bytes_fetched"] <= len(layer.blob) + 192 * KIB, "once, and its ends"
    assert mount.status()["content_bytes"] == len(tar_bytes(FILES))


def test_it_ends_at_once_while_readers_wait(
    server: FaultServer, mounts: Mounts, layer: Layer
) -> None:
    mount, _ = half_open(server, mounts, layer)
    waiting: list[Waiter | Reader] = [
        Waiter("stat", mount / "zlast.img"),
        Waiter("ls", mount.directory),
        Reader(mount / "pages-1.img", 12 * MIB, MIB),
    ]
    wait_until(lambda: all(each.is_waiting() for each in waiting), "all have asked")
    began = time.monotonic()
    done = mount.umount()
    assert (done.code, "is busy" in done.err) == (1, True)
    mount.signal(signal.SIGTERM)
    for each in waiting:
        assert each.result() in ("ECONNABORTED", "ENOTCONN", "EIO")
    mount.wait_end()
    assert time.monotonic() - began < AT_ONCE_S
    assert not list(mounts.cache_dir.glob("incoming/*/content"))
    assert not list(mounts.cache_dir.glob("layers/*"))


def test_it_is_unmounted_in_the_middle(server: FaultServer, mounts: Mounts, layer: Layer) -> None:
    mount, _ = half_open(server, mounts, layer)
    began = time.monotonic()
    assert mount.umount().code == 0
    assert time.monotonic() - began < AT_ONCE_S


def test_killed_in_the_middle(server: FaultServer, mounts: Mounts, layer: Layer) -> None:
    """The next mount begins anew, and clears away what was left."""
    mount, may_go_on = half_open(server, mounts, layer)
    mount.signal(signal.SIGKILL)
    mount.wait_end()
    assert len(list(mounts.cache_dir.glob("incoming/*/content"))) == 1
    may_go_on.set()
    mount = mounts.mount(publish(server, layer))
    assert everything_is_right(mount)
    kept_of(mounts)
    assert not list(mounts.cache_dir.glob("incoming/*/content"))


def test_a_server_that_stays_away(server: FaultServer, mounts: Mounts, layer: Layer) -> None:
    """EIO for who waits, after the deadline; all comes right when it is back."""
    mount, _ = half_open(server, mounts, layer, "--deadline=0.5")
    mounts.expect_log("WARNING .* waiting to go on: .* gave up")
    mounts.expect_log("WARNING .* not all names are known yet: ")
    mounts.expect_log("ERROR .* (lookup|readdir|read) answered with an error: .* gave up")
    server.stop()
    waiting: list[Waiter | Reader] = [
        Waiter("stat", mount / "zlast.img"),
        Waiter("stat", mount / "route-9.img"),
        Waiter("ls", mount.directory),
        Reader(mount / "pages-1.img", 12 * MIB, MIB),
    ]
    assert [each.result() for each in waiting] == ["EIO"] * 4
    assert mount.status()["failed_reads"] >= 4, "a name that cannot be had counts as well"
    assert (mount / "inventory.img").read_bytes() == SMALL["inventory.img"]
    assert read_at(mount / "pages-1.img", 4 * MIB, MIB) == DATA[4 * MIB : 5 * MIB]
    server.forgive()
    server.start()
    assert Reader(mount / "pages-1.img", 12 * MIB, MIB).result() == said_of(DATA[12 * MIB :][:MIB])
    assert everything_is_right(mount)
    assert error_of(lambda: os.stat(mount / "route-9.img")) == "ENOENT"
    assert mount.status()["failed"] is None


def test_nobody_listens_any_more_while_it_mounts(
    server: FaultServer, mounts: Mounts, layer: Layer
) -> None:
    reference, never = publish(server, layer), threading.Event()
    server.always("/blobs/", gate(300, never))
    began = time.monotonic()
    done = mounts.refuse(reference, "--deadline=1")
    assert done.code == 3
    assert "gave up" in done.err.splitlines()[-1]
    assert time.monotonic() - began < 30


# -- what is no such stream ---------------------------------------------------------------------


def _flipped(blob: bytes, at: int) -> bytes:
    wrong = bytearray(blob)
    wrong[at] ^= 0x10
    return bytes(wrong)


def _cut_off(blob: bytes) -> bytes:
    return blob[: len(blob) * 2 // 3]


def _damaged(blob: bytes) -> bytes:
    return _flipped(blob, len(blob) * 3 // 4)


def _wrong_checksum(blob: bytes) -> bytes:
    return _flipped(blob, len(blob) - (6 if blob.startswith(b"\x1f\x8b") else 2))


def _goes_on(blob: bytes) -> bytes:
    return blob + b"and what is this?"


@pytest.mark.parametrize("spoil", [_cut_off, _damaged, _wrong_checksum, _goes_on])
def test_a_stream_that_is_damaged(
    server: FaultServer, mounts: Mounts, layer: Layer, spoil: Callable[[bytes], bytes]
) -> None:
    """The digest is right, and so that is what somebody has pushed."""
    wrong = replace(layer, blob=spoil(layer.blob))
    mount, may_go_on = half_open(server, mounts, wrong)
    late = Waiter("stat", mount / "route-9.img")
    mounts.expect_log("CRITICAL .* every read fails from now on")
    mounts.expect_log("ERROR .* answered with an error: ")
    may_go_on.set()
    assert late.result() in ("EIO", "ENOENT"), "ENOENT where the fault lies behind the last name"
    wait_until(lambda: mount.status()["failed"] is not None, "it is found")
    wait_until(lambda: everything_fails(mount), "every read fails")
    assert Reader(mount / "pages-1.img", 15 * MIB, 4096).result() == "EIO"
    assert not mount.status()["blob_proven"]
    assert mount.status()["failed_reads"] > 0
    assert mount.umount().code == 0
    assert not list(mounts.cache_dir.glob("layers/*"))
    if spoil in (_damaged, _cut_off):
        assert mounts.refuse(publish(server, wrong), "--verify=full").code == 4


def test_a_blob_that_is_not_the_promised_one(
    server: FaultServer, mounts: Mounts, layer: Layer
) -> None:
    """One that can be decoded all the same."""
    files = {**FILES, PAGES: _flipped(DATA, 12 * MIB)}
    other = STREAMS["gzip" if layer is LAYERS["gzip"] else "zstd"](files)
    assert len(other.blob) == len(layer.blob)
    reference = publish(server, layer)
    (resource,) = (item for path, item in server.resources.items() if layer.digest in path)
    resource.body = other.blob
    mounts.expect_log("CRITICAL .* does not match its digest.*; every read fails from now on")
    mounts.expect_log("ERROR .* read answered with an error: ")
    may_go_on = threading.Event()
    server.always("/blobs/", gate(HALF, may_go_on))
    mount = mounts.mount(reference)
    assert (mount / "inventory.img").read_bytes() == SMALL["inventory.img"]
    for name in (*SMALL, "pages-1.img"):
        assert (mount / name).exists()
    may_go_on.set()
    wait_until(lambda: mount.status()["failed"] is not None, "it is found")
    assert layer.digest in mount.status()["failed"]
    wait_until(lambda: everything_fails(mount), "every read fails")
    assert mount.umount().code == 0
    done = mounts.refuse(reference, "--verify=full")
    assert done.code == 5
    assert f"does not match its digest: promised {layer.digest}" in done.err.splitlines()[-1]
    resource.body = layer.blob
    mount = mounts.mount(reference)
    assert everything_is_right(mount)


def test_a_stream_verified_before(server: FaultServer, mounts: Mounts, layer: Layer) -> None:
    reference = publish(server, layer)
    for _ in range(2):
        mount = mounts.mount(reference, "--verify=full")
        assert mount.status()["blob_proven"]
        assert everything_is_right(mount)
        assert mount.status()["bytes_fetched"] <= len(layer.blob) + 192 * KIB
        kept_of(mounts)
        assert mount.umount().code == 0


# -- what later mounts find ---------------------------------------------------------------------


@pytest.fixture
def seen(server: FaultServer, mounts: Mounts, layer: Layer) -> str:
    """A layer that an earlier mount has decoded to its end; its reference."""
    reference = publish(server, layer)
    mount = mounts.mount(reference)
    kept_of(mounts)
    assert mount.umount().code == 0
    return reference


def test_a_later_mount_fetches_nothing(server: FaultServer, mounts: Mounts, seen: str) -> None:
    mount = mounts.mount(seen)
    server.always("/blobs/", lambda exchange: exchange.reset())
    assert everything_is_right(mount)
    assert error_of(lambda: os.stat(mount / "route-9.img")) == "ENOENT"
    status = mount.status()
    assert status["bytes_fetched"] < 192 * KIB
    assert status["chunks_from_cache"] > 0
    assert status["blob_proven"]
    assert kept_of(mounts).stat().st_mode & 0o077 == 0, "others' eyes see no process's memory"


def flip_content(home: Path) -> None:
    with open(home / "content", "r+b") as file:
        byte = os.pread(file.fileno(), 1, 12 * MIB)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 8]), 12 * MIB)


def no_content(home: Path) -> None:
    """As after a power cut: sizes and marks are there, the bytes are not."""
    size = (home / "content").stat().st_size
    os.truncate(home / "content", 0)
    os.truncate(home / "content", size)


def short_content(home: Path) -> None:
    os.truncate(home / "content", 5 * MIB)


def cut_marks(home: Path) -> None:
    os.truncate(home / "marks", 9)


def cut_index(home: Path) -> None:
    if (home / "index").exists():
        os.truncate(home / "index", 100)


def flip_index(home: Path) -> None:
    if (home / "index").exists():
        data = (home / "index").read_bytes()
        (home / "index").write_bytes(_flipped(data, len(data) // 2))


def no_proof(home: Path) -> None:
    (home / "proven").unlink()


DAMAGES = [flip_content, no_content, short_content, cut_marks, cut_index, flip_index, no_proof]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_kept_may_be_damaged(
    server: FaultServer,
    mounts: Mounts,
    layer: Layer,
    seen: str,
    damage: Callable[[Path], None],
) -> None:
    is_gzip = layer is LAYERS["gzip"]
    if damage in (cut_index, flip_index) and not is_gzip:
        return  # it has none
    damage(kept_of(mounts))
    mounts.tolerate_log("WARNING .* (what is kept|cached chunk|the index that an earlier mount)")
    mount = mounts.mount(seen)
    start = 9 * MIB + 5
    assert read_at(mount / "pages-1.img", start, 4096) == DATA[start : start + 4096]
    if is_gzip and damage in (flip_content, no_content, short_content, cut_marks, no_proof):
        # It is read at random, whatever has to be fetched of it, and nobody waits for the rest.
        assert mount.status()["bytes_fetched"] < len(layer.blob) * 4 // 5
    assert everything_is_right(mount)
    assert mount.status()["failed"] is None


# -- SOCI indexes that nobody vouches for -------------------------------------------------------


def test_an_index_that_was_put_beside_it(server: FaultServer, mounts: Mounts) -> None:
    """A gzip layer is then read at random; what proves it is the pass in the background."""
    layer = soci_layer(FILES)
    mount = mounts.mount(publish_referring(server, layer))
    assert read_at(mount / "pages-1.img", 15 * MIB, 4096) == DATA[15 * MIB :][:4096]
    assert mount.status()["bytes_fetched"] < len(layer.blob) // 2
    assert mount.status()["layer_format"] == "soci"
    assert not mount.status()["chunks_proven"]
    assert everything_is_right(mount)
    wait_until(lambda: mount.status()["blob_proven"], "it is proven")


def test_it_is_looked_for_while_the_first_bytes_are_waited_for(
    server: FaultServer, mounts: Mounts
) -> None:
    layer = soci_layer(FILES)
    reference = publish_referring(server, layer)
    asked = threading.Event()

    def note(exchange: Exchange) -> None:
        asked.set()
        exchange.answer(*exchange.normal())

    server.script("/referrers/", note)
    server.script(layer.digest, stall(until=asked))
    assert mounts.mount(reference).status()["layer_format"] == "soci"
    assert server.count("/referrers/") == 1


@pytest.mark.parametrize("lie", ["cut off", "of another layer", "of other bytes"])
def test_an_index_that_is_wrong(server: FaultServer, mounts: Mounts, lie: str) -> None:
    """Beside the image it is as if it were not there; one that the manifest names must be right."""
    layer = soci_layer(FILES)
    ztoc = layer.ztoc
    if lie == "cut off":
        ztoc = ztoc[: len(ztoc) // 2]
    elif lie == "of another layer":
        ztoc = soci_layer(SMALL).ztoc
    layer = replace(layer, ztoc=ztoc)
    referring, pinned = publish_referring(server, layer), publish(server, layer, "pinned")
    if lie == "of other bytes":
        (resource,) = (item for item in server.resources.values() if item.body == ztoc)
        resource.body = _flipped(ztoc, len(ztoc) // 2)
    mounts.expect_log("WARNING .* a SOCI index published for .* is not used: ")
    mount = mounts.mount(referring)
    assert mount.status()["layer_format"] == "gzip"
    assert everything_is_right(mount)
    assert mount.umount().code == 0
    cache = f"--cache-dir={mounts.home}/fresh"
    done = mounts.refuse(pinned, cache)
    assert done.code == (5 if lie == "of other bytes" else 4)
    assert "zTOC" in done.err.splitlines()[-1]


# -- no room ------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB; it goes after the mounts."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk])
    yield disk
    run(["umount", "-l", disk])


@pytest.fixture
def crammed(disk: Path, mounts: Mounts) -> Mounts:
    """Mounts whose cache is on that disk."""
    mounts.cache_dir = disk / "cache"
    mounts.log_files = [mounts.home / "log"]
    return mounts


def test_a_disk_that_fills_up(
    server: FaultServer, disk: Path, crammed: Mounts, layer: Layer
) -> None:
    """What is here is served; the rest is an error that says where to make room; then it comes."""
    mounts = crammed
    mount = mounts.mount(publish(server, layer), f"--log-file={mounts.home}/log")
    mounts.expect_log(f"WARNING .* waiting to go on: .* the cache in {mounts.cache_dir} takes no")
    mounts.expect_log("WARNING .* not all names are known yet: .* make room there, or choose")
    mounts.expect_log("ERROR .* (lookup|readdir|read) answered with an error: .* make room there")
    assert Reader(mount / "pages-1.img", 12 * MIB, 4096).result() == "EIO"
    assert Waiter("stat", mount / "zlast.img").result() == "EIO"
    assert Waiter("ls", mount.directory).result() == "EIO"
    assert (mount / "inventory.img").read_bytes() == SMALL["inventory.img"]
    assert read_at(mount / "pages-1.img", MIB, MIB) == DATA[MIB : 2 * MIB]
    assert mount.status()["failed"] is None
    assert run(["mount", "-o", "remount,size=64m", disk]).code == 0
    wait_until(lambda: Waiter("stat", mount / "zlast.img").result() != "EIO", "it goes on")
    assert everything_is_right(mount)


def test_a_disk_that_was_full_before(
    server: FaultServer, disk: Path, crammed: Mounts, layer: Layer
) -> None:
    (disk / "full").write_bytes(bytes(8 * MIB - 64 * KIB))
    began = time.monotonic()
    done = crammed.refuse(publish(server, layer))
    assert done.code == 3
    assert f"the cache in {crammed.cache_dir} takes no more" in done.err.splitlines()[-1]
    assert "make room there, or choose another directory" in done.err.splitlines()[-1]
    assert time.monotonic() - began < AT_ONCE_S


# -- archives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzipped), ("zst", zstded)])
def test_archives(
    server: FaultServer,
    mounts: Mounts,
    tmp_path: Path,
    suffix: str,
    pack: Callable[[bytes], bytes],
) -> None:
    """On this machine and behind a URL; without a digest nothing of them is kept for later."""
    blob = pack(tar_bytes(FILES))
    path = tmp_path / f"checkpoint.tar.{suffix}"
    path.write_bytes(blob)
    for reference in (str(path), server.add_file(f"/a/checkpoint.tar.{suffix}", blob)):
        mount = mounts.mount(reference)
        assert everything_is_right(mount)
        assert mount.status()["layer_format"] == ("gzip" if suffix == "gz" else "zstd")
        assert mount.umount().code == 0
    assert not list(mounts.cache_dir.glob("layers/*"))
    assert not list(mounts.cache_dir.glob("incoming/*/content"))


def test_two_at_once(server: FaultServer, mounts: Mounts, layer: Layer, tmp_path: Path) -> None:
    """One decodes for both, and leaves it for later mounts."""
    reference = publish(server, layer)
    first = mounts.mount(reference)
    second = mounts.mount(reference, at=tmp_path / "other")
    assert everything_is_right(first)
    assert everything_is_right(second)
    kept_of(mounts)
    assert first.umount().code == 0
    assert everything_is_right(second)


def test_layers_of_a_layout(mounts: Mounts, tmp_path: Path, layer: Layer) -> None:
    reference = write_layout(tmp_path / "layout", layer)
    for _ in range(2):
        mount = mounts.mount(reference)
        assert everything_is_right(mount)
        kept_of(mounts)
        assert mount.umount().code == 0

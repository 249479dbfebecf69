"""A mount that knows what will be wanted fetches it first, once, and lets nobody wait for it."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazyfs.checkpoint.trace import Need, Trace, TracedFile, TracedLayer, dump_trace
from tests.checkpoint import sample
from tests.exchange import Exchange
from tests.faults import FaultServer
from tests.images import Layer, tar_layer, zstd_chunked
from tests.mount.mounting import Mount, Mounts, read_at, wait_until
from tests.mount.published import asked_ranges, publish, some_bytes

KIB, MIB = 1024, 1024 * 1024
PAGES = "checkpoint/pages-1.img"
PAGES_BYTES = 24 * MIB
NEEDED = [(20 * MIB, 4096), (3 * MIB, 200 * KIB), (20 * MIB + 8192, 4096), (11 * MIB, MIB)]
"""Of the pages file: (offset, size), in the order of need."""
CRIU_OPENS = ["inventory.img", "pstree.img", "core-1.img", "mm-1.img"]

_OPEN_ALL = """
import os, sys
for path in sys.argv[1:]:
    os.close(os.open(path, os.O_RDONLY))
"""
_READ_AS_A_TASK = """
import hashlib, mmap, os, sys
pages, size = sys.argv[-1], int(sys.argv[1])
for path in sys.argv[2:]:
    os.close(os.open(path, os.O_RDONLY))
file = os.open(pages, os.O_RDONLY)
target = mmap.mmap(-1, size)
pieces = [(0, 4096), (4096, 3 << 20), ((3 << 20) + 4096, size - (3 << 20) - 4096)]
views = [memoryview(target)[at : at + length] for at, length in pieces]
read = 0
while read < size:
    read += os.preadv(file, views if not read else [memoryview(target)[read:]], read)
print(hashlib.sha256(target).hexdigest())
assert os.pread(file, 5000, 777) == target[777:5777]
assert os.pread(file, 1 << 20, size - 5) == target[size - 5 :]
assert os.pread(file, 1 << 20, size) == b""
"""
"""As CRIU: looks into the pages file, then opens it anew and reads all that lies together."""


def checkpoint() -> dict[str, bytes]:
    files = {f"checkpoint/{name}": data for name, data in sample.images().items()}
    del files["checkpoint/pages-2.img"]
    return {**files, PAGES: some_bytes(PAGES_BYTES)}


FILES = checkpoint()


def traced(layer: Layer, directory: Path) -> Path:
    """Write the trace of a workload that needed `NEEDED`."""
    trace = Trace(
        layers=[TracedLayer(layer.digest, len(layer.blob))],
        files=[TracedFile(PAGES, 0, PAGES_BYTES)],
        needs=[Need(0, offset, size, float(at)) for at, (offset, size) in enumerate(NEEDED)],
    )
    path = directory / "trace"
    path.write_bytes(dump_trace(trace))
    return path


def prefetch(mount: Mount) -> dict[str, Any]:
    told: dict[str, Any] = mount.status()["prefetch"]
    return told


def open_as(names: list[str], mount: Mount) -> None:
    """Open files one after the other, from one process."""
    paths = [str(mount / name) for name in names]
    subprocess.run([sys.executable, "-c", _OPEN_ALL, *paths], check=True)


def pages_start(layer: Layer) -> int:
    return layer.blob.index(FILES[PAGES][:4096])


def is_near(asked: tuple[int, int], layer: Layer) -> bool:
    """Whether a range of the blob has to do with what was needed, in chunks of 256 KiB."""
    start = pages_start(layer)
    return any(
        asked[0] < start + offset + size + 256 * KIB and start + offset - 256 * KIB < asked[1]
        for offset, size in NEEDED
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    made = tmp_path / "criu"
    made.mkdir()
    return made


def test_for_a_restore_what_was_needed_comes_first_then_all_of_it_and_nothing_twice(
    mounts: Mounts, server: FaultServer, work: Path, tmp_path: Path
) -> None:
    layer = tar_layer(FILES)
    reference = publish(server, layer)
    mount = mounts.mount(reference, "--lazy-pages", work, "--trace", traced(layer, tmp_path))
    wait_until(lambda: mount.status()["here_bytes"] >= len(layer.blob), "all of it is here")
    wait_until(lambda: prefetch(mount)["state"] == "done", "it is done")
    wait_until(lambda: prefetch(mount)["traced_bytes"] > 0, "the trace was followed, too")
    told = prefetch(mount)
    assert told["everything"]
    assert told["traced_bytes"] == told["traced_here_bytes"] >= sum(size for _, size in NEEDED)
    asked = asked_ranges(server, layer)
    assert sum(stop - start for start, stop in asked) <= len(layer.blob) + MIB  # its head, and tail
    of_pages = [each for each in asked if each[1] - each[0] >= 256 * KIB and each[0]]
    first = [each for each in of_pages if is_near(each, layer)]
    assert sum(stop - start for start, stop in first) >= told["traced_bytes"] - 256 * KIB
    assert (mount / "pages-1.img").read_bytes() == FILES[PAGES]


def test_a_mount_that_is_looked_at_replays_nothing_until_a_restore_begins(
    mounts: Mounts, server: FaultServer, tmp_path: Path
) -> None:
    layer = zstd_chunked(FILES)
    mount = mounts.mount(publish(server, layer), "--trace", traced(layer, tmp_path))
    wait_until(lambda: prefetch(mount)["state"] == "waiting", "the trace is known")
    subprocess.run(["ls", "-lR", mount.directory], check=True, capture_output=True)
    for name in CRIU_OPENS:
        subprocess.run(["cat", mount / name], check=True, capture_output=True)
    open_as(sorted(os.listdir(mount.directory)), mount)
    assert read_at(mount / "pages-1.img", 0, 4096) == FILES[PAGES][:4096]
    assert prefetch(mount) == {
        "state": "waiting",
        "everything": False,
        "traced_bytes": 0,
        "traced_here_bytes": 0,
    }
    assert mount.status()["here_bytes"] < len(layer.blob) / 4
    open_as(CRIU_OPENS, mount)
    wait_until(lambda: prefetch(mount)["state"] == "done", "it is replayed")
    wait_until(
        lambda: prefetch(mount)["traced_here_bytes"] == prefetch(mount)["traced_bytes"] > 0,
        "it is here",
    )
    waited = mount.status()["reads_waited"]
    with open(mount / "pages-1.img", "rb", buffering=0) as pages:
        os.posix_fadvise(pages.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset, size in NEEDED:
            found = os.pread(pages.fileno(), size, offset)
            assert found == FILES[PAGES][offset : offset + size]
    assert mount.status()["reads_waited"] == waited
    assert mount.status()["here_bytes"] < len(layer.blob) / 2


def test_who_reads_on_and_on_after_a_restore_has_begun_gets_all_of_it_ahead(
    mounts: Mounts, server: FaultServer
) -> None:
    layer = zstd_chunked(FILES)
    mount = mounts.mount(publish(server, layer))
    open_as(CRIU_OPENS, mount)
    assert not prefetch(mount)["everything"]
    assert read_at(mount / "pages-1.img", 0, 4 * MIB) == FILES[PAGES][: 4 * MIB]
    wait_until(lambda: prefetch(mount)["everything"], "it was noticed")
    wait_until(lambda: mount.status()["safe_offline"], "all of it is here")
    assert (mount / "pages-1.img").read_bytes() == FILES[PAGES]


@pytest.mark.parametrize("form", [tar_layer, zstd_chunked])
def test_a_restore_reads_what_is_all_in_the_cache_past_the_page_cache(
    mounts: Mounts, server: FaultServer, form: Callable[[dict[str, bytes]], Layer]
) -> None:
    """For what is not, the kernel reads ahead, and whoever waits can be killed."""
    reference = publish(server, form(FILES))
    digest = hashlib.sha256(FILES[PAGES]).hexdigest()

    def restore(mount: Mount) -> int:
        """Return how much of the pages file is asked for again after a task has read it."""
        words = [sys.executable, "-c", _READ_AS_A_TASK, str(PAGES_BYTES)]
        words += [str(mount / name) for name in [*CRIU_OPENS, "pages-1.img"]]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        assert done.stdout.strip() == digest
        before: int = mount.status()["bytes_read"]
        assert (mount / "pages-1.img").read_bytes() == FILES[PAGES]
        after: int = mount.status()["bytes_read"]
        return after - before

    mount = mounts.mount(reference)
    assert restore(mount) < MIB
    wait_until(lambda: mount.status()["safe_offline"], "all of it is here")
    assert mount.umount().code == 0
    mount = mounts.mount(reference)
    fetched = mount.status()["bytes_fetched"]
    assert restore(mount) >= PAGES_BYTES
    assert mount.status()["bytes_fetched"] == fetched
    (cached,) = mounts.cache_dir.glob("layers/*/content")
    assert mount.umount().code == 0
    with cached.open("r+b") as file:
        file.seek(PAGES_BYTES // 2)
        file.write(bytes(8192))
    mounts.expect_log("WARNING .* cached chunk .* has changed on disk; fetching it anew")
    mount = mounts.mount(reference)
    assert restore(mount) >= PAGES_BYTES
    assert mount.status()["cache_refused"] > 0


def test_a_reader_overtakes_a_replay(
    mounts: Mounts, server: FaultServer, work: Path, tmp_path: Path
) -> None:
    """What is fetched ahead is held up at the source; a read of something else is answered."""
    layer = tar_layer(FILES)
    reference = publish(server, layer)
    start = pages_start(layer)
    let_go = threading.Event()
    held = threading.Semaphore(0)

    def hold_large(exchange: Exchange) -> None:
        asked = exchange.seen.headers.get("Range", "bytes=0-0")
        begin, _, last = asked.removeprefix("bytes=").partition("-")
        if int(begin) >= start and int(last) - int(begin) >= 512 * KIB:
            held.release()
            exchange.wait(event=let_go)
        exchange.answer(*exchange.normal())

    server.script(layer.digest, *([hold_large] * 100))
    try:
        mount = mounts.mount(reference, "--lazy-pages", work, "--trace", traced(layer, tmp_path))
        assert held.acquire(timeout=30)
        offset = 23 * MIB
        with open(mount / "pages-1.img", "rb", buffering=0) as pages:
            os.posix_fadvise(pages.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(pages.fileno(), 4096, offset) == FILES[PAGES][offset : offset + 4096]
        assert not let_go.is_set()
    finally:
        let_go.set()
    wait_until(lambda: mount.status()["here_bytes"] >= len(layer.blob), "all of it is here")
    assert (mount / "pages-1.img").read_bytes() == FILES[PAGES]


def test_a_trace_of_something_else_is_told_and_costs_nothing(
    mounts: Mounts, server: FaultServer, tmp_path: Path
) -> None:
    layer = tar_layer(FILES)
    other = traced(tar_layer({"checkpoint/inventory.img": b"x"}), tmp_path)
    mount = mounts.mount(publish(server, layer), "--trace", other, "-v")
    mounts.expect_log("the trace that was named is of other layers")
    open_as(CRIU_OPENS, mount)
    assert prefetch(mount)["state"] == "none"
    assert read_at(mount / "inventory.img", 0, 10) == FILES["checkpoint/inventory.img"][:10]


def test_a_second_mount_has_it_from_the_cache(
    mounts: Mounts, server: FaultServer, work: Path, tmp_path: Path
) -> None:
    layer = zstd_chunked(FILES)
    reference = publish(server, layer)
    options = ("--lazy-pages", work, "--trace", traced(layer, tmp_path))
    first = mounts.mount(reference, *options)
    wait_until(lambda: first.status()["safe_offline"], "all of it is here")
    assert first.umount().code == 0
    server.seen.clear()
    again = mounts.mount(reference, *options)
    wait_until(lambda: again.status()["safe_offline"], "all of it is here")
    assert asked_ranges(server, layer) == []
    assert (again / "pages-1.img").read_bytes() == FILES[PAGES]


def test_what_is_told_is_documented(mounts: Mounts, server: FaultServer) -> None:
    mount = mounts.mount(publish(server, tar_layer(FILES)))
    documented = (sample.LAYOUT.parents[2] / "docs/json.md").read_text()
    assert not [key for key in prefetch(mount) if f"`{key}`" not in documented]

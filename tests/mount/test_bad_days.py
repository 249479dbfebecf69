"""Servers that fail in the middle: reads wait, come right or end in EIO, never short or wrong."""

import hashlib
import itertools
import json
import threading

import pytest

from tests.faults import (
    Exchange,
    Fault,
    FaultServer,
    behave,
    drip,
    headers,
    redirect,
    reset,
    short,
    stall,
    status,
    whole,
)
from tests.images import zstd_chunked
from tests.mount.mounting import AT_ONCE_S, Mount, Mounts, Reader, read_at, wait_until
from tests.mount.published import (
    FEW,
    KIB,
    MIB,
    checkpoint_files,
    publish,
    publish_files,
    settled,
)

PAGES = "checkpoint/pages-1.img"
FILES = checkpoint_files(24 * MIB)
DATA = FILES[PAGES]
CHUNKED = zstd_chunked(FILES)


@pytest.fixture(params=FEW)
def reference(request: pytest.FixtureRequest, server: FaultServer) -> str:
    return publish_files(server, FILES, request.param)


@pytest.fixture
def chunked(server: FaultServer) -> str:
    """An image without a background pass: what is fetched is what a reader wants."""
    return publish(server, CHUNKED)


def said_of(data: bytes) -> str:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()}"


def read_all(mount: Mount) -> bytes:
    return (mount / "pages-1.img").read_bytes()


# -- what is retried ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        [short(after) for after in (0, 1, 100_000, 65_536)],
        [reset(), reset(after=10), reset(after=200_000)],
        [status(500), status(503), status(502), status(504)],
        [status(429, {"Retry-After": "0"}), status(503, {"Retry-After": "Thu, 01 Jan 1970"})],
        [status(408)] * 3,
    ],
    ids=["short", "reset", "5xx", "429", "408"],
)
def test_what_passes_is_waited_for(
    server: FaultServer, mounts: Mounts, reference: str, faults: list[Fault]
) -> None:
    server.script("/blobs/", *faults[:1])
    mount = mounts.mount(reference)
    server.script("/blobs/", *faults)
    assert read_all(mount) == DATA
    assert mount.status()["failed_reads"] == 0


def test_a_storm(server: FaultServer, mounts: Mounts, reference: str) -> None:
    """Nine of ten requests fail, each in its own way."""
    mount = mounts.mount(reference)
    faults = [status(500), short(70_000), reset(), status(503), reset(after=5000), short(0)]
    turn = itertools.count(1)

    def fail(exchange: Exchange) -> None:
        number = next(turn)
        (faults[number % len(faults)] if number % 10 else behave)(exchange)

    server.always("/blobs/", fail)
    size = 2 * MIB
    assert read_at(mount / "pages-1.img", 5 * MIB, size) == DATA[5 * MIB : 5 * MIB + size]


def test_the_registry_redirects(server: FaultServer, mounts: Mounts, chunked: str) -> None:
    """To a signed URL that expires: then the registry is asked again."""
    blobs = {path: item for path, item in server.resources.items() if "/blobs/" in path}
    for path, item in blobs.items():
        server.resources["/store" + path.rpartition("/")[2]] = item
    signature = "s3cr3t-1"

    def move(exchange: Exchange) -> None:
        path = "/store" + exchange.seen.path.rpartition("/")[2]
        redirect(f"{server.url}{path}?X-Signature={signature}")(exchange)

    def check(exchange: Exchange) -> None:
        (behave if signature in exchange.seen.query else status(403))(exchange)

    server.always("/blobs/", move)
    server.always("/store", check)
    mount = mounts.mount(chunked)
    assert read_at(mount / "pages-1.img", MIB, 4096) == DATA[MIB : MIB + 4096]
    assert server.count("/blobs/") < server.count("/store"), "the URL is remembered"
    signature = "s3cr3t-2"
    assert read_all(mount) == DATA
    assert mount.status()["failed_reads"] == 0
    assert "s3cr3t" not in mounts.log()
    assert "s3cr3t" not in json.dumps(mount.status())


def test_a_token_that_expires(server: FaultServer, mounts: Mounts, reference: str) -> None:
    server.auth = "bearer"
    mount = mounts.mount(reference)
    assert read_at(mount / "pages-1.img", MIB, 4096) == DATA[MIB : MIB + 4096]
    server.revoke()
    assert read_all(mount) == DATA


# -- what is waited for, and for how long -------------------------------------------------------


def test_a_server_that_comes_back(server: FaultServer, mounts: Mounts, chunked: str) -> None:
    """A restart in mid-read: the reader waits and gets its bytes."""
    mount = mounts.mount(chunked)
    settled(server, CHUNKED, mount)
    held = threading.Event()
    server.script("/blobs/", stall(after=1000, until=held))
    asked = server.count("/blobs/")
    reader = Reader(mount / "pages-1.img", 10 * MIB, 4 * MIB)
    server.wait_count("/blobs/", asked + 1)
    server.stop()
    wait_until(lambda: mount.status()["retries"] > 2, "it asks again")
    wait_until(reader.is_waiting, "it waits")
    server.start()
    assert reader.result() == said_of(DATA[10 * MIB : 14 * MIB])
    assert mount.status()["failed_reads"] == 0


def test_a_server_that_stays_away(server: FaultServer, mounts: Mounts, chunked: str) -> None:
    """EIO after the deadline, for as long as it is away; what was fetched stays readable."""
    mount = mounts.mount(chunked, "--deadline=0.5")
    here = read_at(mount / "pages-1.img", 0, 64 * KIB)
    wait_until(lambda: _is_quiet(server, mount), "readahead is over")
    server.stop()
    mounts.expect_log("ERROR .* read answered with an error: .* without a byte in .* attempts")
    for offset in (10 * MIB, 20 * MIB, 10 * MIB):
        assert Reader(mount / "pages-1.img", offset, 300 * KIB).result() == "EIO"
    assert read_at(mount / "pages-1.img", 0, 64 * KIB) == here
    assert mount.status()["failed_reads"] >= 3
    server.start()
    assert read_all(mount) == DATA
    assert (mount / "inventory.img").read_bytes() == FILES["checkpoint/inventory.img"]


def _is_quiet(server: FaultServer, mount: Mount) -> bool:
    before = len(server.seen), mount.status()["bytes_fetched"]
    threading.Event().wait(0.2)
    return before == (len(server.seen), mount.status()["bytes_fetched"])


@pytest.mark.parametrize(
    "fault",
    [stall(), stall(after=0), stall(after=5000), drip(0.05), drip(0.05, header=True)],
    ids=["silence", "header only", "a few bytes", "drip", "header drip"],
)
def test_a_server_that_stalls(
    server: FaultServer, mounts: Mounts, chunked: str, fault: Fault
) -> None:
    """Never a hang; and it recovers as the server does."""
    mount = mounts.mount(chunked, "--deadline=0.5")
    settled(server, CHUNKED, mount)
    server.script("/blobs/", *[fault] * 64)
    mounts.expect_log("ERROR .* read answered with an error: ")
    reader = Reader(mount / "pages-1.img", 10 * MIB, 64 * KIB)
    assert reader.result(timeout_s=40) == "EIO"
    server.forgive()
    assert read_all(mount) == DATA


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_refusal_in_mid_mount(
    server: FaultServer, mounts: Mounts, chunked: str, code: int
) -> None:
    """No reason to wait: EIO at once, until the registry thinks better of it."""
    mount = mounts.mount(chunked)
    settled(server, CHUNKED, mount)
    server.script("/blobs/", *[status(code)] * 64)
    mounts.expect_log(f"ERROR .* read answered with an error: .* \\({code} ")
    assert Reader(mount / "pages-1.img", 10 * MIB, 64 * KIB).result(AT_ONCE_S) == "EIO"
    server.forgive()
    assert read_all(mount) == DATA


# -- answers that are no answer -----------------------------------------------------------------


def test_no_ranges_and_a_small_blob(server: FaultServer, mounts: Mounts) -> None:
    files = checkpoint_files(MIB)
    reference = publish_files(server, files)
    for resource in server.resources.values():
        resource.ranges = False
    mount = mounts.mount(reference)
    assert read_all(mount) == files[PAGES]


def test_no_ranges_and_a_large_blob(server: FaultServer, mounts: Mounts, reference: str) -> None:
    for resource in server.resources.values():
        resource.ranges = False
    done = mounts.refuse(reference)
    assert done.code == 3
    assert "does not support byte ranges (it answered 200 with everything)" in done.err
    assert "copy the image to a registry that does" in done.err


@pytest.mark.parametrize(
    "fault",
    [
        headers({"Content-Range": "bytes 0-99/100"}),
        headers({"Content-Range": "bytes 1-5/5"}),
        headers({"Content-Range": None}),
        headers({"Content-Range": "bytes */5"}),
        headers({"Content-Encoding": "gzip"}),
        headers({"Content-Length": "5"}),
        whole,
    ],
    ids=["another", "another size", "none", "nonsense", "encoded", "another length", "whole"],
)
def test_an_answer_that_lies(
    server: FaultServer, mounts: Mounts, chunked: str, fault: Fault
) -> None:
    mount = mounts.mount(chunked, "--deadline=0.5")
    settled(server, CHUNKED, mount)
    server.script("/blobs/", *[fault] * 64)
    mounts.expect_log("ERROR .* read answered with an error: ")
    assert Reader(mount / "pages-1.img", 10 * MIB, 64 * KIB).result() == "EIO"
    server.forgive()
    assert read_all(mount) == DATA
    server.script("/blobs/", *[fault] * 64)
    (mounts.home / "other").mkdir()
    options = ("--deadline=0.5", f"--cache-dir={mounts.home}/fresh")
    assert mounts.refuse(chunked, *options, at=mounts.home / "other").code == 3

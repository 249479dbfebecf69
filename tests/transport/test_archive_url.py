"""A checkpoint archive by URL: nothing promises its bytes, so it must at least stay the same."""

import random
from collections.abc import Iterator

import pytest

from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.transport.client import HttpClient
from lazyfs.transport.httpblob import HttpBlob, open_url
from tests import faults
from tests.faults import FaultServer
from tests.transport.gather import QUICK, read

DATA = random.Random(5).randbytes(150_000)
OTHER = random.Random(6).randbytes(150_000)
MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def client() -> Iterator[HttpClient]:
    client = HttpClient(QUICK)
    yield client
    client.close()


def opened(server: FaultServer, client: HttpClient, headers: dict[str, str]) -> HttpBlob:
    url = server.add_file("/c.tar", DATA, headers)
    return open_url(client, url + "?signature=s3cr3t")


@pytest.mark.parametrize(
    "headers", [{}, {"ETag": '"1"'}, {"ETag": 'W/"1"'}, {"Last-Modified": MODIFIED}]
)
def test_archive(server: FaultServer, client: HttpClient, headers: dict[str, str]) -> None:
    blob = opened(server, client, headers)
    assert (blob.name, blob.size_bytes) == (f"{server.url}/c.tar", len(DATA))
    assert read(blob, 10, 140_000) == DATA[10:140_000]
    assert server.connections == 1
    assert {seen.query for seen in server.seen} == {"signature=s3cr3t"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        ({"ETag": '"1"'}, {}),
        ({"Last-Modified": MODIFIED}, {"Last-Modified": MODIFIED.replace("2026", "2025")}),
        ({"ETag": '"1"', "Last-Modified": MODIFIED}, {"ETag": '"2"', "Last-Modified": MODIFIED}),
    ],
)
@pytest.mark.parametrize("obeys", [True, False])
def test_archive_that_is_replaced(
    server: FaultServer,
    client: HttpClient,
    before: dict[str, str],
    after: dict[str, str],
    obeys: bool,
) -> None:
    blob = opened(server, client, before)
    assert read(blob, 0, 10) == DATA[:10]
    server.add_file("/c.tar", OTHER, after)
    if not obeys:
        server.script("/c.tar", deaf)
    with pytest.raises(IntegrityError, match="replaced"):
        read(blob, 10, 20)


def deaf(exchange: faults.Exchange) -> None:
    """Answer as a server that does not know conditional requests."""
    for name in ("If-Match", "If-Unmodified-Since"):
        exchange.seen.headers.pop(name, None)
    faults.behave(exchange)


@pytest.mark.parametrize("size", [149_999, 150_001, 5])
def test_archive_of_another_size(server: FaultServer, client: HttpClient, size: int) -> None:
    blob = opened(server, client, {})
    server.add_file("/c.tar", (OTHER + b"x")[:size])
    with pytest.raises(IntegrityError, match="replaced"):
        read(blob, 10, 20)


def test_server_without_ranges(server: FaultServer, client: HttpClient) -> None:
    url = server.add_file("/small.tar", DATA[:1000])
    server.always("/small.tar", faults.whole)
    blob = open_url(client, url)
    assert blob.size_bytes == 1000
    assert read(blob, 10, 20) == DATA[10:20]
    server.always("/c.tar", faults.whole)
    blob = opened(server, client, {})
    with pytest.raises(SourceError, match="does not support byte ranges"):
        read(blob, 10, 20)


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        (faults.status(404), SourceError),
        (faults.status(401), SourceError),
        (faults.status(416), SourceError),
        (faults.headers({"Content-Range": "bytes 0-0/*"}), SourceError),
        (faults.headers({"Content-Encoding": "gzip"}), SourceError),
        (faults.status(503), FetchError),
        (faults.stall(), FetchError),
    ],
)
def test_archive_that_cannot_be_opened(
    server: FaultServer,
    client: HttpClient,
    fault: faults.Fault,
    wanted: type[SourceError],
) -> None:
    server.script("/c.tar", fault)
    with pytest.raises(wanted) as caught:
        opened(server, client, {})
    assert type(caught.value) is wanted
    assert "s3cr3t" not in str(caught.value)


def test_archive_behind_a_redirect(server: FaultServer, client: HttpClient) -> None:
    with FaultServer() as storage:
        target = storage.add_file("/s", DATA, {"ETag": '"1"'})
        server.always("/c.tar", faults.redirect(target))
        blob = opened(server, client, {})
        assert read(blob, 10, 20) == DATA[10:20]
        storage.add_file("/s", OTHER, {"ETag": '"2"'})
        with pytest.raises(IntegrityError):
            read(blob, 10, 20)

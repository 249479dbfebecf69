"""A blob over HTTP: never a wrong byte, never a hang, no secret in a message."""

import contextlib
import os
import random
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazyfs.ground.errors import FetchError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.answers import Question
from lazyfs.transport.client import HttpClient
from lazyfs.transport.httpblob import HttpBlob
from lazyfs.transport.tls import Endpoint, TlsConfig
from lazyfs.transport.urls import Origin
from tests import faults
from tests.faults import FaultServer
from tests.transport.gather import QUICK, Gather, read

DATA = random.Random(1).randbytes(300_000)
SMALL = DATA[:50_000]
SIGNATURE = "s3cr3t"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def client() -> Iterator[HttpClient]:
    client = HttpClient(QUICK)
    yield client
    client.close()


def blob_at(client: HttpClient, url: str, data: bytes = DATA) -> HttpBlob:
    question = Question("the blob", "the host", "log in")
    return HttpBlob(client, url, question=question, size_bytes=len(data))


def test_ranges_come_whole_over_one_connection(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    for start, stop in ((0, 1), (299_999, 300_000), (1234, 98_765), (0, 300_000), (7, 7)):
        assert read(blob, start, stop) == DATA[start:stop]
    assert server.connections == 1
    assert server.seen[0].headers["Accept-Encoding"] == "identity"
    assert server.seen[0].headers["Range"] == "bytes=0-0"


def test_threads_read_one_blob_at_once(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    generator = random.Random(2)
    ranges = [sorted(generator.sample(range(len(DATA)), 2)) for _ in range(100)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda each: read(blob, *each), ranges))
    assert results == [DATA[start:stop] for start, stop in ranges]
    assert server.connections <= 8


def test_outside_of_the_blob_is_not_asked_for(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    with pytest.raises(SourceError):
        read(blob, 299_999, 300_001)
    assert server.count("") == 0


def test_small_blob_of_a_server_without_ranges(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", SMALL), SMALL)
    server.always("/f", faults.whole)
    assert read(blob, 0, 1) == SMALL[:1]
    assert read(blob, 20_000, 30_000) == SMALL[20_000:30_000]
    assert read(blob, 49_999, 50_000) == SMALL[49_999:]
    assert server.connections == 1


def test_large_blob_of_a_server_without_ranges(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    server.always("/f", faults.whole)
    assert read(blob, 0, len(DATA)) == DATA, "everything was asked for, everything came"
    with pytest.raises(SourceError, match="does not support byte ranges"):
        read(blob, 0, 1000)


def test_whole_body_of_another_size(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", SMALL + b"x"), SMALL)
    server.always("/f", faults.whole)
    with pytest.raises(SourceError, match="50001 bytes"):
        read(blob, 0, 10)


@pytest.mark.parametrize(
    "fault",
    [
        faults.headers({"Content-Range": "bytes 1001-2000/300000"}),
        faults.headers({"Content-Range": "bytes 1000-1998/300000"}),
        faults.headers({"Content-Range": "bytes 1000-1999/300001"}),
        faults.headers({"Content-Range": "nonsense"}),
        faults.headers({"Content-Range": None}),
        faults.headers({"Content-Encoding": "gzip"}),
        faults.headers({"Content-Length": "999"}),
        faults.status(416),
        faults.status(204),
        faults.status(400),
    ],
)
def test_answers_that_are_not_believed(
    server: FaultServer, client: HttpClient, fault: faults.Fault
) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    server.script("/f", fault)
    sink = Gather()
    with pytest.raises(SourceError) as caught:
        blob.read_into(ByteRange(1000, 2000), sink)
    assert not isinstance(caught.value, FetchError)
    assert sink.data == b""
    assert read(blob, 1000, 2000) == DATA[1000:2000]


def test_total_may_be_unknown_and_body_chunked(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    server.script("/f", faults.headers({"Content-Range": "bytes 10-99/*"}), faults.chunked)
    assert read(blob, 10, 100) == DATA[10:100]
    assert read(blob, 10, 5000) == DATA[10:5000]
    assert server.connections == 1


def test_more_than_asked_in_chunks(server: FaultServer, client: HttpClient) -> None:
    def more(exchange: faults.Exchange) -> None:
        _, headers, body = exchange.normal()
        exchange.head(206, {**headers, "Transfer-Encoding": "chunked"})
        exchange.write(b"%x\r\n%s\r\n1\r\nx\r\n0\r\n\r\n" % (len(body), body))

    blob = blob_at(client, server.add_file("/f", DATA))
    server.script("/f", more)
    with pytest.raises(SourceError, match="more than was asked"):
        read(blob, 0, 10)


@pytest.mark.parametrize(
    "fault",
    [
        faults.reset(),
        faults.reset(after=500),
        faults.short(after=500),
        faults.stall(),
        faults.stall(after=500),
        faults.drip(0.02),
        faults.drip(0.02, header=True),
        faults.status(503),
        faults.status(500),
    ],
)
def test_transient_faults_end_soon_and_deliver_a_true_prefix(
    server: FaultServer, client: HttpClient, fault: faults.Fault
) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    server.script("/f", fault)
    sink = Gather()
    began_s = time.monotonic()
    with pytest.raises(FetchError) as caught:
        blob.read_into(ByteRange(1000, 5000), sink)
    assert caught.value.transient
    assert time.monotonic() - began_s < 10
    assert sink.data == DATA[1000 : 1000 + len(sink.data)]
    assert read(blob, 1000, 5000) == DATA[1000:5000], "and the next attempt is a fresh one"


def test_server_says_when_to_come_again(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    server.script("/f", faults.status(429, {"Retry-After": "7"}))
    with pytest.raises(FetchError) as caught:
        read(blob, 0, 10)
    assert (caught.value.transient, caught.value.retry_after_s) == (True, 7.0)


@pytest.mark.parametrize("code", [401, 403, 404, 410, 407])
def test_refusals_say_what_to_do(server: FaultServer, client: HttpClient, code: int) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    server.script("/f", faults.status(code, body=b'{"errors":[{"code":"DENIED"}]}'))
    with pytest.raises(SourceError, match=rf"the blob: .*{code} .*DENIED") as caught:
        read(blob, 0, 10)
    assert not isinstance(caught.value, FetchError)
    assert ("log in" in str(caught.value)) == (code != 407)


def test_nobody_listens(client: HttpClient) -> None:
    with FaultServer() as server:
        url = server.add_file("/f", DATA)
    with pytest.raises(FetchError, match="connection refused") as caught:
        read(blob_at(client, url), 0, 10)
    assert caught.value.transient


def test_restarted_server_costs_no_attempt(server: FaultServer, client: HttpClient) -> None:
    blob = blob_at(client, server.add_file("/f", DATA))
    read(blob, 0, 10)
    server.stop()
    server.start()
    assert read(blob, 0, 10) == DATA[:10]


def test_sink_that_raises_ends_the_request(server: FaultServer, client: HttpClient) -> None:
    class Enough(Exception):
        pass

    def enough(size: int) -> None:
        if size > 2000:
            raise Enough

    blob = blob_at(client, server.add_file("/f", DATA))
    with pytest.raises(Enough):
        blob.read_into(ByteRange(0, len(DATA)), Gather(on_advance=enough))
    assert read(blob, 0, 10) == DATA[:10]
    assert server.connections == 2, "a half-read answer's connection is not used again"


def test_redirect_is_remembered_until_it_expires(client: HttpClient) -> None:
    with FaultServer() as registry, FaultServer() as storage:
        target = storage.add_file("/signed", DATA) + "?signature=secret"
        registry.always("/f", faults.redirect(target))
        blob = blob_at(client, f"{registry.url}/f")
        for _ in range(3):
            assert read(blob, 5, 50) == DATA[5:50]
        assert (registry.count("/f"), storage.count("/signed")) == (1, 3)
        for code in (403, 401, 404, 410, 400):
            storage.script("/signed", faults.status(code))
            assert read(blob, 5, 50) == DATA[5:50]
        assert registry.count("/f") == 6
        storage.script("/signed", faults.status(403), faults.status(403))
        with pytest.raises(SourceError, match="403") as caught:
            read(blob, 5, 50)
        assert "secret" not in str(caught.value)
        assert storage.host in str(caught.value)


class Badge:
    """An authorizer that would show its badge to one origin."""

    def __init__(self, server: FaultServer) -> None:
        self._origin = Origin("http", "127.0.0.1", server.port)

    def authorization(self, origin: Origin) -> str | None:
        return "Bearer badge" if origin == self._origin else None

    def renew(self, origin: Origin, challenge: str | None, rejected: str | None) -> str | None:
        return None


def test_credentials_do_not_cross_and_do_not_come_back(client: HttpClient) -> None:
    with FaultServer() as registry, FaultServer() as storage:
        registry.add_file("/end", DATA)
        registry.script("/f", faults.redirect("/g"), faults.redirect("/g"))
        registry.script("/g", faults.redirect(f"{storage.url}/s"))
        registry.script("/g", faults.redirect("/end"))
        storage.script("/s", faults.redirect(f"{registry.url}/end"))
        question = Question("the blob", "the host", "log in")
        for _ in range(2):
            blob = HttpBlob(
                client,
                f"{registry.url}/f",
                question=question,
                size_bytes=len(DATA),
                authorizer=Badge(registry),
            )
            assert read(blob, 0, 9) == DATA[:9]
        shown = [(seen.path, "Authorization" in seen.headers) for seen in registry.seen]
        assert shown == [
            ("/f", True),
            ("/g", True),
            ("/end", False),
            ("/f", True),
            ("/g", True),
            ("/end", True),
        ]
        assert "Authorization" not in storage.seen[0].headers


@pytest.mark.parametrize(
    "location",
    [
        "ftp://example.org/f",
        "http://user:secret@127.0.0.1/f",
        "http://[::1",
        "",
        "http://127.0.0.1:99999/",
    ],
)
def test_redirects_that_lead_nowhere(
    server: FaultServer, client: HttpClient, location: str
) -> None:
    server.script("/f", faults.redirect(location))
    with pytest.raises(SourceError) as caught:
        read(blob_at(client, f"{server.url}/f"), 0, 9)
    assert "secret" not in str(caught.value)


def test_a_redirect_whose_body_has_no_end(server: FaultServer, client: HttpClient) -> None:
    """It is let go of after a few KiB, whatever it says that it has."""
    sent_bytes = 0

    def endless(exchange: faults.Exchange) -> None:
        nonlocal sent_bytes
        exchange.head(307, {"Location": "/g", "Content-Length": str(1 << 40)})
        with contextlib.suppress(OSError):
            while sent_bytes < 64 << 20:
                exchange.write(bytes(1 << 20))
                sent_bytes += 1 << 20
        exchange.close()

    server.always("/f", endless)
    server.add_file("/g", DATA)
    assert read(blob_at(client, f"{server.url}/f"), 0, 9) == DATA[:9]
    assert sent_bytes < 32 << 20


def test_redirects_without_end(server: FaultServer, client: HttpClient) -> None:
    server.always("/f", faults.redirect("/f"))
    with pytest.raises(SourceError, match="more than 5 times"):
        read(blob_at(client, f"{server.url}/f"), 0, 9)
    assert server.count("/f") == 6


def test_messages_hold_no_signature(client: HttpClient) -> None:
    with FaultServer() as server:
        server.always("/f", faults.reset())
        query = f"?signature={SIGNATURE}"
        blob = blob_at(client, f"{server.url}/f{query}")
        with pytest.raises(FetchError) as caught:
            read(blob, 0, 9)
        server.script("/g", faults.drip(0.02))
        server.add_file("/g", DATA)
        with pytest.raises(FetchError) as dripped:
            read(blob_at(client, f"{server.url}/g{query}"), 0, 900)
    with pytest.raises(FetchError) as refused:
        read(blob, 0, 9)
    for error in (caught.value, dripped.value, refused.value):
        assert SIGNATURE not in "".join(traceback.format_exception(error))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody trusts, and its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += (
        f" -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def tls_server(certificate: tuple[Path, Path]) -> Iterator[FaultServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with FaultServer(tls=context) as server:
        yield server


def test_tls(tls_server: FaultServer, certificate: tuple[Path, Path]) -> None:
    url = tls_server.add_file("/f", DATA)
    endpoint = Endpoint(TlsConfig(authorities=(certificate[0],)))
    trusting = HttpClient(QUICK, endpoints=lambda _: endpoint)
    blob = blob_at(trusting, url)
    assert read(blob, 5, 200_000) == DATA[5:200_000]
    assert read(blob, 5, 200_000) == DATA[5:200_000]
    assert tls_server.connections == 1
    tls_server.script("/f", faults.stall(after=100), faults.short(after=100))
    for _ in range(2):
        with pytest.raises(FetchError) as caught:
            read(blob, 0, 1000)
        assert caught.value.transient
    tls_server.script("/f", faults.redirect("http://127.0.0.1:1/f"))
    with pytest.raises(SourceError, match="from https to plain http"):
        read(blob, 0, 1000)
    trusting.close()


def test_certificate_that_nobody_trusts(tls_server: FaultServer, client: HttpClient) -> None:
    with pytest.raises(SourceError, match="SSL_CERT_FILE") as caught:
        read(blob_at(client, tls_server.add_file("/f", DATA)), 0, 9)
    assert not isinstance(caught.value, FetchError)
    assert tls_server.count("/f") == 0


def test_tls_where_there_is_none(server: FaultServer, client: HttpClient) -> None:
    url = server.add_file("/f", DATA).replace("http:", "https:")
    with pytest.raises(SourceError, match="plain HTTP"):
        read(blob_at(client, url), 0, 9)


def test_close_lets_those_under_way_end(server: FaultServer) -> None:
    client = HttpClient(QUICK)
    blob = blob_at(client, server.add_file("/f", DATA))
    go = threading.Event()
    server.script("/f", faults.stall(after=100, until=go))
    begun = threading.Event()

    def note(_: int) -> None:
        begun.set()

    sink = Gather(on_advance=note)
    read_all: Callable[[], None] = lambda: blob.read_into(ByteRange(0, 5000), sink)  # noqa: E731
    thread = threading.Thread(target=read_all)
    thread.start()
    assert begun.wait(5)
    client.close()
    go.set()
    thread.join()
    assert sink.data == DATA[:5000]


@pytest.mark.parametrize("excepted", ["", "registry.invalid"])
def test_proxy_of_the_environment(server: FaultServer, excepted: str) -> None:
    """In a process of its own, for its environment; the fault server is the proxy."""
    server.add_file("/f", DATA)
    script = (
        "import sys\n"
        "from lazyfs.ground.settings import TransportSettings\n"
        "from lazyfs.transport.client import HttpClient\n"
        "client = HttpClient(TransportSettings())\n"
        "with client.open(sys.argv[1], {}) as reply:\n"
        "    print(reply.status, len(reply.read(10**6)))\n"
        "client.close()\n"
    )
    proxy = f"http://user:s3cr3t@{server.host}"
    environment = {**os.environ, "HTTP_PROXY": proxy, "NO_PROXY": excepted}
    done = subprocess.run(
        [sys.executable, "-c", script, "http://registry.invalid/f?sig=s3cr3t"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "s3cr3t" not in done.stderr
    if excepted:
        assert "UnknownHost: registry.invalid: its address is not known" in done.stderr
        assert server.count("/f") == 0
    else:
        assert done.stdout.split() == ["200", str(len(DATA))]
        assert "Proxy-Authorization" in server.seen[0].headers

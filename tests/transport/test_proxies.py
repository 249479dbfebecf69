"""Which proxy is asked, that its password is said to nobody else, and what it cannot be asked."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import SourceError
from lazyfs.transport.proxies import excepted, proxy_for
from lazyfs.transport.urls import Origin
from tests.certificates import Authority
from tests.faults import FaultServer
from tests.proxy import Proxy

DATA = random.Random(1).randbytes(300_000)
PROXY = "http://user:s3cr3t@proxy.example:3128"


def origin(host: str, port: int = 443, scheme: str = "https") -> Origin:
    return Origin(scheme, host, port)


@pytest.mark.parametrize(
    ("exceptions", "host", "port", "found"),
    [
        ("", "r.example", 443, False),
        ("*", "r.example", 443, True),
        ("r.example", "r.example", 443, True),
        ("R.Example", "r.example", 443, True),
        ("example", "r.example", 443, True),
        ("r.example", "notr.example", 443, False),
        ("r.example", "a.r.example", 443, True),
        (".example", "r.example", 443, True),
        (".r.example", "r.example", 443, False),
        ("*.example", "r.example", 443, True),
        ("*.r.example", "r.example", 443, False),
        ("a.example , r.example", "r.example", 443, True),
        ("r.example:443", "r.example", 443, True),
        ("r.example:5000", "r.example", 443, False),
        ("10.0.0.0/8", "10.1.2.3", 443, True),
        ("10.0.0.0/8", "11.1.2.3", 443, False),
        ("10.1.2.3/8", "10.9.9.9", 443, True),
        ("10.0.0.0/8", "r10.example", 443, False),
        ("10.1.2.3", "10.1.2.3", 443, True),
        ("10.1.2.3:5000", "10.1.2.3", 5000, True),
        ("10.1.2.3:5000", "10.1.2.3", 443, False),
        ("fd00::/8", "fd00::1", 443, True),
        ("fd00::1", "fd00::1", 443, True),
        ("[fd00::1]:443", "fd00::1", 443, True),
        ("[fd00::1]:80", "fd00::1", 443, False),
        ("fd00:0::1", "fd00::1", 443, True),
        ("10.0.0.0/99,:443,[", "10.0.0.1", 443, False),
    ],
)
def test_exceptions(exceptions: str, host: str, port: int, found: bool) -> None:
    assert excepted(origin(host, port), exceptions) is found


@given(st.text(alphabet="a.:/*[],1 \0ä") | st.text(), st.text(max_size=20))
def test_any_exceptions_are_read_without_an_error(exceptions: str, host: str) -> None:
    excepted(origin(host), exceptions)


def test_proxy_by_scheme() -> None:
    https, http = origin("r.example"), origin("r.example", 80, "http")
    assert proxy_for(https, {}) is None
    assert proxy_for(https, {"HTTPS_PROXY": PROXY}) == PROXY
    assert proxy_for(http, {"HTTPS_PROXY": PROXY}) is None
    assert proxy_for(http, {"http_proxy": "proxy:3128"}) == "http://proxy:3128"
    assert proxy_for(http, {"ALL_PROXY": PROXY}) == PROXY
    assert proxy_for(https, {"HTTPS_PROXY": "http://a", "ALL_PROXY": PROXY}) == "http://a"
    assert proxy_for(https, {"HTTPS_PROXY": PROXY, "no_proxy": "r.example"}) is None
    for host in ("localhost", "127.0.0.1", "::1"):
        assert proxy_for(origin(host), {"HTTPS_PROXY": PROXY}) is None


@pytest.mark.parametrize(
    "value",
    ["socks5://user:s3cr3t@p", "http://user:s3cr3t@", "http://u:s3cr3t@p:x", "s3cr3t@[", "://"],
)
def test_proxies_that_are_none(value: str) -> None:
    with pytest.raises(SourceError, match="HTTPS_PROXY") as caught:
        proxy_for(origin("r.example"), {"HTTPS_PROXY": value})
    assert "s3cr3t" not in str(caught.value)


_SCRIPT = """
import logging, sys
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.client import HttpClient
from lazyfs.transport.tls import Endpoint, TlsConfig
from lazyfs.transport.urls import Origin
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
endpoint = Endpoint(TlsConfig(authorities=(Path(sys.argv[2]),)))
client = HttpClient(TransportSettings(), endpoints=lambda origin: endpoint)
led_by = Origin("https", "registry.example", 443) if len(sys.argv) > 3 else None
try:
    for _ in range(2):
        with client.open(sys.argv[1], {}, led_by=led_by) as reply:
            print(reply.status, len(reply.read(10**6)))
except LazyfsError as error:
    print(error)
client.close()
"""


def ask(url: str, authority: Authority, proxy: str, *led: str) -> str:
    """Ask twice, in a process that has the environment from its start; return what it says."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, url, authority.certificate, *led],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "HTTPS_PROXY": proxy, "HTTP_PROXY": proxy},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "s3cr3t" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_tunnel_through_a_proxy_with_a_password(authority: Authority) -> None:
    """An address nobody has: only the proxy knows the way."""
    context = authority.context(authority.server("192.0.2.99"))
    with (
        FaultServer(tls=context) as server,
        Proxy(server.port, ("user", "s3cr3t/@")) as proxy,
    ):
        server.add_file("/f", DATA)
        url = "https://192.0.2.99/f?sig=s3cr3t"
        said = ask(url, authority, proxy.url("user:s3cr3t%2F%40@"))
        assert said.split() == ["200", str(len(DATA))] * 2
        assert [line.split()[:2] for line in proxy.seen] == [["CONNECT", "192.0.2.99:443"]]
        assert all("Proxy-Authorization" not in seen.headers for seen in server.seen)
        said = ask(url, authority, proxy.url("user:s3cr3tx@"))
        assert "the proxy on the way answered 407" in said
        assert "HTTPS_PROXY" in said
        said = ask(url, authority, proxy.url())
        assert "the proxy on the way answered 407" in said


def test_tunnel_does_not_hide_who_answers(authority: Authority) -> None:
    context = authority.context(authority.server("192.0.2.98"))
    with FaultServer(tls=context) as server, Proxy(server.port) as proxy:
        said = ask("https://192.0.2.99/f", authority, proxy.url())
        assert "certificate is not trusted" in said
        assert server.seen == []


def test_plain_http_through_a_proxy(authority: Authority) -> None:
    with FaultServer() as server, Proxy(server.port, ("user", "s3cr3t")) as proxy:
        server.add_file("/f", DATA)
        said = ask("http://registry.invalid/f", authority, proxy.url("user:s3cr3t@"))
        assert said.split() == ["200", str(len(DATA))] * 2
        assert all("Proxy-Authorization" not in seen.headers for seen in server.seen)


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "0xa9fea9fe"])
def test_proxy_is_not_asked_for_what_is_near_by_its_name(authority: Authority, host: str) -> None:
    with FaultServer() as server, Proxy(server.port) as proxy:
        server.add_file("/f", DATA)
        url = f"http://{host}/f"
        assert "--allow-local-redirects" in ask(url, authority, proxy.url(), "led")
        assert proxy.seen == []
        assert ask(url, authority, proxy.url()).startswith("200"), "by the user's own word"


def test_proxy_that_is_away(authority: Authority, tmp_path: Path) -> None:
    with Proxy(1) as proxy:
        pass
    said = ask("https://192.0.2.99/f", authority, proxy.url("user:s3cr3t@"))
    assert "connection refused (by the proxy on the way)" in said

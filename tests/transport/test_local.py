"""Who may lead to this machine's own addresses, judged by the address there is."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.errors import FetchError, SourceError
from lazyfs.transport.client import HttpClient
from lazyfs.transport.http import Connection
from lazyfs.transport.local import LocalGuard, Near, near
from lazyfs.transport.urls import Origin, origin_of
from tests import faults
from tests.faults import FaultServer
from tests.transport.gather import QUICK

REGISTRY = Origin("https", "registry.example", 443)
STORAGE = Origin("https", "storage.example", 443)


@pytest.fixture
def client() -> Iterator[HttpClient]:
    client = HttpClient(QUICK)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("127.0.0.1", Near.LOOPBACK),
        ("127.9.9.9", Near.LOOPBACK),
        ("127.1", Near.LOOPBACK),
        ("0x7f000001", Near.LOOPBACK),
        ("2130706433", Near.LOOPBACK),
        ("0177.0.0.1", Near.LOOPBACK),
        ("0.0.0.0", Near.LOOPBACK),
        ("0", Near.LOOPBACK),
        ("localhost", Near.LOOPBACK),
        ("LocalHost.", Near.LOOPBACK),
        ("x.localhost", Near.LOOPBACK),
        ("::1", Near.LOOPBACK),
        ("[::1]", Near.LOOPBACK),
        ("::", Near.LOOPBACK),
        ("::ffff:127.0.0.1", Near.LOOPBACK),
        ("::ffff:7f00:1", Near.LOOPBACK),
        ("64:ff9b::7f00:1", Near.LOOPBACK),
        ("2002:7f00:1::", Near.LOOPBACK),
        ("169.254.169.254", Near.LINK_LOCAL),
        ("::ffff:169.254.169.254", Near.LINK_LOCAL),
        ("64:ff9b::a9fe:a9fe", Near.LINK_LOCAL),
        ("fe80::1", Near.LINK_LOCAL),
        ("fe80::1%eth0", Near.LINK_LOCAL),
        ("fd00:ec2::254", Near.LINK_LOCAL),
        ("fd20:ce::254", Near.LINK_LOCAL),
        ("100.100.100.200", Near.LINK_LOCAL),
        ("168.63.129.16", Near.LINK_LOCAL),
        ("192.0.0.192", Near.LINK_LOCAL),
        ("10.0.0.1", None),
        ("192.168.1.1", None),
        ("172.16.0.1", None),
        ("fd00::1", None),
        ("8.8.8.8", None),
        ("2001:db8::1", None),
        ("::ffff:8.8.8.8", None),
        ("registry.example", None),
        ("localhost.example", None),
        ("notlocalhost", None),
        ("", None),
    ],
)
def test_what_is_near(host: str, found: Near | None) -> None:
    assert near(host) is found


@given(st.text(max_size=60))
def test_any_name_is_near_or_not(host: str) -> None:
    assert near(host) in (None, *Near)


def test_registry_elsewhere_may_not_lead_here() -> None:
    guard = LocalGuard(allow=False)
    guard.note(REGISTRY, "203.0.113.7")
    for address in ("127.0.0.1", "169.254.169.254", "::1"):
        with pytest.raises(SourceError, match=r"storage\.example.*--allow-local-redirects"):
            guard.check(STORAGE, address, REGISTRY)
        guard.check(STORAGE, address, None)
        LocalGuard(allow=True).check(STORAGE, address, REGISTRY)
    for address in ("10.1.2.3", "198.51.100.1", "storage.example"):
        guard.check(STORAGE, address, REGISTRY)


def test_registry_that_is_near_itself_may_lead_to_its_like() -> None:
    guard = LocalGuard(allow=False)
    guard.note(REGISTRY, "127.0.0.1")
    guard.check(STORAGE, "::1", REGISTRY)
    with pytest.raises(SourceError):
        guard.check(STORAGE, "169.254.169.254", REGISTRY)


def test_registry_that_is_near_only_at_times_counts_as_elsewhere() -> None:
    guard = LocalGuard(allow=False)
    guard.note(REGISTRY, "127.0.0.1")
    guard.note(REGISTRY, "203.0.113.7")
    guard.note(REGISTRY, "127.0.0.1")
    with pytest.raises(SourceError):
        guard.check(STORAGE, "127.0.0.1", REGISTRY)


def test_registry_behind_a_proxy_is_judged_by_its_name() -> None:
    guard = LocalGuard(allow=False)
    with pytest.raises(SourceError):
        guard.check(STORAGE, "127.0.0.1", REGISTRY)
    guard.check(STORAGE, "127.0.0.1", Origin("http", "localhost", 80))


def test_name_that_comes_to_mean_this_machine_is_sent_nothing(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an attacker's name server has it: the name itself gives nothing away."""
    real = socket.getaddrinfo

    def rebound(host: str, port: int, *rest: int, **named: int) -> object:
        host = "127.0.0.1" if host == "storage.example" else host
        return real(host, port, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    with FaultServer() as server:
        server.add_file("/f", b"secret")
        url = f"http://storage.example:{server.port}/f"
        for _ in range(2):
            with pytest.raises(SourceError, match="leads to storage") as caught:
                client.get(url, {}, limit_bytes=100, led_by=REGISTRY)
            assert not isinstance(caught.value, FetchError)
        with pytest.raises(SourceError, match="leads to storage"):
            client.post(url, {}, b"form", limit_bytes=100, led_by=REGISTRY)
        assert server.seen == []
        assert client.get(url, {}, limit_bytes=100).body == b"secret", "asked for by the user"
        with pytest.raises(SourceError, match="leads to storage"):
            client.get(url, {}, limit_bytes=100, led_by=REGISTRY)  # by the idle connection
        assert len(server.seen) == 1


def test_address_is_judged_before_a_byte_is_sent() -> None:
    with FaultServer() as server:
        server.add_file("/f", b"x")
        connection = Connection(origin_of(server.url), QUICK, None, {})

        def refuse(peer: str) -> None:
            raise SourceError(f"not to {peer}")

        with pytest.raises(SourceError, match=r"not to 127\.0\.0\.1"):
            connection.ask(f"{server.url}/f", {}, on_peer=refuse)
        assert (connection.peer, server.seen) == (None, [])
        connection.ask(f"{server.url}/f", {})
        assert connection.peer == "127.0.0.1"
        connection.close()


def test_registry_on_loopback_may_redirect_on_loopback(client: HttpClient) -> None:
    with FaultServer() as registry, FaultServer() as storage:
        target = storage.add_file("/g", b"data")
        registry.always("/f", faults.redirect(target))
        assert client.get(f"{registry.url}/f", {}, limit_bytes=100).body == b"data"
        registry.always("/m", faults.redirect("http://169.254.0.1/latest/meta-data"))
        with pytest.raises(SourceError, match="address of this link"):
            client.get(f"{registry.url}/m", {}, limit_bytes=100)

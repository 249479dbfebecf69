"""hosts.toml: which servers it names, in which order, and what it may not say."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.ground.errors import MalformedError
from lazyfs.transport.address import Address, addresses_by_hosts_toml
from lazyfs.transport.hosts_toml import HostServer, parse_hosts_toml
from lazyfs.transport.tls import ClientPair, TlsConfig

WHOLE = """
server = "https://registry.example.com"
ca = "/etc/pki/own.pem"

[host."https://mirror.example.net:5000"]
  capabilities = ["pull"]
  ca = ["a.pem", "/b.pem"]
  client = [["c.cert", "c.key"], "/both.pem"]
  dial_timeout = "1m2.5s"
  [host."https://mirror.example.net:5000".header]
    X-One = "1"
    X-Many = ["2", "3"]

[host."http://127.0.0.1:30020"]
  capabilities = ["Pull", "resolve"]
  skip_verify = true

[host."proxy.example.net/v2/hub"]
  override_path = true

[host."https://proxy.example.net/./x//hub/"]
"""


def parse(text: str) -> tuple[HostServer, ...]:
    return parse_hosts_toml(text, "hosts.toml", "/etc/certs.d/h")


def test_servers_in_order_the_own_one_last() -> None:
    mirror, local, override, below, own = parse(WHOLE)
    assert mirror == HostServer(
        scheme="https",
        host="mirror.example.net:5000",
        path="/v2",
        capabilities=frozenset({"pull"}),
        ca_files=("/etc/certs.d/h/a.pem", "/b.pem"),
        client_pairs=(
            ("/etc/certs.d/h/c.cert", "/etc/certs.d/h/c.key"),
            ("/both.pem", "/both.pem"),
        ),
        headers={"X-One": "1", "X-Many": "2, 3"},
        dial_timeout_s=62.5,
    )
    assert "X-One" not in repr(mirror)
    assert (local.scheme, local.host, local.skip_verify) == ("http", "127.0.0.1:30020", True)
    assert (override.scheme, override.path) == ("https", "/v2/hub")
    assert below.path == "/x/hub/v2"
    assert (own.host, own.ca_files) == ("registry.example.com", ("/etc/pki/own.pem",))
    assert own.capabilities == {"pull", "resolve", "push", "referrers"}
    assert parse("") == (HostServer("", "", "/v2"),)


def test_addresses() -> None:
    found = addresses_by_hosts_toml(parse(WHOLE), "registry.example.com", "team/app")
    assert found == [
        Address(
            "mirror.example.net:5000",
            "team/app",
            schemes=("https",),
            namespace="registry.example.com",
            tls=TlsConfig(
                authorities=(Path("/etc/certs.d/h/a.pem"), Path("/b.pem")),
                clients=(
                    ClientPair(Path("/etc/certs.d/h/c.cert"), Path("/etc/certs.d/h/c.key")),
                    ClientPair(Path("/both.pem")),
                ),
            ),
            headers={"X-One": "1", "X-Many": "2, 3"},
            connect_timeout_s=62.5,
            for_tags=False,
        ),
        Address(
            "127.0.0.1:30020",
            "team/app",
            schemes=("https", "http"),
            namespace="registry.example.com",
            tls=TlsConfig(verify=False),
        ),
        Address(
            "proxy.example.net",
            "team/app",
            schemes=("https",),
            root="/v2/hub",
            namespace="registry.example.com",
        ),
        Address(
            "proxy.example.net",
            "team/app",
            schemes=("https",),
            root="/x/hub/v2",
            namespace="registry.example.com",
        ),
        Address(
            "registry.example.com",
            "team/app",
            schemes=("https",),
            tls=TlsConfig(authorities=(Path("/etc/pki/own.pem"),)),
        ),
    ]


def test_docker_hub_and_a_file_that_does_not_name_its_server() -> None:
    text = 'server = "https://registry-1.docker.io"\n[host."http://cache:80"]\nskip_verify = false'
    cache, own = addresses_by_hosts_toml(parse(text), "docker.io", "library/alpine")
    assert (cache.schemes, cache.namespace) == (("http",), "docker.io")
    assert (own.host, own.namespace, own.schemes) == ("docker.io", None, ("https",))
    (unnamed,) = addresses_by_hosts_toml(parse(""), "127.0.0.1:5000", "x")
    assert unnamed == Address("127.0.0.1:5000", "x"), "its scheme is for the settings to say"


def test_a_server_to_push_to_is_not_asked() -> None:
    text = (
        '[host."https://a"]\ncapabilities = ["push"]\n[host."https://b"]\ncapabilities=["resolve"]'
    )
    assert [each.host for each in addresses_by_hosts_toml(parse(text), "c", "x")] == ["c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host = [", "is not TOML"),
        ("host = 'a'", "not a table of tables"),
        ("[host]\na = 'b'", "not a table of tables"),
        ("[host.'']", "without a URL"),
        ("server = 3", "server is not a string"),
        ("server = 'https://'", "makes no sense"),
        ("server = 'httpx://a'", "makes no sense"),
        ("server = 'https://a:99999'", "makes no sense"),
        ("server = 'https://[a'", "makes no sense"),
        ("server = 'https://a/b c'", "makes no sense"),
        ("server = 'https://user:secret@a'", "of a has a user name or password"),
        ("server = 'https://a?b'", "a query or a fragment"),
        ("override_path = 1", "override_path is neither"),
        ("skip_verify = 'no'", "skip_verify is neither"),
        ("capabilities = 'pull'", "not a list of strings"),
        ("capabilities = ['pull', 'fly']", "'fly' is no capability"),
        ("ca = 1", "ca is neither a file nor"),
        ("ca = ['']", "ca is neither a file nor"),
        ("client = 1", "client is neither a file nor"),
        ("client = [['a']]", r"\[certificate, key\]"),
        ("client = [['a', 'b', 'c']]", r"\[certificate, key\]"),
        ("header = 1", "header is not a table"),
        ("header = {a = 1}", "header 'a' is no string"),
        ('header = {a = "b\\r\\nc: d"}', "'a' cannot be sent"),
        ('header = {"a b" = "c"}', "'a b' cannot be sent"),
        ("dial_timeout = 3", "no duration"),
        ("dial_timeout = 'soon'", "no duration"),
        ("dial_timeout = '-1s'", "no duration"),
    ],
)
def test_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(MalformedError, match=message) as caught:
        parse(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3s", 3),
        ("500ms", 0.5),
        ("1h", 3600),
        ("1.5m", 90),
        ("10us", 1e-5),
        ("", None),
        ("0s", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse(f"dial_timeout = '{text}'")[0].dial_timeout_s == pytest.approx(seconds)


VALUE = st.sampled_from(
    ["true", "3", "'a'", "''", "['a']", "[['a', 'b']]", "{}", "{a = 'b'}", "'2s'", "['pull']"]
)
KEY = st.sampled_from(
    [
        "server",
        "capabilities",
        "ca",
        "client",
        "skip_verify",
        "header",
        "override_path",
        "dial_timeout",
        "host",
        "x",
    ]
)
TABLE = st.tuples(
    st.sampled_from(["", "[host]", "[host.a]", "[host.'https://b:1/c']", "[host.a.header]"]),
    st.dictionaries(KEY, VALUE, max_size=4),
).map(lambda each: "\n".join([each[0], *(f"{key} = {value}" for key, value in each[1].items())]))


@given(st.one_of(st.text(max_size=200), st.lists(TABLE, max_size=4).map("\n".join)))
@example("x = " + "[" * 5000)
@example("[host.'http://a:" + "1" * 5000 + "']")
@example("server = 'http://\u2488'")
def test_any_text_is_servers_or_an_error(text: str) -> None:
    try:
        servers = parse(text)
    except MalformedError:
        return
    assert servers
    assert all(server.host for server in servers[:-1])
    for address in addresses_by_hosts_toml(servers, "a.b", "c/d"):
        assert address.host
        assert set(address.schemes) <= {"http", "https"}

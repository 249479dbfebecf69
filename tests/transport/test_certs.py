"""Certificates put down for a registry: who is trusted, what is shown, and to whom."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.ground.errors import SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.certs import certs_directories, certs_for, registry_endpoints
from lazyfs.transport.client import HttpClient
from lazyfs.transport.tls import ClientPair, Endpoint, TlsConfig, machine_bundle
from lazyfs.transport.urls import origin_of
from tests import faults
from tests.certificates import Authority
from tests.faults import FaultServer
from tests.transport.gather import QUICK

DATA = random.Random(1).randbytes(1000)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def server(authority: Authority) -> Iterator[FaultServer]:
    with FaultServer(tls=authority.context(authority.server("127.0.0.1"))) as server:
        server.add_file("/f", DATA)
        yield server


@pytest.fixture
def strict(authority: Authority) -> Iterator[FaultServer]:
    """A server that wants a client certificate."""
    context = authority.context(authority.server("127.0.0.1"), wants_client=True)
    with FaultServer(tls=context) as server:
        server.add_file("/f", DATA)
        yield server


def put(directory: Path, host: str, **files: Path) -> None:
    (directory / host).mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        stem, _, suffix = name.rpartition("_")
        (directory / host / f"{stem}.{suffix}").write_bytes(path.read_bytes())


def get(url: str, name: str, certs: Path, own: Endpoint | None = None) -> bytes:
    endpoints = registry_endpoints(name, own=own, directories=[certs])
    client = HttpClient(QUICK, endpoints=endpoints)
    try:
        return client.get(url, {}, limit_bytes=10_000).body
    finally:
        client.close()


def test_directories_are_those_of_podman_and_the_first_counts(tmp_path: Path) -> None:
    assert certs_directories({"HOME": "/home/u"}) == [
        Path("/home/u/.config/containers/certs.d"),
        Path("/etc/containers/certs.d"),
        Path("/etc/docker/certs.d"),
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        (directory / "r.example:5000").mkdir(parents=True)
    (second / "r.example:5000/ca.crt").touch()
    assert certs_for("r.example:5000", [first, second]) == TlsConfig(), "as containers/image"
    found = certs_for("r.example:5000", [second, first])
    assert found == TlsConfig(authorities=(second / "r.example:5000/ca.crt",))
    (second / "ca.crt").touch()
    for name in ("r.example", "..", ".", "", "r.example:5000/..", "x\0"):
        assert certs_for(name, [first, second]) == TlsConfig()
    (tmp_path / "file").touch()
    assert certs_for("x", [tmp_path / "file"]) == TlsConfig()


def test_files_are_told_by_their_names(tmp_path: Path) -> None:
    directory = tmp_path / "r.example"
    directory.mkdir()
    for name in ("b.crt", "a.crt", "c.cert", "c.key", "README", "d.pem"):
        (directory / name).touch()
    assert certs_for("r.example", [tmp_path]) == TlsConfig(
        authorities=(directory / "a.crt", directory / "b.crt"),
        clients=(ClientPair(directory / "c.cert", directory / "c.key"),),
    )
    (directory / "e.cert").touch()
    with pytest.raises(SourceError, match=r"e\.cert has no key beside it \(e\.key\)"):
        certs_for("r.example", [tmp_path])
    (directory / "e.cert").unlink()
    (directory / "f.key").touch()
    with pytest.raises(SourceError, match=r"f\.key has no certificate"):
        certs_for("r.example", [tmp_path])


def test_authority_is_trusted_beside_those_of_the_machine(
    server: FaultServer, authority: Authority, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="not trusted"):
        get(f"{server.url}/f", server.host, tmp_path)
    put(tmp_path, server.host, ca_crt=authority.certificate)
    assert get(f"{server.url}/f", server.host, tmp_path) == DATA
    (tmp_path / server.host / "ca.crt").write_text("nothing")
    with pytest.raises(SourceError, match=r"authority .*ca\.crt cannot be used"):
        get(f"{server.url}/f", server.host, tmp_path)


def test_what_no_authority_would_mend_is_told_as_that(authority: Authority, tmp_path: Path) -> None:
    for pair, advice in (
        (authority.expired("127.0.0.1"), r"has expired\); whoever runs it has to renew it"),
        (authority.server("192.0.2.1"), "call it by a name that its certificate has$"),
    ):
        with FaultServer(tls=authority.context(pair)) as server:
            put(tmp_path, server.host, ca_crt=authority.certificate)
            with pytest.raises(SourceError, match=advice):
                get(f"{server.url}/f", server.host, tmp_path)


def test_client_certificate_is_shown_to_who_wants_it(
    strict: FaultServer, authority: Authority, tmp_path: Path
) -> None:
    put(tmp_path, strict.host, ca_crt=authority.certificate)
    with pytest.raises(SourceError, match="client certificate"):
        get(f"{strict.url}/f", strict.host, tmp_path)
    client = authority.client()
    put(tmp_path, strict.host, me_cert=client.certificate, me_key=client.key)
    assert get(f"{strict.url}/f", strict.host, tmp_path) == DATA
    (tmp_path / strict.host / "me.key").write_bytes(authority.pair.key.read_bytes())
    with pytest.raises(SourceError, match=r"me\.key cannot be used") as caught:
        get(f"{strict.url}/f", strict.host, tmp_path)
    assert "PRIVATE" not in str(caught.value)


def test_key_with_a_password_is_refused_not_asked_for(
    strict: FaultServer, authority: Authority, tmp_path: Path
) -> None:
    client = authority.client("locked")
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", client.key, "-out"]
    subprocess.run([*command, tmp_path / "locked.key"], check=True, capture_output=True)
    put(tmp_path, strict.host, ca_crt=authority.certificate)
    put(tmp_path, strict.host, me_cert=client.certificate, me_key=tmp_path / "locked.key")
    with pytest.raises(SourceError, match="it is encrypted"):
        get(f"{strict.url}/f", strict.host, tmp_path)


def test_first_of_several_client_certificates_is_shown(
    strict: FaultServer, authority: Authority, tmp_path: Path
) -> None:
    good, other = authority.client("one"), Authority(tmp_path / "ca").client("two")
    put(tmp_path, strict.host, ca_crt=authority.certificate)
    put(tmp_path, strict.host, a_cert=good.certificate, a_key=good.key)
    put(tmp_path, strict.host, b_cert=other.certificate, b_key=other.key)
    assert get(f"{strict.url}/f", strict.host, tmp_path) == DATA


def test_certificates_that_are_renewed_count_from_the_next_connection(
    strict: FaultServer, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger").client("stranger")
    put(tmp_path, strict.host, ca_crt=authority.certificate)
    put(tmp_path, strict.host, me_cert=stranger.certificate, me_key=stranger.key)
    endpoints = registry_endpoints(strict.host, directories=[tmp_path])
    client = HttpClient(QUICK, endpoints=endpoints)
    with pytest.raises(SourceError):
        client.get(f"{strict.url}/f", {}, limit_bytes=10_000)
    good = authority.client("good")
    put(tmp_path, strict.host, me_cert=good.certificate, me_key=good.key)
    assert client.get(f"{strict.url}/f", {}, limit_bytes=10_000).body == DATA
    client.close()


def test_what_is_the_registrys_own_does_not_go_where_it_leads(
    strict: FaultServer, server: FaultServer, authority: Authority, tmp_path: Path
) -> None:
    """The authority does: whoever has its key could be the registry, and lead anywhere."""
    client = authority.client()
    put(tmp_path, server.host, ca_crt=authority.certificate)
    put(tmp_path, server.host, me_cert=client.certificate, me_key=client.key)
    own = Endpoint(headers={"X-Secret": "s3cr3t"})
    server.always("/f", faults.redirect(f"{strict.url}/f"))
    with pytest.raises(SourceError, match="client certificate"):
        get(f"{server.url}/f", server.host, tmp_path, own)
    with FaultServer(tls=authority.context(authority.server("127.0.0.1"))) as storage:
        storage.add_file("/g", DATA)
        server.always("/h", faults.redirect(f"{storage.url}/g"))
        assert get(f"{server.url}/h", server.host, tmp_path, own) == DATA
        assert "X-Secret" not in storage.seen[0].headers
    assert server.seen[-1].headers["X-Secret"] == "s3cr3t"
    put(tmp_path, strict.host, its_cert=client.certificate, its_key=client.key)
    assert get(f"{server.url}/f", server.host, tmp_path, own) == DATA, "that one has its own"
    assert "X-Secret" not in strict.seen[0].headers


def test_without_verifying_only_the_registrys_host_is_believed(tmp_path: Path) -> None:
    said = Endpoint(TlsConfig(verify=False))
    endpoints = registry_endpoints("r.example:5000", own=said, directories=[tmp_path])

    def verified(url: str) -> bool:
        return endpoints(origin_of(url)).tls.verify

    assert not verified("https://r.example:5000/")
    assert not verified("https://r.example/token"), "the same host"
    assert verified("https://storage.example/")
    assert verified("https://r.example.evil/")
    hub = registry_endpoints(
        "docker.io", served_by="registry-1.docker.io", own=said, directories=[tmp_path]
    )
    assert not hub(origin_of("https://registry-1.docker.io/v2/")).tls.verify
    assert hub(origin_of("https://auth.docker.io/token")).tls.verify


def test_unverified_server_is_read_without_a_warning(server: FaultServer, tmp_path: Path) -> None:
    said = Endpoint(TlsConfig(verify=False))
    assert get(f"{server.url}/f", server.host, tmp_path, said) == DATA


def test_settings_verify_unless_told() -> None:
    assert TransportSettings().tls_verify


def test_the_first_bundle_that_this_machine_has_is_its_trust(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("debian", "fedora", "alpine")]
    (tmp_path / "debian").mkdir()
    assert machine_bundle(map(str, places)) is None
    for path in places[1:]:
        path.touch()
    assert machine_bundle(map(str, places)) == str(tmp_path / "fedora")

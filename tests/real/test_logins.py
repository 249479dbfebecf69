"""The real registry with a password, a token server, TLS and client certificates.

What a person has put down for Podman is all that lazyfs is given: skopeo reads the same image
from the same home directory.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from testbed import Layer, Registry, Session, Wan, push_oci_image
from testbed.registry import free_port

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.registry import RegistrySource
from tests.certificates import Authority
from tests.exchange import Exchange
from tests.faults import FaultServer, redirect
from tests.images import tar_bytes
from tests.real.conftest import Store
from tests.transport.gather import read

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

PAGES = bytes(range(256)) * 5000
LAYER = tar_bytes(
    {"checkpoint/": b"", "checkpoint/inventory.img": b"i", "checkpoint/pages-1.img": PAGES}
)
PASSWORD = "s3cr3t"
HASH = "$2b$04$0dc3EQI5VlB0/hMa5gXANeYzPzkJcMWddSAgBZuH320isQinL00Hy"
"""Of the password, by bcrypt."""


@pytest.fixture
def image(store: Store, work: Path) -> str:
    (work / "layer.tar").write_bytes(LAYER)
    push_oci_image(store.address, "logins", "1", [Layer(work / "layer.tar")])
    return "logins:1"


@dataclass(frozen=True)
class Home:
    """A person's home directory, as Podman knows it."""

    path: Path
    cache: Path

    def log_in(self, host: str, entry: Mapping[str, str]) -> None:
        auths = {"auths": {host: dict(entry)}}
        for name in (".docker/config.json", "auth.json"):
            (self.path / name).parent.mkdir(exist_ok=True)
            (self.path / name).write_text(json.dumps(auths))

    def put(self, host: str, authority: Authority, *, client: bool = False) -> None:
        directory = self.path / ".config/containers/certs.d" / host
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "ca.crt").write_bytes(authority.certificate.read_bytes())
        if client:
            pair = authority.client()
            (directory / "client.cert").write_bytes(pair.certificate.read_bytes())
            (directory / "client.key").write_bytes(pair.key.read_bytes())

    def lazyfs(self, *words: str) -> tuple[int, bytes, str]:
        """Run a command; return exit code, output and what it says."""
        environ = {
            "HOME": str(self.path),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "lazyfs", words[0], f"--cache-dir={self.cache}"]
        done = subprocess.run(
            [*command, *words[1:]], capture_output=True, env=environ, timeout=90, check=False
        )
        assert PASSWORD not in done.stderr.decode()
        return done.returncode, done.stdout, done.stderr.decode()

    def skopeo(self, store: Store, reference: str) -> str:
        """Return the image's manifest as skopeo reads it with the same home."""
        with Session(store.testbed, [self.path]) as session:
            command = ["env", f"HOME={self.path}", "skopeo", "inspect", "--raw"]
            authfile = f"--authfile={self.path}/auth.json"
            return session.run([*command, authfile, f"docker://{reference}"])


@pytest.fixture
def home(work: Path) -> Home:
    (work / "home").mkdir()
    return Home(work / "home", work / "cache")


def served(store: Store, work: Path, port: int, **stanzas: Any) -> Registry:
    """The store's contents, served otherwise."""
    directory = work / "registry"
    directory.mkdir()
    (directory / "data").symlink_to(store.data)
    return Registry(store.testbed, directory, port=port, config=stanzas)


def test_password_and_client_certificate(store: Store, image: str, home: Home, work: Path) -> None:
    authority = Authority(work / "authority")
    pair = authority.server("127.0.0.1")
    htpasswd = work / "htpasswd"
    htpasswd.write_text(f"user:{HASH}\n")
    tls = {"certificate": str(pair.certificate), "key": str(pair.key)}
    registry = served(
        store,
        work,
        free_port(),
        http={"tls": {**tls, "clientcas": [str(authority.certificate)]}},
        auth={"htpasswd": {"realm": "here", "path": str(htpasswd)}},
    )
    with registry:
        reference = f"{registry.address}/{image}"
        read = ("cat", reference, "pages-1.img")
        code, _, said = home.lazyfs(*read)
        assert (code, "not trusted" in said) == (3, True), said
        home.put(registry.address, authority)
        code, _, said = home.lazyfs(*read)
        assert (code, "client certificate" in said) == (3, True), said
        home.put(registry.address, authority, client=True)
        code, _, said = home.lazyfs(*read)
        assert (code, "podman login" in said) == (3, True), said
        home.log_in(registry.address, password("wrong"))
        code, _, said = home.lazyfs(*read)
        assert (code, "are not good for it" in said) == (3, True), said
        home.log_in(registry.address, password(PASSWORD))
        assert home.lazyfs(*read) == (0, PAGES, "")
        layer = json.loads(home.skopeo(store, reference))["layers"][0]
        assert layer["size"] == len(LAYER), "what is put down is what Podman's family takes"


def password(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"user:{text}".encode()).decode()}


class TokenServer:
    """Signs tokens for the registry, for a password or an identity token."""

    def __init__(self, work: Path, server: FaultServer) -> None:
        self.certificate, self._key = work / "token.crt", work / "token.key"
        self.server = server
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=tokens", "-keyout", str(self._key)]
        subprocess.run([*command, "-out", self.certificate], check=True, capture_output=True)
        server.always("/token", self._answer)
        self.issued = 0

    @property
    def stanza(self) -> dict[str, Any]:
        return {
            "token": {
                "realm": f"{self.server.url}/token",
                "service": "the registry",
                "issuer": "tokens",
                "rootcertbundle": str(self.certificate),
            }
        }

    def _answer(self, exchange: Exchange) -> None:
        basic = password(PASSWORD)["auth"]
        by_password = exchange.seen.headers.get("Authorization") == f"Basic {basic}"
        if not by_password and b"refresh_token=r3fresh&" not in exchange.seen.body + b"&":
            exchange.answer(401, {}, b"{}")
            return
        self.issued += 1
        now_s = int(time.time())
        claims = {
            "iss": "tokens",
            "sub": "user",
            "aud": "the registry",
            "exp": now_s + 60,
            "nbf": now_s - 60,
            "iat": now_s - 60,
            "jti": str(self.issued),
            "access": [{"type": "repository", "name": "logins", "actions": ["pull"]}],
        }
        text = json.dumps({"token": self._signed(claims), "expires_in": 60})
        exchange.answer(200, {"Content-Type": "application/json"}, text.encode())

    def _signed(self, claims: Mapping[str, Any]) -> str:
        der = "".join(self.certificate.read_text().splitlines()[1:-1])
        header = {"typ": "JWT", "alg": "RS256", "x5c": [der]}
        parts = [_url64(json.dumps(each).encode()) for each in (header, claims)]
        signing = ["openssl", "dgst", "-sha256", "-sign", str(self._key)]
        signature = subprocess.run(
            signing, input=".".join(parts).encode(), check=True, capture_output=True
        )
        return ".".join([*parts, _url64(signature.stdout)])


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize("entry", [password(PASSWORD), {"identitytoken": "r3fresh"}])
def test_token_server(
    store: Store, image: str, home: Home, work: Path, entry: dict[str, str]
) -> None:
    with FaultServer() as server:
        tokens = TokenServer(work, server)
        with served(store, work, free_port(), auth=tokens.stanza) as registry:
            reference = f"{registry.address}/{image}"
            code, _, said = home.lazyfs("cat", reference, "pages-1.img")
            assert (code, "a token to pull" in said) == (3, True), said
            home.log_in(registry.address, entry)
            assert home.lazyfs("cat", reference, "pages-1.img") == (0, PAGES, "")
            assert tokens.issued == 1


def test_registry_elsewhere_may_not_lead_to_loopback(store: Store, image: str, home: Home) -> None:
    """By a redirect or by its realm, unless a person says so; seen by the address there is."""
    with Wan(store.testbed) as wan, FaultServer("logins", address=wan.near_ip) as far:
        reference = f"{far.host}/{image}"
        lead = [f"http://{store.address}", f"http://localhost:{store.address.rpartition(':')[2]}"]

        def to(host: str) -> Callable[[Exchange], None]:
            return lambda exchange: redirect(host + exchange.seen.path)(exchange)

        for host in lead:
            far.always("/v2/", to(host))
            read = ("cat", "--plain-http", reference, "pages-1.img")
            code, _, said = home.lazyfs(*read)
            assert code == 3
            assert "this machine's own address, which is refused" in said
            allowed = home.lazyfs("cat", "--allow-local-redirects", *read[1:])
            assert allowed == (0, PAGES, "")
            far.forgive()
        with FaultServer() as local:
            far.auth, far.realm = "bearer", f"{local.url}/token"
            code, _, said = home.lazyfs(*read)
            assert (code, "is refused" in said) == (3, True), said
            assert local.seen == []


def test_name_that_is_rebound_is_not_followed_here(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signed URL that is remembered is judged anew with each connection."""
    here = False
    real = socket.getaddrinfo

    def rebound(host: str, *rest: Any, **named: Any) -> Any:
        if host == "storage.example":
            host = "127.0.0.1" if here else wan.near_ip
        return real(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    with (
        Wan(store.testbed) as wan,
        FaultServer(address=wan.near_ip) as registry,
        FaultServer(address=wan.near_ip) as storage,
    ):
        local = FaultServer()
        local.port = storage.port
        with local:
            for each in (storage, local):
                each.add_file("/signed", PAGES)
            digest = registry.add_blob(PAGES)
            registry.always("/blobs/", redirect(f"http://storage.example:{storage.port}/signed"))
            settings = TransportSettings(plain_http=True, deadline_s=5)
            source = RegistrySource(
                registry.host, registry.repository, settings=settings, counters=Counters()
            )
            blob = source.blob(Digest.parse(digest), len(PAGES))
            assert read(blob, 0, 100) == PAGES[:100]
            assert read(blob, 100, 200) == PAGES[100:200]
            assert (registry.count("/blobs/"), storage.count("/signed")) == (1, 2)
            storage.stop()
            here = True
            for _ in range(2):
                with pytest.raises(SourceError, match="this machine's own address"):
                    read(blob, 0, 100)
            assert local.seen == []
            source.close()

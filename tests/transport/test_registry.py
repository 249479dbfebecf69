"""Pulling from a registry: manifests proven, blobs by range, credentials as asked for."""

import base64
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, MalformedError, SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.registry import RegistrySource
from tests import faults
from tests.faults import OCI_MANIFEST, FaultServer
from tests.transport.gather import QUICK, read

BLOB = random.Random(3).randbytes(200_000)
MANIFEST = {"schemaVersion": 2, "layers": []}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def source(server: FaultServer, tmp_path: Path) -> Iterator[RegistrySource]:
    source = open_source(server, tmp_path)
    yield source
    source.close()


def open_source(
    server: FaultServer, directory: Path, settings: TransportSettings = QUICK
) -> RegistrySource:
    """Open the server's repository with the auth file `auth.json` of the directory."""
    authfile = directory / "auth.json"
    if not authfile.exists():
        authfile.write_text("{}")
    return RegistrySource(
        server.host, server.repository, settings=settings, counters=Counters(), authfile=authfile
    )


def log_in(server: FaultServer, directory: Path, username: str, password: str) -> None:
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    (directory / "auth.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))


def test_manifest_by_tag_and_digest(server: FaultServer, source: RegistrySource) -> None:
    digest = server.add_manifest(MANIFEST, "v1")
    server.add_manifest(MANIFEST, "latest")
    for reference in ("v1", digest, None):
        manifest = source.manifest(reference)
        assert str(manifest.digest) == digest
        assert json.loads(manifest.data) == MANIFEST
        assert manifest.media_type == OCI_MANIFEST
    assert "image.index" in server.seen[0].headers["Accept"]
    assert "docker.distribution.manifest.list.v2" in server.seen[0].headers["Accept"]
    assert server.connections == 1


def test_manifest_that_lies(server: FaultServer, source: RegistrySource) -> None:
    digest = server.add_manifest(MANIFEST, "v1")
    server.always("/manifests/", faults.corrupt)
    for reference in ("v1", digest):
        with pytest.raises(IntegrityError):
            source.manifest(reference)


def test_manifest_that_lies_without_saying_a_digest(
    server: FaultServer, source: RegistrySource
) -> None:
    digest = server.add_manifest(MANIFEST)
    server.add_manifest({"schemaVersion": 2, "layers": [], "x": 1}, "other")
    path = f"/v2/{server.repository}/manifests/"
    server.resources[path + digest] = server.resources[path + "other"]
    server.resources[path + digest].headers.clear()
    with pytest.raises(IntegrityError, match="does not match its digest"):
        source.manifest(digest)
    server.resources[path + "other"].headers["Docker-Content-Digest"] = "md5:0"
    with pytest.raises(IntegrityError, match="Docker-Content-Digest"):
        source.manifest("other")


def test_manifest_without_end(server: FaultServer, source: RegistrySource) -> None:
    server.add_manifest(b" " * (4 * 1024 * 1024 + 1), "v1")
    with pytest.raises(SourceError, match="more than the 4194304 bytes"):
        source.manifest("v1")


def test_manifest_that_is_not_there(server: FaultServer, source: RegistrySource) -> None:
    with pytest.raises(
        SourceError, match=r"team/checkpoint:v2: .*404 .*NAME_UNKNOWN.*podman login"
    ):
        source.manifest("v2")
    assert server.count("/manifests/v2") == 1


def test_metadata_is_asked_for_again(server: FaultServer, source: RegistrySource) -> None:
    server.add_manifest(MANIFEST, "v1")
    server.script(
        "/manifests/",
        faults.status(503),
        faults.status(429, {"Retry-After": "0"}),
        faults.short(after=3),
        faults.reset(),
        faults.drip(0.2),
    )
    assert json.loads(source.manifest("v1").data) == MANIFEST
    assert server.count("/manifests/") == 6


def test_registry_that_is_away(server: FaultServer, tmp_path: Path) -> None:
    server.stop()
    source = open_source(server, tmp_path, TransportSettings(deadline_s=0.1))
    with pytest.raises(FetchError, match=r"gave up.*connection refused"):
        source.manifest("v1")


def test_blobs(server: FaultServer, source: RegistrySource) -> None:
    digest = Digest.parse(server.add_blob(BLOB))
    blob = source.blob(digest, len(BLOB))
    assert blob.name == f"{server.host}/team/checkpoint@{digest}"
    assert read(blob, 1000, 150_000) == BLOB[1000:150_000]
    assert source.read_blob(digest, len(BLOB)) == BLOB
    with pytest.raises(SourceError, match="more than the 10 bytes"):
        source.read_blob(digest, 10)
    server.script("/blobs/", faults.corrupt)
    with pytest.raises(IntegrityError):
        source.read_blob(digest, len(BLOB))
    with pytest.raises(MalformedError):
        source.read_blob(digest, 1 << 40)


@pytest.mark.parametrize("life_s", [300, None, 0.001])
def test_anonymous_token(server: FaultServer, source: RegistrySource, life_s: float | None) -> None:
    server.auth, server.token_life_s = "bearer", life_s
    digest = Digest.parse(server.add_blob(BLOB))
    server.add_manifest(MANIFEST, "v1")
    source.manifest("v1")
    blob = source.blob(digest, len(BLOB))
    assert read(blob, 0, 10) == BLOB[:10]
    if life_s != 0.001:
        assert server.tokens_issued == 1
        assert server.count("/v2/") == 3, "only the first request was refused"
        server.revoke()
        assert read(blob, 0, 10) == BLOB[:10]
        assert server.tokens_issued == 2


def test_many_threads_fetch_one_token(server: FaultServer, source: RegistrySource) -> None:
    server.auth = "bearer"
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    with ThreadPoolExecutor(8) as pool:
        ranges = [(at, at + 100) for at in range(0, 10_000, 100)]
        assert b"".join(pool.map(lambda each: read(blob, *each), ranges)) == BLOB[:10_000]
    assert server.tokens_issued == 1


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
def test_password(server: FaultServer, tmp_path: Path, scheme: str) -> None:
    server.auth, server.password = scheme, ("user", "s3cr3t")
    server.add_manifest(MANIFEST, "v1")
    source = open_source(server, tmp_path)
    with pytest.raises(SourceError, match=r"401 .*log in with `podman login 127"):
        source.manifest("v1")
    log_in(server, tmp_path, "user", "wr0ng")
    with pytest.raises(SourceError, match=r"auth\.json are not good") as caught:
        source.manifest("v1")
    assert "wr0ng" not in str(caught.value)
    log_in(server, tmp_path, "user", "s3cr3t")
    source.manifest("v1")
    source.manifest("v1")
    source.close()


def test_token_that_is_refused_is_not_fetched_for_ever(
    server: FaultServer, source: RegistrySource
) -> None:
    server.auth = "bearer"
    server.always(
        "/v2/",
        faults.status(
            401,
            {"WWW-Authenticate": f'Bearer realm="{server.url}/token",service="test, with a comma"'},
        ),
    )
    with pytest.raises(SourceError, match="401"):
        source.manifest("v1")
    assert (server.tokens_issued, server.count("/v2/")) == (1, 2)


def test_token_server_that_stumbles(server: FaultServer, source: RegistrySource) -> None:
    server.auth = "bearer"
    server.add_manifest(MANIFEST, "v1")
    server.script("/token", faults.status(503), faults.reset(), faults.status(429))
    source.manifest("v1")
    server.revoke()
    server.script("/token", faults.status(200, body=b"<html>"))
    with pytest.raises(SourceError, match="something else than a token"):
        source.manifest("v1")


def test_credentials_do_not_follow_to_storage(server: FaultServer, tmp_path: Path) -> None:
    server.auth, server.password = "bearer", ("user", "s3cr3t")
    log_in(server, tmp_path, "user", "s3cr3t")
    source = open_source(server, tmp_path)
    digest = Digest.parse(server.add_blob(BLOB))
    with FaultServer() as storage:
        target = storage.add_file("/signed", BLOB)

        def admitted(exchange: faults.Exchange) -> None:
            assert exchange.seen.headers["Authorization"].startswith("Bearer ")
            faults.redirect(target)(exchange)

        server.add_manifest(MANIFEST, "v1")
        source.manifest("v1")
        server.script("/blobs/", admitted)
        blob = source.blob(digest, len(BLOB))
        assert read(blob, 0, 10) == BLOB[:10]
        assert read(blob, 10, 20) == BLOB[10:20]
        assert [("Authorization" in seen.headers) for seen in storage.seen] == [False, False]
        storage.script("/signed", faults.status(403))
        assert read(blob, 10, 20) == BLOB[10:20], "asked the registry again"
    source.close()


def test_loopback_registry_that_speaks_tls_only(
    server: FaultServer, source: RegistrySource
) -> None:
    server.script("/manifests/", faults.status(400))
    with pytest.raises(SourceError, match="TLS"):
        source.manifest("v1")

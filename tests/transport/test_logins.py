"""A login over the life of a mount: expired, revoked, rotated, and the token server away.

Reads go through the policy that a mount has, so that what passes is waited for.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.blob import Blob
from lazyfs.transport.registry import RegistrySource
from lazyfs.transport.retry import Fetcher
from tests import faults
from tests.certificates import Authority
from tests.faults import FaultServer
from tests.transport.gather import QUICK, Gather

BLOB = bytes(range(256)) * 100


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.auth = "bearer"
        yield server


def write(authfile: Path, server: FaultServer, entry: dict[str, str]) -> None:
    authfile.write_text(json.dumps({"auths": {server.host: entry}}))


def password(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"user:{text}".encode()).decode()}


@pytest.fixture
def authfile(tmp_path: Path, server: FaultServer) -> Path:
    path = tmp_path / "auth.json"
    server.password = ("user", "s3cr3t")
    write(path, server, password("s3cr3t"))
    return path


@pytest.fixture
def source(server: FaultServer, authfile: Path) -> Iterator[RegistrySource]:
    source = RegistrySource(
        server.host, server.repository, settings=QUICK, counters=Counters(), authfile=authfile
    )
    yield source
    source.close()


async def fetch(blob: Blob, settings: TransportSettings = QUICK) -> bytes:
    sink = Gather()
    limiter = trio.CapacityLimiter(1)
    fetcher = Fetcher(settings, Counters())
    await fetcher.fetch(blob, ByteRange(100, 5000), sink, limiter=limiter)
    return bytes(sink.data)


@pytest.mark.parametrize("status", [401, 403])
async def test_token_that_expired_early_is_renewed_once_whatever_the_refusal(
    server: FaultServer, source: RegistrySource, status: int
) -> None:
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    assert await fetch(blob) == BLOB[100:5000]
    server.revoke()
    server.script("/blobs/", faults.status(status, {}))
    assert await fetch(blob) == BLOB[100:5000]
    assert server.tokens_issued == 2
    server.always("/blobs/", faults.status(status, {}))
    with pytest.raises(SourceError, match=str(status)):
        await fetch(blob)
    assert server.tokens_issued == 3


async def test_token_server_that_is_away_as_the_token_expires_is_waited_for(
    server: FaultServer, source: RegistrySource
) -> None:
    server.token_life_s = 0.001
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    assert await fetch(blob) == BLOB[100:5000]
    server.script("/token", faults.status(503), faults.reset(), faults.status(500), faults.stall())
    assert await fetch(blob) == BLOB[100:5000]


async def test_registry_that_restarts_as_the_token_expires_is_waited_for(
    server: FaultServer, source: RegistrySource
) -> None:
    server.token_life_s = 0.001
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    assert await fetch(blob) == BLOB[100:5000]
    server.stop()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def restart() -> None:
            await trio.sleep(0.2)
            await trio.to_thread.run_sync(server.start)

        assert await fetch(blob) == BLOB[100:5000]


async def test_password_that_is_rotated_counts_from_the_next_read(
    server: FaultServer, source: RegistrySource, authfile: Path
) -> None:
    server.token_life_s = 0.001
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    assert await fetch(blob) == BLOB[100:5000]
    server.password = ("user", "an0ther")
    with pytest.raises(SourceError, match=r"auth\.json are not good") as caught:
        await fetch(blob)
    assert "s3cr3t" not in str(caught.value)
    write(authfile, server, password("an0ther"))
    assert await fetch(blob) == BLOB[100:5000]
    await trio.Path(authfile).unlink()
    with pytest.raises(SourceError, match="does not exist"):
        await fetch(blob)


async def test_basic_password_that_is_rotated_counts_from_the_next_read(
    server: FaultServer, source: RegistrySource, authfile: Path
) -> None:
    server.auth = "basic"
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    assert await fetch(blob) == BLOB[100:5000]
    server.password = ("user", "an0ther")
    with pytest.raises(SourceError, match="401"):
        await fetch(blob)
    write(authfile, server, password("an0ther"))
    assert await fetch(blob) == BLOB[100:5000]


async def test_identity_token_is_all_that_is_needed(
    server: FaultServer, source: RegistrySource, authfile: Path
) -> None:
    write(authfile, server, {"identitytoken": "wr0ng"})
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    server.identity_token = "r3fresh"
    with pytest.raises(SourceError, match="401") as caught:
        await fetch(blob)
    assert "wr0ng" not in str(caught.value)
    write(authfile, server, {"identitytoken": "r3fresh"})
    server.script("/token", faults.status(503))
    assert await fetch(blob) == BLOB[100:5000]
    asked = [seen for seen in server.seen if seen.path == "/token"]
    assert {seen.method for seen in asked} == {"POST"}
    assert all("Authorization" not in seen.headers for seen in asked)


async def test_identity_token_does_not_follow_a_redirect(
    server: FaultServer, source: RegistrySource, authfile: Path
) -> None:
    write(authfile, server, {"identitytoken": "r3fresh"})
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    with FaultServer() as elsewhere:
        server.always("/token", faults.redirect(f"{elsewhere.url}/token"))
        with pytest.raises(SourceError, match="307"):
            await fetch(blob)
        assert elsewhere.seen == []


async def test_password_does_not_follow_a_redirect_of_the_token_server(
    server: FaultServer, source: RegistrySource
) -> None:
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    with FaultServer() as elsewhere:
        server.always("/token", faults.redirect(f"{elsewhere.url}/token"))
        elsewhere.always("/token", faults.status(404, {}))
        with pytest.raises(SourceError):
            await fetch(blob)
        assert "Authorization" in next(s for s in server.seen if s.path == "/token").headers
        assert elsewhere.count("/token") > 0
        assert all("Authorization" not in each.headers for each in elsewhere.seen)


@pytest.mark.parametrize("challenge", ["Basic realm=x", "Bearer realm={}/token,service=x"])
async def test_storage_that_asks_for_a_login_gets_none(
    server: FaultServer, source: RegistrySource, challenge: str
) -> None:
    """Its signed URL has expired, and it would have what the registry was shown."""
    digest = Digest.parse(server.add_blob(BLOB))
    blob = source.blob(digest, len(BLOB))
    assert await fetch(blob) == BLOB[100:5000]
    with FaultServer() as storage:
        target = storage.add_file("/signed", BLOB)
        server.script("/blobs/", faults.redirect(target))
        assert await fetch(blob) == BLOB[100:5000]
        for status in (401, 403, 410):
            headers = {"WWW-Authenticate": challenge.format(storage.url)}
            storage.script("/signed", faults.status(status, headers))
            server.script("/blobs/", faults.redirect(target))
            assert await fetch(blob) == BLOB[100:5000]
        assert storage.count("/token") == 0
        assert all("Authorization" not in seen.headers for seen in storage.seen)
    assert server.tokens_issued == 1, "the token is as good as before"


async def test_signed_url_that_expires_in_mid_transfer_is_asked_for_anew(
    server: FaultServer, source: RegistrySource
) -> None:
    digest = Digest.parse(server.add_blob(BLOB))
    blob = source.blob(digest, len(BLOB))
    with FaultServer() as storage:
        old, new = storage.add_file("/old", BLOB), storage.add_file("/new", BLOB)
        await fetch(blob)
        for status in (401, 403, 410):
            server.script("/blobs/", faults.redirect(old), faults.redirect(new))
            storage.script("/old", faults.short(after=1000), faults.status(status))
            storage.script("/new", faults.status(503))
            assert await fetch(blob) == BLOB[100:5000]
            server.forgive()
            storage.forgive()
            await fetch(blob)


async def test_realm_on_this_machine_is_refused_to_a_registry_elsewhere(
    server: FaultServer, source: RegistrySource
) -> None:
    server.realm = "http://169.254.0.1/token"
    blob = source.blob(Digest.parse(server.add_blob(BLOB)), len(BLOB))
    with pytest.raises(SourceError, match="where clouds keep their metadata"):
        await fetch(blob)


@pytest.mark.parametrize("speaks_tls", [True, False])
def test_registry_that_need_not_prove_who_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, speaks_tls: bool
) -> None:
    """As with Podman's --tls-verify=false: HTTPS with any certificate, or plain HTTP."""
    authority = Authority(tmp_path)
    context = authority.context(authority.server("192.0.2.1"))
    with FaultServer(tls=context if speaks_tls else None) as server:
        server.add_manifest({"schemaVersion": 2}, "v1")
        for verify in (False, True) if speaks_tls else (False,):
            settings = replace(QUICK, tls_verify=verify)
            source = RegistrySource(
                server.host, server.repository, settings=settings, counters=Counters()
            )
            if verify:
                with pytest.raises(SourceError, match="certificate is not trusted"):
                    source.manifest("v1")
            else:
                source.manifest("v1")
                assert "--tls-verify=false" in caplog.text
            source.close()

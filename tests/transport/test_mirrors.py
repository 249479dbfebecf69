"""A repository at several places: who is asked for what, and what becomes of those who fail."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError, SourceError, UnknownHost
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.address import Address, addresses_by_hosts_toml
from lazyfs.transport.blob import Blob
from lazyfs.transport.hosts_toml import parse_hosts_toml
from lazyfs.transport.mirrors import MirroredSource, open_repository
from lazyfs.transport.place import ManyPlaces
from lazyfs.transport.registry import RegistrySource
from lazyfs.transport.tls import TlsConfig
from tests import faults
from tests.certificates import Authority
from tests.faults import OCI_INDEX, FaultServer, Resource, digest_of
from tests.transport.gather import QUICK, Gather, read

BLOB = random.Random(8).randbytes(300_000)
MANIFEST = {"schemaVersion": 2, "layers": []}
KIND = "application/vnd.amazon.soci.index.v1+json"


@pytest.fixture
def mirror() -> Iterator[FaultServer]:
    with FaultServer("cache/team/checkpoint") as server:
        yield server


@pytest.fixture
def other() -> Iterator[FaultServer]:
    with FaultServer("checkpoint") as server:
        yield server


@pytest.fixture
def registry() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@contextmanager
def opened(
    directory: Path,
    *servers: FaultServer | Address,
    settings: TransportSettings = QUICK,
    counters: Counters | None = None,
) -> Iterator[MirroredSource]:
    """Open the servers' repositories as one, in this order, with the directory's auth file."""
    authfile = directory / "auth.json"
    if not authfile.exists():
        authfile.write_text("{}")
    counters = counters or Counters()
    sources = []
    for each in servers:
        address = each if isinstance(each, Address) else Address(each.host, each.repository)
        sources.append(
            RegistrySource(
                address.host,
                address.repository,
                settings=settings,
                counters=counters,
                authfile=authfile,
                address=address,
            )
        )
    source = MirroredSource("r.example/team", sources, settings=settings, counters=counters)
    try:
        yield source
    finally:
        source.close()


def everywhere(servers: Sequence[FaultServer]) -> Digest:
    for server in servers:
        server.add_manifest(MANIFEST, "v1")
        server.add_blob(BLOB)
    return Digest.of(BLOB)


def read_on(blob: Blob, start: int, stop: int) -> bytes:
    """Read a range as `retry` does: go on elsewhere from the byte where an attempt ended."""
    assert isinstance(blob, ManyPlaces)
    sink = Gather()
    for _ in range(10):
        place = blob.places()[0]
        try:
            place.blob.read_into(ByteRange(start + len(sink.data), stop), sink)
        except IntegrityError as error:
            place.health.lied(error)
        except SourceError as error:
            place.health.failed(error)
        else:
            place.health.answered(0.001)
            return bytes(sink.data)
    raise AssertionError("ten attempts")


def test_the_mirror_is_asked_and_the_registry_left_alone(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror, registry])
    with opened(tmp_path, mirror, registry) as source:
        assert source.name == "r.example/team"
        manifest = source.manifest("v1")
        assert source.manifest(str(manifest.digest)) == manifest
        assert source.read_blob(digest, len(BLOB)) == BLOB
        blob = source.blob(digest, len(BLOB))
        assert (blob.name, blob.size_bytes) == (f"r.example/team@{digest}", len(BLOB))
        assert read(blob, 7, 200_000) == BLOB[7:200_000]
        names = [health.name for health in source.healths()]
        assert names == [f"{mirror.host}/cache/team/checkpoint", f"{registry.host}/team/checkpoint"]
        first, last = (health.snapshot() for health in source.healths())
        assert first["first_byte_ms"] > 0
        assert (first["failures"], first["lied"], first["last_error"]) == (0, False, None)
        assert last["first_byte_ms"] is None
        blob.close()
    assert registry.seen == []


def test_a_mirror_that_does_not_have_it(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([registry])
    counters = Counters()
    with opened(tmp_path, mirror, registry, counters=counters) as source:
        source.manifest("v1")
        assert (mirror.count("/manifests/"), registry.count("/manifests/")) == (1, 1)
        assert (counters.requests, counters.retries) == (2, 0)
        assert source.healths()[0].rests
        assert "404" in source.healths()[0].snapshot()["last_error"]
        assert source.read_blob(digest, len(BLOB)) == BLOB
        assert mirror.count("/blobs/") == 0, "it rests, and the registry had it"


def test_a_mirror_that_is_away_costs_one_attempt(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror, registry])
    mirror.stop()
    with opened(tmp_path, mirror, registry) as source:
        source.manifest("v1")
        assert source.read_blob(digest, len(BLOB)) == BLOB
        assert source.healths()[0].failures == 1
        assert "refused" in str(source.healths()[0].last_error)


def test_all_are_asked_again_when_none_could_answer(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    everywhere([registry])
    registry.script("/manifests/", faults.status(503), faults.status(429))
    counters = Counters()
    with opened(tmp_path, mirror, registry, counters=counters) as source:
        source.manifest("v1")
    assert registry.count("/manifests/") == 3
    assert counters.retries == 2


def test_where_all_fail_each_is_named_in_one_line(
    mirror: FaultServer, other: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    mirror.always("/manifests/", faults.status(403))
    other.auth, other.password = "basic", ("user", "s3cr3t")
    with (
        opened(tmp_path, mirror, other, registry) as source,
        pytest.raises(SourceError) as caught,
    ):
        source.manifest("v2")
    message = str(caught.value)
    assert message.startswith("r.example/team:v2 is to be had nowhere: ")
    assert "\n" not in message
    assert f"{mirror.host} does not allow it (403 Forbidden)" in message
    assert f"podman login {mirror.host}`" in message
    assert f"{other.host} wants credentials (401" in message
    assert f"podman login {other.host}`" in message
    assert f"{registry.host} has no such thing" in message
    assert caught.value.exit_code == 3
    assert not isinstance(caught.value, FetchError)


def test_a_source_that_is_gone_for_good_says_so_after_the_deadline(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    mirror.stop()
    registry.stop()
    settings = replace(QUICK, deadline_s=0.2)
    with (
        opened(tmp_path, mirror, registry, settings=settings) as source,
        pytest.raises(FetchError, match=r"gave up.*had nowhere: .*refused; .*refused") as caught,
    ):
        source.manifest("v1")
    assert not caught.value.transient


def test_a_registry_whose_name_nobody_knows(mirror: FaultServer, tmp_path: Path) -> None:
    unknown = Address("registry.invalid", "x", schemes=("http",))
    with opened(tmp_path, mirror, unknown) as source, pytest.raises(UnknownHost, match="404"):
        source.manifest("v1")
    assert mirror.count("/manifests/") == 1, "not asked for a minute: the name is wrong"


@pytest.mark.parametrize("by_digest", [False, True])
def test_a_mirror_that_lies_is_never_asked_again(
    mirror: FaultServer,
    registry: FaultServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    by_digest: bool,
) -> None:
    everywhere([mirror, registry])
    digest = registry.add_manifest(MANIFEST, "v1")
    mirror.script("/manifests/", faults.corrupt)
    with opened(tmp_path, mirror, registry) as source:
        with caplog.at_level(logging.WARNING, "lazyfs"):
            assert str(source.manifest(digest if by_digest else "v1").digest) == digest
        assert f"{mirror.host}/cache/team/checkpoint gave wrong bytes" in caplog.text
        assert source.healths()[0].snapshot()["lied"]
        source.manifest(digest)
        assert source.read_blob(Digest.of(BLOB), len(BLOB)) == BLOB
        blob = source.blob(Digest.of(BLOB), len(BLOB))
        assert read_on(blob, 0, 1000) == BLOB[:1000]
    assert len(mirror.seen) == 1


def test_where_all_lie_there_is_no_answer(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = everywhere([mirror, registry])
    for server in (mirror, registry):
        server.always("/blobs/", faults.corrupt)
    with opened(tmp_path, mirror, registry) as source:
        with pytest.raises(IntegrityError, match="nowhere"):
            source.read_blob(digest, len(BLOB))
        with pytest.raises(IntegrityError):
            read(source.blob(digest, len(BLOB)), 0, 10)


def test_tags_and_digests_are_asked_of_those_who_may_know(
    mirror: FaultServer, other: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror, other, registry])
    only_digests = Address(mirror.host, mirror.repository, for_tags=False)
    nothing = Address(other.host, other.repository, for_tags=False, for_digests=False)
    with opened(tmp_path, only_digests, nothing, registry) as source:
        manifest = source.manifest("v1")
        assert (mirror.count("/v2/"), registry.count("/v2/")) == (0, 1)
        source.manifest(str(manifest.digest))
        assert source.read_blob(digest, len(BLOB)) == BLOB
        assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
        assert (mirror.count("/v2/"), other.count("/v2/"), registry.count("/v2/")) == (3, 0, 1)
    with opened(tmp_path, nothing, nothing) as source, pytest.raises(SourceError, match="no place"):
        source.manifest("v1")


# --- blobs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        faults.reset(after=70_000),
        faults.short(after=70_000),
        faults.stall(after=70_000),
        faults.status(404),
        faults.status(403),
        faults.status(429, {"Retry-After": "100"}),
    ],
    ids=["reset", "short", "stalled", "404", "403", "429"],
)
def test_a_mirror_that_fails_in_mid_read_is_left_for_the_registry(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path, fault: faults.Fault
) -> None:
    digest = everywhere([mirror, registry])
    mirror.script("/blobs/", fault)
    with opened(tmp_path, mirror, registry) as source:
        blob = source.blob(digest, len(BLOB))
        assert read_on(blob, 5, 250_000) == BLOB[5:250_000]
        again = source.blob(digest, len(BLOB))
        assert read_on(again, 0, 10) == BLOB[:10]
        assert source.healths()[0].rests, "known to all blobs of the mount"
    assert (mirror.count("/blobs/"), registry.count("/blobs/")) == (1, 2)


def test_a_mirror_that_is_still_fetching_it_rests_for_a_moment_only(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror, registry])
    mirror.script("/blobs/", faults.whole)
    with opened(tmp_path, mirror, registry) as source:
        blob = source.blob(digest, len(BLOB))
        with pytest.raises(FetchError, match="does not have it yet") as caught:
            read(blob, 0, 10)
        assert caught.value.transient
        assert read(blob, 0, 10) == BLOB[:10]
    with opened(tmp_path, registry, mirror) as source:
        registry.script("/blobs/", faults.status(404))
        mirror.script("/blobs/", faults.whole)
        blob = source.blob(digest, len(BLOB))
        assert isinstance(blob, ManyPlaces)
        with pytest.raises(SourceError, match="does not support byte ranges") as refused:
            read(blob.places()[1].blob, 0, 10)
        assert not isinstance(refused.value, FetchError), "the registry itself should have it"


# --- each in its own way -----------------------------------------------------------------------


def test_each_place_sees_its_own_credentials_headers_and_namespace(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    (tmp_path / "auth.json").write_text(
        f'{{"auths": {{"{mirror.host}": {{"auth": "dXNlcjptaXJyb3I="}},'
        f' "{registry.host}": {{"auth": "dXNlcjpyZWdpc3RyeQ=="}}}}}}'
    )
    mirror.auth, mirror.password = "basic", ("user", "mirror")
    registry.auth, registry.password = "bearer", ("user", "registry")
    digest = everywhere([mirror, registry])
    address = Address(
        mirror.host,
        mirror.repository,
        namespace="r.example:5000",
        headers={"X-Mirror": "secret"},
    )
    with opened(tmp_path, address, registry) as source:
        source.manifest("v1")
        source.read_blob(digest, len(BLOB))
        assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
        mirror.always("/blobs/", faults.status(404))
        assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
    for seen in mirror.seen:
        assert seen.headers["X-Mirror"] == "secret"
        assert seen.query == "ns=r.example%3A5000"
        assert seen.headers.get("Authorization", "Basic ").startswith("Basic ")
    assert "secret" not in repr(address)
    for seen in registry.seen:
        assert "X-Mirror" not in seen.headers
        assert "ns=" not in seen.query
        assert "dXNlcjptaXJyb3I=" not in seen.headers.get("Authorization", "")


def test_the_api_below_another_path(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror])
    for path in list(mirror.resources):
        mirror.resources[path.replace("/v2/", "/proxy/v2/")] = mirror.resources.pop(path)
    address = Address(mirror.host, mirror.repository, root="/proxy/v2")
    with opened(tmp_path, address, registry) as source:
        source.manifest("v1")
        assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
    assert registry.seen == []


def test_an_insecure_mirror_that_speaks_plain_http(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror, registry])
    insecure = Address(
        mirror.host,
        mirror.repository,
        schemes=("https", "http"),
        tls=TlsConfig(verify=False),
    )
    with opened(tmp_path, insecure, registry) as source:
        blob = source.blob(digest, len(BLOB))
        assert read_on(blob, 0, 10) == BLOB[:10]
        assert read_on(blob, 10, 20) == BLOB[10:20]
        source.manifest("v1")
    assert mirror.seen[0].path == "/v2/", "asked once what it speaks"
    assert mirror.count("/blobs/") == 2
    assert registry.seen == []


def tls_server(authority: Authority, repository: str, **options: bool) -> FaultServer:
    return FaultServer(repository, authority.context(authority.server("127.0.0.1"), **options))


def test_a_mirror_with_an_authority_and_client_certificates_of_its_own(
    registry: FaultServer, tmp_path: Path
) -> None:
    """As containerd's `ca` and `client` have it: for that mirror only."""
    authority = Authority(tmp_path / "authority")
    client = authority.client()
    with tls_server(authority, "team/checkpoint", wants_client=True) as mirror:
        digest = everywhere([mirror, registry])
        text = (
            f"server = '{registry.url}'\n[host.'{mirror.url}']\n"
            f"ca = '{authority.certificate}'\n"
            f"client = [['{client.certificate}', '{client.key}']]\n"
        )
        found = addresses_by_hosts_toml(
            parse_hosts_toml(text, "hosts.toml", "/"), registry.host, registry.repository
        )
        with opened(tmp_path, *found) as source:
            source.manifest("v1")
            assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
            assert not any(health.failures for health in source.healths())
        assert mirror.seen[0].query.startswith("ns=127.0.0.1%3A")
    assert registry.seen == []


@pytest.mark.parametrize("insecure", [False, True])
def test_a_mirror_that_nobody_vouches_for(
    registry: FaultServer, tmp_path: Path, insecure: bool
) -> None:
    with tls_server(Authority(tmp_path / "authority"), "team/checkpoint") as mirror:
        digest = everywhere([mirror, registry])
        address = Address(
            mirror.host,
            mirror.repository,
            schemes=() if insecure else ("https",),
            tls=TlsConfig(verify=not insecure),
        )
        with opened(tmp_path, address, registry) as source:
            source.manifest("v1")
            assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
            why = source.healths()[0].last_error
            assert (why is None) == insecure
            assert insecure or "not trusted" in str(why)
    assert (registry.seen == []) == insecure


def test_a_mirror_that_speaks_nothing_that_it_may(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([registry])
    mirror.always("/v2/", faults.status(400))
    with opened(tmp_path, mirror, registry) as source:
        assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]
        assert "another scheme" in str(source.healths()[0].last_error)
    mirror.stop()
    gone = Address(mirror.host, mirror.repository, schemes=("https", "http"))
    with opened(tmp_path, gone, registry) as source:
        assert read_on(source.blob(digest, len(BLOB)), 0, 10) == BLOB[:10]


def test_a_host_without_an_answer_is_not_waited_for_longer_than_is_said(
    registry: FaultServer, tmp_path: Path
) -> None:
    everywhere([registry])
    # TEST-NET-1 (RFC 5737): either no route, or no answer
    silent = Address("192.0.2.1", "x", schemes=("http",), connect_timeout_s=0.05)
    with opened(tmp_path, silent, registry) as source:
        source.manifest("v1")
        assert source.healths()[0].failures == 1


def test_referrers_are_the_registry_s_to_know(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    subject = Digest.of(b"subject")

    def serve(server: FaultServer, text: bytes) -> None:
        index = (
            b'{"manifests": [{"digest": "%s", "size": 5, "mediaType": "a", "artifactType": "%s"}]}'
            % (digest_of(text).encode(), KIND.encode())
        )
        path = f"/v2/{server.repository}/referrers/{subject}"
        server.resources[path] = Resource(index, OCI_INDEX)

    serve(mirror, b"mirror")
    namespaced = Address(mirror.host, mirror.repository, namespace="r.example")
    with opened(tmp_path, namespaced, registry) as source:
        (found,) = source.referrers(subject, KIND)
        assert str(found.digest) == digest_of(b"mirror"), "the registry knew of none"
        assert mirror.seen[-1].query.endswith("&ns=r.example")
        serve(registry, b"registry")
        (found,) = source.referrers(subject, KIND)
        assert str(found.digest) == digest_of(b"registry")
        assert not any(health.failures for health in source.healths())
    only_digests = Address(mirror.host, mirror.repository, for_tags=False)
    registry.stop()
    with opened(tmp_path, only_digests, registry) as source:
        assert source.referrers(subject, KIND) == []


# --- from the files ----------------------------------------------------------------------------


def test_from_a_registries_conf_to_bytes(
    mirror: FaultServer, registry: FaultServer, tmp_path: Path
) -> None:
    digest = everywhere([mirror, registry])
    conf = tmp_path / "registries.conf"
    conf.write_text(
        f"[[registry]]\nlocation='{registry.host}'\n"
        f"[[registry.mirror]]\nlocation='{mirror.host}/cache'\n"
    )

    def open_it(mirrors: str, repository: str) -> RegistrySource | MirroredSource:
        return open_repository(
            registry.host,
            repository,
            by_digest=False,
            settings=replace(QUICK, mirrors=mirrors),
            counters=Counters(),
            authfile=None,
            environ={"HOME": str(tmp_path)},
        )

    source = open_it(str(conf), registry.repository)
    assert source.read_blob(digest, len(BLOB)) == BLOB
    source.close()
    assert (mirror.count("/blobs/"), registry.count("/blobs/")) == (1, 0)
    alone = open_it("none", registry.repository)
    assert isinstance(alone, RegistrySource), "without mirrors there is nothing to choose from"
    assert [health.name for health in alone.healths()] == [f"{registry.host}/team/checkpoint"]
    alone.close()
    conf.write_text(f"[[registry]]\nlocation='{registry.host}'\nblocked=true")
    with pytest.raises(LazyfsError, match="blocks the registry"):
        open_it(str(conf), registry.repository)

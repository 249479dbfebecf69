"""Writing to a registry: what is asked for first, what is sent, and what is made of refusals."""

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.transport.push import RegistryTarget
from tests import faults
from tests.certificates import Authority
from tests.exchange import written_to
from tests.faults import OCI_MANIFEST, FaultServer, Resource, digest_of
from tests.transport.gather import QUICK

BLOB = bytes(range(256)) * 5000
DIGEST = Digest.of(BLOB)
MANIFEST = json.dumps({"schemaVersion": 2, "layers": []}).encode()
REPOSITORY = "team/stubs"
UPLOADS = f"/v2/{REPOSITORY}/blobs/uploads/"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.writable = True
        yield server


@pytest.fixture
def authfile(tmp_path: Path, server: FaultServer) -> Path:
    path = tmp_path / "auth.json"
    auth = base64.b64encode(b"user:s3cr3t").decode()
    path.write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
    return path


@pytest.fixture
def target(server: FaultServer, authfile: Path) -> Iterator[RegistryTarget]:
    target = open_target(server, authfile)
    yield target
    target.close()


def open_target(server: FaultServer, authfile: Path, *mount_from: str) -> RegistryTarget:
    settings = replace(QUICK, authfile=str(authfile), mirrors="none")
    return RegistryTarget(
        server.host, REPOSITORY, settings=settings, counters=Counters(), mount_from=mount_from
    )


def put(target: RegistryTarget, data: bytes = BLOB) -> None:
    target.put_blob(Digest.of(data), len(data), lambda: io.BytesIO(data))


def stored(server: FaultServer, data: bytes = BLOB) -> bool:
    resource = server.resources.get(f"/v2/{REPOSITORY}/blobs/{digest_of(data)}")
    return resource is not None and resource.body == data


def asked(server: FaultServer) -> list[tuple[str, str]]:
    return [(seen.method, seen.path.removeprefix(f"/v2/{REPOSITORY}/")) for seen in server.seen[1:]]


def not_needed() -> BinaryIO:
    raise AssertionError("nothing was to be sent")


def test_a_blob_is_asked_for_and_then_sent(server: FaultServer, target: RegistryTarget) -> None:
    put(target)
    assert stored(server)
    assert asked(server) == [
        ("HEAD", f"blobs/{DIGEST}"),
        ("POST", "blobs/uploads/"),
        ("PUT", "blobs/uploads/1"),
    ]
    last = server.seen[-1]
    assert last.query == f"state=a&digest={str(DIGEST).replace(':', '%3A')}"
    assert last.headers["Content-Length"] == str(len(BLOB))
    assert server.connections == 1


def test_what_is_there_is_not_sent(server: FaultServer, target: RegistryTarget) -> None:
    put(target)
    target.put_blob(DIGEST, len(BLOB), not_needed)
    assert server.count("/uploads/") == 2


def test_what_is_there_by_another_size_is_an_error(
    server: FaultServer, target: RegistryTarget
) -> None:
    server.resources[f"/v2/{REPOSITORY}/blobs/{DIGEST}"] = Resource(b"other")
    with pytest.raises(IntegrityError, match="5 bytes there"):
        target.put_blob(DIGEST, len(BLOB), not_needed)


def test_an_empty_blob(server: FaultServer, target: RegistryTarget) -> None:
    put(target, b"")
    assert stored(server, b"")


def test_a_blob_is_mounted_from_where_the_registry_has_it(
    server: FaultServer, authfile: Path
) -> None:
    server.add_blob(BLOB)
    target = open_target(server, authfile, REPOSITORY, "other/one", server.repository)
    target.put_blob(DIGEST, len(BLOB), not_needed)
    assert stored(server)
    assert [seen.method for seen in server.seen].count("POST") == 2
    target.close()


@pytest.mark.parametrize("answer", [403, 404, 405, 202])
def test_a_blob_that_is_not_mounted_is_sent(
    server: FaultServer, authfile: Path, answer: int
) -> None:
    server.script("/uploads/", faults.status(answer, {"Location": "/x"}))
    target = open_target(server, authfile, server.repository)
    put(target)
    assert stored(server)
    target.close()


def test_manifests_go_by_tag_or_by_digest(server: FaultServer, target: RegistryTarget) -> None:
    digest = target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    assert digest == Digest.of(MANIFEST)
    target.put_manifest(MANIFEST, OCI_MANIFEST, None)
    assert [path for _method, path in asked(server)] == ["manifests/v1", f"manifests/{digest}"]
    assert server.resources[f"/v2/{REPOSITORY}/manifests/v1"].body == MANIFEST
    assert server.seen[-1].headers["Content-Type"] == OCI_MANIFEST


def test_a_registry_that_took_it_for_something_else(
    server: FaultServer, target: RegistryTarget
) -> None:
    server.script("/manifests/", faults.status(201, {"Docker-Content-Digest": "sha256:0"}))
    with pytest.raises(IntegrityError, match="took it for"):
        target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")


@pytest.mark.parametrize(
    "fault", [faults.reset(), faults.status(503), faults.status(429, {"Retry-After": "0"})]
)
@pytest.mark.parametrize("step", ["/blobs/sha256", "/uploads/", "/uploads/1", "/manifests/"])
def test_what_passes_is_tried_again_from_the_blobs_start(
    server: FaultServer, target: RegistryTarget, fault: faults.Fault, step: str
) -> None:
    server.script(step, fault)
    put(target)
    target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    assert stored(server)
    assert server.resources[f"/v2/{REPOSITORY}/manifests/v1"].body == MANIFEST


def test_a_registry_may_take_its_time_with_a_large_blob(
    server: FaultServer, target: RegistryTarget
) -> None:
    """It hashes and moves what it has taken before it answers."""

    def slow(exchange: faults.Exchange) -> None:
        exchange.wait(1.5 * QUICK.stall_timeout_s)
        assert written_to(exchange, server.resources)

    server.script("/uploads/1", slow)
    large = bytes(16 << 20)
    put(target, large)
    assert stored(server, large)
    assert server.count("/uploads/1") == 1


def test_for_how_long_it_was_waited_is_told(server: FaultServer) -> None:
    server.always("/uploads/1", faults.stall())
    settings = replace(QUICK, stall_timeout_s=0.1, deadline_s=0.2, mirrors="none")
    target = RegistryTarget(server.host, REPOSITORY, settings=settings, counters=Counters())
    with pytest.raises(FetchError, match=r"within 0\.35 s"):
        put(target, bytes(1 << 20))
    target.close()


class _Slow(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0.01)
        return super().read(size)


def test_what_is_sent_for_long_is_not_silence(server: FaultServer) -> None:
    server.script("/uploads/1", faults.status(503))
    settings = replace(QUICK, deadline_s=0.5, mirrors="none")
    target = RegistryTarget(server.host, REPOSITORY, settings=settings, counters=Counters())
    target.put_blob(DIGEST, len(BLOB), lambda: _Slow(BLOB))
    assert stored(server)
    target.close()


def test_what_does_not_pass_is_given_up(server: FaultServer) -> None:
    server.always("/uploads/1", faults.reset())
    settings = replace(QUICK, deadline_s=0.3, mirrors="none")
    target = RegistryTarget(server.host, REPOSITORY, settings=settings, counters=Counters())
    with pytest.raises(FetchError, match="gave up"):
        put(target)
    target.close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "wants credentials"),
        (403, "does not allow it"),
        (404, "has no such thing"),
        (405, "can only be read"),
        (413, "client_max_body_size"),
        (400, "answered 400 Bad Request"),
        (302, "answered 302 Found"),
    ],
)
@pytest.mark.parametrize("step", ["/uploads/", "/uploads/1", "/manifests/"])
def test_refusals_say_what_to_do(
    server: FaultServer, target: RegistryTarget, code: int, said: str, step: str
) -> None:
    server.always(step, faults.status(code, {"Location": "http://127.0.0.1:1/elsewhere"}))
    with pytest.raises(SourceError, match=said) as refused:
        if step != "/manifests/":
            put(target)
        target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    assert REPOSITORY in str(refused.value)
    assert "s3cr3t" not in str(refused.value)
    assert "elsewhere" not in str(refused.value)


def test_a_manifest_of_an_unknown_kind(server: FaultServer, target: RegistryTarget) -> None:
    server.always("/manifests/", faults.status(415))
    with pytest.raises(SourceError, match="manifests of this kind"):
        target.put_manifest(MANIFEST, "application/x", "v1")


def test_an_upload_that_leads_nowhere(server: FaultServer, target: RegistryTarget) -> None:
    server.always("/uploads/", faults.status(202))
    with pytest.raises(SourceError, match="without saying where to"):
        put(target)


# -- who is told what ---------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_credentials_are_asked_for_pushing(server: FaultServer, authfile: Path, auth: str) -> None:
    server.auth, server.password = auth, ("user", "s3cr3t")
    server.scopes = [f"repository:{REPOSITORY}:pull,push", "repository:other:pull"]
    target = open_target(server, authfile, "other")
    put(target)
    target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    assert stored(server)
    target.close()


@pytest.mark.parametrize("step", ["/uploads/1", "/manifests/"])
def test_a_token_that_is_refused_in_between_is_renewed(
    server: FaultServer, target: RegistryTarget, step: str
) -> None:
    server.auth, server.password = "bearer", ("user", "s3cr3t")
    server.scopes = [f"repository:{REPOSITORY}:pull,push"]
    server.script(step, faults.status(401))
    put(target)
    target.put_manifest(MANIFEST, OCI_MANIFEST, "v1")
    assert stored(server)
    assert server.tokens_issued >= 1


def test_a_token_that_is_not_given_for_pushing(server: FaultServer, target: RegistryTarget) -> None:
    server.auth, server.password = "bearer", ("somebody", "else")
    with pytest.raises(SourceError, match=r"a token to push to .*podman login"):
        put(target)


def test_an_upload_elsewhere_is_shown_no_credentials(
    server: FaultServer, target: RegistryTarget
) -> None:
    server.auth, server.password = "basic", ("user", "s3cr3t")
    with FaultServer() as store:
        store.always("/upload", faults.status(201))
        server.script(
            "/uploads/",
            faults.status(202, {"Location": f"{store.url}/upload?signature=abc"}),
        )
        put(target)
        (sent,) = store.seen
    assert any("Authorization" in seen.headers for seen in server.seen)
    assert sent.body == BLOB
    assert "Authorization" not in sent.headers
    assert sent.query.startswith("signature=abc&digest=")


def test_a_refusal_elsewhere_does_not_show_its_signature(
    server: FaultServer, target: RegistryTarget
) -> None:
    with FaultServer() as store:
        store.always("/upload", faults.status(403))
        where = {"Location": f"{store.url}/upload?signature=abc"}
        server.script("/uploads/", faults.status(202, where))
        with pytest.raises(SourceError) as refused:
            put(target)
    assert "signature" not in str(refused.value)


def test_an_upload_does_not_lead_to_clouds_metadata(
    server: FaultServer, target: RegistryTarget
) -> None:
    server.script("/uploads/", faults.status(202, {"Location": "http://169.254.0.1/upload"}))
    with pytest.raises(SourceError, match="where clouds keep their metadata"):
        put(target)


def test_tls_is_checked_and_an_authority_is_believed(tmp_path: Path, authfile: Path) -> None:
    authority = Authority(tmp_path / "ca")
    with FaultServer(tls=authority.context(authority.server("127.0.0.1"))) as server:
        server.writable = True
        for verify in (True, False):
            settings = replace(QUICK, tls_verify=verify, mirrors="none")
            target = RegistryTarget(server.host, REPOSITORY, settings=settings, counters=Counters())
            if verify:
                with pytest.raises(SourceError, match="certificate is not trusted"):
                    put(target)
            else:
                put(target)
                assert stored(server)
            target.close()


def test_registries_conf_moves_what_is_written_and_no_mirror_is_written_to(
    server: FaultServer, tmp_path: Path
) -> None:
    conf = tmp_path / "registries.conf"
    conf.write_text(
        f"""[[registry]]
prefix = "stubs.example/team"
location = "{server.host}/team"
insecure = true
[[registry.mirror]]
location = "127.0.0.1:1/mirror"
"""
    )
    settings = replace(QUICK, mirrors=str(conf))
    target = RegistryTarget("stubs.example", "team/stubs", settings=settings, counters=Counters())
    put(target)
    assert target.name == "stubs.example/team/stubs"
    assert stored(server)
    target.close()

"""What the OCI distribution-spec lets a registry do, and lazyfs has to take.

The test server knows no HEAD at all: that nothing asks by it, every test of this folder shows.
Paging and the tag schema of referrers are in test_referrers.py, ranges in test_http_blob.py.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import FetchError, IntegrityError, SourceError
from lazyfs.transport.registry import RegistrySource
from tests import faults
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, Resource
from tests.transport.gather import QUICK, read

MANIFEST = {"schemaVersion": 2, "layers": []}
BLOB = bytes(range(256)) * 100
KIND = "application/vnd.amazon.soci.index.v1+json"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def source(server: FaultServer, tmp_path: Path) -> Iterator[RegistrySource]:
    (tmp_path / "auth.json").write_text("{}")
    source = RegistrySource(
        server.host,
        server.repository,
        settings=QUICK,
        counters=Counters(),
        authfile=tmp_path / "auth.json",
    )
    yield source
    source.close()


def served(server: FaultServer, name: str) -> Resource:
    return server.resources[f"/v2/{server.repository}/manifests/{name}"]


def test_a_digest_is_of_the_bytes_as_they_were_served(
    server: FaultServer, source: RegistrySource
) -> None:
    """Not of the document, written anew."""
    text = b'\xef\xbb\xbf{ "layers" :[],\r\n\t"schemaVersion":2.0e0 }\n\n'
    digest = server.add_manifest(text, "v1")
    for reference in ("v1", digest):
        manifest = source.manifest(reference)
        assert manifest.data == text
        assert str(manifest.digest) == digest


@pytest.mark.parametrize("reference", ["v1", "digest"])
def test_docker_content_digest_may_be_absent(
    server: FaultServer, source: RegistrySource, reference: str
) -> None:
    digest = server.add_manifest(MANIFEST, "v1")
    served(server, "v1").headers.clear()
    manifest = source.manifest(digest if reference == "digest" else reference)
    assert str(manifest.digest) == digest


def test_docker_content_digest_may_be_of_another_algorithm(
    server: FaultServer, source: RegistrySource
) -> None:
    digest = server.add_manifest(MANIFEST, "v1")
    data = json.dumps(MANIFEST).encode()
    for name, hexadecimal in (("v1", hashlib.sha512(data)), (digest, hashlib.sha512(b"other"))):
        served(server, name).headers["Docker-Content-Digest"] = f"sha512:{hexadecimal.hexdigest()}"
        if name == "v1":
            assert str(source.manifest("v1").digest) == digest
    with pytest.raises(IntegrityError):
        source.manifest(digest)


def test_docker_content_digest_of_another_manifest(
    server: FaultServer, source: RegistrySource
) -> None:
    """Right for what was asked is not enough, if the registry itself says otherwise."""
    digest = server.add_manifest(MANIFEST, "v1")
    served(server, "v1").headers["Docker-Content-Digest"] = faults.digest_of(b"another")
    for reference in ("v1", digest):
        with pytest.raises(IntegrityError, match="does not match"):
            source.manifest(reference)


@pytest.mark.parametrize(
    ("sent", "media_type"),
    [
        (OCI_INDEX, OCI_INDEX),
        (f"{OCI_INDEX}; charset=utf-8", OCI_INDEX),
        (f" {OCI_MANIFEST} ;q=1", OCI_MANIFEST),
        ("text/plain; charset=utf-8", "text/plain"),
        ("", ""),
        (None, ""),
    ],
)
def test_content_types(
    server: FaultServer, source: RegistrySource, sent: str | None, media_type: str
) -> None:
    """Told as they are; what the document is, its own text decides above."""
    server.add_manifest(MANIFEST, "v1")
    server.script("/manifests/", faults.headers({"Content-Type": sent}))
    assert source.manifest("v1").media_type == media_type
    accepted = server.seen[0].headers["Accept"]
    for kind in (OCI_MANIFEST, OCI_INDEX, "application/vnd.docker.distribution.manifest.v2+json"):
        assert kind in accepted


@pytest.mark.parametrize("wish", ["7", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", None])
@pytest.mark.parametrize("what", ["manifest", "blob", "range", "token"])
def test_too_many_requests(
    server: FaultServer, source: RegistrySource, what: str, wish: str | None
) -> None:
    """Each says so as a transient error, with the registry's own wish, which is obeyed."""
    digest = Digest.parse(server.add_blob(BLOB))
    server.add_manifest(MANIFEST, "v1")
    code = b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "x"}]}'
    limit = faults.status(429, {} if wish is None else {"Retry-After": wish}, code)
    if what == "token":
        server.auth = "bearer"
    part = {"manifest": "/manifests/", "token": "/token"}.get(what, "/blobs/")
    server.script(part, limit)
    with pytest.raises(FetchError, match="429 Too Many Requests, TOOMANYREQUESTS") as caught:
        if what in ("manifest", "token"):
            source.ask_manifest("v1")
        elif what == "blob":
            source.ask_blob(digest, len(BLOB))
        else:
            read(source.blob(digest, len(BLOB)), 0, 10)
    assert caught.value.transient
    expected = {"7": 7.0, "soon": None, None: None}.get(wish, 0.0)
    assert caught.value.retry_after_s == expected
    assert source.manifest("v1").media_type == OCI_MANIFEST


def test_a_manifest_may_be_elsewhere(server: FaultServer, source: RegistrySource) -> None:
    with FaultServer() as other:
        digest = other.add_manifest(MANIFEST)
        target = f"{other.url}/v2/{other.repository}/manifests/{digest}"
        server.always("/manifests/", faults.redirect(target, 301))
        assert str(source.manifest("v1").digest) == digest
        assert str(source.manifest(digest).digest) == digest


@pytest.mark.parametrize("applied", [None, "artifactType"])
def test_filters_that_were_applied_or_not(
    server: FaultServer, source: RegistrySource, applied: str | None
) -> None:
    def listed(text: bytes, kind: str) -> dict[str, object]:
        found = {"mediaType": OCI_MANIFEST, "digest": faults.digest_of(text), "size": len(text)}
        return {**found, "artifactType": kind}

    subject = Digest.of(b"subject")
    wanted = listed(b"a", KIND)
    rows = [wanted] if applied else [listed(b"b", "application/spdx+json"), wanted]
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows}
    path = f"/v2/{server.repository}/referrers/{subject}"
    headers = {"OCI-Filters-Applied": applied} if applied else {}
    server.resources[path] = Resource(json.dumps(index).encode(), OCI_INDEX, headers)
    (found,) = source.referrers(subject, KIND)
    assert str(found.digest) == wanted["digest"]


def test_warnings_are_passed_on_once(
    server: FaultServer, source: RegistrySource, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_manifest(MANIFEST, "v1")
    served(server, "v1").headers["Warning"] = '299 - "this registry closes in May"'
    with caplog.at_level(logging.WARNING, "lazyfs"):
        source.manifest("v1")
        source.manifest("v1")
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{server.host} says: this registry closes in May"]


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"errors": []}', b'{"errors": [{"code": 3}]}', b"\xff" * 100_000]
)
def test_refusals_in_whatever_words(
    server: FaultServer, source: RegistrySource, body: bytes
) -> None:
    server.script("/manifests/", faults.status(404, {}, body))
    with pytest.raises(SourceError, match="404 Not Found"):
        source.manifest("v1")

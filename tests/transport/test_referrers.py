"""Who refers to a manifest: by the API, the fallback tag, a layout; and never at any price."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.files import LayoutSource
from lazyfs.transport.referrers import (
    PAGES_MOST,
    REFERRERS_MOST,
    fallback_tag,
    next_page,
    parse_referrers,
    referrers_path,
    referring_as,
)
from lazyfs.transport.registry import RegistrySource
from lazyfs.transport.source import ImageSource, ReferrerDescriptor
from tests import faults
from tests.faults import OCI_INDEX, OCI_MANIFEST, FaultServer, Resource, digest_of

KIND = "application/vnd.amazon.soci.index.v1+json"
SUBJECT = Digest.of(b"the image's manifest")
SAMPLE = Path(__file__).parent.parent / "data" / "soci"
PATIENT = TransportSettings(deadline_s=60, backoff_first_s=0.01)
"""As in earnest: what hurries does so of itself."""


def listed(text: bytes | str, kind: str | None = KIND, **more: Any) -> dict[str, Any]:
    """Describe a referrer."""
    data = text.encode() if isinstance(text, str) else text
    found = {"mediaType": OCI_MANIFEST, "digest": digest_of(data), "size": len(data), **more}
    return found if kind is None else {**found, "artifactType": kind}


def index(*manifests: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).encode()


def digests(found: list[ReferrerDescriptor]) -> list[str]:
    return [str(each.digest) for each in found]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def source(server: FaultServer, tmp_path: Path) -> Iterator[ImageSource]:
    authfile = tmp_path / "auth.json"
    authfile.write_text("{}")
    source = RegistrySource(
        server.host, server.repository, settings=PATIENT, counters=Counters(), authfile=authfile
    )
    source.settle()
    server.seen.clear()
    yield source
    source.close()


def serve(server: FaultServer, body: bytes, query: str = "", **headers: str) -> None:
    """Answer the referrers API; `query` is only for the path of a next page."""
    path = f"/v2/{server.repository}/referrers/{SUBJECT}{query}"
    server.resources[path] = Resource(body, OCI_INDEX, dict(headers))


def serve_tag(server: FaultServer, body: bytes) -> None:
    server.add_manifest(body, f"sha256-{SUBJECT.hex}", OCI_INDEX)


# --- texts -------------------------------------------------------------------------------------


def test_what_soci_has_pushed() -> None:
    (found,) = parse_referrers((SAMPLE / "referrers.json").read_bytes(), KIND)
    assert str(found.digest) == digest_of((SAMPLE / "index.json").read_bytes())
    assert found.annotations == {"com.amazon.soci.build-tool-identifier": "AWS SOCI CLI v0.1"}
    assert (found.media_type, found.artifact_type) == (OCI_MANIFEST, KIND)
    manifest = Digest.of((SAMPLE / "manifest.json").read_bytes())
    assert referring_as((SAMPLE / "index.json").read_bytes(), manifest) == KIND
    assert referring_as((SAMPLE / "index.json").read_bytes(), SUBJECT) == ""


def test_only_what_fits_is_listed() -> None:
    body = index(
        listed("a", "application/spdx+json"),
        listed("b", None),
        listed("c"),
        {**listed("d"), "digest": "blake3:00"},
        {**listed("e"), "size": 1 << 40},
        {**listed("f"), "annotations": None},
        {**listed("g"), "artifactType": None},
    )
    assert digests(parse_referrers(body, KIND)) == [digest_of(b"c"), digest_of(b"f")]
    many = [listed(str(number)) for number in range(REFERRERS_MOST + 5)]
    assert len(parse_referrers(index(*many), KIND)) == REFERRERS_MOST
    assert parse_referrers(index(), KIND) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"manifests": null}',
        b'{"manifests": [{}]}',
        b'{"manifests": [{"digest": "sha256:00", "size": -1}]}',
        b'{"manifests": [{"digest": 1, "size": 1}]}',
        b"<html>",
        b"[" * 100_000,
    ],
)
def test_what_is_no_list(body: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_referrers(body, KIND)
    assert referring_as(body, SUBJECT) == ""


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8")))
def test_any_bytes(data: bytes) -> None:
    referring_as(data, SUBJECT)
    try:
        parse_referrers(data, KIND)
    except MalformedError:
        return


def test_names() -> None:
    assert fallback_tag(SUBJECT) == f"sha256-{SUBJECT.hex}"
    assert fallback_tag(Digest("sha512", "a" * 128)) == "sha512-" + "a" * 64
    assert referrers_path(SUBJECT, KIND) == (
        f"referrers/{SUBJECT}?artifactType=application%2Fvnd.amazon.soci.index.v1%2Bjson"
    )


URL = "https://host:5000/v2/team/x/referrers/sha256:00?artifactType=a"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (None, None),
        ("", None),
        ("</v2/team/x?n=2>; rel=next", "https://host:5000/v2/team/x?n=2"),
        ('</v2/team/x?a=1,2&n=2>; rel="next"', "https://host:5000/v2/team/x?a=1,2&n=2"),
        (
            '</first>; rel="first", <?n=2>; title="x"; REL="next"; type=y',
            URL.split("?")[0] + "?n=2",
        ),
        ('<https://host:5000/there>;rel="next"', "https://host:5000/there"),
        ('<https://elsewhere/there>; rel="next"', None),
        ('<http://host:5000/there>; rel="next"', None),
        ('<file:///etc/passwd>; rel="next"', None),
        ('<http://[>; rel="next"', None),
        ('<https://user:word@host:5000/there>; rel="next"', None),
        ('</there>; rel="nextish"', None),
        ('</there>; rel="prev"', None),
        ("</there", None),
        ("<" * 100_000, None),
    ],
)
def test_next_page(link: str | None, expected: str | None) -> None:
    assert next_page(URL, link) == expected


@given(st.text(max_size=200))
def test_any_link(link: str) -> None:
    found = next_page(URL, link)
    assert found is None or found.startswith("https://host:5000")


# --- a registry --------------------------------------------------------------------------------


def test_the_api(server: FaultServer, source: ImageSource) -> None:
    serve(server, index(listed("a"), listed("b", "other")), **{"OCI-Filters-Applied": "x"})
    assert digests(source.referrers(SUBJECT, KIND)) == [digest_of(b"a")]
    assert server.seen[-1].query == f"artifactType={KIND.replace('/', '%2F').replace('+', '%2B')}"
    assert "image.index" in server.seen[-1].headers["Accept"]
    serve(server, index())
    serve_tag(server, index(listed("by tag")))
    assert source.referrers(SUBJECT, KIND) == [], "where there is an API, the tag is history"


def test_pages(server: FaultServer, source: ImageSource) -> None:
    here = f"/v2/{server.repository}/referrers/{SUBJECT}"
    serve(server, index(listed("a")), Link=f'<{here}/2?x=y>; rel="next"')
    serve(server, index(listed("b", "other")), "/2", Link='<3>; rel="next"')
    serve(server, index(listed("c")), "/3")
    assert digests(source.referrers(SUBJECT, KIND)) == [digest_of(b"a"), digest_of(b"c")]
    serve(server, index(listed("c")), "/3", Link=f'<{here}>; rel="next"')
    before = server.count("/referrers/")
    assert len(source.referrers(SUBJECT, KIND)) == PAGES_MOST - 3, "every third is of another type"
    assert server.count("/referrers/") == before + PAGES_MOST, "pages without end"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 501])
def test_the_fallback_tag(server: FaultServer, source: ImageSource, status: int) -> None:
    serve_tag(server, index(listed("a"), listed("b", "other")))
    server.always("/referrers/", faults.status(status, body=b"no such page"))
    assert digests(source.referrers(SUBJECT, KIND)) == [digest_of(b"a")]
    assert (server.count("/referrers/"), server.count("/manifests/sha256-")) == (1, 1)


def test_nothing_at_all(server: FaultServer, source: ImageSource) -> None:
    assert source.referrers(SUBJECT, KIND) == []
    assert len(server.seen) == 2
    assert len({seen.connection for seen in server.seen}) == 1


def test_a_registry_that_wants_a_token(server: FaultServer, source: ImageSource) -> None:
    server.auth = "bearer"
    server.add_manifest({"schemaVersion": 2, "layers": []}, "v1")
    serve(server, index(listed("a")))
    source.manifest("v1")
    asked = len(server.seen)
    assert digests(source.referrers(SUBJECT, KIND)) == [digest_of(b"a")]
    assert (len(server.seen), server.tokens_issued) == (asked + 1, 1)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"{}", b'{"manifests": 1}', b" " * (4 * 1024 * 1024 + 1)]
)
def test_an_answer_that_is_no_list(server: FaultServer, source: ImageSource, body: bytes) -> None:
    serve(server, body)
    assert source.referrers(SUBJECT, KIND) == []
    del server.resources[f"/v2/{server.repository}/referrers/{SUBJECT}"]
    serve_tag(server, body)
    assert source.referrers(SUBJECT, KIND) == []


def test_faults_that_pass(server: FaultServer, source: ImageSource) -> None:
    serve(server, index(listed("a")))
    server.script("/referrers/", faults.status(503), faults.reset(), faults.short(after=3))
    assert digests(source.referrers(SUBJECT, KIND)) == [digest_of(b"a")]


@pytest.mark.parametrize(
    "fault",
    [
        faults.status(500),
        faults.status(429, {"Retry-After": "30"}),
        faults.reset(),
        faults.stall(),
        faults.stall(after=3),
        faults.drip(0.5),
        faults.drip(0.5, header=True),
        faults.headers({"Content-Encoding": "gzip"}),
    ],
)
def test_a_registry_that_is_slow_or_ill_does_not_hold_up(
    server: FaultServer, source: ImageSource, fault: faults.Fault
) -> None:
    serve(server, index(listed("a")))
    server.always("/referrers/", fault)
    began_s = time.monotonic()
    assert source.referrers(SUBJECT, KIND) == []
    assert time.monotonic() - began_s < 15
    assert server.count("/manifests/") == 0


def test_a_registry_that_is_away(server: FaultServer, source: ImageSource) -> None:
    server.stop()
    began_s = time.monotonic()
    assert source.referrers(SUBJECT, KIND) == []
    assert time.monotonic() - began_s < 3


# --- a layout ----------------------------------------------------------------------------------


class Layout:
    """An OCI layout being written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.write()

    def add(self, data: bytes) -> dict[str, Any]:
        descriptor = listed(data, None)
        (self.directory / "blobs/sha256" / Digest.of(data).hex).write_bytes(data)
        return descriptor

    def write(self, *manifests: dict[str, Any]) -> None:
        (self.directory / "index.json").write_bytes(index(*manifests))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def local(layout: Layout) -> Iterator[ImageSource]:
    source = LayoutSource(layout.directory, counters=Counters())
    yield source
    source.close()


def referrer(subject: Digest = SUBJECT, **more: Any) -> bytes:
    manifest = {"schemaVersion": 2, "subject": {"digest": str(subject)}, "layers": [], **more}
    return json.dumps(manifest).encode()


def test_a_layout_that_lists_referrers(layout: Layout, local: ImageSource) -> None:
    by_type = layout.add(referrer(artifactType=KIND))
    by_config = layout.add(referrer(config={"mediaType": KIND, "digest": "", "size": 2}))
    layout.write(
        layout.add(b"{}"),
        layout.add(b"not JSON"),
        {**layout.add(referrer(artifactType=KIND, x=1)), "artifactType": "another"},
        layout.add(referrer(artifactType="another")),
        layout.add(referrer(Digest.of(b"another"), artifactType=KIND)),
        layout.add(json.dumps({"artifactType": KIND}).encode()),
        listed("not there"),
        {**listed("no digest"), "digest": "sha256:../../etc/passwd"},
        {**layout.add(referrer(artifactType=KIND, x=2)), "size": 1 << 40},
        {**by_type, "artifactType": KIND, "annotations": {"a": "b"}},
        by_config,
    )
    found = local.referrers(SUBJECT, KIND)
    assert digests(found) == [by_type["digest"], by_config["digest"]]
    assert found[0].annotations == {"a": "b"}
    assert local.manifest(str(found[0].digest)).data == referrer(artifactType=KIND)


def test_a_layout_with_the_fallback_tag(layout: Layout, local: ImageSource) -> None:
    tagged = layout.add(index(listed("a"), listed("b", "other")))
    names = {"org.opencontainers.image.ref.name": fallback_tag(SUBJECT)}
    others = [layout.add(str(number).encode()) for number in range(100)]
    layout.write(*others, {**tagged, "annotations": names})
    assert digests(local.referrers(SUBJECT, KIND)) == [digest_of(b"a")]


def test_a_layout_whose_blobs_lie(layout: Layout, local: ImageSource) -> None:
    described = layout.add(referrer(artifactType=KIND))
    layout.write(described)
    other = referrer(artifactType=KIND, other=1)
    (layout.directory / "blobs" / described["digest"].replace(":", "/")).write_bytes(other)
    assert local.referrers(SUBJECT, KIND) == []
    (layout.directory / "index.json").write_bytes(b"[]")
    assert local.referrers(SUBJECT, KIND) == []
    local.close()
    assert local.referrers(SUBJECT, KIND) == []


def test_the_only_image_beside_what_refers_to_it(layout: Layout, local: ImageSource) -> None:
    image = layout.add(b'{"layers": []}')
    artifact = {**layout.add(referrer(artifactType=KIND)), "artifactType": KIND}
    names = {"org.opencontainers.image.ref.name": fallback_tag(SUBJECT)}
    tagged = {**layout.add(index(listed("a"))), "annotations": names}
    layout.write(image, artifact, tagged)
    assert local.manifest(None).data == b'{"layers": []}'
    layout.write(artifact)
    assert local.manifest(None).data == referrer(artifactType=KIND), "if there is nothing else"

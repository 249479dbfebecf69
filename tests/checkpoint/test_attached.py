"""Which trace a mount follows: what is believed of strangers, and what is remembered."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from trio.testing import MockClock

from lazyfs.checkpoint import attached
from lazyfs.checkpoint.attached import (
    FoundTrace,
    Offer,
    TraceMemory,
    TraceSearch,
    candidates,
    offers_in,
    take_one,
)
from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.image import ResolvedImage, resolve
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.checkpoint.referrals import TRACE_TYPE, Referrals
from lazyfs.checkpoint.trace import (
    BLOB_KEY,
    BLOB_SIZE_KEY,
    HINT_LIMIT_BYTES,
    WORKLOAD_KEY,
    Need,
    Recording,
    dump_trace,
)
from lazyfs.content.cache import Cache
from lazyfs.content.documents import name_of
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.source import ReferrerDescriptor
from tests import faults
from tests.faults import FaultServer, digest_of
from tests.images import tar_layer
from tests.mount.published import manifest_of
from tests.traces import (
    annotations_of,
    artifact_of,
    attach,
    attach_trace,
    index_of,
    listed,
    trace_of,
)

LAYER = tar_layer({"checkpoint/inventory.img": b"i"})
MANIFEST = json.dumps(manifest_of(LAYER)).encode()
SUBJECT = digest_of(MANIFEST)
TRACE = trace_of(LAYER.digest)
SETTINGS = TransportSettings(deadline_s=2, backoff_first_s=0.01, mirrors="none")


# --- lists -------------------------------------------------------------------------------------


@dataclass
class Origin:
    """What a source holds, and what it is asked for."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failure: Exception | None = None

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        self.asked.append(f"{'manifest' if is_manifest else 'blob'} {digest}")
        if self.failure is not None:
            raise self.failure
        data = self.blobs.get(str(digest))
        if data is None:
            raise SourceError("404")
        return data


def referrer(annotations: dict[str, str], data: bytes = b"a", kind: str = TRACE_TYPE) -> Any:
    return ReferrerDescriptor(Digest.of(data), "", len(data), kind, annotations)


def test_the_newest_comes_first_whatever_its_zone() -> None:
    whens = {
        "2026-01-02T03:00:00Z": "b",
        "2026-01-02T04:30:00+02:00": "a",  # which is 02:30 in UTC
        "2026-01-02T03:00:00.5+00:00": "c",
        "": "x",
        "yesterday": "x",
        "9" * 100_000: "x",
    }
    rows = [referrer(annotations_of(b"d", name, when)) for when, name in whens.items()]
    offers = offers_in(rows, Origin())
    assert [offer.workload for offer in offers][:3] == ["c", "b", "a"]
    assert {offer.workload for offer in offers[3:]} == {"x"}


@pytest.mark.parametrize(
    "said",
    [
        {BLOB_KEY: "x", BLOB_SIZE_KEY: "1"},
        {BLOB_KEY: "sha256:../..", BLOB_SIZE_KEY: "1"},
        {BLOB_SIZE_KEY: "0"},
        {BLOB_SIZE_KEY: "-1"},
        {BLOB_SIZE_KEY: str(HINT_LIMIT_BYTES + 1)},
        {BLOB_SIZE_KEY: "9" * 5000},
        {BLOB_SIZE_KEY: "²"},
        {WORKLOAD_KEY: "w" * 100_000},
    ],
)
def test_what_can_be_no_trace_is_not_asked_for(said: dict[str, str]) -> None:
    origin = Origin()
    assert offers_in([referrer({**annotations_of(b"d"), **said})], origin) == []
    assert origin.asked == []


def test_without_annotations_the_artifacts_manifest_says_it() -> None:
    document = dump_trace(TRACE)
    manifest = artifact_of(document, {WORKLOAD_KEY: "web"})
    origin = Origin({digest_of(manifest): manifest})
    (offer,) = offers_in([referrer({}, manifest)], origin)
    assert (offer.digest, offer.size_bytes, offer.workload) == (
        digest_of(document),
        len(document),
        "web",
    )
    others = [b"{}", b"[]", b"\xff", b'{"layers": [{"digest": "sha256:00", "size": 1}]}']
    origin = Origin({digest_of(data): data for data in others})
    assert offers_in([referrer({}, data) for data in others], origin) == []
    assert len(origin.asked) == 4
    many = [referrer({}, str(number).encode()) for number in range(100)]
    assert offers_in(many, origin) == []
    assert len(origin.asked) == 8, "only some are read"


def test_others_than_traces_are_passed_over() -> None:
    assert offers_in([referrer(annotations_of(b"d"), kind="application/spdx+json")], Origin()) == []


def offer(workload: str, number: int = 0) -> Offer:
    return Offer(digest_of(f"{workload}{number}".encode()), 1, workload)


def test_which_one_is_taken() -> None:
    web, job, none = offer("web"), offer("job"), offer("")
    assert candidates([web, none, job], "") == [none, web, job], "one without a name, then newest"
    assert candidates([web], "") == [web]
    assert candidates([job, web], "")[0] is job
    assert candidates([web, offer("web", 2), none], "web") == [web, offer("web", 2)]
    assert candidates([web, none], "other") == []


texts = st.text(max_size=30) | st.sampled_from(["sha256:" + "0" * 64, "7", "2026-01-01T00:00Z"])
keys = st.sampled_from([BLOB_KEY, BLOB_SIZE_KEY, WORKLOAD_KEY, attached.CREATED_KEY])


@given(st.lists(st.dictionaries(keys, texts), max_size=5), st.binary(max_size=100))
def test_any_annotations_and_any_manifest(rows: list[dict[str, str]], manifest: bytes) -> None:
    origin = Origin({digest_of(manifest): manifest})
    for each in offers_in([referrer(row, manifest) for row in rows], origin):
        assert 0 < each.size_bytes <= HINT_LIMIT_BYTES
        Digest.parse(each.digest)


# --- a registry --------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.add_blob(b"{}")
        server.add_blob(LAYER.blob)
        server.add_manifest(MANIFEST, "1")
        yield server


@dataclass
class Host:
    """A machine with a cache, which looks for traces of the image in the server."""

    server: FaultServer
    cache: Cache
    settings: TransportSettings

    def look(self, workload: str = "", *, by_digest: bool = True) -> FoundTrace | None:
        """Look as a mount does; what it asks for beside the manifest is in `server.seen`."""
        tail = f"@{SUBJECT}" if by_digest else ":1"
        reference = parse_reference(f"{self.server.host}/{self.server.repository}{tail}")
        config = OpenConfig(self.cache, self.settings, trace="auto", workload=workload)
        with closing(
            resolve(reference, self.settings, Counters(), documents=self.cache.documents)
        ) as image:
            image.save()
            self.server.seen.clear()
            return trio.run(TraceSearch(image, config, by_digest=by_digest).find)

    def memory(self) -> TraceMemory:
        name = f"{self.server.host}/{self.server.repository}"
        return TraceMemory(self.cache.documents, Digest.parse(SUBJECT), name)


@pytest.fixture
def host(server: FaultServer, tmp_path: Path) -> Host:
    (tmp_path / "auth.json").write_text("{}")
    settings = replace(SETTINGS, authfile=str(tmp_path / "auth.json"))
    return Host(server, Cache(tmp_path / "cache"), settings)


def asked(server: FaultServer) -> list[str]:
    """Return what was asked for; but for what tells HTTP from HTTPS."""
    paths = [seen.path.removeprefix(f"/v2/{server.repository}/") for seen in server.seen]
    return [path for path in paths if path != "/v2/"]


def test_it_costs_a_list_and_the_document(server: FaultServer, host: Host) -> None:
    digest = attach_trace(server, SUBJECT, TRACE)
    assert host.look() == FoundTrace(TRACE, digest, 12 * 1024)
    assert asked(server) == [f"referrers/{SUBJECT}", f"blobs/{digest}"]
    assert len({seen.connection for seen in server.seen}) == 1


def test_where_there_is_no_api_it_costs_one_more(server: FaultServer, host: Host) -> None:
    document = dump_trace(TRACE)
    server.add_blob(document)
    attach(server, SUBJECT, listed(annotations_of(document)), by_tag=True)
    found = host.look()
    assert found is not None
    assert [path.partition("/")[0] for path in asked(server)] == ["referrers", "manifests", "blobs"]


def test_a_second_look_asks_nobody(server: FaultServer, host: Host) -> None:
    digest = attach_trace(server, SUBJECT, TRACE)
    first = host.look()
    assert first is not None
    assert host.look() == first
    assert host.look(by_digest=False) == first
    assert asked(server) == []
    path = host.cache.documents
    path.forget(name_of(Digest.parse(digest), "blob", f"{server.host}/{server.repository}"))
    assert host.look() == first, "the document has been removed, not the list"
    assert asked(server) == [f"blobs/{digest}"]


def test_that_there_is_none_is_believed_for_an_image_by_digest(
    server: FaultServer, host: Host
) -> None:
    assert host.look() is None
    attach_trace(server, SUBJECT, TRACE)
    assert host.look() is None
    assert asked(server) == []
    assert host.look(by_digest=False) is not None, "whose registry is asked anyway"


def age(host: Host, seconds: float) -> None:
    """Make what is remembered older."""
    known = host.memory().load()
    assert known is not None
    older = msgspec.structs.replace(known, asked_at_s=known.asked_at_s - seconds)
    name = name_of(Digest.parse(SUBJECT), "trace", f"{host.server.host}/{host.server.repository}")
    host.cache.documents.keep(name, [msgspec.json.encode(older)])


def test_that_there_is_none_is_not_believed_for_ever(server: FaultServer, host: Host) -> None:
    assert host.look() is None
    attach_trace(server, SUBJECT, TRACE)
    age(host, attached.FRESH_S + 1)
    assert host.look() is not None


def test_what_was_found_long_ago_is_followed_at_once(server: FaultServer, host: Host) -> None:
    attach_trace(server, SUBJECT, TRACE)
    first = host.look()
    age(host, attached.FRESH_S + 1)
    server.stop()
    assert host.look() == first


def test_and_what_is_attached_by_now_is_asked_for_behind_it(
    server: FaultServer, host: Host
) -> None:
    attach_trace(server, SUBJECT, TRACE)
    first = host.look()
    age(host, attached.FRESH_S + 1)
    newer = trace_of(LAYER.digest, workload="newer")
    digest = attach_trace(server, SUBJECT, newer)
    with closing(opened(host)) as image:
        config = OpenConfig(host.cache, host.settings, trace="auto")
        search = TraceSearch(image, config, by_digest=True)
        assert trio.run(search.find) == first
        assert asked(server) == []
        trio.run(search.freshen, clock=MockClock(autojump_threshold=0))
    assert asked(server) == [f"referrers/{SUBJECT}", f"blobs/{digest}"]
    server.stop()
    found = host.look()
    assert found is not None
    assert found.trace == newer


def test_a_workload_that_is_not_among_what_is_remembered(server: FaultServer, host: Host) -> None:
    attach_trace(server, SUBJECT, trace_of(LAYER.digest, workload="web"))
    assert host.look() is not None
    attach_trace(server, SUBJECT, trace_of(LAYER.digest, workload="job"))
    assert host.look("job") is None, "by digest it is believed that there is none"
    assert host.look("job", by_digest=False) is not None


def test_a_clock_that_was_set_back(server: FaultServer, host: Host) -> None:
    assert host.look() is None
    age(host, -1000)
    attach_trace(server, SUBJECT, TRACE)
    assert host.look() is not None


def test_a_registry_that_is_ill_is_not_remembered_as_one_without_traces(
    server: FaultServer, host: Host
) -> None:
    is_ill = True

    def fault(exchange: faults.Exchange) -> None:
        (faults.status(500) if is_ill else faults.behave)(exchange)

    server.always("/referrers/", fault)
    attach_trace(server, SUBJECT, TRACE)
    assert host.look() is None
    is_ill = False
    assert host.look() is not None


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"asked_at_s": 1e999, "offers": []}', b"\xff"])
def test_a_damaged_memory_is_none(server: FaultServer, host: Host, damage: bytes) -> None:
    attach_trace(server, SUBJECT, TRACE)
    name = name_of(Digest.parse(SUBJECT), "trace", f"{server.host}/{server.repository}")
    host.cache.documents.keep(name, [damage])
    assert host.look() is not None


def test_a_document_in_the_cache_that_is_another(server: FaultServer, host: Host) -> None:
    digest = attach_trace(server, SUBJECT, TRACE)
    host.memory().keep_document(
        Digest.parse(digest), dump_trace(trace_of(LAYER.digest, workload="x"))
    )
    found = host.look()
    assert found is not None
    assert found.trace == TRACE


def test_the_workload_that_was_asked_for(
    server: FaultServer, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = []
    for name, when in (("web", "2026-01-01T00:00:00Z"), ("job\n", "2026-01-02T00:00:00Z")):
        document = dump_trace(trace_of(LAYER.digest, workload=name))
        server.add_blob(document)
        rows.append(listed(annotations_of(document, name, when), name.encode()))
    attach(server, SUBJECT, *rows)
    found = host.look("web")
    assert found is not None
    assert found.trace.workload == "web"
    newest = host.look()
    assert newest is not None
    assert newest.trace.workload == "job\n"
    assert host.look("other") is None
    assert "no trace of the workload other; there are those of job\\n, web" in caplog.text
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def test_a_trace_of_other_layers_is_passed_over(server: FaultServer, host: Host) -> None:
    rows = []
    for number, layer in enumerate(("sha256:" + "0" * 64, LAYER.digest)):
        document = dump_trace(trace_of(layer))
        server.add_blob(document)
        when = f"2026-01-0{9 - number}T00:00:00Z"
        rows.append(listed(annotations_of(document, created=when), str(number).encode()))
    attach(server, SUBJECT, *rows)
    found = host.look()
    assert found is not None
    assert found.trace == TRACE


def test_what_was_recorded_beside_it_is_dropped(server: FaultServer, host: Host) -> None:
    attach_trace(server, SUBJECT, trace_of(LAYER.digest, recording=Recording(reference="x")))
    found = host.look()
    assert found is not None
    assert found.trace.recording is None


def lying_size(document: bytes) -> dict[str, str]:
    return {**annotations_of(document), BLOB_SIZE_KEY: "3"}


def hostile_documents() -> Sequence[bytes]:
    needs = [Need(0, 0, 1, 0.0)] * 600_000
    return [
        b"",
        b"not zstd",
        dump_trace(TRACE)[:-5],
        dump_trace(trace_of(LAYER.digest, version=2)),
        dump_trace(msgspec.structs.replace(TRACE, needs=needs)),
        dump_trace(trace_of(LAYER.digest, recording=Recording(way="x" * (40 << 20)))),
    ]


@pytest.mark.parametrize("number", range(6))
def test_documents_that_are_none(server: FaultServer, host: Host, number: int) -> None:
    document = hostile_documents()[number]
    server.add_blob(document)
    attach(server, SUBJECT, listed({**annotations_of(document), BLOB_SIZE_KEY: "4194304"}))
    assert host.look() is None


@pytest.mark.parametrize(
    "fault",
    [
        faults.status(404),
        faults.status(500),
        faults.corrupt,
        faults.stall(),
        faults.drip(0.3),
        faults.reset(),
        faults.redirect("http://169.254.169.254/latest"),
        faults.redirect("file:///etc/passwd"),
        faults.headers({"Content-Encoding": "gzip"}),
    ],
)
def test_a_document_that_does_not_come(
    server: FaultServer, host: Host, fault: faults.Fault, caplog: pytest.LogCaptureFixture
) -> None:
    digest = attach_trace(server, SUBJECT, TRACE)
    server.always(f"/blobs/{digest}", fault)
    assert host.look() is None
    assert all(record.levelno <= logging.INFO for record in caplog.records)


def endless(exchange: faults.Exchange) -> None:
    """Send zeros for as long as anybody reads."""
    exchange.head(200, {"Content-Type": "application/octet-stream"})
    while exchange.wait(0):
        exchange.write(bytes(1 << 20))


def test_a_body_without_an_end(server: FaultServer, host: Host) -> None:
    digest = attach_trace(server, SUBJECT, TRACE)
    server.always(f"/blobs/{digest}", endless)
    assert host.look() is None
    server.always("/referrers/", endless)
    host.memory().forget()
    assert host.look() is None


def test_a_size_that_is_a_lie(server: FaultServer, host: Host) -> None:
    document = dump_trace(TRACE)
    server.add_blob(document)
    attach(server, SUBJECT, listed(lying_size(document)))
    assert host.look() is None


def test_ten_thousand_that_refer_to_it(server: FaultServer, host: Host) -> None:
    other = dump_trace(trace_of("sha256:" + "0" * 64))
    server.add_blob(other)
    rows = [listed(annotations_of(other), str(number).encode()) for number in range(10_000)]
    attach(server, SUBJECT, *rows)
    assert host.look() is None
    known = host.memory().load()
    assert known is not None
    assert len(known.offers) <= 64


def test_an_image_that_is_no_registrys(tmp_path: Path) -> None:
    archive = tmp_path / "checkpoint.tar"
    archive.write_bytes(LAYER.blob)
    config = OpenConfig(Cache(tmp_path / "cache"), trace="auto")
    with closing(resolve(parse_reference(str(archive)), SETTINGS, Counters())) as image:
        assert trio.run(TraceSearch(image, config, by_digest=False).find) is None


def test_a_file_that_was_named(
    server: FaultServer, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    reference = parse_reference(f"{server.host}/{server.repository}:1")
    with closing(resolve(reference, host.settings, Counters())) as image:
        for trace, expected in ((TRACE, True), (trace_of("sha256:" + "0" * 64), False)):
            config = OpenConfig(host.cache, trace=Path("t"), given_trace=trace)
            found = trio.run(TraceSearch(image, config, by_digest=False).find)
            assert (found is not None) is expected
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "of other layers" in caplog.text


def test_off_asks_nobody(server: FaultServer, host: Host) -> None:
    reference = parse_reference(f"{server.host}/{server.repository}:1")
    with closing(resolve(reference, host.settings, Counters())) as image:
        server.seen.clear()
        config = OpenConfig(host.cache, host.settings, trace="off")
        assert trio.run(TraceSearch(image, config, by_digest=False).find) is None
    assert server.seen == []


# --- one question for all ----------------------------------------------------------------------


def opened(host: Host) -> ResolvedImage:
    reference = parse_reference(f"{host.server.host}/{host.server.repository}:1")
    image = resolve(reference, host.settings, Counters(), documents=host.cache.documents)
    host.server.seen.clear()
    return image


def test_several_types_are_one_question(server: FaultServer, host: Host) -> None:
    document = dump_trace(TRACE)
    soci = {**listed({}, b"soci"), "artifactType": "soci"}
    attach(server, SUBJECT, soci, {**soci, "artifactType": "x"}, listed(annotations_of(document)))
    with closing(opened(host)) as image:
        assert image.referrals is not None
        assert image.digest is not None
        image.referrals.begin(image.digest, (TRACE_TYPE, "soci"))
        image.referrals.begin(image.digest, (TRACE_TYPE,))
        for kind in (TRACE_TYPE, "soci"):
            (found,) = image.referrals.of(image.digest, kind)
            assert found.artifact_type == kind
        assert image.referrals.of(image.digest, "y") == []
    assert [seen.query for seen in server.seen] == ["", "artifactType=y"]


def test_where_much_refers_to_an_image_each_type_is_asked_for(
    server: FaultServer, host: Host
) -> None:
    attach(server, SUBJECT, listed({}, b"a"))
    path = f"/v2/{server.repository}/referrers/{SUBJECT}"
    server.resources[path].headers["Link"] = f'<{path}/2>; rel="next"'
    server.resources[f"{path}/2"] = faults.Resource(index_of(listed({}, b"b")), faults.OCI_INDEX)
    with closing(opened(host)) as image:
        assert image.source is not None
        found = image.source.referrers(Digest.parse(SUBJECT), TRACE_TYPE, "soci")
    assert sorted(str(each.digest) for each in found) == sorted([digest_of(b"a"), digest_of(b"b")])


def test_a_bug_in_asking_is_told_to_who_waits() -> None:
    class Broken:
        def referrers(self, digest: Digest, *kinds: str) -> Any:
            raise ZeroDivisionError

    referrals = Referrals(Broken())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        referrals.of(Digest.parse(SUBJECT), "a")


def test_a_document_that_is_not_there_is_a_line_of_the_log(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with closing(opened(host)) as image:
        assert take_one([offer("a")], image, "", None) is None
    assert "is not used" in caplog.text

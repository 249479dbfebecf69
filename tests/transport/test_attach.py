"""Attaching what refers to an image: by a registry's API, by the clients' list, in layouts."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError, SourceError
from lazyfs.transport.files import LayoutSource
from lazyfs.transport.layout_writer import LayoutTarget
from lazyfs.transport.push import RegistryTarget
from lazyfs.transport.referrers import parse_referrers, with_referrer
from tests import faults
from tests.faults import OCI_INDEX, OCI_MANIFEST, Exchange, FaultServer, Resource, digest_of
from tests.transport.gather import QUICK

KIND = "application/vnd.lazyfs.trace.v1"
KEY = "workload"
SUBJECT = Digest.of(b"the image's manifest")
TAG = f"sha256-{SUBJECT.hex}"


def artifact(workload: str = "", number: int = 0, subject: Digest = SUBJECT) -> bytes:
    named = {KEY: workload} if workload else {}
    manifest = {
        "schemaVersion": 2,
        "artifactType": KIND,
        "subject": {"digest": str(subject)},
        "annotations": {**named, "number": str(number)},
        "layers": [],
    }
    return json.dumps(manifest).encode()


def entry_of(data: bytes, **more: Any) -> dict[str, Any]:
    return {
        "mediaType": OCI_MANIFEST,
        "digest": digest_of(data),
        "size": len(data),
        "artifactType": KIND,
        "annotations": json.loads(data)["annotations"],
        **more,
    }


def digests(listed: bytes | None) -> list[str]:
    assert listed is not None
    return [each["digest"] for each in json.loads(listed)["manifests"]]


# --- the list ----------------------------------------------------------------------------------


def test_a_list_that_is_not_there_yet() -> None:
    data = artifact()
    made = with_referrer(None, entry_of(data), KEY)
    assert made is not None
    assert json.loads(made) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [entry_of(data)],
    }
    assert with_referrer(made, entry_of(data), KEY) is None, "it is there"


def test_what_others_have_listed_stays_as_it_is() -> None:
    other = {"digest": "sha256:00", "artifactType": "x", "annotations": None, "data": [1]}
    same_name_of_another_type = {**entry_of(artifact("web")), "artifactType": "y"}
    old, another = entry_of(artifact("web", 1)), entry_of(artifact("job"))
    rows = [other, same_name_of_another_type, old, another]
    before = json.dumps({"annotations": {"a": "b"}, "more": None, "manifests": rows}).encode()
    new = entry_of(artifact("web", 2))
    made = with_referrer(before, new, KEY)
    assert made is not None
    assert json.loads(made) == {
        "annotations": {"a": "b"},
        "more": None,
        "manifests": [other, same_name_of_another_type, another, new],
    }


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff", b'{"manifests": 1}', b'{"manifests": [1]}', b"[" * 99_999]
)
def test_what_is_no_list_is_not_written_over(data: bytes) -> None:
    with pytest.raises(MalformedError):
        with_referrer(data, entry_of(artifact()), KEY)


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
)
rows = st.dictionaries(
    st.sampled_from(["digest", "artifactType", "annotations", "x"]), values, max_size=4
)


@given(st.lists(rows, max_size=4))
def test_whatever_is_listed_a_new_entry_is_found(listed: list[dict[str, Any]]) -> None:
    data = artifact("web")
    made = with_referrer(json.dumps({"manifests": listed}).encode(), entry_of(data), KEY)
    assert made is not None
    kept = json.loads(made)["manifests"]
    assert kept[-1] == entry_of(data)
    assert [each for each in listed if each in kept] == kept[:-1]


# --- a registry --------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.writable = True
        yield server


def open_target(
    server: FaultServer, authfile: Path, pause: Callable[[float], None] = lambda _: None
) -> RegistryTarget:
    authfile.write_text("{}")
    settings = replace(QUICK, authfile=str(authfile), mirrors="none")
    return RegistryTarget(
        server.host, server.repository, settings=settings, counters=Counters(), pause=pause
    )


@pytest.fixture
def target(server: FaultServer, tmp_path: Path) -> Iterator[RegistryTarget]:
    target = open_target(server, tmp_path / "auth.json")
    yield target
    target.close()


def listed_by_tag(server: FaultServer) -> bytes | None:
    found = server.resources.get(f"/v2/{server.repository}/manifests/{TAG}")
    return None if found is None else found.body


def attach(target: RegistryTarget, data: bytes) -> str:
    return target.attach(data, SUBJECT, entry_of(data), KEY)


def with_api(server: FaultServer) -> faults.Fault:
    """Take a manifest as a registry does that lists referrers itself."""

    def fault(exchange: Exchange) -> None:
        seen = exchange.seen
        if seen.method == "PUT":
            server.resources[seen.path] = Resource(seen.body, OCI_MANIFEST)
            exchange.answer(201, {"OCI-Subject": str(SUBJECT)})
        else:
            faults.behave(exchange)

    return fault


def test_a_registry_that_lists_it_itself(server: FaultServer, target: RegistryTarget) -> None:
    server.always("/manifests/", with_api(server))
    data = artifact()
    assert attach(target, data) == "api"
    assert server.resources[f"/v2/{server.repository}/manifests/{digest_of(data)}"].body == data
    assert listed_by_tag(server) is None
    assert server.count("/manifests/") == 1


def test_where_none_does_so_clients_keep_the_list(
    server: FaultServer, target: RegistryTarget
) -> None:
    first, other, second = artifact("web", 1), artifact("job"), artifact("web", 2)
    for data in (first, other, second):
        assert attach(target, data) == "tag"
    assert digests(listed_by_tag(server)) == [digest_of(other), digest_of(second)]
    resource = server.resources[f"/v2/{server.repository}/manifests/{TAG}"]
    assert resource.content_type == OCI_INDEX
    found = parse_referrers(resource.body, KIND)
    assert [each.annotations.get(KEY) for each in found] == ["job", "web"]
    before = len(server.seen)
    attach(target, second)
    assert [seen.method for seen in server.seen[before:]] == ["PUT", "GET"], "it is listed already"


def test_who_writes_the_list_between_reading_and_writing_is_not_lost_nor_are_we(
    server: FaultServer, target: RegistryTarget
) -> None:
    theirs, ours = artifact("job"), artifact("web")
    left = 2

    def overwritten(exchange: Exchange) -> None:
        """Take our list, and be given the list of somebody who had not seen ours."""
        nonlocal left
        seen = exchange.seen
        if seen.method != "PUT":
            faults.behave(exchange)
            return
        listed = with_referrer(None, entry_of(theirs), KEY) if left else seen.body
        left = max(0, left - 1)
        assert listed is not None
        server.resources[seen.path] = Resource(listed, OCI_INDEX)
        exchange.answer(201, {})

    server.always(f"/manifests/{TAG}", overwritten)
    assert attach(target, ours) == "tag"
    assert digests(listed_by_tag(server)) == [digest_of(theirs), digest_of(ours)]


def test_who_writes_the_list_a_little_later_does_not_make_us_be_lost(
    server: FaultServer, tmp_path: Path
) -> None:
    """They had read the list before ours was there."""
    theirs, ours = artifact("job"), artifact("web")
    pauses: list[float] = []

    def pause(pause_s: float) -> None:
        pauses.append(pause_s)
        if len(pauses) == 1:
            listed = with_referrer(None, entry_of(theirs), KEY)
            assert listed is not None
            server.add_manifest(listed, TAG, OCI_INDEX)

    target = open_target(server, tmp_path / "auth.json", pause)
    assert attach(target, ours) == "tag"
    target.close()
    assert digests(listed_by_tag(server)) == [digest_of(theirs), digest_of(ours)]
    assert len(pauses) == 2


def test_of_two_with_the_same_name_at_the_same_time_one_stays_and_neither_fails(
    server: FaultServer, tmp_path: Path
) -> None:
    theirs, ours = artifact("web", 1), artifact("web", 2)

    def pause(pause_s: float) -> None:
        """Be the other, who insists."""
        listed = with_referrer(listed_by_tag(server), entry_of(theirs), KEY)
        assert listed is not None
        server.add_manifest(listed, TAG, OCI_INDEX)

    target = open_target(server, tmp_path / "auth.json", pause)
    assert attach(target, ours) == "tag"
    target.close()
    assert digests(listed_by_tag(server)) == [digest_of(theirs)]


def test_a_list_that_is_always_somebody_elses(server: FaultServer, target: RegistryTarget) -> None:
    def refuse(exchange: Exchange) -> None:
        if exchange.seen.method == "PUT":
            exchange.answer(201, {})
        else:
            exchange.answer(200, {"Content-Type": OCI_INDEX}, b'{"manifests": []}')

    server.always(f"/manifests/{TAG}", refuse)
    with pytest.raises(SourceError, match="at the same time"):
        attach(target, artifact())


@pytest.mark.parametrize("status", [401, 403, 405, 413])
def test_a_registry_that_takes_nothing(
    server: FaultServer, target: RegistryTarget, status: int
) -> None:
    server.always("/manifests/", faults.status(status))
    with pytest.raises(SourceError, match=server.repository):
        attach(target, artifact())


def test_a_list_that_is_damaged_is_left_alone(server: FaultServer, target: RegistryTarget) -> None:
    server.add_manifest(b"not JSON", TAG, OCI_INDEX)
    with pytest.raises(MalformedError):
        attach(target, artifact())
    assert listed_by_tag(server) == b"not JSON"


# --- a layout ----------------------------------------------------------------------------------


def test_a_layout_lists_it_in_its_index(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path / "layout")
    image = b'{"layers": []}'
    target.put_manifest(image, OCI_MANIFEST, "1")
    subject, another = Digest.of(image), Digest.of(b"another image")
    kept = artifact("web", 1, another)
    for data, of in (
        (artifact("web", 1, subject), subject),
        (artifact("job", 1, subject), subject),
        (kept, another),
        (artifact("web", 2, subject), subject),
    ):
        assert target.attach(data, of, entry_of(data), KEY) == "index"
    source = LayoutSource(tmp_path / "layout", counters=Counters())
    found = {each.annotations[KEY]: each for each in source.referrers(subject, KIND)}
    assert {name: each.annotations["number"] for name, each in found.items()} == {
        "web": "2",
        "job": "1",
    }
    (other,) = source.referrers(another, KIND)
    assert str(other.digest) == digest_of(kept)
    assert source.manifest(None).data == image, "the only image is found without a tag"
    assert source.manifest("1").data == image
    assert source.read_offer(found["web"].digest, 10) == artifact("web", 2, subject)
    source.close()


def test_a_layout_with_rows_that_lead_nowhere(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path)
    new = artifact("web", 2)
    odd: list[Any] = [
        {**entry_of(artifact("web", 1)), "digest": each} for each in (None, 7, "x", "sha256:00")
    ]
    missing = {**entry_of(artifact("web", 1)), "digest": f"sha256:{hashlib.sha256().hexdigest()}"}
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [*odd, missing]}))
    target.attach(new, SUBJECT, entry_of(new), KEY)
    written = json.loads((tmp_path / "index.json").read_bytes())["manifests"]
    assert written == [*odd, missing, entry_of(new)]

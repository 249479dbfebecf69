"""The documents of a stub, edited: any bytes give bytes, or the declared error."""

import contextlib
import json

from hypothesis import given
from hypothesis import strategies as some

from lazyfs.checkpoint.stub_documents import (
    annotate,
    describe,
    edit_config,
    parse_document,
    write_document,
)
from lazyfs.checkpoint.stub_layer import Written
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError

LAYER = Written(Digest.of(b"packed"), 6, Digest.of(b"plain"))
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(),
    lambda each: some.lists(each) | some.dictionaries(some.text(), each),
)


@given(some.binary(max_size=300) | JSON.map(lambda each: json.dumps(each).encode()))
def test_any_bytes_are_a_document_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedError):
        document = parse_document(data, "it")
        assert parse_document(write_document(document), "it") == document


@given(
    some.binary(max_size=300)
    | JSON.map(lambda each: json.dumps(each).encode())
    | JSON.map(lambda each: json.dumps({"rootfs": {"diff_ids": each}}).encode())
    | some.lists(some.text(), min_size=2, max_size=2).map(
        lambda each: json.dumps({"rootfs": {"diff_ids": each}, "x": "\ud800"}).encode()
    )
)
def test_any_config_stays_but_for_the_ids_of_the_layers_that_are_others(data: bytes) -> None:
    edited = edit_config(data, [Digest.of(b"1"), Digest.of(b"2")], {1: LAYER})
    if edited != data:
        before, after = json.loads(data), json.loads(edited)
        first, second = after["rootfs"]["diff_ids"]
        assert (first, second) == (before["rootfs"]["diff_ids"][0], str(LAYER.diff_id))
        before["rootfs"]["diff_ids"] = after["rootfs"]["diff_ids"]
        assert before == after


def test_what_is_nested_beyond_measure_is_no_document() -> None:
    with contextlib.suppress(MalformedError):
        parse_document(b'{"a":' + b"[" * 200_000, "it")
    deep = b'{"a":' + b"[" * 200_000
    assert edit_config(deep, [], {}) == deep


def test_a_layers_descriptor_says_nothing_of_the_bytes_that_were() -> None:
    before = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd",
        "digest": "sha256:0",
        "size": 1,
        "urls": ["https://a.example/"],
        "data": "AA==",
        "platform": {"os": "linux"},
        "annotations": {
            "io.github.containers.zstd-chunked.manifest-checksum": "sha256:0",
            "org.opencontainers.image.title": "checkpoint",
        },
    }
    assert describe(before, LAYER, "application/vnd.oci.image.layer.v1.tar+gzip") == {
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": str(LAYER.digest),
        "size": 6,
        "platform": {"os": "linux"},
        "annotations": {"org.opencontainers.image.title": "checkpoint"},
    }
    assert before["size"] == 1, "it is another"


def test_annotations_are_added_to_none() -> None:
    for document in ({}, {"annotations": None}, {"annotations": {"com.amazon.soci.x": "1"}}):
        annotate(document, "a", "b")
        assert document == {"annotations": {"a": "b"}}


def test_a_layer_that_has_to_be_plain_says_so() -> None:
    plain = Written(LAYER.diff_id, 6, LAYER.diff_id)
    before = {"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "digest": "", "size": 0}
    assert describe(before, plain, "x")["mediaType"] == "application/vnd.oci.image.layer.v1.tar"

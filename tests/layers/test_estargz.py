import dataclasses
import hashlib
import json
import random
import tarfile
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError, UnsupportedLayer
from lazyfs.layers.deflate import GZIP, Buffer, PythonInflater
from lazyfs.layers.estargz import EStargz, Gunzip, toc_json
from lazyfs.layers.model import EntryType, StreamIndex
from lazyfs.layers.stargz import TAIL_BYTES
from lazyfs.layers.stargz_toc import NOT_SHOWN
from tests.images import Layer, Member
from tests.layers.indexed import (
    DATA,
    check_against_tar,
    content_of,
    decode,
    descriptor,
    files_of,
    open_as,
    open_index,
    sample,
)
from tests.layers.stargz_writer import (
    DIGEST_KEY,
    LANDMARK,
    Toc,
    empty_member,
    estargz,
    gzip_footer,
    gzipped,
    stargz_body,
    toc_text,
    with_gzip_toc,
)

RANDOM = random.Random(7)
PAGES = RANDOM.randbytes(50_000) + bytes(40_000) + RANDOM.randbytes(20_001)
FILES = {"checkpoint/": b"", "checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}
PLAIN = {"checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}
LAYER = estargz(FILES, chunk_bytes=30_000)
SHARED = estargz(FILES, chunk_bytes=10_000, least_bytes=25_000)
SAMPLES = ("first", "chunks", "shared")


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_a_layer_of_ctr_remote_reads_as_gzip_and_tar_read_it(name: str) -> None:
    layer = sample(DATA / "estargz" / name)
    index = open_index(EStargz(), layer)
    assert index.format_name == "estargz"
    assert index.cache_tag == f"stargz-1-{layer.annotations[DIGEST_KEY].removeprefix('sha256:')}"
    assert index.chunks.proven
    assert index.stream is None
    check_against_tar(index, layer.blob, NOT_SHOWN)
    paths = [entry.path for entry in index.entries]
    assert not NOT_SHOWN & set(paths)
    assert {"empty-00/.wh.gone", "empty-01/.wh..wh..opq"} <= set(paths)


def test_files_that_share_a_gzip_member_are_one_chunk() -> None:
    index = open_index(EStargz(), sample(DATA / "estargz" / "shared"))
    named = [entry for entry in index.entries if entry.type is EntryType.FILE and entry.size_bytes]
    assert len(named) == 21
    assert len(index.chunks) == 3


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=4), max_size=6),
    st.integers(50, 5000),
    st.sampled_from([0, 700, 4000, 100_000]),
)
def test_files_read_back(
    shape: list[list[tuple[int, bool]]], chunk_bytes: int, least_bytes: int
) -> None:
    rng = random.Random(5)
    files = {
        f"f{number}": b"".join(bytes(n) if zeros else rng.randbytes(n) for n, zeros in file)
        for number, file in enumerate(shape)
    }
    layer = estargz(files, chunk_bytes=chunk_bytes, least_bytes=least_bytes)
    assert files_of(open_index(EStargz(), layer), layer.blob) == files


@pytest.mark.parametrize("least_bytes", [0, 2**30])
@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20, 3 * 2**20 + 7])
def test_chunks_beyond_one_piece(size: int, least_bytes: int) -> None:
    files = {"a": b"1", "large": RANDOM.randbytes(size), "same": b"\xff" * size, "z": b"2"}
    layer = estargz(files, chunk_bytes=2**22, least_bytes=least_bytes)
    assert files_of(open_index(EStargz(), layer), layer.blob) == files


def test_files_of_their_own_start_at_pages() -> None:
    index = open_index(EStargz(), LAYER)
    content = content_of(index.chunks, LAYER.blob)
    assert [entry.content_start % 4096 for entry in index.entries] == [0, 0, 0]
    assert len(content) == 4096 + len(PAGES)
    assert len(index.chunks) == 1 + 4


def test_metadata_links_and_duplicates_are_told() -> None:
    files = [
        Member("a", b"1", mtime=1, mode=0o4755, uid=2**32 - 1, gid=3, pax={"x": "y"}),
        Member("./b", type=tarfile.LNKTYPE, link="./a"),
        Member("s", type=tarfile.SYMTYPE, link="../x"),
        Member("null", type=tarfile.CHRTYPE),
        Member("pipe", type=tarfile.FIFOTYPE),
        Member("a", b"2"),
    ]
    a, b, s, null, pipe, again = open_index(EStargz(), estargz(files)).entries
    assert (a.mode, a.uid, a.gid, a.mtime_ns) == (0o4755, 2**32 - 1, 3, 10**9)
    assert a.xattrs == (("user.x", b"x"),)
    assert (b.link_of, b.content_start, b.size_bytes) == ("a", a.content_start, 1)
    assert (s.type, s.symlink_target) == (EntryType.SYMLINK, "../x")
    assert (null.type, pipe.type) == (EntryType.OTHER, EntryType.FIFO)
    assert again.path == "a"


def test_chunks_of_the_first_writers_have_no_names() -> None:
    def edit(toc: Toc) -> None:
        for row in toc["entries"]:
            if row["type"] == "chunk":
                del row["name"]

    layer = estargz(FILES, chunk_bytes=30_000, edit=edit)
    assert files_of(open_index(EStargz(), layer), layer.blob) == PLAIN


def test_a_file_of_one_chunk_may_have_but_its_own_digest() -> None:
    def edit(toc: Toc) -> None:
        for row in toc["entries"]:
            row.pop("chunkDigest", None)

    layer = estargz(FILES, edit=edit)
    assert files_of(open_index(EStargz(), layer), layer.blob) == PLAIN


def test_a_payload_may_go_on_in_the_next_gzip_member() -> None:
    """No writer does it, but to gzip it is the same."""

    def pack(data: bytes) -> bytes:
        return gzipped(data[:700]) + gzipped(b"") + gzipped(data[700:])

    body, toc = stargz_body(FILES, pack, 30_000, 0)
    layer = with_gzip_toc(body, toc_text(toc))
    assert files_of(open_index(EStargz(), layer), layer.blob) == PLAIN


@pytest.mark.parametrize("step", [1, 100, 4096])
def test_gunzip_without_a_fast_library(step: int) -> None:
    plain = PAGES + bytes(300_000)
    packed = b"".join(gzipped(plain[at : at + 90_000]) for at in range(0, len(plain), 90_000))
    for source in (Gunzip(packed), Gunzip(packed, PythonInflater(GZIP))):
        out, content = Buffer(step * 50), b""
        while got := source.unpack(out, step, step * 50):
            content += bytes(out.view[step : step + got])
        assert content == plain


# --- where the TOC is --------------------------------------------------------------------------


def test_a_small_layer_is_opened_in_one_round() -> None:
    rounds: list[int] = []
    open_as(EStargz(), LAYER, rounds)
    assert rounds == [TAIL_BYTES]


@pytest.mark.parametrize("count", [500, 3000])
def test_a_toc_beyond_the_tail_is_fetched(count: int) -> None:
    """Names that look like the places where the text is cut; one TOC begins within the tail."""
    files = {'d},\n\t\t{\n\t\t\t"name' + f"{n}/" + "},{": b"%d" % n for n in range(count)}
    layer = estargz(files)
    rounds: list[int] = []
    index = open_as(EStargz(), layer, rounds)
    assert not isinstance(index, StreamIndex)
    assert files_of(index, layer.blob) == files
    assert len(rounds) == 1 + (count > 500)


def test_a_toc_that_ends_before_the_tail_is_fetched() -> None:
    body, toc = stargz_body(FILES, gzipped, 30_000, 0)
    layer = with_gzip_toc(body, toc_text(toc))
    filler = gzipped(RANDOM.randbytes(200_000))
    layer = dataclasses.replace(layer, blob=layer.blob[:-51] + filler + layer.blob[-51:])
    assert files_of(open_index(EStargz(), layer), layer.blob) == PLAIN


def test_the_first_version_of_the_footer() -> None:
    body, toc = stargz_body(FILES, gzipped, 30_000, 0)
    layer = with_gzip_toc(body, toc_text(toc), legacy=True)
    assert files_of(open_index(EStargz(), layer), layer.blob) == PLAIN


def test_a_compact_toc() -> None:
    body, toc = stargz_body({f"f{n}": b"x" for n in range(5000)}, gzipped, 30_000, 0)
    layer = with_gzip_toc(body, json.dumps(toc, separators=(",", ":")).encode())
    assert len(open_index(EStargz(), layer).entries) == 5000


@pytest.mark.parametrize("head", [None, b""])
def test_without_a_footer_it_is_an_ordinary_gzip(head: bytes | None) -> None:
    body = LAYER.blob[:-51]
    for footer in (b"", empty_member(b"SG\x11\0STARGZEXTERNALTOC"), gzip_footer(0)[:-1] + b"x"):
        layer = dataclasses.replace(LAYER, blob=body + footer)
        opened = open_as(EStargz(), layer, head=head)
        assert isinstance(opened, StreamIndex)
        assert opened.format_name == "gzip"


def test_it_is_recognised_by_annotation_and_bytes() -> None:
    form, described = EStargz(), descriptor(LAYER)
    assert form.recognises(described, LAYER.blob[:100])
    assert form.recognises(described, b"")
    assert not form.recognises(described, b"\x28\xb5\x2f\xfd")
    plain = msgspec.structs.replace(described, annotations={})
    assert not form.recognises(plain, LAYER.blob[:100])


# --- lies --------------------------------------------------------------------------------------


def falsified(number: int, **changes: object) -> Layer:
    def edit(toc: Toc) -> None:
        toc["entries"][number] |= changes

    return estargz(FILES, chunk_bytes=30_000, edit=edit)


SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (2, {"offset": 10**9}),
        (2, {"offset": -1}),
        (2, {"offset": 2**64}),
        (2, {"size": 2**62}),
        (2, {"size": "5"}),
        (2, {"innerOffset": 2**62}),
        (2, {"innerOffset": -1}),
        (2, {"chunkOffset": 1}),
        (2, {"chunkSize": 4}),
        (2, {"chunkDigest": "sha256:" + "g" * 64}),
        (2, {"chunkDigest": "sha512:" + "a" * 128}),
        (2, {"chunkDigest": "", "digest": ""}),
        (2, {"name": "../up"}),
        (2, {"name": ""}),
        (2, {"name": "x" * 300}),
        (2, {"type": "socket"}),
        (2, {"type": "hardlink", "linkName": "nothing"}),
        (2, {"type": "chunk"}),
        (2, {"xattrs": {"a": "not base64!"}}),
        (3, {"size": len(PAGES) - 30_000}),
        (3, {"size": 90_000}),
        (3, {"chunkDigest": ""}),
        (4, {"chunkOffset": 29_999}),
        (4, {"chunkOffset": 0}),
        (4, {"chunkOffset": 10**9}),
        (4, {"chunkDigest": ""}),
        (4, {"offset": 1}),
        (4, {"name": "checkpoint/a.img"}),
        (5, {"offset": 0}),
    ],
)
def test_a_toc_that_lies_is_refused(number: int, changes: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        open_as(EStargz(), falsified(number, **changes))


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (2, {"size": 6, "chunkSize": 0}),
        (2, {"size": 4}),
        (2, {"size": 2**25}),
        (2, {"innerOffset": 1}),
        (2, {"innerOffset": 2**20}),
        (2, {"chunkDigest": SHA}),
        (3, {"chunkDigest": SHA}),
        (4, {"chunkDigest": SHA}),
    ],
)
def test_content_that_is_not_as_promised_is_never_given(
    number: int, changes: dict[str, object]
) -> None:
    layer = falsified(number, **changes)
    index = open_index(EStargz(), layer)
    with pytest.raises(IntegrityError):
        content_of(index.chunks, layer.blob)


def test_shared_stretches_may_not_overlap() -> None:
    def edit(toc: Toc) -> None:
        rows = [row for row in toc["entries"] if row.get("innerOffset")]
        rows[1]["innerOffset"] = rows[0]["innerOffset"] + 3

    with pytest.raises(MalformedError, match="overlaps"):
        open_as(EStargz(), estargz(FILES, chunk_bytes=10_000, least_bytes=25_000, edit=edit))


def test_one_bad_payload_of_a_stretch_spoils_it() -> None:
    def edit(toc: Toc) -> None:
        next(row for row in toc["entries"] if row["name"].endswith("a.img"))["chunkDigest"] = SHA

    layer = estargz(FILES, chunk_bytes=10_000, least_bytes=25_000, edit=edit)
    index = open_index(EStargz(), layer)
    with pytest.raises(IntegrityError):
        decode(index.chunks, 0, layer.blob)
    assert decode(index.chunks, 1, layer.blob)


def test_another_version_of_the_toc() -> None:
    with pytest.raises(UnsupportedLayer):
        open_as(EStargz(), estargz(FILES, edit=lambda toc: toc.update(version=2)))


def test_the_toc_must_be_the_one_that_was_promised() -> None:
    other = dataclasses.replace(LAYER, annotations={DIGEST_KEY: SHA})
    with pytest.raises(IntegrityError):
        open_as(EStargz(), other)
    with pytest.raises(MalformedError):
        open_as(EStargz(), dataclasses.replace(LAYER, annotations={DIGEST_KEY: "sha256:"}))


@pytest.mark.parametrize("position", [0, 2**62, len(LAYER.blob) - 51, len(LAYER.blob)])
def test_a_footer_that_lies(position: int) -> None:
    layer = dataclasses.replace(LAYER, blob=LAYER.blob[:-51] + gzip_footer(position))
    with pytest.raises((MalformedError, IntegrityError)):
        open_as(EStargz(), layer)


@pytest.mark.parametrize("plain_bytes", [2**20, 2**31])
def test_a_toc_larger_than_a_toc_can_be(plain_bytes: int) -> None:
    info = tarfile.TarInfo("stargz.index.json")
    info.size = plain_bytes
    with pytest.raises(MalformedError, match="cannot be"):
        next(toc_json(gzipped(info.tobuf(tarfile.USTAR_FORMAT))))


@pytest.mark.parametrize("tail", [b"", bytes(100)])
def test_a_toc_that_is_cut_off(tail: bytes) -> None:
    info = tarfile.TarInfo("stargz.index.json")
    info.size = 101
    for packed in (gzipped(info.tobuf(tarfile.USTAR_FORMAT) + tail), gzipped(tail)):
        with pytest.raises(MalformedError):
            list(toc_json(packed))


def test_a_toc_of_another_name() -> None:
    with pytest.raises(MalformedError, match="other"):
        list(toc_json(gzipped(tarfile.TarInfo("other").tobuf(tarfile.USTAR_FORMAT))))


# --- anything at all ---------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.integers(-(2**65), 2**65), st.integers(-9, 200), st.text(max_size=9), st.just(SHA)
)
KEYS = st.sampled_from(
    [
        *("name", "type", "linkName", "mode", "uid", "modtime", "xattrs", "digest", "size"),
        *("offset", "innerOffset", "chunkOffset", "chunkSize", "chunkDigest"),
    ]
)


@settings(deadline=None)
@given(st.sampled_from([0, 25_000]), st.integers(0, 8), KEYS, VALUES)
def test_a_mutated_toc_is_right_or_refused(
    least_bytes: int, number: int, key: str, value: Any
) -> None:
    def edit(toc: Toc) -> None:
        toc["entries"][number % len(toc["entries"])][key] = value

    layer = estargz(FILES, chunk_bytes=20_000, least_bytes=least_bytes, edit=edit)
    try:
        files = files_of(open_index(EStargz(), layer), layer.blob)
    except LazyfsError as err:
        assert isinstance(err, MalformedError | UnsupportedLayer | IntegrityError)
        return
    for data in files.values():
        assert data in (b"hello", PAGES, b"", LANDMARK.data)


def _right_or_refused(layer: Layer) -> None:
    try:
        opened = open_as(EStargz(), layer)
        if isinstance(opened, StreamIndex):
            return
        assert files_of(opened, layer.blob) == PLAIN
    except (MalformedError, UnsupportedLayer, IntegrityError):
        return


@settings(deadline=None)
@given(st.sampled_from([LAYER, SHARED]), st.integers(0, 2**20), st.integers(1, 255), st.booleans())
def test_a_changed_byte_is_never_seen(layer: Layer, at: int, change: int, tail: bool) -> None:
    """The TOC's digest is promised: what is read is right, or an error."""
    blob = bytearray(layer.blob)
    at = len(blob) - 1 - at % 1000 if tail else at % len(blob)
    blob[at] ^= change
    _right_or_refused(dataclasses.replace(layer, blob=bytes(blob)))


@settings(deadline=None)
@given(st.sampled_from([LAYER, SHARED]), st.integers(1, 200_000), st.binary(max_size=60))
def test_a_truncated_or_extended_blob(layer: Layer, stop: int, tail: bytes) -> None:
    _right_or_refused(dataclasses.replace(layer, blob=layer.blob[:stop] + tail))


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"null", b"[" * 10_000, b"\xff", b"{" * 9, b'{"version":1,']
)
def test_text_that_is_no_toc(text: bytes) -> None:
    with pytest.raises((MalformedError, UnsupportedLayer)):
        open_as(EStargz(), with_gzip_toc(gzipped(b"x"), text))


def test_a_layer_of_no_bytes() -> None:
    with pytest.raises(MalformedError):
        open_as(EStargz(), dataclasses.replace(LAYER, blob=b""))


def test_a_layer_of_no_files() -> None:
    layer = estargz({})
    index = open_index(EStargz(), layer)
    assert (index.entries, content_of(index.chunks, layer.blob)) == ([], b"")


def test_digests_are_of_the_plain_toc() -> None:
    text = b"".join(toc_json(LAYER.blob[LAYER.blob.rindex(b"\x1f\x8b\x08\0") : -51]))
    assert f"sha256:{hashlib.sha256(text).hexdigest()}" == LAYER.annotations[DIGEST_KEY]

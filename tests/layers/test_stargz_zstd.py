"""What differs from gzip; lies about the TOC's entries are `test_estargz`'s."""

import dataclasses
import random
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.layers.model import LayerIndex, StreamIndex
from lazyfs.layers.stargz_toc import NOT_SHOWN
from lazyfs.layers.stargz_zstd import StargzZstd, toc_json
from tests.images import Layer
from tests.layers.indexed import (
    DATA,
    check_against_tar,
    content_of,
    descriptor,
    files_of,
    open_as,
    open_index,
    sample,
)
from tests.layers.stargz_writer import DIGEST_KEY, ZSTD_KEYS, stargz_zstd, with_zstd_toc, zstded

RANDOM = random.Random(8)
PAGES = RANDOM.randbytes(50_000) + bytes(40_000) + RANDOM.randbytes(20_001)
FILES = {"checkpoint/": b"", "checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}
PLAIN = {"checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}
LAYER = stargz_zstd(FILES, chunk_bytes=30_000)
SHARED = stargz_zstd(FILES, chunk_bytes=10_000, least_bytes=25_000)
FOOTER_BYTES = 48
"""With the header of its frame."""


def test_a_layer_of_ctr_remote_reads_as_zstd_and_tar_read_it() -> None:
    layer = sample(DATA / "stargz-zstd" / "chunks")
    index = open_index(StargzZstd(), layer)
    assert index.format_name == "zstd:stargz"
    assert index.chunks.proven
    assert index.stream is None
    check_against_tar(index, layer.blob, NOT_SHOWN)


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
    layer = stargz_zstd(files, chunk_bytes=chunk_bytes, least_bytes=least_bytes)
    assert files_of(open_index(StargzZstd(), layer), layer.blob) == files


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_chunks_beyond_one_piece(size: int) -> None:
    files = {"a": b"1", "large": RANDOM.randbytes(size), "same": b"\xff" * size, "z": b"2"}
    layer = stargz_zstd(files, chunk_bytes=2**22, least_bytes=2**30)
    assert files_of(open_index(StargzZstd(), layer), layer.blob) == files


def test_a_large_toc() -> None:
    files = {f"{n}/" + "x" * 200: b"%d" % n for n in range(3000)}
    layer = stargz_zstd(files)
    assert files_of(open_index(StargzZstd(), layer), layer.blob) == files


def test_it_is_recognised_by_annotations_and_bytes() -> None:
    form, described = StargzZstd(), descriptor(LAYER)
    assert form.recognises(described, LAYER.blob[:100])
    assert form.recognises(described, b"")
    assert not form.recognises(described, b"\x1f\x8b\x08")
    digest_only = {DIGEST_KEY: LAYER.annotations[DIGEST_KEY]}
    gzip_or_zstd = msgspec.structs.replace(described, annotations=digest_only)
    assert form.recognises(gzip_or_zstd, LAYER.blob[:100])
    assert not form.recognises(gzip_or_zstd, b"")
    no_digest = {ZSTD_KEYS + "manifest-checksum": LAYER.annotations[DIGEST_KEY]}
    plain = msgspec.structs.replace(described, annotations=no_digest)
    assert not form.recognises(plain, LAYER.blob[:100])


@pytest.mark.parametrize("head", [None, b""])
def test_without_a_footer_it_is_plain_zstd(head: bytes | None) -> None:
    for blob in (LAYER.blob[:-FOOTER_BYTES], LAYER.blob[:-1] + b"y", b"", b"\x28\xb5\x2f\xfd"):
        opened = open_as(StargzZstd(), dataclasses.replace(LAYER, blob=blob or b"x"), head=head)
        assert isinstance(opened, StreamIndex)
        assert opened.format_name == "zstd"


@pytest.mark.parametrize(
    ("start", "size"), [(0, 10), (7, 10), (8, 0), (2**63, 10), (8, 2**63), (9, len(LAYER.blob))]
)
def test_a_footer_that_lies(start: int, size: int) -> None:
    footer = struct.pack("<4sIQQQQ8s", b"\x50\x2a\x4d\x18", 40, start, size, 0, 1, b"GnUlInUx")
    layer = dataclasses.replace(LAYER, blob=LAYER.blob[:-FOOTER_BYTES] + footer)
    with pytest.raises(MalformedError):
        open_as(StargzZstd(), layer)


def test_the_toc_must_be_the_one_that_was_promised() -> None:
    annotations = LAYER.annotations | {DIGEST_KEY: "sha256:" + "a" * 64}
    with pytest.raises(IntegrityError):
        open_as(StargzZstd(), dataclasses.replace(LAYER, annotations=annotations))


def test_a_toc_larger_than_a_toc_can_be() -> None:
    packed = zstded(bytes(50 * 2**20))
    assert len(packed) < 50 * 2**10
    with pytest.raises(MalformedError):
        for _ in toc_json(packed):
            pass


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"[" * 10_000, b"\xff"])
def test_text_that_is_no_toc(text: bytes) -> None:
    with pytest.raises((MalformedError, UnsupportedLayer)):
        open_as(StargzZstd(), with_zstd_toc(zstded(b"x"), text))


def _right_or_refused(layer: Layer) -> None:
    try:
        opened = open_as(StargzZstd(), layer)
        if isinstance(opened, LayerIndex) and opened.format_name == "zstd:stargz":
            assert files_of(opened, layer.blob) == PLAIN
    except (MalformedError, UnsupportedLayer, IntegrityError):
        return


@settings(deadline=None)
@given(st.sampled_from([LAYER, SHARED]), st.integers(0, 2**20), st.integers(1, 255), st.booleans())
def test_a_changed_byte_is_never_seen(layer: Layer, at: int, change: int, tail: bool) -> None:
    blob = bytearray(layer.blob)
    at = len(blob) - 1 - at % 1000 if tail else at % len(blob)
    blob[at] ^= change
    _right_or_refused(dataclasses.replace(layer, blob=bytes(blob)))


@settings(deadline=None)
@given(st.sampled_from([LAYER, SHARED]), st.integers(1, 200_000), st.binary(max_size=60))
def test_a_truncated_or_extended_blob(layer: Layer, stop: int, tail: bytes) -> None:
    _right_or_refused(dataclasses.replace(layer, blob=layer.blob[:stop] + tail))


def test_a_chunk_of_another_layer() -> None:
    files = dict(PLAIN)
    files["checkpoint/a.img"] = b"hullo"
    other = stargz_zstd({"checkpoint/": b"", **files}, chunk_bytes=30_000)
    index = open_index(StargzZstd(), LAYER)
    with pytest.raises(IntegrityError):
        content_of(index.chunks, other.blob[: len(LAYER.blob)].ljust(len(LAYER.blob)))

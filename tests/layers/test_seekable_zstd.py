import dataclasses
import hashlib
import logging
import random
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.layers.model import LayerIndex, StreamIndex
from lazyfs.layers.seekable_zstd import TAIL_BYTES, SeekableZstd
from tests.images import Layer, tar_bytes
from tests.layers.indexed import (
    DATA,
    check_against_tar,
    content_of,
    decode,
    descriptor,
    files_of,
    open_as,
    open_index,
    tar_of,
)

RANDOM = random.Random(9)
PAGES = RANDOM.randbytes(50_000) + bytes(40_000) + RANDOM.randbytes(20_001)
FILES = {"checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}
TAR = tar_bytes(FILES)
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
CHECKSUMS = 0x80


def table_of(rows: Sequence[tuple[int, int, int]], descriptor: int = CHECKSUMS) -> bytes:
    """Write a seek table of packed sizes, plain sizes and checksums."""
    entry = struct.Struct("<III" if descriptor & CHECKSUMS else "<II")
    body = b"".join(entry.pack(*row[: entry.size // 4]) for row in rows)
    body += struct.pack("<IBI", len(rows), descriptor, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(body)) + body


def layer_of(
    pieces: Sequence[bytes], descriptor: int = CHECKSUMS, *, content_size: bool = True
) -> tuple[Layer, list[tuple[int, int, int]]]:
    """Return a layer with a frame for each piece, and the rows of its table."""
    packer = zstandard.ZstdCompressor(write_content_size=content_size)
    frames = [packer.compress(piece) for piece in pieces]
    rows = [
        (len(frame), len(piece), xxhash.xxh64_intdigest(piece) & 0xFFFFFFFF)
        for frame, piece in zip(frames, pieces, strict=True)
    ]
    blob = b"".join(frames) + table_of(rows, descriptor)
    return Layer(blob, {}, MEDIA_TYPE), rows


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


LAYER, ROWS = layer_of(cut(TAR, 10_000))
BODY_BYTES = sum(row[0] for row in ROWS)


def with_rows(rows: Sequence[tuple[int, int, int]], descriptor: int = CHECKSUMS) -> Layer:
    return dataclasses.replace(LAYER, blob=LAYER.blob[:BODY_BYTES] + table_of(rows, descriptor))


# --- round trips -------------------------------------------------------------------------------


def test_a_layer_of_pyzstd_reads_as_zstd_and_tar_read_it() -> None:
    layer = Layer((DATA / "zstd-seekable" / "layer").read_bytes(), {}, MEDIA_TYPE)
    index = open_index(SeekableZstd(), layer)
    assert index.format_name == "zstd:seekable"
    assert len(index.chunks) == 12
    assert content_of(index.chunks, layer.blob) == tar_of(layer.blob)
    check_against_tar(index, layer.blob, frozenset())


@settings(deadline=None)
@given(
    st.lists(st.integers(0, len(TAR)), max_size=30),
    st.sampled_from([0, CHECKSUMS, 1, CHECKSUMS | 3]),
    st.booleans(),
)
def test_files_read_back(cuts: list[int], descriptor: int, content_size: bool) -> None:
    """However it is cut, empty frames among them."""
    pieces = [TAR[start:stop] for start, stop in pairwise([0, *sorted(cuts), len(TAR)])]
    layer, _ = layer_of(pieces, descriptor, content_size=content_size)
    index = open_index(SeekableZstd(), layer)
    assert len(index.chunks) == sum(map(bool, pieces))
    assert files_of(index, layer.blob) == FILES


@pytest.mark.parametrize("content_size", [True, False])
@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 3 * 2**20 + 7])
def test_frames_beyond_one_piece(size: int, content_size: bool) -> None:
    data = tar_bytes({"large": RANDOM.randbytes(size), "same": b"\xff" * size})
    layer, _ = layer_of(cut(data, size), content_size=content_size)
    assert content_of(open_index(SeekableZstd(), layer).chunks, layer.blob) == data


def test_the_whole_blob_can_be_decoded_to_prove_it() -> None:
    index = open_index(SeekableZstd(), LAYER)
    assert not index.chunks.proven
    assert index.stream is not None
    decoder = index.stream.decoder()
    content = b"".join(bytes(piece) for piece in decoder.decode(LAYER.blob))
    decoder.finish()
    assert content == TAR == content_of(index.chunks, LAYER.blob)
    table = LAYER.blob[BODY_BYTES:]
    assert index.cache_tag == f"zstd-seekable-1-{hashlib.sha256(table).hexdigest()}"


def test_a_table_beyond_the_tail_is_fetched() -> None:
    layer, rows = layer_of(cut(TAR, 20))
    assert len(rows) * 12 > TAIL_BYTES
    rounds: list[int] = []
    opened = open_as(SeekableZstd(), layer, rounds)
    assert isinstance(opened, LayerIndex)
    assert rounds == [TAIL_BYTES, len(table_of(rows)) - TAIL_BYTES]
    assert content_of(opened.chunks, layer.blob) == TAR


def test_a_skippable_frame_counts_as_an_empty_one() -> None:
    hidden = b"\x51\x2a\x4d\x18\x05\0\0\0hello"
    blob = hidden + LAYER.blob[:BODY_BYTES] + hidden
    blob += table_of([(len(hidden), 0, 0), *ROWS, (len(hidden), 0, 0)])
    layer = dataclasses.replace(LAYER, blob=blob)
    assert files_of(open_index(SeekableZstd(), layer), blob) == FILES


def test_a_row_stands_for_one_frame() -> None:
    first, second, *rest = ROWS
    checksum = xxhash.xxh64_intdigest(TAR[:20_000]) & 0xFFFFFFFF
    layer = with_rows([(first[0] + second[0], 20_000, checksum), *rest])
    index = open_index(SeekableZstd(), layer)
    with pytest.raises(IntegrityError):
        decode(index.chunks, 0, layer.blob)


# --- no table, or none that can be used --------------------------------------------------------


def test_it_is_recognised_as_plain_zstd_is() -> None:
    form = SeekableZstd()
    assert form.recognises(descriptor(LAYER), LAYER.blob[:100])
    assert not form.recognises(descriptor(LAYER), b"\x1f\x8b\x08")
    assert not form.recognises(descriptor(LAYER), b"")


@pytest.mark.parametrize("blob", [b"x", LAYER.blob[:BODY_BYTES], LAYER.blob + b"\0", bytes(17)])
def test_without_a_table_it_is_plain_zstd(blob: bytes) -> None:
    opened = open_as(SeekableZstd(), dataclasses.replace(LAYER, blob=blob))
    assert isinstance(opened, StreamIndex)
    assert opened.format_name == "zstd"


def bad_tables() -> Iterator[Layer]:
    (packed, plain, checksum), *rest = ROWS
    yield with_rows(ROWS[:-1])
    yield with_rows([*ROWS, (1, 1, 0)])
    yield with_rows([*ROWS, (1, 0, 0)])
    yield with_rows([])
    yield with_rows([(packed - 1, plain, checksum), *rest])
    yield with_rows([(2**32 - 1, plain, checksum), *rest])
    yield with_rows([(packed, 2**30 + 1, checksum), *rest])
    yield with_rows([(0, plain, checksum), *ROWS])
    for bit in (0x40, 0x20, 0x10, 0x08, 0x04):
        yield with_rows(ROWS, CHECKSUMS | bit)
    blob = bytearray(LAYER.blob)
    blob[BODY_BYTES] ^= 1
    yield dataclasses.replace(LAYER, blob=bytes(blob))
    blob[BODY_BYTES] ^= 1
    blob[BODY_BYTES + 4] ^= 1
    yield dataclasses.replace(LAYER, blob=bytes(blob))
    for count in (2**32 - 1, len(ROWS) - 1, len(ROWS) + 1, 0, 10**7):
        footer = struct.pack("<IBI", count, CHECKSUMS, 0x8F92EAB1)
        yield dataclasses.replace(LAYER, blob=LAYER.blob[:-9] + footer)


@pytest.mark.parametrize("layer", list(bad_tables()))
def test_a_table_that_cannot_be_is_not_used(layer: Layer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lazyfs"):
        opened = open_as(SeekableZstd(), layer)
    assert isinstance(opened, StreamIndex)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_giant_frames_are_not_used() -> None:
    layer, _ = layer_of([TAR])
    filler = b"\x50\x2a\x4d\x18" + struct.pack("<I", 64 * 2**20) + bytes(64 * 2**20)
    table = table_of([(len(filler), 5, 0)])
    opened = open_as(SeekableZstd(), dataclasses.replace(layer, blob=filler + table))
    assert isinstance(opened, StreamIndex)


# --- tables that lie ---------------------------------------------------------------------------


def checksummed(plain: int, start: int = 0) -> tuple[int, int]:
    return plain, xxhash.xxh64_intdigest(TAR[start : start + plain]) & 0xFFFFFFFF


@pytest.mark.parametrize("with_checksums", [True, False])
@pytest.mark.parametrize("plain", [9_999, 10_001, 1, 2**20 + 5])
@pytest.mark.parametrize("content_size", [True, False])
def test_frames_of_another_size(plain: int, with_checksums: bool, content_size: bool) -> None:
    descriptor = CHECKSUMS if with_checksums else 0
    layer, rows = layer_of(cut(TAR, 10_000), content_size=content_size)
    body = layer.blob[: sum(row[0] for row in rows)]
    blob = body + table_of([(rows[0][0], *checksummed(plain)), *rows[1:]], descriptor)
    index = open_index(SeekableZstd(), dataclasses.replace(layer, blob=blob))
    with pytest.raises(IntegrityError):
        decode(index.chunks, 0, blob)
    assert decode(index.chunks, 1, blob) == TAR[10_000:20_000]


@pytest.mark.parametrize("size", [10_000, 2**20 + 1])
@pytest.mark.parametrize("shift", [1, -1, 5, -5])
def test_frames_that_end_elsewhere(size: int, shift: int) -> None:
    data = TAR * 40
    layer, rows = layer_of(cut(data, size), 0)
    (first, plain, checksum), (second, *other), *rest = rows
    moved = [(first + shift, plain, checksum), (second - shift, *other), *rest]
    blob = layer.blob[: sum(row[0] for row in rows)] + table_of(moved, 0)  # type: ignore[arg-type]
    index = open_index(SeekableZstd(), dataclasses.replace(layer, blob=blob))
    with pytest.raises(IntegrityError):
        decode(index.chunks, 0, blob)
        decode(index.chunks, 1, blob)


def test_a_checksum_that_is_not_that_of_the_content() -> None:
    (packed, plain, checksum), *rest = ROWS
    layer = with_rows([(packed, plain, checksum ^ 1), *rest])
    index = open_index(SeekableZstd(), layer)
    with pytest.raises(IntegrityError, match="checksum"):
        decode(index.chunks, 0, layer.blob)


def test_a_frame_that_is_a_bomb_stops_where_the_table_says() -> None:
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50 * 2**20))
    for plain in (1000, 2**21):
        blob = bomb + table_of([(len(bomb), plain, 0)], 0)
        index = open_index(SeekableZstd(), dataclasses.replace(LAYER, blob=blob))
        with pytest.raises(IntegrityError):
            decode(index.chunks, 0, blob)


@settings(deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 255), st.booleans())
def test_a_changed_byte_is_seen_where_frames_have_checksums(
    at: int, change: int, tail: bool
) -> None:
    blob = bytearray(LAYER.blob)
    at = len(blob) - 1 - at % 300 if tail else at % len(blob)
    blob[at] ^= change
    layer = dataclasses.replace(LAYER, blob=bytes(blob))
    try:
        opened = open_as(SeekableZstd(), layer)
        if isinstance(opened, LayerIndex):
            assert files_of(opened, layer.blob) == FILES
    except (MalformedError, IntegrityError):
        return


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.one_of(st.integers(0, 30_000), st.integers(0, 2**32 - 1))] * 3)),
    st.integers(0, 255),
)
def test_any_table(rows: list[tuple[int, int, int]], descriptor: int) -> None:
    layer = with_rows(rows, descriptor)
    opened = open_as(SeekableZstd(), layer)
    if isinstance(opened, LayerIndex):
        with pytest.raises(IntegrityError):
            content_of(opened.chunks, layer.blob)

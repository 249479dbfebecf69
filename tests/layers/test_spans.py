import contextlib
import hashlib
import random
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.layers.deflate import Engine, engines
from lazyfs.layers.gzip import GzipDecoder
from lazyfs.layers.model import ChunkMap
from lazyfs.layers.restart_index import open_restart_index
from lazyfs.layers.spans import GzipSpans
from tests.layers.streaming import MIB, decode, gzip_member, mixed

each_engine = pytest.mark.parametrize("engine", engines(), ids=lambda item: item.name)
DATA = mixed(400_000)


def indexed(blob: bytes, spacing: int) -> tuple[bytes, ChunkMap]:
    """Decode a blob; return its content and its spans."""
    decoder = GzipDecoder(engines()[0], spacing)
    content = decode(decoder, [blob])
    kept = decoder.restart_index()
    assert kept is not None
    return content, open_restart_index(kept, len(blob)).chunks


def span(chunks: ChunkMap, blob: bytes, index: int) -> bytes:
    item = chunks.blob_range(index)
    pieces = list(map(bytes, chunks.decode(index, memoryview(blob)[item.start : item.stop])))
    assert len(pieces) == -(-chunks.content_size(index) // MIB)
    return b"".join(pieces)


def check(blob: bytes, spacing: int) -> ChunkMap:
    """Compare each span, in any order, with what a decoder from the start gives."""
    content, chunks = indexed(blob, spacing)
    assert content == zlib_content(blob)
    assert chunks.content_start(len(chunks)) == chunks.content_size_bytes == len(content)
    order = list(range(len(chunks)))
    random.Random(1).shuffle(order)
    for index in order:
        start, stop = chunks.content_start(index), chunks.content_start(index + 1)
        assert chunks.content_size(index) == stop - start
        assert chunks.index_at(start) == chunks.index_at(stop - 1) == index
        assert span(chunks, blob, index) == content[start:stop]
        if index:
            shared = chunks.blob_range(index - 1).stop - chunks.blob_range(index).start
            assert shared in (0, 1)
    return chunks


def zlib_content(blob: bytes) -> bytes:
    content = b""
    while blob.strip(b"\0"):
        decompressor = zlib.decompressobj(31)
        content += decompressor.decompress(blob)
        blob = decompressor.unused_data
    return content


@dataclass(frozen=True)
class Parts:
    """What `GzipSpans` is made of, made with nothing but zlib: stored blocks, and one member."""

    blob_starts: Sequence[int]
    bits: Sequence[int]
    content_starts: Sequence[int]
    blob_stop: int
    content_size_bytes: int
    digests: bytes
    windows: Sequence[bytes]

    def spans(self, engine: Engine | None = None) -> GzipSpans:
        return GzipSpans(
            blob_starts=self.blob_starts,
            bits=self.bits,
            content_starts=self.content_starts,
            blob_stop=self.blob_stop,
            content_size_bytes=self.content_size_bytes,
            digests=self.digests,
            window=lambda index: self.windows[index],
            proven=False,
            engine=engine,
        )


def one_span(packed: bytes, size: int, bits: int = 0, window: bytes = b"") -> Parts:
    start = 100 + bool(bits)
    digest = hashlib.sha256(packed).digest()
    return Parts([start], [bits], [0], 100 + len(packed), size, digest, [window])


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("spacing", [1, 20_000, 10**6])
def test_spans_of_one_member(level: int, spacing: int) -> None:
    blob = gzip_member(DATA, level, memory_level=1)
    assert (len(check(blob, spacing)) == 1) == (spacing == 10**6)


@pytest.mark.parametrize("strategy", [zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED, zlib.Z_RLE])
def test_spans_of_strategies(strategy: int) -> None:
    check(gzip_member(DATA, strategy=strategy, memory_level=1), 20_000)


def test_blocks_begin_at_every_bit() -> None:
    chunks = check(gzip_member(DATA, memory_level=1), 1)
    shared = [
        chunks.blob_range(index).stop - chunks.blob_range(index + 1).start
        for index in range(len(chunks) - 1)
    ]
    assert {0, 1} == set(shared)
    assert len(shared) > 300


@pytest.mark.parametrize("spacing", [1, 5_000, 70_000, 10**6])
def test_spans_of_many_members(spacing: int) -> None:
    parts = [mixed(size, size) for size in (0, 1, 70_000, 0, 0, 40_000, 3, 90_000, 0)]
    members = [gzip_member(part, memory_level=1) for part in parts]
    check(b"".join(members), spacing)
    check(b"".join(members) + bytes(777), spacing)


@pytest.mark.parametrize("zeros", [1, 3, 512, 10_240])
@pytest.mark.parametrize("members", [1, 3])
def test_zeros_behind_the_last_member(zeros: int, members: int) -> None:
    blob = b"".join(gzip_member(mixed(200_000, seed)) for seed in range(members))
    check(blob + bytes(zeros), 50_000)


def test_spans_with_flushes() -> None:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = []
    for at in range(0, len(DATA), 30_000):
        parts.append(packer.compress(DATA[at : at + 30_000]))
        parts.append(packer.flush((zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK)[at % 3]))
    check(b"".join(parts) + packer.flush(), 1)


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 5 * MIB + 7])
def test_spans_beyond_one_piece(size: int) -> None:
    data = mixed(size)
    assert len(check(gzip_member(data), 10**9)) == 1


def test_a_piece_stays_when_its_span_fits_in_one() -> None:
    blob = gzip_member(DATA, memory_level=1)
    _, chunks = indexed(blob, 50_000)
    kept: list[Data] = []
    for index in range(len(chunks)):
        item = chunks.blob_range(index)
        kept.extend(chunks.decode(index, blob[item.start : item.stop]))
    assert b"".join(kept) == DATA


def test_threads_may_decode_at_once() -> None:
    blob = gzip_member(mixed(8 * MIB))
    content, chunks = indexed(blob, 100_000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda index: span(chunks, blob, index), range(len(chunks))))
    assert b"".join(parts) == content


def test_spans_may_be_relocated() -> None:
    blob = gzip_member(DATA, memory_level=1)
    _, chunks = indexed(blob, 20_000)
    kept: list[Data] = []

    def keep(data: Data) -> memoryview:
        kept.append(bytes(data))
        return memoryview(kept[-1]).toreadonly()

    chunks.relocate(keep)
    assert len(kept) == 3
    assert not chunks.zero_chunks()
    assert b"".join(span(chunks, blob, index) for index in range(len(chunks))) == DATA


def test_a_given_window_and_prime() -> None:
    """A block in the middle of a byte, which refers to what came before; as SOCI has it."""
    window = bytes(range(256)) * 128
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=window)
    packed = packer.compress(window[5:3000]) + packer.flush()
    shifted = (int.from_bytes(packed, "little") << 3) | 5
    data = shifted.to_bytes(len(packed) + 1, "little")
    for engine in engines():
        spans = one_span(data, 2995, bits=5, window=window).spans(engine)
        assert spans.blob_range(0) == (100, 100 + len(data))
        assert b"".join(map(bytes, spans.decode(0, data))) == window[5:3000]
        assert not spans.proven


# --- what lies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["flip", "shorter", "longer", "empty"])
def test_bytes_that_do_not_match_are_not_decoded(wrong: str) -> None:
    blob = gzip_member(DATA, memory_level=1)
    _, chunks = indexed(blob, 20_000)
    item = chunks.blob_range(3)
    data = bytearray(blob[item.start : item.stop])
    if wrong == "flip":
        data[-1] ^= 0x80
    else:
        data = {"shorter": data[:-1], "longer": data + b"\0", "empty": bytearray()}[wrong]
    with pytest.raises(IntegrityError, match="digest"):
        next(iter(chunks.decode(3, data)))


@each_engine
@pytest.mark.parametrize("change", [-1, 1, 100_000, 5 * MIB])
def test_another_size_than_promised(engine: Engine, change: int) -> None:
    blob = gzip_member(DATA)
    parts = one_span(blob[10:], len(DATA))
    assert b"".join(map(bytes, parts.spans(engine).decode(0, blob[10:]))) == DATA
    wrong = replace(parts, content_size_bytes=len(DATA) + change).spans(engine)
    with pytest.raises(IntegrityError, match=r"less|more"):
        for piece in wrong.decode(0, blob[10:]):
            assert len(piece) <= MIB


@each_engine
def test_no_more_is_made_of_a_bomb_than_promised(engine: Engine) -> None:
    packed = gzip_member(bytes(200 * MIB), 9)[10:]
    made = 0
    with pytest.raises(IntegrityError, match="more"):
        for piece in one_span(packed, 3 * MIB).spans(engine).decode(0, packed):
            made += len(piece)
    assert made == 3 * MIB


GOOD = Parts([10, 50, 90], [0, 3, 0], [0, 1000, 5000], 120, 9000, bytes(96), [b""] * 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"blob_starts": [10, 10, 90]},
        {"blob_starts": [50, 10, 90]},
        {"blob_starts": [-1, 10, 90]},
        {"blob_starts": [0, 10, 90], "bits": [1, 0, 0]},
        {"blob_starts": [10, 50, 120]},
        {"blob_starts": [10, 50]},
        {"blob_starts": [], "bits": [], "content_starts": [], "digests": b""},
        {"bits": [0, 8, 0]},
        {"bits": [0, -1, 0]},
        {"content_starts": [1, 1000, 5000]},
        {"content_starts": [0, 0, 5000]},
        {"content_starts": [0, 1000, 9000]},
        {"content_starts": [0, 1000, 2**63]},
        {"content_size_bytes": 5000 + 2**30 + 1},
        {"content_size_bytes": 2**64},
        {"content_size_bytes": -1},
        {"blob_stop": 90 + 2**26},
        {"blob_stop": 2**70},
        {"digests": bytes(95)},
    ],
)
def test_columns_that_cannot_be(wrong: dict[str, object]) -> None:
    assert len(GOOD.spans()) == 3
    with pytest.raises(MalformedError):
        replace(GOOD, **wrong).spans()  # type: ignore[arg-type]


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(0, 7), st.integers(1, 3000), st.binary(max_size=100))
def test_hostile_spans(draw: st.DataObject, bits: int, size: int, window: bytes) -> None:
    """Bytes that match their digest, and are anything."""
    packed = bytearray(gzip_member(DATA[:2000], memory_level=1)[10:] + gzip_member(DATA[:500]))
    at = draw.draw(st.integers(0, len(packed)))
    packed[at : at + draw.draw(st.integers(0, 300))] = draw.draw(st.binary(max_size=100))
    data = bytes(bool(bits)) + bytes(packed) + b"\0"
    for engine in engines():
        spans = one_span(data, size, bits, window).spans(engine)
        made = bytearray()
        with contextlib.suppress(IntegrityError):
            for piece in spans.decode(0, data):
                made += piece
            assert len(made) == size
        assert len(made) <= size

import contextlib
import gzip
import hashlib
import random
import shutil
import subprocess
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import MalformedError
from lazyfs.layers.deflate import Engine, engines
from lazyfs.layers.gzip import Gzip, GzipDecoder
from lazyfs.layers.restart_index import open_restart_index
from tests.layers.streaming import (
    MIB,
    at_random,
    chop,
    decode,
    descriptor,
    gzip_member,
    mixed,
    open_stream,
)

ENGINES: tuple[Engine | None, ...] = (*engines(), None)
each_engine = pytest.mark.parametrize(
    "engine", ENGINES, ids=lambda item: item.name if item else "python"
)
DATA = mixed(3 * MIB)
SMALL = DATA[:50_000]

FLAGS_ALL = 0x1E
"""FHCRC, FEXTRA, FNAME, FCOMMENT."""


def with_every_field(data: bytes) -> bytes:
    """A member whose header has all optional fields (RFC 1952, section 2.3)."""
    header = b"\x1f\x8b\x08" + bytes([FLAGS_ALL]) + bytes(4) + b"\x02\x03"
    header += (5000).to_bytes(2, "little") + b"e" * 5000 + b"name\0" + b"comment\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    return header + gzip_member(data)[10:]


@each_engine
@pytest.mark.parametrize("level", range(10))
def test_levels(engine: Engine | None, level: int) -> None:
    blob = gzip_member(DATA, level)
    rng = random.Random(level)
    assert decode(GzipDecoder(engine), [blob]) == DATA
    assert decode(GzipDecoder(engine, 100_000), at_random(blob, rng)) == DATA


@each_engine
@pytest.mark.parametrize("strategy", [zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED, zlib.Z_RLE])
def test_strategies(engine: Engine | None, strategy: int) -> None:
    blob = gzip_member(DATA, strategy=strategy)
    assert decode(GzipDecoder(engine), at_random(blob, random.Random(1))) == DATA


@pytest.mark.parametrize("flush", [zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK])
def test_flushed_in_between(flush: int) -> None:
    """As pigz does: one member, with empty blocks in it."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    parts = [packer.compress(part) + packer.flush(flush) for part in chop(DATA, [50_000] * 99)]
    blob = b"".join(parts) + packer.flush()
    for engine in ENGINES:
        assert decode(GzipDecoder(engine, 1), at_random(blob, random.Random(1))) == DATA


def test_gzip_itself() -> None:
    if shutil.which("gzip") is None:
        pytest.skip("gzip is not installed")
    blob = subprocess.run(["gzip", "-3"], input=DATA, capture_output=True, check=True).stdout
    assert decode(open_stream(Gzip(), blob).decoder(), at_random(blob, random.Random(1))) == DATA


@each_engine
def test_members_one_after_the_other(engine: Engine | None) -> None:
    rng = random.Random(2)
    parts = [mixed(rng.choice((0, 1, 100, 65_280, 400_000)), seed) for seed in range(30)]
    blob = b"".join(map(gzip_member, parts)) + bytes(rng.randrange(3 * MIB))
    assert decode(GzipDecoder(engine), [blob]) == b"".join(parts)
    assert decode(GzipDecoder(engine), at_random(blob, rng)) == b"".join(parts)


@each_engine
def test_headers_with_every_field(engine: Engine | None) -> None:
    blob = with_every_field(SMALL) + with_every_field(SMALL)
    for size in (1, 7, 10**6):
        assert decode(GzipDecoder(engine), chop(blob, [size] * len(blob))) == SMALL * 2


@each_engine
def test_a_byte_at_a_time(engine: Engine | None) -> None:
    blob = gzip_member(SMALL) + gzip_member(b"") + gzip_member(SMALL) + bytes(5)
    assert decode(GzipDecoder(engine, 1), chop(blob, [1] * len(blob))) == SMALL * 2


@each_engine
def test_zeros_come_in_pieces(engine: Engine | None) -> None:
    blob = gzip_member(bytes(64 * MIB), 9)
    decoder = GzipDecoder(engine)
    sizes = [len(piece) for piece in decoder.decode(blob)]
    assert sizes == [MIB] * 64
    decoder.finish()


@each_engine
def test_nothing_is_nothing(engine: Engine | None) -> None:
    decoder = GzipDecoder(engine)
    assert decode(decoder, [gzip_member(b"")]) == b""
    assert decoder.restart_index() is None


@each_engine
def test_truncation_is_told(engine: Engine | None) -> None:
    blob = gzip_member(SMALL[:500]) + gzip_member(b"x")
    whole = {len(gzip_member(SMALL[:500])), len(blob)}
    for size in range(len(blob) + 1):
        decoder = GzipDecoder(engine)
        content = b"".join(map(bytes, decoder.decode(blob[:size])))
        assert (SMALL[:500] + b"x").startswith(content)
        if size in whole:
            decoder.finish()
        else:
            with pytest.raises(MalformedError, match="cut off"):
                decoder.finish()
            assert decoder.restart_index() is None


@each_engine
@pytest.mark.parametrize("at", [-1, -4, -5, -8, 0, 1, 2, 3])
def test_wrong_trailers_and_headers(engine: Engine | None, at: int) -> None:
    blob = bytearray(gzip_member(SMALL))
    blob[at] ^= 0xFF
    with pytest.raises(MalformedError):
        decode(GzipDecoder(engine), [bytes(blob)])


@each_engine
@pytest.mark.parametrize("more", [b"\x01", b"\x1f\x8c", b"\0\0\x1f\x8b\x08", b"\0" * 5000 + b"x"])
def test_something_behind_the_end(engine: Engine | None, more: bytes) -> None:
    blob = gzip_member(SMALL) + more
    with pytest.raises(MalformedError):
        decode(GzipDecoder(engine), [blob])
    with pytest.raises(MalformedError):
        decode(GzipDecoder(engine), chop(blob, [1] * len(blob)))


def test_bytes_decide() -> None:
    blob = gzip_member(b"")
    layer = descriptor(len(blob), "application/vnd.oci.image.layer.v1.tar+zstd")
    assert Gzip().recognises(layer, blob)
    assert not Gzip().recognises(layer, blob[:2])
    assert not Gzip().recognises(layer, b"\x1f\x8b\x07" + blob[3:])


def test_what_is_opened() -> None:
    blob = gzip.compress(SMALL)
    index = open_stream(Gzip(), blob)
    assert (index.format_name, index.cache_tag) == ("gzip", "gzip-spans-1")
    decoder = index.decoder()
    assert decoder.restart_index() is None
    assert decode(decoder, [blob]) == SMALL
    kept = decoder.restart_index()
    assert kept is not None
    assert index.reopen is not None
    assert index.reopen(kept).cache_tag == index.cache_tag


def test_points_depend_on_the_blob_alone() -> None:
    """Not on how it was cut, nor on the library."""
    parts = [gzip_member(mixed(size, size), memory_level=1) for size in (9, 10_000, 300_000, 7)]
    parts += [gzip_member(b"")] * 3 + [gzip_member(bytes(20_000))] * 4
    blob = b"".join(parts)
    for spacing in (1, 5000, 65_536):
        found = set()
        for seed in range(12):
            for engine in engines():
                decoder = GzipDecoder(engine, spacing)
                size = 1 if not seed else len(blob)
                pieces = (
                    chop(blob, [1] * size) if not seed else at_random(blob, random.Random(seed))
                )
                decode(decoder, pieces)
                found.add(hashlib.sha256(decoder.restart_index() or b"").digest())
        assert len(found) == 1


def test_spans_are_spaced() -> None:
    decoder = GzipDecoder(engines()[0])
    blob = b"".join(gzip_member(mixed(5 * MIB, seed)) for seed in range(3))
    decode(decoder, [blob])
    kept = decoder.restart_index()
    assert kept is not None
    chunks = open_restart_index(kept, len(blob)).chunks
    sizes = [chunks.content_size(index) for index in range(len(chunks))]
    assert all(4 * MIB <= size < 5 * MIB for size in sizes[:-1])
    assert len(sizes) >= 3


@settings(deadline=None, max_examples=400)
@given(st.data(), st.sampled_from(ENGINES))
def test_hostile_bytes(draw: st.DataObject, engine: Engine | None) -> None:
    blob = bytearray(with_every_field(SMALL[:3000]) + gzip_member(SMALL[:3000], memory_level=1))
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(0, len(blob)))
        blob[at : at + draw.draw(st.integers(0, 20))] = draw.draw(st.binary(max_size=20))
    decoder = GzipDecoder(engine, 500)
    sizes = draw.draw(st.lists(st.integers(0, 4000), max_size=5))
    try:
        decode(decoder, chop(bytes(blob), sizes))
    except MalformedError:
        assert decoder.restart_index() is None
        return
    kept = decoder.restart_index()
    assert kept is None or len(open_restart_index(kept, len(blob)).chunks)


@settings(deadline=None)
@given(st.binary(max_size=500))
def test_any_bytes_behind_the_magic(data: bytes) -> None:
    for engine in ENGINES:
        with contextlib.suppress(MalformedError):
            decode(GzipDecoder(engine, 1), [b"\x1f\x8b\x08\0" + data])

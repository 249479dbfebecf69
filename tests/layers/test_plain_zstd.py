import contextlib
import random
import shutil
import subprocess

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.layers.plain_zstd import MAGIC, FrameHeader, PlainZstd, ZstdDecoder
from tests.layers.streaming import MIB, at_random, chop, decode, descriptor, mixed, open_stream

DATA = mixed(3 * MIB)
SMALL = DATA[:5000]


def frame(data: bytes, level: int = 3, *, checksum: bool = True, size: bool = True) -> bytes:
    packer = zstandard.ZstdCompressor(level, write_checksum=checksum, write_content_size=size)
    if size:
        return packer.compress(data)
    stream = packer.compressobj()
    return stream.compress(data) + stream.flush()


def skippable(data: bytes, nibble: int = 0) -> bytes:
    return bytes([0x50 + nibble]) + b"\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def by_hand(blocks: list[tuple[int, bytes]], window: int = 0x50) -> bytes:
    """A frame of raw (0) and RLE (1) blocks, with a window of 1 MiB unless told."""
    packed = MAGIC + bytes([0, window])
    for number, (kind, data) in enumerate(blocks):
        header = (number == len(blocks) - 1) | kind << 1 | len(data) << 3
        packed += header.to_bytes(3, "little") + (data[:1] if kind == 1 else data)
    return packed


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [-5, 1, 3, 9, 19])
@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("checksum", [True, False])
def test_levels(level: int, size: bool, checksum: bool) -> None:
    data = DATA if level < 10 else DATA[:500_000]
    blob = frame(data, level, checksum=checksum, size=size)
    assert decode(ZstdDecoder(), [blob]) == data
    assert decode(ZstdDecoder(), at_random(blob, random.Random(level))) == data


@pytest.mark.parametrize("options", [[], ["-1"], ["--no-check"], ["-B1MiB", "-T2"], ["--long=27"]])
def test_zstd_itself(options: list[str]) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    blob = subprocess.run(
        ["zstd", "-q", *options], input=DATA, capture_output=True, check=True
    ).stdout
    index = open_stream(PlainZstd(), blob)
    assert (index.format_name, index.cache_tag) == ("zstd", "zstd-stream-1")
    assert index.reopen is None
    decoder = index.decoder()
    assert decode(decoder, at_random(blob, random.Random(1))) == DATA
    assert decoder.restart_index() is None


def test_frames_and_skippable_frames() -> None:
    rng = random.Random(5)
    parts, blob = [], b""
    for seed in range(40):
        parts.append(mixed(rng.choice((0, 1, 300, 200_000)), seed))
        blob += frame(parts[-1], checksum=seed % 2 == 0, size=seed % 3 == 0)
        if seed % 4 == 0:
            blob += skippable(rng.randbytes(rng.choice((0, 5, 70_000))), seed % 16)
    for source in (blob, skippable(b"first") + blob):
        assert decode(open_stream(PlainZstd(), source).decoder(), [source]) == b"".join(parts)
        assert decode(ZstdDecoder(), at_random(source, rng)) == b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_791, 65_792])
def test_a_byte_at_a_time(size: int) -> None:
    blob = frame(DATA[:size]) + skippable(b"") + skippable(b"abc") + frame(DATA[:size], size=False)
    assert decode(ZstdDecoder(), chop(blob, [1] * len(blob))) == DATA[:size] * 2


def test_small_windows_and_long_ones() -> None:
    for log in (10, 17, 20, 27):
        parameters = zstandard.ZstdCompressionParameters(window_log=log)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        blob = stream.compress(DATA) + stream.flush()
        header = FrameHeader.parse(blob[:18])
        assert header is not None
        assert header.window_bytes == zstandard.get_frame_parameters(blob).window_size == 1 << log
        assert decode(ZstdDecoder(), at_random(blob, random.Random(log))) == DATA


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_791, 65_792, 300_000])
def test_headers_are_read_as_the_library_reads_them(size: int) -> None:
    for checksum in (True, False):
        blob = frame(bytes(size), checksum=checksum)
        header = FrameHeader.parse(blob[:18])
        known = zstandard.get_frame_parameters(blob)
        assert header is not None
        assert header.size_bytes == zstandard.frame_header_size(blob)
        assert header.window_bytes == known.window_size
        assert header.has_checksum == known.has_checksum == checksum
        assert FrameHeader.parse(blob[: header.size_bytes - 1]) is None


# --- bounds ------------------------------------------------------------------------------------


def test_a_bomb_comes_in_pieces() -> None:
    """4 bytes for each 128 KiB: 1 GiB of 32 KiB."""
    blob = by_hand([(1, bytes(2**17))] * 8192)
    assert len(blob) < 33_000
    decoder = ZstdDecoder()
    sizes = [len(piece) for piece in decoder.decode(blob)]
    assert sizes == [MIB] * 1024
    decoder.finish()
    assert len(decode(ZstdDecoder(), at_random(blob[:4006] + blob[-4:], random.Random(1)))) == (
        1001 * 2**17
    )


def test_raw_blocks_and_empty_ones() -> None:
    blocks = [(0, b"a"), (0, b""), (1, b"b" * 5), (0, DATA[: 2**17]), (0, b"")] * 5
    content = b"".join(data for _, data in blocks)
    blob = by_hand(blocks)
    assert decode(ZstdDecoder(), [blob]) == content
    assert decode(ZstdDecoder(), chop(blob, [1] * 1000)) == content


def test_windows_beyond_reason() -> None:
    for window, fits in ((17 << 3, True), (17 << 3 | 1, False), (21 << 3, False), (0xFF, False)):
        blob = by_hand([(0, b"x")], window)
        if fits:
            assert decode(open_stream(PlainZstd(), blob).decoder(), [blob]) == b"x"
            continue
        with pytest.raises(UnsupportedLayer, match="window"):
            open_stream(PlainZstd(), blob)
        with pytest.raises(UnsupportedLayer, match="window"):
            decode(ZstdDecoder(), [blob])


def test_dictionaries_are_not_there() -> None:
    samples: list[Data] = [mixed(3000, seed) for seed in range(50)]
    trained = zstandard.train_dictionary(4000, samples)
    blob = zstandard.ZstdCompressor(dict_data=trained).compress(samples[0])
    for wrong in (lambda: open_stream(PlainZstd(), blob), lambda: decode(ZstdDecoder(), [blob])):
        with pytest.raises(UnsupportedLayer, match="dictionary"):
            wrong()


# --- what lies ---------------------------------------------------------------------------------


def test_truncation_is_told() -> None:
    blob = frame(SMALL[:300]) + skippable(b"abc") + frame(b"x", size=False)
    borders = (len(frame(SMALL[:300])), len(frame(SMALL[:300])) + 11, len(blob))
    for size in range(len(blob) + 1):
        decoder = ZstdDecoder()
        content = b"".join(map(bytes, decoder.decode(blob[:size])))
        assert (SMALL[:300] + b"x").startswith(content)
        if size in borders:
            decoder.finish()
        else:
            with pytest.raises(MalformedError, match="cut off"):
                decoder.finish()


@pytest.mark.parametrize("more", [b"\0\0\0\0", b"\x28\xb5\x2f\xfc", b"garbage", b"\x1f\x8b\x08\0"])
def test_something_behind_the_end(more: bytes) -> None:
    with pytest.raises(MalformedError):
        decode(ZstdDecoder(), [frame(SMALL) + more])
    with pytest.raises(MalformedError):
        decode(ZstdDecoder(), chop(frame(SMALL) + more, [1] * 10**5))


def test_a_wrong_checksum_is_told() -> None:
    blob = bytearray(frame(SMALL))
    blob[-1] ^= 1
    with pytest.raises(MalformedError):
        decode(ZstdDecoder(), [bytes(blob)])


@pytest.mark.parametrize("block", [(3, b""), (0, bytes(2**17 + 1)), (1, bytes(2**17 + 1))])
def test_blocks_that_cannot_be(block: tuple[int, bytes]) -> None:
    with pytest.raises(MalformedError, match="block"):
        decode(ZstdDecoder(), [by_hand([block])])


def test_bytes_decide() -> None:
    known = PlainZstd()
    layer = descriptor(1000, "application/vnd.oci.image.layer.v1.tar+gzip")
    assert known.recognises(layer, frame(b"x"))
    assert known.recognises(layer, skippable(b"abc", 15) + skippable(b"") + frame(b"x"))
    assert known.recognises(layer, skippable(bytes(70_000))[:65_536])
    assert not known.recognises(layer, skippable(b"abc") + b"\x04\x22\x4d\x18lz4")
    assert not known.recognises(layer, b"")
    assert not known.recognises(layer, b"\x28\xb5\x2f")
    assert not known.recognises(layer, b"\x1f\x8b\x08\0")


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_hostile_bytes(draw: st.DataObject) -> None:
    blob = bytearray(
        frame(SMALL) + skippable(b"abc") + frame(SMALL[:200], size=False, checksum=False)
        + by_hand([(1, bytes(9)), (0, b"abc")])
    )  # fmt: skip
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(0, len(blob)))
        blob[at : at + draw.draw(st.integers(0, 20))] = draw.draw(st.binary(max_size=20))
    sizes = draw.draw(st.lists(st.integers(0, 4000), max_size=5))
    with contextlib.suppress(MalformedError, UnsupportedLayer):
        decode(ZstdDecoder(), chop(bytes(blob), sizes))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_behind_a_header(data: bytes) -> None:
    with contextlib.suppress(MalformedError, UnsupportedLayer):
        decode(ZstdDecoder(), [MAGIC + b"\0\x50" + data])
    with contextlib.suppress(MalformedError, UnsupportedLayer):
        open_stream(PlainZstd(), MAGIC + data)

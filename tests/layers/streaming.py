"""Streams of every writer, and decoders that are driven as the content floor does."""

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence

from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import (
    LayerDescriptor,
    LayerFormat,
    LayerIndex,
    StreamDecoder,
    StreamIndex,
)

MIB = 2**20


def mixed(size: int, seed: int = 1) -> bytes:
    """Text, noise and zeros, as pages have them."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(b"abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(500)]
    data = bytearray()
    while len(data) < size:
        kind = rng.random()
        length = rng.randrange(1, 30_000)
        if kind < 0.6:
            data += b" ".join(rng.choices(words, k=length // 5 + 1))
        elif kind < 0.8:
            data += rng.randbytes(length)
        else:
            data += bytes(length)
    return bytes(data[:size])


def gzip_member(
    data: bytes, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY, memory_level: int = 8
) -> bytes:
    """One gzip member; a low `memory_level` makes small blocks."""
    packer = zlib.compressobj(level, zlib.DEFLATED, 31, memory_level, strategy)
    return packer.compress(data) + packer.flush()


def chop(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut the data into pieces of the given sizes; what is left comes as one."""
    at = 0
    for size in sizes:
        if at >= len(data):
            return
        yield data[at : at + size]
        at += size
    yield data[at:]


def at_random(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Cut the data anywhere, closely now and then."""
    return chop(data, iter(lambda: rng.choice((0, 1, 2, 7, 500, 9_000, 200_000)), -1))


def decode(decoder: StreamDecoder, pieces: Iterable[bytes]) -> bytes:
    """Decode a whole blob; check that content comes in pieces of bounded size."""
    content = bytearray()
    for data in pieces:
        for piece in decoder.decode(memoryview(data)):
            assert 0 < len(piece) <= MIB
            content += piece
    decoder.finish()
    return bytes(content)


def descriptor(size: int, media_type: str = "application/octet-stream") -> LayerDescriptor:
    return LayerDescriptor(media_type, None, size, {})


def open_stream(chosen: LayerFormat, blob: bytes) -> StreamIndex:
    """Open a layer by a format that wants nothing but its head."""
    layer = descriptor(len(blob))
    assert chosen.recognises(layer, blob[: 64 * 1024])
    opening = chosen.open(layer, blob[: 64 * 1024])
    asked: list[Sequence[ByteRange]] = []
    try:
        asked.append(next(opening))
    except StopIteration as stop:
        index: LayerIndex | StreamIndex = stop.value
        assert isinstance(index, StreamIndex)
        return index
    raise AssertionError(f"asked for {asked}")

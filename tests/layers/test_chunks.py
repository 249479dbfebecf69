import hashlib
import random

import pytest

from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.chunks import BLOB_CHUNK_MOST_BYTES, FixedChunks, TableBuilder, TableChunks
from lazyfs.layers.zstd_chunked import decompress
from tests.layers.driving import content_of

GIB = 2**30


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 100])
def test_an_even_grid_covers_the_blob(size: int) -> None:
    blob = random.Random(1).randbytes(size)
    chunks = FixedChunks(size, 10)
    assert len(chunks) == (size + 9) // 10
    assert not chunks.proven
    assert content_of(chunks, blob) == blob


@pytest.mark.parametrize("wrong", [b"", b"123456789", b"12345678901"])
def test_an_even_grid_refuses_another_length(wrong: bytes) -> None:
    with pytest.raises(IntegrityError):
        list(FixedChunks(25, 10).decode(1, wrong))


def test_an_even_grid_gives_the_same_buffer_back() -> None:
    data = memoryview(bytes(10))
    (piece,) = FixedChunks(25, 10).decode(1, data)
    assert piece is data


def test_a_table_finds_chunks_across_stretches() -> None:
    """Content and blob both grow past what 32 bits hold, several times."""
    digest = hashlib.sha256().digest()
    builder = TableBuilder(blob_stop=40 * GIB)
    rng = random.Random(3)
    rows = []
    content = blob = 0
    for _ in range(600):
        size = rng.choice([1, 4096, 65536, 3 * GIB]) if rng.random() < 0.5 else 70_000
        blob += rng.choice([0, 500, GIB // 8])
        is_zeros = size == 3 * GIB
        stop = blob + rng.randrange(1, 100_000)
        rows.append((content, size, blob, blob if is_zeros else stop))
        builder.add(size, ByteRange(blob, stop), None if is_zeros else digest)
        content += size
        blob = stop
        if rng.random() < 0.3:
            builder.align(4096)
            content += -content % 4096
    chunks = TableChunks(builder, decompress)
    assert len(builder.stretch_rows) > 5
    assert chunks.content_size_bytes == chunks.content_start(len(rows)) == content
    for index, (start, size, low, high) in enumerate(rows):
        assert chunks.content_start(index) == start
        assert chunks.content_size(index) == size
        assert chunks.blob_range(index) == (low, high)
        assert chunks.index_at(start) == chunks.index_at(start + size - 1) == index
        assert chunks.index_at(chunks.content_start(index + 1) - 1) == index


@pytest.mark.parametrize(
    ("size", "start", "stop"),
    [(0, 100, 110), (-1, 100, 110), (5, 40, 60), (5, 100, 100), (5, 110, 100), (5, 990, 1001)],
)
def test_a_table_refuses_rows_that_lie(size: int, start: int, stop: int) -> None:
    builder = TableBuilder(blob_stop=1000)
    builder.add(5, ByteRange(10, 50), bytes(32))
    with pytest.raises(MalformedError):
        builder.add(size, ByteRange(start, stop), bytes(32))
    assert len(builder) == 1


def test_a_table_refuses_giant_chunks() -> None:
    builder = TableBuilder(blob_stop=GIB)
    with pytest.raises(MalformedError):
        builder.add(5, ByteRange(0, BLOB_CHUNK_MOST_BYTES + 1), bytes(32))


def test_a_chunk_of_zeros_is_not_fetched_and_comes_in_pieces() -> None:
    builder = TableBuilder(blob_stop=GIB)
    builder.add(3 * 2**20 + 5, ByteRange(100, 200), None)
    chunks = TableChunks(builder, decompress)
    assert chunks.blob_range(0).size_bytes == 0
    pieces = [bytes(piece) for piece in chunks.decode(0, b"")]
    assert [len(piece) for piece in pieces] == [2**20] * 3 + [5]
    assert not any(map(any, pieces))
    with pytest.raises(IntegrityError):
        list(chunks.decode(0, b"x"))

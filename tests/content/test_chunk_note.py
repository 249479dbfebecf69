"""The note of how a layer is cut: what was written is read, and nothing else is."""

from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.content.chunk_note import (
    Grid,
    even_grid,
    leave_note,
    parse_note,
    read_note,
    zero_chunks_noted,
)
from lazyfs.layers.chunks import FixedChunks
from tests.images import zstd_chunked
from tests.layers.driving import open_layer

CHUNKS = open_layer(
    zstd_chunked({"a": b"a" * 5000, "z": bytes(300_000), "b": b"b" * 70_000})
).chunks


def test_a_note_says_how_a_layer_is_cut(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    assert zero_chunks_noted(tmp_path) == 0
    leave_note(tmp_path, CHUNKS)
    grid = read_note(tmp_path)
    assert grid is not None
    assert list(grid.starts) == [CHUNKS.content_start(index) for index in range(len(CHUNKS))]
    assert list(grid.sizes) == [CHUNKS.content_size(index) for index in range(len(CHUNKS))]
    assert zero_chunks_noted(tmp_path) == len(CHUNKS.zero_chunks())
    assert [path.name for path in tmp_path.iterdir()] == ["chunks"]
    assert (tmp_path / "chunks").stat().st_mode & 0o077 == 0


def test_what_is_noted_is_not_noted_again(tmp_path: Path) -> None:
    leave_note(tmp_path, CHUNKS)
    before = (tmp_path / "chunks").stat().st_ino

    def no() -> None:
        raise AssertionError

    leave_note(tmp_path, CHUNKS, no)
    assert (tmp_path / "chunks").stat().st_ino == before


def test_a_note_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave_note(tmp_path, CHUNKS, stop)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        leave_note(tmp_path / "gone", CHUNKS)


def test_even_grids_are_as_their_chunk_maps() -> None:
    chunks = FixedChunks(1_000_001)
    grid = even_grid(1_000_001, 256 * 1024)
    assert len(grid) == len(chunks) == 4
    assert [*grid.sizes] == [chunks.content_size(index) for index in range(4)]
    assert len(even_grid(0, 5)) == 0


@given(st.binary(max_size=200), st.booleans())
def test_a_grid_or_none(data: bytes, sealed: bool) -> None:
    if sealed:
        data = b"lazyfs-chunks-1\n" + data
        data += xxhash.xxh3_128_digest(data)
    assert parse_note(data) is None or isinstance(parse_note(data), Grid)


def test_torn_notes_are_none(tmp_path: Path) -> None:
    leave_note(tmp_path, CHUNKS)
    whole = (tmp_path / "chunks").read_bytes()
    assert parse_note(whole) is not None
    for length in (0, 3, 16, 40, len(whole) - 1):
        assert parse_note(whole[:length]) is None
    for at in range(0, len(whole), 7):
        assert parse_note(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]) is None

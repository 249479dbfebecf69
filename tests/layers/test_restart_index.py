import io
import mmap
import struct
import tarfile
import tempfile

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.layers.deflate import engines
from lazyfs.layers.gzip import GzipDecoder
from lazyfs.layers.model import Entry, LayerIndex
from lazyfs.layers.restart import RestartPoint
from lazyfs.layers.restart_index import SpanRecorder, open_restart_index
from tests.layers.streaming import decode, gzip_member, mixed


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(5):
            info = tarfile.TarInfo(f"checkpoint/pages-{number}.img")
            info.size = 100_000
            tar.addfile(info, io.BytesIO(mixed(info.size, number)))
    return file.getvalue()


TAR = archive()
BLOB = gzip_member(TAR, memory_level=1)


def kept(blob: bytes = BLOB, spacing: int = 20_000) -> bytes:
    decoder = GzipDecoder(engines()[0], spacing)
    decode(decoder, [blob])
    index = decoder.restart_index()
    assert index is not None
    return index


def content_of(index: LayerIndex, blob: bytes = BLOB) -> bytes:
    content = bytearray()
    for number in range(len(index.chunks)):
        item = index.chunks.blob_range(number)
        for piece in index.chunks.decode(number, blob[item.start : item.stop]):
            content += piece
    return bytes(content)


def walked(index: LayerIndex, content: bytes) -> list[Entry]:
    try:
        wanted = next(index.walk)
        while True:
            wanted = index.walk.send([content[item.start : item.stop] for item in wanted])
    except StopIteration:
        return index.entries


def resealed(data: bytes) -> bytes:
    return data + xxhash.xxh3_128_digest(data)


def test_what_was_kept_opens_the_layer() -> None:
    index = open_restart_index(kept(), len(BLOB))
    assert (index.format_name, index.cache_tag) == ("gzip", "gzip-spans-1")
    assert index.chunks.proven
    assert index.stream is None
    assert len(index.chunks) > 10
    content = content_of(index)
    assert content == TAR
    entries = walked(index, content)
    assert [entry.path for entry in entries] == [f"checkpoint/pages-{n}.img" for n in range(5)]
    last = entries[-1]
    assert content[last.content_start :][: last.size_bytes] == mixed(100_000, 4)


def test_windows_are_read_out_of_a_mapping() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(kept())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        index = open_restart_index(memoryview(mapping), len(BLOB))
        with pytest.raises(BufferError):
            mapping.close()
        assert content_of(index) == TAR


def test_windows_are_packed() -> None:
    blob = gzip_member(bytes(10**6) + b"x" * 10**6)
    assert len(kept(blob, 1)) < 2000


def test_a_member_needs_no_window() -> None:
    members = [gzip_member(mixed(50_000, seed)) for seed in range(9)]
    index = kept(b"".join(members), 40_000)
    assert len(index) < 1000
    assert len(open_restart_index(index, sum(map(len, members))).chunks) == 9


def test_content_that_ends_at_a_point() -> None:
    """Members without content behind the last: what they add to the blob belongs to no span."""
    blob = gzip_member(TAR[:50_000], memory_level=1) + gzip_member(b"") * 3
    index = open_restart_index(kept(blob, 1), len(blob))
    assert content_of(index, blob) == TAR[:50_000]
    assert index.chunks.blob_range(len(index.chunks) - 1).stop < len(blob)


def test_no_index_where_none_would_do() -> None:
    assert SpanRecorder().finish(0, 0) is None
    for blob_bytes, content_bytes in ((2**26 + 100, 2**20), (1000, 2**30 + 1), (1000, 0)):
        recorder = SpanRecorder()
        recorder.begin(RestartPoint(10, 0, 0, b""), b"")
        recorder.see(b"data")
        assert recorder.finish(blob_bytes, content_bytes) is None


def test_a_torn_file_is_told() -> None:
    whole = kept()
    for stop in (*range(100), *range(100, len(whole), 997), len(whole) - 1):
        with pytest.raises(MalformedError, match="torn"):
            open_restart_index(whole[:stop], len(BLOB))
        torn = whole[:stop] + bytes([whole[stop] ^ 1]) + whole[stop + 1 :]
        with pytest.raises(MalformedError, match="torn"):
            open_restart_index(torn, len(BLOB))


def test_another_blob_or_version_is_told() -> None:
    with pytest.raises(UnsupportedLayer, match="of a blob of"):  # nothing is wrong with it
        open_restart_index(kept(), len(BLOB) + 1)
    older = resealed(b"lazyfs gzip 0\n\0\0" + kept()[16:-16])
    with pytest.raises(MalformedError, match="another"):
        open_restart_index(older, len(BLOB))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("number", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_numbers_that_lie(place: int, number: int) -> None:
    data = bytearray(kept()[:-16])
    struct.pack_into("<Q", data, 16 + 8 * place, number)
    with pytest.raises((MalformedError, UnsupportedLayer)):
        open_restart_index(resealed(bytes(data)), len(BLOB))


def test_a_damaged_window_is_told() -> None:
    data = bytearray(kept()[:-16])
    data[-3000:] = bytes(3000)
    index = open_restart_index(resealed(bytes(data)), len(BLOB))
    with pytest.raises(IntegrityError, match="window"):
        content_of(index)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_hostile_bytes(draw: st.DataObject) -> None:
    """Sealed rightly, and anything inside."""
    blob = gzip_member(TAR[:30_000], memory_level=1)
    data = bytearray(kept(blob, 1000)[:-16])
    for _ in range(draw.draw(st.integers(0, 4))):
        at = draw.draw(st.integers(16, min(len(data), 3000)))
        data[at : at + draw.draw(st.integers(0, 9))] = draw.draw(st.binary(max_size=9))
    try:
        index = open_restart_index(resealed(bytes(data)), len(blob))
        assert index.chunks.content_size_bytes > 0
        content_of(index, blob)
    except (MalformedError, IntegrityError, UnsupportedLayer):
        pass

import dataclasses
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.layers.model import EntryType, LayerDescriptor
from lazyfs.layers.table import choose
from lazyfs.layers.zstd_chunked import CHECKSUM_KEY, POSITION_KEY, decompress
from tests.images import Layer, Member, cut_evenly, with_toc, zstd_chunked
from tests.layers.driving import (
    content_of,
    descriptor,
    drive_opening,
    entries_of,
    files_of,
    open_layer,
    reader_of,
)

SAMPLE = Path(__file__).parent.parent / "data" / "zstd-chunked"
RANDOM = random.Random(11)
PAGES = RANDOM.randbytes(150_000) + bytes(100_000) + RANDOM.randbytes(50_001)
FILES = {"checkpoint/": b"", "checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}


def sample() -> Layer:
    described = json.loads((SAMPLE / "descriptor.json").read_bytes())
    blob = (SAMPLE / "layer").read_bytes()
    assert f"sha256:{hashlib.sha256(blob).hexdigest()}" == described["digest"]
    return Layer(blob, described["annotations"], described["mediaType"])


# --- round trips -------------------------------------------------------------------------------


def test_a_layer_of_skopeo_reads_as_zstd_and_tar_read_it() -> None:
    layer = sample()
    plain = zstandard.ZstdDecompressor().stream_reader(layer.blob, read_across_frames=True).read()
    index = open_layer(layer)
    content = content_of(index.chunks, layer.blob)
    entries = entries_of(index, reader_of(content))
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        assert [entry.path for entry in entries] == archive.getnames()
        for entry in entries:
            info = archive.getmember(entry.path)
            if info.islnk():
                assert entry.link_of == info.linkname
            else:
                assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
                assert entry.mtime_ns == round(info.mtime * 10**6) * 1000
                assert entry.symlink_target == (info.linkname if info.issym() else "")
            if entry.type is EntryType.FILE:
                file = archive.extractfile(info)
                assert file is not None
                start = entry.content_start
                assert content[start : start + entry.size_bytes] == file.read()
    kinds = [entry.type for entry in entries]
    assert kinds.count(EntryType.OTHER) == kinds.count(EntryType.FIFO) == 1
    assert max(index.chunks.content_size(i) for i in range(len(index.chunks))) > 2**20


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=6), max_size=5),
    st.integers(50, 9000),
    st.booleans(),
)
def test_files_read_back(
    shape: list[list[tuple[int, bool]]], chunk_bytes: int, content_size: bool
) -> None:
    rng = random.Random(5)
    files = {
        f"f{number}": b"".join(bytes(n) if zeros else rng.randbytes(n) for n, zeros in file)
        for number, file in enumerate(shape)
    }
    layer = zstd_chunked(files, cut=cut_evenly(chunk_bytes), content_size=content_size)
    assert files_of(layer) == files


@pytest.mark.parametrize("content_size", [True, False])
@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20, 3 * 2**20 + 7])
def test_chunks_beyond_one_piece(size: int, content_size: bool) -> None:
    files = {"large": RANDOM.randbytes(size), "same": b"\xff" * size}
    layer = zstd_chunked(files, cut=cut_evenly(2**30), content_size=content_size)
    assert files_of(layer) == files


def test_files_start_at_pages_and_only_data_is_fetched() -> None:
    index = open_layer(zstd_chunked(FILES, cut=cut_evenly(10_000)))
    entries = entries_of(index, reader_of(b""))
    assert index.cache_tag.startswith("zstd-chunked-1-")
    assert index.chunks.proven
    assert all(entry.content_start % 4096 == 0 for entry in entries)
    sizes = [index.chunks.blob_range(i).size_bytes for i in range(len(index.chunks))]
    assert sizes.count(0) == 10
    assert index.chunks.content_size_bytes % 4096 == 0


def test_metadata_links_and_duplicates_are_told() -> None:
    files = [
        Member("a", b"1", mtime=1.25, mode=0o4755, uid=2**32 - 1, gid=3),
        Member("./b", type=tarfile.LNKTYPE, link="./a"),
        Member("s", type=tarfile.SYMTYPE, link="../x"),
        Member("null", type=tarfile.CHRTYPE),
        Member("a", b"2"),
    ]
    a, b, s, null, again = entries_of(open_layer(zstd_chunked(files)), reader_of(b""))
    assert (a.mode, a.uid, a.gid, a.mtime_ns) == (0o4755, 2**32 - 1, 3, 1_250_000_000)
    assert (b.link_of, b.content_start, b.size_bytes) == ("a", a.content_start, 1)
    assert (s.type, s.symlink_target) == (EntryType.SYMLINK, "../x")
    assert null.type is EntryType.OTHER
    assert again.path == "a"


def test_a_long_toc_is_read_in_pieces() -> None:
    """Names that look like the places where the text is cut, and far more than one piece."""
    files = {'d},{"type":"reg' + f"{n}/" + "},{": bytes([n % 251]) * (n % 5) for n in range(5000)}
    files |= {"},{" + str(n): b"x" for n in range(50)}
    layer = zstd_chunked(files, cut=cut_evenly(2))
    assert int(layer.annotations[POSITION_KEY].split(":")[2]) > 3 * 256 * 1024
    assert files_of(layer) == files


def test_a_toc_that_is_not_compact_is_read_whole() -> None:
    frames = zstd_chunked(FILES)
    toc = toc_of(frames)
    layer = with_toc(frames.blob, json.dumps(toc, indent=2).encode())
    assert files_of(layer) == {"checkpoint/a.img": b"hello", "checkpoint/pages-1.img": PAGES}


def test_threads_may_decode_at_once() -> None:
    layer = zstd_chunked({"f": RANDOM.randbytes(4_000_000)}, cut=cut_evenly(30_000))
    chunks = open_layer(layer).chunks

    def decode(index: int) -> bytes:
        item = chunks.blob_range(index)
        return b"".join(map(bytes, chunks.decode(index, layer.blob[item.start : item.stop])))

    with ThreadPoolExecutor(8) as pool:
        one = list(pool.map(decode, range(len(chunks))))
        two = list(pool.map(decode, range(len(chunks))))
    assert one == two


def test_one_thread_may_decode_large_chunks_in_turns() -> None:
    files = {"a": RANDOM.randbytes(3 * 2**20), "b": b"b" * 3 * 2**20, "c": b"c"}
    layer = zstd_chunked(files, cut=cut_evenly(2**30))
    chunks = open_layer(layer).chunks

    def decoding(index: int) -> Iterator[bytes]:
        item = chunks.blob_range(index)
        return map(bytes, chunks.decode(index, layer.blob[item.start : item.stop]))

    both = list(zip(decoding(0), decoding(1), strict=True))
    assert b"".join(pair[0] for pair in both) == files["a"]
    assert b"".join(pair[1] for pair in both) == files["b"]


# --- lies --------------------------------------------------------------------------------------


def toc_of(layer: Layer) -> dict[str, Any]:
    offset, size, _, _ = map(int, layer.annotations[POSITION_KEY].split(":"))
    text = zstandard.ZstdDecompressor().decompress(layer.blob[offset : offset + size])
    toc: dict[str, Any] = json.loads(text)
    return toc


def falsified(number: int, **changes: object) -> Layer:
    def edit(toc: dict[str, Any]) -> None:
        toc["entries"][number] |= changes

    return zstd_chunked(FILES, cut=cut_evenly(60_000), edit=edit)


SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (1, {"offset": 10**9}),
        (1, {"endOffset": 10**9}),
        (1, {"offset": 0, "endOffset": 0}),
        (1, {"offset": -1}),
        (1, {"offset": 2**64}),
        (1, {"size": 2**62}),
        (1, {"size": "5"}),
        (1, {"size": 5.5}),
        (1, {"digest": ""}),
        (1, {"digest": "sha512:" + "a" * 128}),
        (1, {"digest": "sha256:" + "g" * 64}),
        (1, {"digest": "sha256:" + "a " * 32}),
        (1, {"digest": "sha256:" + "A" * 64}),
        (1, {"name": "../up"}),
        (1, {"name": "a\0b"}),
        (1, {"name": ""}),
        (1, {"name": "x" * 300}),
        (1, {"name": None}),
        (1, {"type": "socket"}),
        (1, {"type": "hardlink", "linkName": "nothing"}),
        (1, {"type": "hardlink", "linkName": "checkpoint"}),
        (1, {"type": "symlink"}),
        (1, {"uid": -1}),
        (1, {"gid": 2**32}),
        (1, {"modtime": "yesterday"}),
        (1, {"modtime": "2023-02-30T00:00:00Z"}),
        (1, {"chunkOffset": 1}),
        (1, {"chunkType": "holes"}),
        (2, {"chunkSize": 59_999}),
        (2, {"offset": 0}),
        (2, {"size": 300_002}),
        (3, {"chunkOffset": 59_999}),
        (3, {"chunkOffset": 0}),
        (3, {"offset": 0}),
        (3, {"name": "checkpoint/a.img"}),
        (3, {"chunkDigest": ""}),
        (0, {"type": "chunk"}),
        (1, {"type": "chunk"}),
        (2, {"type": "dir"}),
    ],
)
def test_tocs_that_lie_are_refused(number: int, changes: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        open_layer(falsified(number, **changes))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}]",
        b"[1]",
        b'{"version":1,"entries":5}',
        b'{"version":1,"entries":[{}]}',
        b'{"version":1,"entries":[{"type":"reg"}]}',
        b'{"version":1,"entries":[{"type":"reg","name":"\xff"}]}',
        b'{"version":1,"entries":[{"type":"dir","name":"\\ud800"}]}',
        b"[" * 100_000,
        b'{"version":1,"entries":[{"type":"dir","name":"a"},{"type":"dir","name":"b"}',
        b'{"version":1,"x":[{"a":1},{"type":"dir","name":"a"}],"entries":[]}',
    ],
)
def test_text_that_is_no_toc_is_refused(text: bytes) -> None:
    with pytest.raises(MalformedError):
        open_layer(with_toc(b"\x28\xb5\x2f\xfd" + bytes(996), text))


@pytest.mark.parametrize("text", [b"{}", b'{"version":2,"entries":[]}', b'{"entries":[]}'])
def test_another_version_is_not_read(text: bytes) -> None:
    with pytest.raises(UnsupportedLayer):
        open_layer(with_toc(b"\x28\xb5\x2f\xfd" + bytes(996), text))


@pytest.mark.parametrize(
    ("position", "error"),
    [
        ("", MalformedError),
        ("1:2:3", MalformedError),
        ("-8:20:30:1", MalformedError),
        (" 8:20:30:1", MalformedError),
        ("0:20:30:1", MalformedError),
        ("8:0:30:1", MalformedError),
        ("8:20:0:1", MalformedError),
        ("8:20:20001:1", MalformedError),
        ("990:20:30:1", MalformedError),
        ("8:20:30:2", UnsupportedLayer),
        ("8:99999999999999999999:30:1", MalformedError),
    ],
)
def test_positions_that_cannot_be_are_refused(position: str, error: type[Exception]) -> None:
    layer = zstd_chunked({})
    described = LayerDescriptor(
        layer.media_type, None, 1000, layer.annotations | {POSITION_KEY: position}
    )
    with pytest.raises(error):
        drive_opening(choose(described, layer.blob).open(described, layer.blob), layer.blob)


def test_a_toc_that_contradicts_its_digest_is_refused() -> None:
    layer = zstd_chunked(FILES)
    wrong = dataclasses.replace(layer, annotations=layer.annotations | {CHECKSUM_KEY: SHA})
    with pytest.raises(IntegrityError):
        open_layer(wrong)
    with pytest.raises(MalformedError):
        open_layer(dataclasses.replace(layer, annotations=layer.annotations | {CHECKSUM_KEY: "x"}))


@pytest.mark.parametrize("change", [-1, 1, 40])
def test_a_toc_of_another_size_than_promised_is_refused(change: int) -> None:
    layer = zstd_chunked(FILES)
    offset, size, plain, kind = map(int, layer.annotations[POSITION_KEY].split(":"))
    position = f"{offset}:{size}:{plain + change}:{kind}"
    with pytest.raises(MalformedError):
        open_layer(
            dataclasses.replace(layer, annotations=layer.annotations | {POSITION_KEY: position})
        )


# --- decoding what somebody else sent ----------------------------------------------------------


@pytest.mark.parametrize("promised", [1, 100, 2**20 + 1, 3 * 2**20])
@pytest.mark.parametrize("declares", [True, False])
def test_a_frame_of_another_size_is_refused(promised: int, declares: bool) -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=declares)
    for size in (promised - 1, promised + 1, promised * 2, 64 * 2**20):
        frame = compressor.compress(bytes(size))
        with pytest.raises(IntegrityError):
            list(decompress(frame, promised))


def test_a_window_larger_than_ours_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(bytes(2**20)) + compressor.flush()
    for size in (2**20, 2**20 + 1):
        with pytest.raises(IntegrityError):
            list(decompress(frame, size))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(1, 2**21))
def test_any_bytes_decompress_or_fail_as_declared(data: bytes, size: int) -> None:
    try:
        pieces = [bytes(piece) for piece in decompress(data, size)]
    except IntegrityError:
        return
    assert len(b"".join(pieces)) == size


LARGE = zstd_chunked(
    {"small": PAGES[:20_000], "large": bytes(2**20) + PAGES},
    cut=cut_evenly(2**30),
    content_size=False,
)
LARGE_CHUNKS = open_layer(LARGE).chunks


@settings(deadline=None)
@given(st.data(), st.integers(0, 1))
def test_a_damaged_chunk_is_refused_or_unharmed(draw: st.DataObject, index: int) -> None:
    item = LARGE_CHUNKS.blob_range(index)
    right = LARGE.blob[item.start : item.stop]
    data = bytearray(right)
    at = draw.draw(st.integers(0, len(data) - 1) | st.integers(0, 20))
    data[at] ^= draw.draw(st.integers(1, 255))
    try:
        got = b"".join(map(bytes, LARGE_CHUNKS.decode(index, data)))
    except IntegrityError:
        return
    assert got == b"".join(map(bytes, LARGE_CHUNKS.decode(index, right)))


TOC_TEXT = json.dumps(toc_of(zstd_chunked(FILES, cut=cut_evenly(60_000)))).encode()
TOC_FRAMES = zstd_chunked(FILES, cut=cut_evenly(60_000)).blob


@settings(deadline=None)
@given(st.data())
def test_a_falsified_toc_gives_a_layer_or_a_declared_error(draw: st.DataObject) -> None:
    text = bytearray(TOC_TEXT)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(text) - 1))
        new = draw.draw(st.binary(max_size=4) | st.sampled_from([b"0", b"9", b'"', b"}", b"-"]))
        text[at : at + draw.draw(st.integers(0, 3))] = new
    layer = with_toc(TOC_FRAMES, bytes(text))
    try:
        index = open_layer(layer)
    except (MalformedError, UnsupportedLayer):
        return
    size = index.chunks.content_size_bytes
    for entry in entries_of(index, reader_of(b"")):
        assert 0 <= entry.content_start <= entry.content_start + entry.size_bytes <= size
    for number in range(len(index.chunks)):
        item = index.chunks.blob_range(number)
        try:
            for _ in index.chunks.decode(number, layer.blob[item.start : item.stop]):
                pass
        except IntegrityError:
            continue


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(descriptor(LARGE).annotations)), st.text(max_size=30)))
def test_any_annotations_give_a_layer_or_a_declared_error(changes: dict[str, str]) -> None:
    try:
        open_layer(dataclasses.replace(LARGE, annotations=LARGE.annotations | changes))
    except (MalformedError, UnsupportedLayer, IntegrityError):
        return

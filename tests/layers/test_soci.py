"""SOCI's zTOC: what soci writes reads as gzip and tar read the layer, and what lies is refused."""

import gzip
import hashlib
import io
import random
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.layers.model import Entry, EntryType, LayerDescriptor, LayerIndex
from lazyfs.layers.soci import open_soci, read_entries
from lazyfs.layers.soci_checkpoints import read_checkpoints
from lazyfs.layers.ztoc import read_files, read_ztoc
from tests.images import tar_bytes
from tests.layers.ztoc_writer import File, Point, Ztoc, checkpoints, span_digests

SAMPLE = Path(__file__).parent.parent / "data" / "soci"
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
NAMES = ("", "members.")


def sample(name: str = "") -> tuple[bytes, bytes]:
    """Return a layer of soci's and its zTOC."""
    return (SAMPLE / f"{name}layer").read_bytes(), (SAMPLE / f"{name}ztoc").read_bytes()


def described(blob: bytes) -> LayerDescriptor:
    return LayerDescriptor(GZIP, None, len(blob), {})


def opened(blob: bytes, ztoc: bytes, *, pinned: bool) -> LayerIndex:
    return open_soci(described(blob), ztoc, pinned=pinned, head=blob[:65536])


def content_of(index: LayerIndex, blob: bytes) -> bytes:
    """Decode every span."""
    content = bytearray()
    chunks = index.chunks
    for number in range(len(chunks)):
        start, stop = chunks.blob_range(number)
        pieces = [bytes(piece) for piece in chunks.decode(number, blob[start:stop])]
        assert len(content) == chunks.content_start(number)
        content += b"".join(pieces)
    assert len(content) == chunks.content_size_bytes
    return bytes(content)


def walked(index: LayerIndex, content: bytes) -> list[Entry]:
    """Run the walk, and return the entries."""
    answers = None
    while True:
        try:
            wanted = next(index.walk) if answers is None else index.walk.send(answers)
        except StopIteration:
            return index.entries
        answers = [content[item.start : item.stop] for item in wanted]


# --- what soci writes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pinned", [True, False])
def test_a_layer_of_soci_reads_as_gzip_and_tar_read_it(name: str, pinned: bool) -> None:
    blob, ztoc = sample(name)
    plain = gzip.decompress(blob)
    index = opened(blob, ztoc, pinned=pinned)
    content = content_of(index, blob)
    assert content == plain[: len(content)]
    assert not any(plain[len(content) :]), "only a record's filling is left out"
    entries = walked(index, content)
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        assert [entry.path for entry in entries] == archive.getnames()
        for entry in entries:
            info = archive.getmember(entry.path)
            if info.islnk():
                assert entry.link_of == info.linkname
            else:
                assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
                assert abs(entry.mtime_ns - info.mtime * 10**9) < 1000
                assert entry.symlink_target == (info.linkname if info.issym() else "")
            if entry.type is EntryType.FILE:
                file = archive.extractfile(info)
                assert file is not None
                start = entry.content_start
                assert content[start : start + entry.size_bytes] == file.read()
    types = {entry.path: entry.type for entry in entries}
    assert types["checkpoint"] is EntryType.DIRECTORY
    assert types["spec.dump"] is EntryType.SYMLINK
    assert types["null"] is EntryType.OTHER


@pytest.mark.parametrize("name", NAMES)
def test_the_table_and_the_walk_tell_the_same(name: str) -> None:
    blob, ztoc = sample(name)
    told = opened(blob, ztoc, pinned=True).entries
    unpinned = opened(blob, ztoc, pinned=False)
    assert unpinned.entries == []
    seen = walked(unpinned, content_of(unpinned, blob))
    # A FIFO may be told apart or not: that is the reader of the table's to say.
    assert [entry for entry in told if entry.path != "pipe"] == [
        entry for entry in seen if entry.path != "pipe"
    ]


def test_who_vouches_decides_what_is_proven() -> None:
    blob, ztoc = sample()
    pinned, referred = (opened(blob, ztoc, pinned=value) for value in (True, False))
    assert pinned.chunks.proven
    assert pinned.stream is None
    assert not referred.chunks.proven
    assert referred.stream is not None
    tag = f"soci-1-{hashlib.sha256(ztoc).hexdigest()}"
    assert (pinned.cache_tag, referred.cache_tag) == (tag, tag)
    assert pinned.format_name == "soci"


def streamed(index: LayerIndex, blob: bytes, cut: int = 1000) -> bytes:
    """Decode the whole blob as the pass behind the reads does."""
    assert index.stream is not None
    decoder = index.stream.decoder()
    content = b"".join(
        bytes(piece)
        for start in range(0, len(blob), cut)
        for piece in decoder.decode(blob[start : start + cut])
    )
    decoder.finish()
    return content


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [977, 1_000_000])
def test_the_pass_behind_the_reads_gives_the_same(name: str, cut: int) -> None:
    blob, ztoc = sample(name)
    index = opened(blob, ztoc, pinned=False)
    assert streamed(index, blob, cut) == content_of(index, blob)


def test_files_that_a_ztoc_hides() -> None:
    blob, ztoc = made(files={"a": b"a" * 100, "b": b"b" * 9000})
    for counted in (1024, 1536):
        index = opened(blob, replace(ztoc, uncompressed=counted, **ONE).write(), pinned=False)
        with pytest.raises(MalformedError, match="goes on"):
            streamed(index, blob)
    index = opened(blob, replace(ztoc, uncompressed=20_480).write(), pinned=False)
    with pytest.raises(MalformedError, match="8192 bytes before"):
        streamed(index, blob)


def test_a_span_goes_from_its_first_bit_to_the_next_ones_first_byte() -> None:
    blob, ztoc = sample()
    index = opened(blob, ztoc, pinned=True)
    digests = read_ztoc(ztoc).span_digests
    assert [tuple(index.chunks.blob_range(number)) for number in range(3)] == [
        (20, 15513),  # behind a gzip header that holds a name
        (15512, 17990),  # six bits of the first block are in the byte before
        (17989, len(blob)),  # with the trailer
    ]
    for number in range(3):
        start, stop = index.chunks.blob_range(number)
        promised = digests[number * 32 : number * 32 + 32]
        assert hashlib.sha256(blob[start:stop]).digest() == promised


def test_windows_are_views_of_the_ztoc() -> None:
    blob, ztoc = sample()
    plain = gzip.decompress(blob)
    buffer = bytearray(ztoc)
    points = read_checkpoints(read_ztoc(buffer).checkpoints)
    assert len(points.window(0)) == 0
    for index, start in enumerate(points.content_starts):
        window = points.window(index)
        assert window == plain[max(0, start - 32768) : start]
        assert window.obj is buffer


def test_bytes_that_do_not_match_their_span_are_refused() -> None:
    blob, ztoc = sample()
    chunks = opened(blob, ztoc, pinned=False).chunks
    for number in range(len(chunks)):
        start, stop = chunks.blob_range(number)
        data = bytearray(blob[start:stop])
        data[-1] ^= 1
        with pytest.raises(IntegrityError):
            list(chunks.decode(number, data))


# --- what is written here ----------------------------------------------------------------------

FILES = {"checkpoint/": b"", "checkpoint/pages-1.img": random.Random(2).randbytes(9000)}


def made(
    header_bytes: int = 10, *, left_out: int = 0, files: dict[str, bytes] | None = None
) -> tuple[bytes, Ztoc]:
    """Return a gzip layer of two stored blocks, entered at both, and its zTOC."""
    plain = tar_bytes(files or FILES)[:12288]
    half = len(plain) // 2
    packer = zlib.compressobj(0, zlib.DEFLATED, -15)
    first = packer.compress(plain[:half]) + packer.flush(zlib.Z_FULL_FLUSH)
    body = first + packer.compress(plain[half:]) + packer.flush()
    name = bytes([8]) + b"\0" * 5 + b"\xff" + b"n" * (header_bytes - 11) + b"\0"
    header = b"\x1f\x8b\x08" + (name if header_bytes > 10 else bytes(6) + b"\xff")
    blob = header + body + struct.pack("<II", zlib.crc32(plain), len(plain))
    assert gzip.decompress(blob) == plain
    points = [
        Point(header_bytes, 0),
        Point(header_bytes + len(first), half, window=plain[max(0, half - 32768) : half]),
    ]
    if left_out:
        points[0] = Point(10, 0)
    return blob, Ztoc(
        compressed=len(blob),
        uncompressed=len(plain),
        files=[File("checkpoint/", 512, type="dir"), File("checkpoint/pages-1.img", 1024, 9000)],
        digests=span_digests(blob, points),
        checkpoints=checkpoints(points, left_out=left_out),
    )


ONE: dict[str, Any] = {
    "checkpoints": checkpoints([Point(10, 0)]),
    "digests": ["sha256:" + "0" * 64],
}


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("pinned", [True, False])
def test_both_versions_of_checkpoints(left_out: int, pinned: bool) -> None:
    blob, ztoc = made(left_out=left_out)
    index = opened(blob, ztoc.write(), pinned=pinned)
    content = content_of(index, blob)
    assert content == gzip.decompress(blob)
    assert [entry.path for entry in walked(index, content)] == [
        "checkpoint",
        "checkpoint/pages-1.img",
    ]


def test_the_old_version_of_a_layer_whose_header_is_longer() -> None:
    # That soci took every header to be 10 bytes long; such an index never worked.
    blob, ztoc = made(20, left_out=1)
    for head in (blob, b"", b"\x1f"):
        with pytest.raises(UnsupportedLayer, match="10 bytes"):
            open_soci(described(blob), ztoc.write(), pinned=True, head=head)


@pytest.mark.parametrize("head", [b"\x1f", b"\x1f\x8b\x08" + bytes(100), b"n" * 65536])
def test_an_index_that_does_not_fit_the_layers_beginning(head: bytes) -> None:
    blob, ztoc = made()
    with pytest.raises(MalformedError, match="no tar begins"):
        open_soci(described(blob), ztoc.write(), pinned=True, head=head)
    open_soci(described(blob), ztoc.write(), pinned=True)  # nothing to compare with


def test_an_index_of_another_layer() -> None:
    blob, ztoc = made()
    with pytest.raises(MalformedError, match="made for another layer"):
        opened(blob + b"\0", ztoc.write(), pinned=True)
    other, _ = made(files={"a": random.Random(3).randbytes(9000)})
    assert len(other) == len(blob)
    index = opened(other, ztoc.write(), pinned=False)
    with pytest.raises(IntegrityError):
        content_of(index, other)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"algorithm": 2}, UnsupportedLayer, "uncompressed"),
        ({"algorithm": 3}, UnsupportedLayer, "compression 3"),
        ({"algorithm": -1}, UnsupportedLayer, "compression -1"),
        ({"version": "2.0"}, UnsupportedLayer, "version"),
        ({"version": ""}, UnsupportedLayer, "version"),
        ({"version": "0.9\n"}, UnsupportedLayer, "version"),
        ({"version": "0." + "9" * 300}, MalformedError, "string of 302"),
        ({"max_span_id": 0}, MalformedError, "2 checkpoints for 1 spans"),
        ({"max_span_id": -5}, MalformedError, "spans"),
        ({"digests": ()}, MalformedError, "0 spans"),
        ({"digests": (), "max_span_id": 1}, MalformedError, "not whole"),
        ({"digests": ["sha512:" + "0" * 128] * 2}, MalformedError, "sha512"),
        ({"digests": ["sha256:" + "0" * 63] * 2}, MalformedError, "not a digest"),
        ({"digests": ["\xff" * 71] * 2}, MalformedError, "not a digest"),
        ({"checkpoints": b""}, MalformedError, "no checkpoints"),
        ({"checkpoints": checkpoints([], count=2)}, MalformedError, "2 checkpoints"),
        ({"checkpoints": checkpoints([], count=0)}, MalformedError, "0 checkpoints"),
        ({"checkpoints": checkpoints([], count=-1)}, MalformedError, "-1 checkpoints"),
        ({"uncompressed": 0}, MalformedError, "hold"),
        ({"uncompressed": -1}, MalformedError, "hold"),
        ({"uncompressed": 2**62}, MalformedError, "hold"),
        ({"compressed": -1}, MalformedError, "another layer"),
        ({"no_compression_info": True}, MalformedError, "compression"),
    ],
)
def test_indexes_that_cannot_be(
    change: dict[str, object], error: type[Exception], match: str
) -> None:
    blob, ztoc = made()
    for pinned in (True, False):
        with pytest.raises(error, match=match):
            opened(blob, replace(ztoc, **change).write(), pinned=pinned)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "points",
    [
        [Point(9, 0), Point(6000, 6144)],
        [Point(10, 1), Point(6000, 6144)],
        [Point(10, 0, bits=3), Point(6000, 6144)],
        [Point(10, 0), Point(6000, 6144, bits=8)],
        [Point(10, 0), Point(-1, 6144)],
        [Point(10, 0), Point(6000, -6144)],
        [Point(10, 0), Point(10, 6144)],
        [Point(10, 0), Point(6000, 0)],
        [Point(10, 0), Point(6000, 12288)],
        [Point(10, 0), Point(2**62, 6144)],
        [Point(6000, 0), Point(10, 6144)],
    ],
)
def test_checkpoints_that_cannot_be(points: list[Point]) -> None:
    blob, ztoc = made()
    with pytest.raises(MalformedError):
        opened(blob, replace(ztoc, checkpoints=checkpoints(points)).write(), pinned=True)


def test_spans_too_large_to_be_fetched_whole() -> None:
    layer = LayerDescriptor(GZIP, None, 2**30, {})
    ztoc = Ztoc(
        compressed=2**30,
        uncompressed=2**30,
        digests=["sha256:" + "0" * 64],
        checkpoints=checkpoints([Point(10, 0)]),
    )
    with pytest.raises(UnsupportedLayer, match="span-size"):
        open_soci(layer, ztoc.write(), pinned=True)


# --- the list of files -------------------------------------------------------------------------


def entries_of(files: list[File] | None, archive_bytes: int = 10_240) -> list[Entry]:
    return read_entries(read_files(Ztoc(files=files).write()), archive_bytes)


def test_entries() -> None:
    files = [
        File("./", 512, type="dir", mode=0o40755),
        File("/a/b\udcff", 1024, 700, mode=0o104600, uid=2**32 - 1, gid=7),
        File("link", 2560, type="symlink", link="/etc/passwd"),
        File("same", 3072, 99, type="hardlink", link="a/b\udcff"),
        File("null", 3584, type="char"),
        File("sda", 4096, type="block"),
        File("empty", 4608, modified=""),
        File("last", 5120, 5120, modified="2023-11-15T00:13:20.000000001+02:00"),
    ]
    root, file, link, same, null, sda, empty, last = entries_of(files)
    assert (root.path, root.type, root.mode) == ("", EntryType.DIRECTORY, 0o755)
    assert (file.path, file.mode, file.uid, file.gid) == ("a/b\udcff", 0o4600, 2**32 - 1, 7)
    assert (file.content_start, file.size_bytes) == (1024, 700)
    assert (link.type, link.symlink_target) == (EntryType.SYMLINK, "/etc/passwd")
    assert (same.link_of, same.content_start, same.size_bytes) == (file.path, 1024, 700)
    assert null.type is sda.type is EntryType.OTHER
    assert (empty.size_bytes, empty.mtime_ns) == (0, 0)
    assert last.mtime_ns == 1_700_000_000_000_000_001
    assert entries_of(None) == entries_of([]) == []


@pytest.mark.parametrize(
    "files",
    [
        [File("a", 0)],
        [File("a", 513)],
        [File("a", -512)],
        [File("a", 512, -1)],
        [File("a", 512, 10_000)],
        [File("a", 512, 2**63 - 1)],
        [File("a", 10_752)],
        [File("a", 512, 1), File("b", 1024)],
        [File("a", 1024), File("b", 512)],
        [File("../a", 512)],
        [File("a\0b", 512)],
        [File("a" * 300, 512)],
        [File("a/" * 3000, 512)],
        [File("a", 512, type="what")],
        [File("a", 512, type="chunk")],
        [File("", 512)],
        [File("a", 512, type="symlink")],
        [File("a", 512, type="hardlink", link="b")],
        [File("a", 512, modified="yesterday")],
        [File("a", 512, modified="2023-99-14T22:13:20Z")],
        [File("a", 512, modified="\xff")],
    ],
)
def test_entries_that_cannot_be(files: list[File]) -> None:
    with pytest.raises(MalformedError):
        entries_of(files)


def test_sparse_files() -> None:
    with pytest.raises(UnsupportedLayer, match="sparse"):
        entries_of([File("a", 512, 10, pax={"path": "a", "GNU.sparse.major": "1"})])


# --- hostile bytes -----------------------------------------------------------------------------


def read_all(blob: bytes, data: bytes) -> None:
    """Read whatever it is: a value, or one of the declared errors."""
    for pinned in (True, False):
        try:
            index = opened(blob, data, pinned=pinned)
        except (MalformedError, UnsupportedLayer):
            continue
        for number in range(len(index.chunks)):
            start, stop = index.chunks.blob_range(number)
            try:
                for piece in index.chunks.decode(number, blob[start:stop]):
                    assert len(piece) <= 2**20
            except IntegrityError:
                continue


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    read_all(b"\x1f\x8b\x08", data)
    with pytest.raises((MalformedError, UnsupportedLayer)):
        open_soci(described(b"\x1f\x8b\x08"), data, pinned=True)


BLOB, ZTOC = made()
SMALL = replace(ZTOC, checkpoints=checkpoints([], count=1)).write()
WHOLE = ZTOC.write()
WORDS = st.sampled_from([0, 1, 2, 4, 8, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 4), WORDS), min_size=1, max_size=4))
def test_any_words_in_a_small_ztoc(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SMALL)
    for at, word in changes:
        struct.pack_into("<I", data, at, word)
    read_all(BLOB, bytes(data))
    for read in (read_ztoc, lambda it: read_entries(read_files(it), 10_240)):
        try:
            read(bytes(data))
        except (MalformedError, UnsupportedLayer):
            continue


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_bytes_in_a_whole_ztoc(data: st.DataObject) -> None:
    changed = bytearray(WHOLE)
    window = WHOLE.index(bytes(2048))
    beside = [*range(window), *range(len(WHOLE) - 600, len(WHOLE))]
    for at in data.draw(st.lists(st.sampled_from(beside), min_size=1, max_size=5)):
        changed[at] = data.draw(st.integers(0, 255))
    read_all(BLOB, bytes(changed))


@given(st.integers(0, len(SMALL) - 1))
def test_a_ztoc_cut_short(size: int) -> None:
    read_all(BLOB, SMALL[:size])


def with_another_list(count: int) -> tuple[bytearray, bytes]:
    """Return a zTOC whose list of files, of so many, is to follow; and a table that it may hold."""
    one = bytearray(Ztoc(files=[File("n" * 200, 512)]).write())

    def pointed(at: int) -> int:
        return at + int(struct.unpack_from("<I", one, at)[0])

    places = range(0, len(one) - 8, 4)
    (old,) = (at for at in places if one[at : at + 4] == b"\1\0\0\0" and 4 < one[at + 4] < 64)
    pointer = next(at for at in places if pointed(at) == old)
    row = pointed(old + 4)
    table = bytes(one[row - 64 : one.index(b"n" * 200) + 220])
    struct.pack_into("<I", one, pointer, len(one) - pointer)
    return one + struct.pack("<I", count), table


def test_strings_that_are_shared_without_end() -> None:
    """A list of a million pointers to one table with a long name: 4 MB that become 4 GB."""
    count = 1_000_000
    data, table = with_another_list(count)
    target = 4 * count + 64
    data += b"".join(struct.pack("<I", target - 4 * index) for index in range(count))
    with pytest.raises(MalformedError, match="again and again"):
        for _ in read_files(data + table):
            pass


def test_more_files_than_any_image_has() -> None:
    data, _ = with_another_list(4_000_001)
    with pytest.raises(MalformedError, match="more than 4000000"):
        next(read_files(data + bytes(4 * 4_000_001)))

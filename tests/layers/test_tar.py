import contextlib
import io
import random
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import LazyfsError, MalformedError, UnsupportedLayer
from lazyfs.layers.model import Entry, EntryType
from lazyfs.layers.tar import looks_like_tar, walk_tar, walk_tar_stream
from lazyfs.layers.tar_header import parse_pax
from tests.images import Files, Member, tar_bytes, tar_layer
from tests.layers.driving import drive, files_of, reader_of

FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


def walked(data: bytes) -> list[Entry]:
    entries: list[Entry] = []
    drive(walk_tar(len(data), entries), reader_of(data))
    return entries


def checksummed(block: bytearray) -> bytes:
    """Put the right checksum into a header that a test has falsified."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header(edit: Callable[[bytearray], None] = lambda block: None, **fields: object) -> bytes:
    """Return a ustar header with `edit` applied and the checksum right."""
    info = tarfile.TarInfo("file")
    for key, value in fields.items():
        setattr(info, key, value)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    edit(block)
    return checksummed(block)


def put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def edit(block: bytearray) -> None:
        block[at : at + len(value)] = value

    return edit


# --- against tarfile ---------------------------------------------------------------------------

component = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda text: text not in (".", "..") and len(text.encode()) <= 200)
paths = st.lists(component, min_size=1, max_size=4).map("/".join)


@st.composite
def archives(draw: st.DrawFn) -> tuple[int, list[Member]]:
    tar_format = draw(st.sampled_from(FORMATS))
    ustar = tar_format == tarfile.USTAR_FORMAT
    owner = st.integers(0, 8**7 - 1 if ustar else 2**32 - 1)
    eighths = st.integers(0, 2**35).map(lambda value: value / 8)
    mtime = eighths if tar_format == tarfile.PAX_FORMAT else st.integers(0, 2**33 - 1)
    rows: list[Member] = []
    for path in draw(st.lists(paths, unique=True, max_size=6)):
        kind = draw(
            st.sampled_from(
                (b"0", b"0", tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"6", b"3")
            )
        )
        files = [row.name for row in rows if row.type == tarfile.REGTYPE]
        link = ""
        if kind == tarfile.LNKTYPE:
            if not files:
                continue
            link = draw(st.sampled_from(files))
        elif kind == tarfile.SYMTYPE:
            link = draw(paths)
        rows.append(
            Member(
                path,
                draw(st.binary(max_size=20)) * 60 if kind == tarfile.REGTYPE else b"",
                type=kind,
                link=link,
                mode=draw(st.integers(0, 0o7777)),
                uid=draw(owner),
                gid=draw(owner),
                mtime=draw(mtime),
            )
        )
    kept: list[Member] = []
    for row in rows:
        try:
            tar_bytes([*kept, row], tar_format)
        except ValueError:  # a name that ustar cannot hold
            continue
        if row.type != tarfile.LNKTYPE or any(row.link == other.name for other in kept):
            kept.append(row)
    return tar_format, kept


KINDS = {
    tarfile.REGTYPE: EntryType.FILE,
    tarfile.LNKTYPE: EntryType.FILE,
    tarfile.DIRTYPE: EntryType.DIRECTORY,
    tarfile.SYMTYPE: EntryType.SYMLINK,
    tarfile.FIFOTYPE: EntryType.FIFO,
    tarfile.CHRTYPE: EntryType.OTHER,
}


@settings(deadline=None)
@given(archives())
def test_the_walk_sees_what_tarfile_sees(made: tuple[int, list[Member]]) -> None:
    tar_format, rows = made
    data = tar_bytes(rows, tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        theirs = archive.getmembers()
        ours = walked(data)
        assert [entry.path for entry in ours] == [info.name for info in theirs]
        for entry, info in zip(ours, theirs, strict=True):
            assert entry.type is KINDS[info.type]
            if info.issym():
                assert entry.symlink_target == info.linkname
            if info.islnk():
                first = next(item for item in ours if item.path == info.linkname)
                assert (entry.content_start, entry.size_bytes) == (
                    first.content_start,
                    first.size_bytes,
                )
                assert entry.link_of == first.path
                continue
            assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
            assert abs(entry.mtime_ns - int(info.mtime * 10**9)) <= 1000
            if info.isreg():
                assert (entry.content_start, entry.size_bytes) == (info.offset_data, info.size)


@pytest.mark.parametrize("tar_format", FORMATS)
def test_files_read_back(tar_format: int) -> None:
    files = {
        "checkpoint/": b"",
        "checkpoint/a": b"x",
        "empty": b"",
        "big": bytes(range(256)) * 3000,
    }
    read = files_of(tar_layer(files, tar_format))
    assert read == {name: data for name, data in files.items() if not name.endswith("/")}


def test_long_names_and_links_in_both_dialects() -> None:
    name, target = "/".join(["ü" * 100] * 10), "t" * 300
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        files = [Member(name, b"x"), Member("s" * 200, type=tarfile.SYMTYPE, link=target)]
        first, second = walked(tar_bytes(files, tar_format))
        assert first.path == name
        assert (second.path, second.symlink_target) == ("s" * 200, target)


# --- what tarfile does not write --------------------------------------------------------------


def test_old_and_odd_headers() -> None:
    v7_file = header(put(257, bytes(8)), type=tarfile.AREGTYPE, name="old", mtime=5)
    v7_directory = header(put(257, bytes(8)), type=tarfile.AREGTYPE, name="dir/")
    contiguous = header(type=tarfile.CONTTYPE, name="contiguous", size=3)
    star = header(
        lambda block: (
            block.__setitem__(slice(345, 351), b"prefix"),
            block.__setitem__(slice(476, 488), b"00000000001 "),
            block.__setitem__(slice(508, 512), b"tar\0"),
        )[0],
        name="star",
    )
    old, directory, odd, starry = walked(
        v7_file + v7_directory + contiguous + b"abc".ljust(512, b"\0") + star
    )
    assert (old.path, old.type, old.mtime_ns) == ("old", EntryType.FILE, 5 * 10**9)
    assert (directory.path, directory.type) == ("dir", EntryType.DIRECTORY)
    assert (odd.type, odd.size_bytes) == (EntryType.FILE, 3)
    assert starry.path == "prefix/star"


def test_base_256_numbers_and_signed_checksums() -> None:
    def edit(block: bytearray) -> None:
        block[108:116] = b"\x80" + (2**32 - 2).to_bytes(7, "big")
        block[136:148] = b"\xff" * 12

    (entry,) = walked(header(edit))
    assert (entry.uid, entry.mtime_ns) == (2**32 - 2, -(10**9))
    block = bytearray(header(put(0, b"\xe9t\xe9")))
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + block[156:]) + 256
    block[148:156] = b"%06o\0 " % signed
    (entry,) = walked(bytes(block))
    assert entry.path.encode("utf-8", "surrogateescape") == b"\xe9t\xe9e"


def test_a_gzip_file_is_no_tar_by_the_luck_of_its_date() -> None:
    """Mostly zeros, and its signed bytes add up to what no checksum at all would be."""
    head = bytes.fromhex("1f8b0800ffffff7f0203").ljust(512, b"\0")
    for filler in range(256):
        block = head[:20] + bytes([0x80, filler]) + head[22:]
        block = block[:22] + bytes([(-sum(_signed(block)) - 256) % 256]) + block[23:]
        assert not looks_like_tar(block)


def _signed(block: bytes) -> list[int]:
    return [byte - 256 if byte > 127 else byte for byte in block]


def test_pax_records_override_and_globals_last() -> None:
    def pax(kind: bytes, records: dict[str, str]) -> bytes:
        body = b"".join(record(key, value) for key, value in records.items())
        return header(type=kind, size=len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")

    first, second, third = walked(
        pax(b"g", {"uid": "7", "mtime": "1.5"})
        + header(name="a")
        + pax(b"x", {"uid": "8", "path": "./b", "mtime": "-0.25", "size": "512", "comment": ""})
        + header(name="z")
        + b"x" * 512
        + pax(b"x", {"uid": "", "gid": "9"})
        + header(name="c", uid=3)
    )
    assert (first.path, first.uid, first.mtime_ns) == ("a", 7, 1_500_000_000)
    assert (second.path, second.uid, second.mtime_ns, second.size_bytes) == (
        "b",
        8,
        -250_000_000,
        512,
    )
    assert (third.uid, third.gid) == (3, 9)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    size = len(body)
    while len(str(size)) + len(body) != size:
        size = len(str(size)) + len(body)
    return b"%d%b" % (size, body)


@pytest.mark.parametrize(
    "data",
    b"x|5 a=b|6 a=b |06 a=\n6|-6 a=b\n|5 ab\n|5 =b\n|99 a=b\n|0 |6a=b\n|6 a=b\n\0| a=b\n".split(
        b"|"
    ),
)
def test_bad_pax_records_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_pax(data, 0)


def test_a_hard_link_shares_the_bytes_of_the_first() -> None:
    link = tarfile.LNKTYPE
    files: Files = [
        Member("a", b"data", mode=0o600, uid=5, mtime=9),
        Member("./b", type=link, link="./a"),
        Member("c", type=link, link="b"),
        Member("s", type=tarfile.SYMTYPE, link="x"),
        Member("t", type=link, link="s"),
    ]
    a, b, c, s, t = walked(tar_bytes(files))
    assert b.content_start == c.content_start == a.content_start
    assert (b.link_of, c.link_of, a.link_of) == ("a", "a", "")
    assert (c.size_bytes, c.mode, c.uid, c.mtime_ns) == (4, 0o600, 5, 9 * 10**9)
    assert (t.type, t.symlink_target) == (EntryType.SYMLINK, s.symlink_target)


@pytest.mark.parametrize(
    "files",
    [
        [Member("b", type=tarfile.LNKTYPE, link="a")],
        [Member("b", type=tarfile.LNKTYPE, link="b")],
        [Member("b", type=tarfile.LNKTYPE, link="a"), Member("a")],
        [Member("d", type=tarfile.DIRTYPE), Member("b", type=tarfile.LNKTYPE, link="d")],
        [Member("../a")],
        [Member("a"), Member("b", type=tarfile.LNKTYPE, link="../a")],
        [Member("./")],
        [Member("a//b")],
        [Member("s", type=tarfile.SYMTYPE)],
        [Member("n" * 256)],
    ],
)
def test_links_and_names_that_cannot_be_are_refused(files: list[Member]) -> None:
    with pytest.raises(MalformedError):
        walked(tar_bytes(files))


def test_duplicates_are_all_told() -> None:
    assert [entry.size_bytes for entry in walked(tar_bytes([Member("a", b"1"), Member("a")]))] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    "data",
    [
        header(type=b"S"),
        header(type=b"M"),
        tar_bytes([Member("a", pax={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})]),
        tar_bytes([Member("a", pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})]),
    ],
)
def test_what_is_not_read_is_said(data: bytes) -> None:
    with pytest.raises(UnsupportedLayer):
        walked(data)


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 512,
        header()[:-1] + b"x",
        header()[:200],
        header(size=1),
        header(put(124, b"\xff" * 12)),
        header(put(124, b"0000000008\0 ")),
        header(put(108, b"\xff" * 8)),
        header(put(136, b"\x80" + b"\x7f" * 11)),
        header(type=b"L", size=2**21) + bytes(2**21) + header(),
        header(type=b"x", size=100) + bytes(512),
        header(type=b"L"),
        header(type=b"x"),
        header(type=b"L", size=10) + b"long".ljust(512, b"\0"),
        header(type=b"L", size=10) + b"long".ljust(512, b"\0") + bytes(1024),
        header() + bytes(512) + header(),
        header(put(345, b"..")),
    ],
)
def test_malformed_archives_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        walked(data)


def test_every_truncation_is_an_end_or_an_error() -> None:
    data = tar_bytes({"a": b"x" * 700, "b" * 150: b"y", "c": b""})
    whole = walked(data)
    for size in range(0, len(data), 100):
        try:
            assert whole[: len(entries := walked(data[:size]))] == entries
        except MalformedError as err:
            assert "truncated" in str(err)
    assert walked(b"") == walked(bytes(512)) == walked(bytes(1024)) == []


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_arbitrary_bytes_give_entries_or_a_declared_error(data: bytes) -> None:
    outcome(data)


@settings(deadline=None)
@given(st.data(), st.sampled_from(FORMATS), st.booleans())
def test_mutated_archives_give_entries_or_a_declared_error(
    draw: st.DataObject, tar_format: int, fix_checksums: bool
) -> None:
    files = [
        Member("d", type=tarfile.DIRTYPE),
        Member("d/file", b"data" * 200, mtime=1.5 if tar_format == tarfile.PAX_FORMAT else 1),
        Member("d/link", type=tarfile.LNKTYPE, link="d/file"),
        Member("s", type=tarfile.SYMTYPE, link="t" * 90),
    ]
    if tar_format != tarfile.USTAR_FORMAT:
        files.append(Member("long" * 50, b"tail"))
    data = bytearray(tar_bytes(files, tar_format).rstrip(b"\0"))
    data += bytes(-len(data) % 512)
    for _ in range(draw.draw(st.integers(1, 6))):
        block = 512 * draw.draw(st.integers(0, len(data) // 512 - 1))
        at = block + draw.draw(st.sampled_from(range(512)) | st.integers(100, 160))
        new = draw.draw(st.binary(min_size=1, max_size=12))
        data[at : at + len(new)] = new
        if fix_checksums:
            data[block : block + 512] = checksummed(data[block : block + 512])
    outcome(bytes(data))


def outcome(data: bytes) -> None:
    try:
        entries = walked(data)
    except (MalformedError, UnsupportedLayer) as err:
        assert isinstance(err, LazyfsError)
        return
    for entry in entries:
        assert 0 <= entry.content_start <= entry.content_start + entry.size_bytes <= len(data)


# --- a tar that comes as a stream --------------------------------------------------------------


def walked_as_stream(data: bytes, spare: random.Random) -> list[Entry]:
    """Walk without knowing the size: replies are longer as it happens, and shorter at the end."""
    entries: list[Entry] = []
    position = 0
    walk = walk_tar_stream(entries)
    try:
        (wanted,) = next(walk)
        while True:
            assert wanted.start >= position, "it never looks back"
            position = wanted.start
            stop = wanted.stop + spare.choice((0, 0, 100, 5000))
            (wanted,) = walk.send([data[wanted.start : stop]])
    except StopIteration:
        return entries


@settings(deadline=None)
@given(archives(), st.integers(0, 99))
def test_a_stream_has_the_same_entries(made: tuple[int, list[Member]], seed: int) -> None:
    tar_format, rows = made
    data = tar_bytes(rows, tar_format)
    assert walked_as_stream(data, random.Random(seed)) == walked(data)


def test_a_stream_may_end_without_the_zero_blocks() -> None:
    data = tar_bytes([Member("a", b"1" * 512)])[:1024]
    assert [entry.path for entry in walked_as_stream(data, random.Random(1))] == ["a"]


@pytest.mark.parametrize("size", [1, 511, 513])
def test_a_stream_cut_off_in_a_header_is_refused(size: int) -> None:
    data = tar_bytes([Member("a", b""), Member("b", b"")])[:size]
    with pytest.raises(MalformedError):
        walked_as_stream(data, random.Random(1))


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 99))
def test_a_hostile_stream_gives_entries_or_the_error(data: bytes, seed: int) -> None:
    start = tar_bytes([Member("a", b"1")])[:1024]
    with contextlib.suppress(MalformedError, UnsupportedLayer):
        walked_as_stream(start + data, random.Random(seed))


@pytest.mark.parametrize("size", [2**44 + 1, 2**62, 2**70])
def test_sizes_beyond_all_memory_are_refused(size: int) -> None:
    data = header(put(124, b"\x80" + size.to_bytes(11, "big"))) + bytes(1024)
    for walk in (walked, lambda data: walked_as_stream(data, random.Random(1))):
        with pytest.raises(MalformedError):
            walk(data)

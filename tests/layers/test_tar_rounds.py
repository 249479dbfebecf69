"""How few round trips the walk needs, over archives that are too large to be made."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import Entry
from lazyfs.layers.pagemap_hint import PagesHint, read_pagemap
from lazyfs.layers.tar import walk_tar
from tests.layers.driving import drive

KIB, MIB, GIB = 2**10, 2**20, 2**30


class SparseTar:
    """A tar of which only headers and small files are held; large files read as zeros."""

    def __init__(self, *, gnu: bool = False) -> None:
        self._gnu = gnu
        self._parts: list[tuple[int, bytes]] = []
        self.size = 0

    def add(self, name: str, data: bytes | int, **fields: float) -> None:
        info = tarfile.TarInfo(name)
        info.size = data if isinstance(data, int) else len(data)
        info.mtime = fields.get("mtime", 0)
        header = info.tobuf(tarfile.GNU_FORMAT if self._gnu else tarfile.PAX_FORMAT)
        self._parts.append((self.size, header + (b"" if isinstance(data, int) else data)))
        self.size += len(header) + -(-info.size // 512) * 512

    def end(self) -> None:
        self.size += -(-(self.size + 1024) // 10240) * 10240 - self.size

    def read(self, item: ByteRange) -> bytes:
        assert 0 <= item.start < item.stop <= self.size
        assert item.size_bytes <= 4 * MIB
        out = bytearray(item.size_bytes)
        for at, part in self._parts:
            low, high = max(at, item.start), min(at + len(part), item.stop)
            if low < high:
                out[low - item.start : high - item.start] = part[low - at : high - at]
        return bytes(out)

    def walk(self) -> tuple[list[Entry], list[list[ByteRange]]]:
        rounds: list[list[ByteRange]] = []
        entries: list[Entry] = []
        drive(walk_tar(self.size, entries), self.read, rounds)
        return entries, rounds


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(fields: list[tuple[int, int]]) -> bytes:
    body = b"".join(varint(number << 3) + varint(value) for number, value in fields)
    return len(body).to_bytes(4, "little") + body


def pagemap(pages_id: int, runs: list[int], *, old: bool = False) -> bytes:
    """Make a pagemap whose runs of pages are present, with runs that are not in between."""
    out = io.BytesIO()
    out.write((0x54564319).to_bytes(4, "little") + (0x56084025).to_bytes(4, "little"))
    out.write(message([(1, pages_id)]))
    for index, pages in enumerate(runs):
        address = 0x7F00_0000_0000 + index * 2**32
        if old:
            out.write(message([(1, address), (2, pages)]))
            out.write(message([(1, address), (2, 9), (3, 1)]))
        else:
            flags = 4 | 2 * (index % 2)
            out.write(message([(1, address), (2, pages & 0xFFFFFFFF), (4, flags), (5, pages)]))
            out.write(message([(1, address), (2, 9), (4, 1), (5, 9)]))
    return out.getvalue()


def checkpoint(
    count: int, *, pagemaps: bool = True, error_every: int = 0, metadata_bytes: int = 700
) -> SparseTar:
    """Make an archive as Podman does: names sorted, `count` processes of mixed sizes."""
    files: dict[str, bytes | int] = {}
    for pid in range(1, count + 1):
        files[f"checkpoint/core-{pid}.img"] = b"c" * metadata_bytes
        files[f"checkpoint/mm-{pid}.img"] = b"m" * metadata_bytes
        runs = [1 + pid * 37 % 50, pid * 7919 % 3000, 256 * (pid % 5)]
        size = sum(runs) * 4096
        if error_every and pid % error_every == 0:
            size = size // 8192 * 4096 + 123
        if pagemaps:
            files[f"checkpoint/pagemap-{pid + 9000}.img"] = pagemap(pid, runs)
        files[f"checkpoint/pages-{pid}.img"] = size
    files["checkpoint/pstree.img"] = b"p" * 400
    files["config.dump"] = b"{}"
    archive = SparseTar()
    for name in sorted(files):
        archive.add(name, files[name], mtime=1.5)
    archive.end()
    return archive


def names(archive: SparseTar) -> list[str]:
    return [entry.path for entry in archive.walk()[0]]


def test_one_process_takes_two_round_trips() -> None:
    entries, rounds = checkpoint(1).walk()
    assert len(entries) == 6
    assert len(rounds) == 2


def test_a_hundred_pages_files_take_few_round_trips() -> None:
    archive = checkpoint(100)
    assert archive.size > 500 * MIB
    entries, rounds = archive.walk()
    assert len(entries) == 402
    assert len(rounds) <= 4
    assert sum(item.size_bytes for items in rounds for item in items) < 4 * MIB


def test_without_pagemaps_each_large_file_takes_one() -> None:
    archive = checkpoint(100, pagemaps=False)
    assert len(archive.walk()[1]) <= 102
    assert len(names(archive)) == 302


def test_much_metadata_is_read_in_growing_blocks() -> None:
    """Some 4 MB of small files in front of the pages."""
    entries, rounds = checkpoint(100, metadata_bytes=20_000).walk()
    assert len(entries) == 402
    assert len(rounds) <= 8


@pytest.mark.parametrize("error_every", [1, 2, 7])
def test_wrong_predictions_cost_requests_only(error_every: int) -> None:
    """As with compressed pages: sizes are not what pagemaps say."""
    archive = checkpoint(30, error_every=error_every)
    entries, rounds = archive.walk()
    assert len(entries) == 122
    assert len(rounds) <= 34
    assert sum(len(items) for items in rounds) <= 30 * 5


def test_sizes_beyond_any_disk() -> None:
    archive = SparseTar(gnu=True)
    for name in ("a", "b", "c"):
        archive.add(name, 3 * 2**40 + 1)
    entries, rounds = archive.walk()
    assert [entry.size_bytes for entry in entries] == [3 * 2**40 + 1] * 3
    assert entries[2].content_start == 2 * (3 * 2**40 + 512) + 3 * 512
    assert len(rounds) == 3


def test_each_directory_is_predicted_for_itself() -> None:
    """As in a chain of pre-dumps; an empty pagemap among them tells nothing."""
    archive = SparseTar()
    for directory in ("a/", "b/", "c/", "d/", ""):
        for pid in range(20):
            data = b"" if pid == 7 else pagemap(pid, [500 + pid])
            archive.add(f"{directory}pagemap-{pid}.img", data)
        for name in sorted(f"pages-{pid}.img" for pid in range(20) if pid != 7):
            archive.add(directory + name, 4096 * (500 + int(name[6:-4])))
    entries, rounds = archive.walk()
    assert len(entries) == 5 * 39
    assert len(rounds) <= 5 * 3


def test_a_range_never_leaves_the_archive() -> None:
    for count in (1, 3, 5):
        archive = checkpoint(count)
        archive.size -= 1024  # ends without its zero blocks
        assert len(names(archive)) == 4 * count + 2


def test_pagemaps_are_read() -> None:
    runs = [1, 2**20, 300]
    assert read_pagemap(pagemap(7, runs)) == PagesHint(7, sum(runs) * 4096)
    assert read_pagemap(pagemap(2**31, runs, old=True)) == PagesHint(2**31, sum(runs) * 4096)
    assert read_pagemap(pagemap(1, [])) == PagesHint(1, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pagemap(1, [5])[:-1],
        pagemap(1, [5]) + b"\0",
        pagemap(1, [5])[4:],
        pagemap(1, [])[:8] + message([(2, 1)]),
        pagemap(1, []) + message([(1, 1)]),
        pagemap(1, []) + b"\x02\0\0\0\x0a\x00",
        pagemap(1, []) + b"\x0c\0\0\0\x08" + b"\xff" * 11,
        pagemap(1, []) + b"\xff\xff\xff\xff",
    ],
)
def test_other_pagemaps_give_no_hint(data: bytes) -> None:
    assert read_pagemap(data) is None


@settings(deadline=None)
@given(st.binary(max_size=100), st.booleans())
def test_any_bytes_give_a_hint_or_none(data: bytes, framed: bool) -> None:
    hint = read_pagemap(pagemap(1, [3]) + data if framed else data)
    assert hint is None or hint.size_bytes >= 0


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_varints_of_every_size(pages: int, pages_id: int) -> None:
    assert read_pagemap(pagemap(pages_id, [pages])) == PagesHint(pages_id, pages * 4096)

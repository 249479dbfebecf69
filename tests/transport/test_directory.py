"""Directories: an image of skopeo's, and an unpacked checkpoint as the tar it would make."""

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.directory import DirectorySource, UnpackedDirectory, holds_image
from lazyfs.transport.source import ImageSource
from tests.transport.gather import Gather, read

DATA = random.Random(4).randbytes(1_000_000)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    directory = tmp_path / "unpacked"
    (directory / "checkpoint/deep").mkdir(parents=True)
    (directory / "checkpoint/pages-1.img").write_bytes(DATA)
    (directory / "checkpoint/inventory.img").write_bytes(b"inventory")
    (directory / "checkpoint/empty").touch()
    (directory / "checkpoint/deep" / ("n" * 200)).write_bytes(b"x" * 512)
    (directory / "checkpoint/parent").symlink_to("../pre-checkpoint")
    (directory / "config.dump").write_text("{}")
    os.mkfifo(directory / "fifo")
    (directory / b"\xff.dump".decode("utf-8", "surrogateescape")).write_bytes(b"y")
    return directory


@pytest.fixture
def blob(unpacked: Path) -> Iterator[UnpackedDirectory]:
    blob = UnpackedDirectory(unpacked)
    yield blob
    blob.close()


def names(data: bytes) -> dict[str, bytes | str | None]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {
            member.name: file.read()
            if member.isreg() and (file := tar.extractfile(member))
            else member.linkname
            for member in tar
        }


def test_unpacked(unpacked: Path, blob: UnpackedDirectory) -> None:
    assert blob.name == str(unpacked)
    data = read(blob, 0, blob.size_bytes)
    assert len(data) == blob.size_bytes
    assert len(data) % 512 == 0
    assert names(data) == {
        "checkpoint": "",
        "checkpoint/deep": "",
        "checkpoint/deep/" + "n" * 200: b"x" * 512,
        "checkpoint/empty": b"",
        "checkpoint/inventory.img": b"inventory",
        "checkpoint/pages-1.img": DATA,
        "checkpoint/parent": "../pre-checkpoint",
        "config.dump": b"{}",
        "fifo": "",
        "\udcff.dump": b"y",
    }
    status = (unpacked / "config.dump").stat()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmember("config.dump")
    assert (member.mode, member.uid, member.gid) == (
        status.st_mode & 0o7777,
        os.getuid(),
        os.getgid(),
    )
    assert member.mtime == int(status.st_mtime)


@given(st.randoms())
def test_any_range_of_it(tmp_path_factory: pytest.TempPathFactory, rng: random.Random) -> None:
    directory = tmp_path_factory.getbasetemp() / "ranges"
    if not directory.exists():
        directory.mkdir()
        for number, size in enumerate((0, 1, 511, 512, 513, 5000, 300_000)):
            (directory / f"{number}").write_bytes(DATA[number : number + size])
    blob = UnpackedDirectory(directory)
    whole = read(blob, 0, blob.size_bytes)
    for _ in range(20):
        start = rng.randrange(len(whole) + 1)
        stop = rng.randrange(start, len(whole) + 1)
        sink = Gather(rng.choice([1000, 100_000]))
        blob.read_into(ByteRange(start, stop), sink)
        assert sink.data == whole[start:stop]
    blob.close()


def test_it_is_bounded(unpacked: Path, blob: UnpackedDirectory) -> None:
    for start, stop in ((0, blob.size_bytes + 1), (-1, 1), (2, 1)):
        with pytest.raises(SourceError, match="asked for"):
            read(blob, start, stop)
    blob.close()
    blob.close()
    with pytest.raises(SourceError, match="closed"):
        read(blob, 0, blob.size_bytes)


@pytest.mark.parametrize("change", ["append", "touch", "replace", "remove", "symlink", "directory"])
def test_what_changes_is_an_error(unpacked: Path, blob: UnpackedDirectory, change: str) -> None:
    path = unpacked / "checkpoint/pages-1.img"
    if change == "append":
        path.write_bytes(DATA + b"x")
    elif change == "touch":
        os.utime(path, ns=(0, 1))
    elif change == "replace":
        status = path.stat()
        path.rename(unpacked / "old")
        path.write_bytes(DATA)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "remove":
        path.unlink()
    elif change == "symlink":
        path.rename(unpacked / "elsewhere")
        path.symlink_to("../elsewhere")
    else:
        (unpacked / "checkpoint").rename(unpacked / "elsewhere")
        (unpacked / "checkpoint").symlink_to("elsewhere")
    with pytest.raises((IntegrityError, SourceError), match=r"pages-1\.img|inventory\.img|n{200}"):
        read(blob, 0, blob.size_bytes)


def test_a_file_that_is_written_to_while_it_is_read(
    unpacked: Path, blob: UnpackedDirectory
) -> None:
    path = unpacked / "checkpoint/pages-1.img"
    start = read(blob, 0, blob.size_bytes).index(DATA[:1000])
    sink = Gather(
        100_000, on_advance=lambda size: os.utime(path, ns=(0, 1)) if size == 100_000 else None
    )
    with pytest.raises(IntegrityError, match="written to"):
        blob.read_into(ByteRange(start, start + len(DATA)), sink)
    assert sink.data == DATA[: len(sink.data)]


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(SourceError, match="cannot be opened"):
            UnpackedDirectory(tmp_path / name)
        with pytest.raises(SourceError, match="cannot be opened"):
            DirectorySource(tmp_path / name, counters=Counters())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    directory = tmp_path / "copied"
    directory.mkdir()
    (directory / "version").write_text("Directory Transport Version: 1.1\n")
    inner = json.dumps({"inner": 1}).encode()
    (directory / f"{Digest.of(inner).hex}.manifest.json").write_bytes(inner)
    (directory / "manifest.json").write_text('{"an": "index"}')
    (directory / Digest.of(DATA).hex).write_bytes(DATA)
    return directory


def test_copied_by_skopeo(copied: Path) -> None:
    assert holds_image(copied)
    assert not holds_image(copied.parent)
    source: ImageSource = DirectorySource(copied, counters=Counters())
    assert source.name == f"dir:{copied}"
    top = b'{"an": "index"}'
    sha512 = Digest("sha512", hashlib.sha512(top).hexdigest())
    for reference in (None, str(Digest.of(top)), str(sha512)):
        manifest = source.manifest(reference)
        assert (manifest.data, manifest.media_type) == (top, "")
    assert source.manifest(str(sha512)).digest == sha512
    inner = b'{"inner": 1}'
    assert source.manifest(str(Digest.of(inner))).data == inner
    blob = source.blob(Digest.of(DATA), len(DATA))
    assert read(blob, 10, 999) == DATA[10:999]
    assert source.read_blob(Digest.of(DATA), len(DATA)) == DATA
    assert source.referrers(Digest.of(top), "application/x") == []
    with pytest.raises(SourceError, match="cannot be opened"):
        source.manifest(str(Digest.of(b"none")))
    with pytest.raises(SourceError, match="cannot be opened"):
        source.blob(Digest.of(b"none"), 0)
    source.close()
    source.close()
    with pytest.raises(SourceError, match="closed"):
        source.manifest(None)
    with pytest.raises(SourceError, match="closed"):
        read(blob, 0, 1)


def test_copied_whose_bytes_lie(copied: Path) -> None:
    source = DirectorySource(copied, counters=Counters())
    digest = Digest.of(DATA)
    (copied / digest.hex).write_bytes(b"other")
    (copied / f"{digest.hex}.manifest.json").write_bytes(b"other")
    for attempt in (
        lambda: source.manifest(str(digest)),
        lambda: source.read_blob(digest, 5),
        lambda: source.blob(digest, 6),
    ):
        with pytest.raises(IntegrityError):
            attempt()
    with pytest.raises(MalformedError):
        source.read_blob(digest, 1 << 40)
    with pytest.raises(MalformedError):
        source.manifest("v1")
    (copied / "manifest.json").write_bytes(b" " * 5_000_000)
    with pytest.raises(MalformedError, match="too large"):
        source.manifest(None)
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").symlink_to(digest.hex)
    with pytest.raises(SourceError, match="symlinks are not followed"):
        source.manifest(None)
    (copied / "manifest.json").unlink()
    os.mkfifo(copied / "manifest.json")
    with pytest.raises(SourceError, match="not a regular file"):
        source.manifest(None)
    source.close()

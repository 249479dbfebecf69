"""Files and OCI layouts on this machine."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, MalformedError, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.files import LayoutSource, open_file
from tests.transport.gather import Gather, read

DATA = random.Random(4).randbytes(1_000_000)


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.tar"
    path.write_bytes(DATA)
    blob = open_file(path)
    assert (blob.name, blob.size_bytes) == (str(path), len(DATA))
    for start, stop in ((0, 1), (5, 700_000), (0, len(DATA)), (9, 9)):
        assert read(blob, start, stop) == DATA[start:stop]
    with pytest.raises(SourceError):
        read(blob, 0, len(DATA) + 1)
    path.rename(tmp_path / "away")
    path.write_bytes(b"another")
    assert read(blob, 0, 10) == DATA[:10], "what was opened is what is read"
    blob.close()
    blob.close()
    with pytest.raises(SourceError, match="closed"):
        read(blob, 0, 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(DATA + b"x"),
        lambda path: os.truncate(path, 10),
        lambda path: os.utime(path, ns=(0, 1)),
    ],
)
def test_file_that_is_written_to(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "checkpoint.tar"
    path.write_bytes(DATA)
    blob = open_file(path)
    sink = Gather(100_000, on_advance=lambda size: change(path) if size == 100_000 else None)
    with pytest.raises(IntegrityError, match="written to"):
        blob.read_into(ByteRange(0, len(DATA)), sink)
    assert sink.data == DATA[: len(sink.data)]
    blob.close()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("none", ".", "fifo"):
        with pytest.raises(SourceError):
            open_file(tmp_path / name)


class Layout:
    """An OCI layout being written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []
        self.write_index()

    def add_blob(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        self.path(digest).write_bytes(data)
        return digest

    def add_manifest(self, data: bytes, tag: str | None = None) -> Digest:
        digest = self.add_blob(data)
        names = {"org.opencontainers.image.ref.name": tag} if tag else {}
        self.manifests.append(
            {"mediaType": "m", "digest": str(digest), "size": len(data), "annotations": names}
        )
        self.write_index()
        return digest

    def write_index(self) -> None:
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.directory / "index.json").write_text(json.dumps(index))

    def path(self, digest: Digest) -> Path:
        return self.directory / "blobs" / digest.algorithm / digest.hex


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def source(layout: Layout) -> Iterator[LayoutSource]:
    source = LayoutSource(layout.directory, counters=Counters())
    yield source
    source.close()


def test_layout_with_one_image(layout: Layout, source: LayoutSource) -> None:
    digest = layout.add_manifest(b"{}", "v1")
    for reference in (None, "v1", str(digest)):
        manifest = source.manifest(reference)
        assert (manifest.data, manifest.digest, manifest.media_type) == (b"{}", digest, "m")
    layer = layout.add_blob(DATA)
    assert source.manifest(str(layout.add_blob(b"unlisted"))).data == b"unlisted"
    assert source.read_blob(layer, len(DATA)) == DATA
    blob = source.blob(layer, len(DATA))
    assert read(blob, 10, 999) == DATA[10:999]
    source.close()
    source.close()
    with pytest.raises(SourceError, match="closed"):
        read(blob, 0, 1)
    with pytest.raises(SourceError, match="closed"):
        source.manifest(None)


def test_layout_with_several_images(layout: Layout, source: LayoutSource) -> None:
    with pytest.raises(SourceError, match="no image in it"):
        source.manifest(None)
    layout.add_manifest(b"1", "b")
    layout.add_manifest(b"1", "c")
    assert source.manifest(None).data == b"1", "one image with two names"
    layout.add_manifest(b"2", "a")
    assert source.manifest("a").data == b"2"
    with pytest.raises(SourceError, match=r"which image\? it has a, b, c"):
        source.manifest(None)
    with pytest.raises(SourceError, match="no image is called 'd' there; it has a, b, c"):
        source.manifest("d")
    layout.add_manifest(b"3", "a")
    with pytest.raises(SourceError, match="'a' names several"):
        source.manifest("a")


def test_layout_whose_bytes_lie(layout: Layout, source: LayoutSource) -> None:
    digest = layout.add_manifest(b"{}", "v1")
    layout.path(digest).write_bytes(b"[]")
    for reference in ("v1", str(digest)):
        with pytest.raises(IntegrityError):
            source.manifest(reference)
    with pytest.raises(IntegrityError):
        source.read_blob(digest, 2)
    with pytest.raises(IntegrityError, match="2 bytes, though 3"):
        source.blob(digest, 3)
    with pytest.raises(MalformedError):
        source.read_blob(digest, 1 << 40)


@pytest.mark.parametrize(
    "index", [b"", b"[]", b'{"manifests": 1}', b'{"manifests": [{}]}', b"\xff", b" " * 5_000_000]
)
def test_layout_whose_index_is_none(layout: Layout, source: LayoutSource, index: bytes) -> None:
    (layout.directory / "index.json").write_bytes(index)
    with pytest.raises(MalformedError):
        source.manifest(None)


def test_layout_with_a_digest_that_is_a_path(layout: Layout, source: LayoutSource) -> None:
    layout.manifests.append({"digest": "sha256:../../../etc/passwd", "size": 1})
    layout.write_index()
    with pytest.raises(MalformedError, match="not a digest"):
        source.manifest(None)


def test_symlinks_are_not_followed(layout: Layout, source: LayoutSource, tmp_path: Path) -> None:
    digest = layout.add_manifest(b"{}")
    path = layout.path(digest)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="symlinks are not followed"):
        source.manifest(None)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="not a regular file"):
        source.blob(digest, 0)
    path.unlink()
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="symlinks are not followed"):
        source.blob(digest, 0)


def test_what_is_no_layout(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError):
            LayoutSource(path, counters=Counters())

"""Opens layers by one format and reads all their files, for formats with an index of their own."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import zstandard

from lazyfs.layers.model import (
    ChunkMap,
    Entry,
    EntryType,
    LayerDescriptor,
    LayerFormat,
    LayerIndex,
    StreamIndex,
)
from tests.images import Layer

DATA = Path(__file__).parent.parent / "data"
KINDS = {
    tarfile.REGTYPE: EntryType.FILE,
    tarfile.DIRTYPE: EntryType.DIRECTORY,
    tarfile.SYMTYPE: EntryType.SYMLINK,
    tarfile.CHRTYPE: EntryType.OTHER,
    tarfile.FIFOTYPE: EntryType.FIFO,
}


def sample(path: Path) -> Layer:
    """Load a layer of `tests/data` by its path less the suffix."""
    described = json.loads(path.with_suffix(".json").read_bytes())
    layer = Layer(
        path.with_suffix(".layer").read_bytes(), described["annotations"], described["mediaType"]
    )
    assert layer.digest == described["digest"]
    return layer


def descriptor(layer: Layer) -> LayerDescriptor:
    return LayerDescriptor(layer.media_type, None, len(layer.blob), layer.annotations)


def open_as(
    form: LayerFormat, layer: Layer, rounds: list[int] | None = None, *, head: bytes | None = None
) -> LayerIndex | StreamIndex:
    """Open a layer; `rounds` receives how many bytes were asked for at each yield."""
    opening = form.open(descriptor(layer), layer.blob[:65536] if head is None else head)
    try:
        wanted = next(opening)
        while True:
            assert all(0 <= start < stop <= len(layer.blob) for start, stop in wanted)
            if rounds is not None:
                rounds.append(sum(item.size_bytes for item in wanted))
            wanted = opening.send([memoryview(layer.blob)[start:stop] for start, stop in wanted])
    except StopIteration as stop:
        opened: LayerIndex | StreamIndex = stop.value
        return opened


def open_index(form: LayerFormat, layer: Layer) -> LayerIndex:
    opened = open_as(form, layer)
    assert isinstance(opened, LayerIndex)
    return opened


def decode(chunks: ChunkMap, index: int, blob: bytes) -> bytes:
    start, stop = chunks.blob_range(index)
    pieces = [bytes(piece) for piece in chunks.decode(index, memoryview(blob)[start:stop])]
    assert len(pieces) == 1 or chunks.content_size(index) > 2**20
    assert max(map(len, pieces)) <= 2**20
    content = b"".join(pieces)
    assert len(content) == chunks.content_size(index)
    return content


def content_of(chunks: ChunkMap, blob: bytes) -> bytes:
    """Decode every chunk; check that they tile the content space and share no bytes."""
    content = bytearray(chunks.content_size_bytes)
    end = blob_end = 0
    for index in range(len(chunks)):
        start, stop = chunks.content_start(index), chunks.content_start(index + 1)
        assert end <= start < start + chunks.content_size(index) <= stop
        assert chunks.index_at(start) == chunks.index_at(stop - 1) == index
        item = chunks.blob_range(index)
        assert blob_end <= item.start < item.stop <= len(blob)
        piece = decode(chunks, index, blob)
        content[start : start + len(piece)] = piece
        end, blob_end = stop, item.stop
    assert end == chunks.content_size_bytes
    return bytes(content)


def walk(index: LayerIndex, content: bytes) -> list[Entry]:
    """Run the walk to its end and return the entries."""
    try:
        wanted = next(index.walk)
        while True:
            wanted = index.walk.send([content[start:stop] for start, stop in wanted])
    except StopIteration:
        return index.entries


def files_of(index: LayerIndex, blob: bytes) -> dict[str, bytes]:
    """Read every file through the chunks."""
    content = content_of(index.chunks, blob)
    return {
        entry.path: content[entry.content_start : entry.content_start + entry.size_bytes]
        for entry in walk(index, content)
        if entry.type is EntryType.FILE
    }


def tar_of(blob: bytes) -> bytes:
    """Decompress a blob as programs do that know nothing of its index."""
    if blob.startswith(b"\x1f\x8b"):
        return gzip.decompress(blob)
    source = io.BytesIO(blob)
    return zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True).read()


def check_against_tar(index: LayerIndex, blob: bytes, ignored: frozenset[str]) -> None:
    """Compare all entries, and every byte of every file, with what tarfile reads."""
    content = content_of(index.chunks, blob)
    entries = walk(index, content)
    with tarfile.open(fileobj=io.BytesIO(tar_of(blob))) as archive:
        infos = [info for info in archive.getmembers() if info.name not in ignored]
        assert [entry.path for entry in entries] == [info.name for info in infos]
        for entry, info in zip(entries, infos, strict=True):
            start = entry.content_start
            data = archive.extractfile(info) if info.isfile() or info.islnk() else None
            if data is not None:
                assert content[start : start + entry.size_bytes] == data.read()
            if info.islnk():
                assert entry.link_of == info.linkname
                continue
            assert entry.type is KINDS[info.type]
            assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
            assert entry.mtime_ns // 10**9 == int(info.mtime)
            assert entry.symlink_target == (info.linkname if info.issym() else "")
            xattrs = {
                key.removeprefix("SCHILY.xattr."): value.encode()
                for key, value in info.pax_headers.items()
                if key.startswith("SCHILY.xattr.")
            }
            assert dict(entry.xattrs) == xattrs

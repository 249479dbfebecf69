"""Drives walks and reads layers, as the content floor does."""

from collections.abc import Callable

from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import (
    HEAD_BYTES,
    ChunkMap,
    Entry,
    EntryType,
    LayerDescriptor,
    LayerIndex,
    Opening,
    StreamIndex,
    Walk,
)
from lazyfs.layers.table import choose
from tests.images import Layer

Read = Callable[[ByteRange], bytes]


def reader_of(data: bytes) -> Read:
    """Return a reader that insists on ranges that lie within the data."""

    def read(item: ByteRange) -> bytes:
        assert 0 <= item.start < item.stop <= len(data)
        return data[item.start : item.stop]

    return read


def drive(walk: Walk, read: Read, rounds: list[list[ByteRange]] | None = None) -> None:
    """Run a walk to its end; `rounds` receives what it asked for, a list for each yield."""
    try:
        wanted = next(walk)
        while True:
            if rounds is not None:
                rounds.append(list(wanted))
            wanted = walk.send([read(item) for item in wanted])
    except StopIteration:
        return


def entries_of(index: LayerIndex, read: Read) -> list[Entry]:
    """Walk an opened layer and return what it found."""
    drive(index.walk, read)
    return index.entries


def drive_opening(opening: Opening, blob: bytes) -> LayerIndex | StreamIndex:
    """Give an opening what it asks for, to its end."""
    try:
        wanted = next(opening)
        while True:
            assert all(0 <= item.start <= item.stop <= len(blob) for item in wanted)
            wanted = opening.send([blob[item.start : item.stop] for item in wanted])
    except StopIteration as stop:
        index: LayerIndex | StreamIndex = stop.value
        return index


def descriptor(layer: Layer) -> LayerDescriptor:
    """Describe a layer as a manifest does."""
    return LayerDescriptor(layer.media_type, None, len(layer.blob), layer.annotations)


def open_layer(layer: Layer) -> LayerIndex:
    """Open a layer by whichever format recognises it."""
    described = descriptor(layer)
    head = layer.blob[:HEAD_BYTES]
    index = drive_opening(choose(described, head).open(described, head), layer.blob)
    assert isinstance(index, LayerIndex)
    return index


def content_of(chunks: ChunkMap, blob: bytes) -> bytes:
    """Decode every chunk; check that they tile the content space and do not share bytes."""
    content = bytearray(chunks.content_size_bytes)
    end = blob_end = 0
    for index in range(len(chunks)):
        start, stop = chunks.content_start(index), chunks.content_start(index + 1)
        assert end <= start < start + chunks.content_size(index) <= stop
        assert chunks.index_at(start) == chunks.index_at(stop - 1) == index
        item = chunks.blob_range(index)
        assert blob_end <= item.start <= item.stop
        pieces = [bytes(piece) for piece in chunks.decode(index, blob[item.start : item.stop])]
        assert len(pieces) == 1 or chunks.content_size(index) > 2**20
        assert len(b"".join(pieces)) == chunks.content_size(index)
        content[start : start + chunks.content_size(index)] = b"".join(pieces)
        end = start + chunks.content_size(index)
        blob_end = item.stop
    assert chunks.content_start(len(chunks)) == chunks.content_size_bytes
    return bytes(content)


def files_of(layer: Layer) -> dict[str, bytes]:
    """Read every file of a layer through its chunks."""
    index = open_layer(layer)
    content = content_of(index.chunks, layer.blob)
    entries = entries_of(index, reader_of(content))
    return {
        entry.path: content[entry.content_start : entry.content_start + entry.size_bytes]
        for entry in entries
        if entry.type is EntryType.FILE
    }

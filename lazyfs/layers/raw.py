"""A blob that is one file: how oras pushes the files of a directory, one by one."""

from lazyfs.layers.chunks import FixedChunks
from lazyfs.layers.model import Entry, EntryType, LayerIndex, no_walk

_MODE = 0o644


def open_file(path: str, size_bytes: int) -> LayerIndex:
    """Return a layer that holds one file, `path`, whose content is the blob."""
    return LayerIndex(
        format_name="file",
        cache_tag="tar-256k",
        chunks=FixedChunks(size_bytes),
        entries=[Entry(path, EntryType.FILE, _MODE, size_bytes=size_bytes)],
        walk=no_walk(),
    )

"""The table of contents of zstd:chunked, made into entries and chunks.

Source: containers/storage, `pkg/chunked/internal/minimal/compression.go` (`TOC`,
`FileMetadata`) and `pkg/chunked/storage_linux.go` (`mergeTocEntries`).
"""

from collections.abc import Iterable

from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.chunks import TableBuilder
from lazyfs.layers.model import Entry
from lazyfs.layers.toc_json import (
    FILE_ALIGNMENT_BYTES,
    TocEntries,
    TocEntry,
    batches,
    check_size,
    chunk_bytes,
    digest_value,
)


def read_toc(pieces: Iterable[bytes], blob_stop: int) -> tuple[list[Entry], TableBuilder]:
    """Read a TOC that comes in pieces; all frames must lie before `blob_stop` in the blob.

    Raises:
        MalformedError: not a TOC, or one that lies about offsets, sizes or names.
        UnsupportedLayer: another version than 1.
    """
    reader = _Reader(blob_stop)
    for batch in batches(pieces, "zstd:chunked"):
        for item in batch:
            reader.add(item)
    return reader.finish()


class _Reader:
    """Entries and chunks, as the TOC's objects go by.

    A chunk ends where the next one begins, so the last is held back until that is known.
    """

    def __init__(self, blob_stop: int) -> None:
        self._chunks = TableBuilder(blob_stop)
        self._names = TocEntries()
        self._file: TocEntry | None = None
        self._held: TocEntry | None = None

    def add(self, item: TocEntry) -> None:
        if item.type == "chunk":
            file, held = self._file, self._held
            if file is None or held is None or item.name != file.name:
                raise MalformedError(f"the TOC has a chunk of {item.name[:200]!r} without its file")
            self._chunk(held, item.chunk_offset, item.offset)
            self._held = item
            return
        self._finish_file()
        if self._names.add(item, self._chunks.content_end):
            self._file = self._held = item

    def finish(self) -> tuple[list[Entry], TableBuilder]:
        self._finish_file()
        return self._names.entries, self._chunks

    def _chunk(self, item: TocEntry, content_stop: int, blob_stop: int) -> None:
        digest = None
        if item.chunk_type == "":
            digest = digest_value(item.chunk_digest, item.name)
        elif item.chunk_type != "zeros":
            raise MalformedError(f"a chunk of {item.name[:200]!r} is of type {item.chunk_type!r}")
        size_bytes = chunk_bytes(item, content_stop)
        self._chunks.add(size_bytes, ByteRange(item.offset, blob_stop), digest)
        check_size(self._chunks)

    def _finish_file(self) -> None:
        file, held = self._file, self._held
        self._file = self._held = None
        if file is None or held is None:
            return
        if held is file and file.digest:
            # A file of one chunk: what is said of the file is all that is said.
            file.chunk_digest = file.digest
        self._chunk(held, file.size, file.end_offset)
        self._chunks.align(FILE_ALIGNMENT_BYTES)

"""The TOC of eStargz, made into entries, chunks and *groups*.

A payload, in eStargz, is a file or a chunk of one. It lies in the stretch of the blob that
begins at its `offset`, which decompresses by itself, `innerOffset` bytes behind the stretch's
beginning; around it lie tar headers and padding, which belong to nobody. The stretch goes on to
where the next one begins. Mostly there is one payload at the very start of each; where the
image was made with a least chunk size, many small ones share a stretch: they are one chunk
here, their bytes one after the other without what lies between, and each has a digest.

Content layout: the files that are not empty, in the TOC's order, each in one piece; a file whose
stretch is its own from its start begins at a multiple of 4096.

Source: stargz-snapshotter, `docs/estargz.md`, `estargz/types.go` (`TOCEntry`) and
`estargz/estargz.go` (`appendTar` writes, `initFields` and `Verifiers` read). Checks are stricter
than theirs: payloads must follow each other in the TOC as in the blob, as every writer puts
them, each with a digest of its own.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.chunks import CONTENT_CHUNK_MOST_BYTES, DIGEST_BYTES, TableBuilder
from lazyfs.layers.model import Entry
from lazyfs.layers.names import entry_path
from lazyfs.layers.toc_json import (
    CHUNKS_MOST,
    FILE_ALIGNMENT_BYTES,
    TocEntries,
    TocEntry,
    batches,
    check_size,
    chunk_bytes,
    digest_value,
)

TOC_NAME = "stargz.index.json"
NOT_SHOWN = frozenset((".prefetch.landmark", ".no.prefetch.landmark", TOC_NAME))
"""What the writer adds to the files that it was given."""

PAYLOAD = struct.Struct(f"<QQ{DIGEST_BYTES}s")
"""One of a group: where it begins in the decompressed stretch, its size, its sha256 value."""


class StargzToc(NamedTuple):
    """What a TOC says.

    `groups`: for chunks that are not one payload at their stretch's start, by number, their
    payloads, packed as `PAYLOAD` says.
    """

    entries: list[Entry]
    chunks: TableBuilder
    groups: Mapping[int, bytes]


def read_stargz_toc(pieces: Iterable[bytes], blob_stop: int, format_name: str) -> StargzToc:
    """Read a TOC that comes in pieces; all payloads must lie before `blob_stop` in the blob.

    Raises:
        MalformedError: not a TOC, or one that lies about offsets, sizes or names.
        UnsupportedLayer: another version than 1.
    """
    reader = _Reader(blob_stop)
    for batch in batches(pieces, format_name):
        for item in batch:
            reader.add(item)
    return reader.finish()


class _Reader:
    """Entries, chunks and groups, as the TOC's objects go by.

    A payload's size may be known only from what follows, and where a stretch ends is: so the
    last payload is held back, and so is the stretch of which there may be more.
    """

    def __init__(self, blob_stop: int) -> None:
        self._blob_stop = blob_stop
        self._chunks = TableBuilder(blob_stop)
        self._names = TocEntries()
        self._groups: dict[int, bytes] = {}
        self._file: TocEntry | None = None
        self._held: TocEntry | None = None
        self._stretch_start = 0
        self._stretch_bytes = 0
        """How many bytes of content the stretch holds so far."""
        self._inner_stop = 0
        self._payloads = bytearray()
        self._payload_count = 0

    def add(self, item: TocEntry) -> None:
        if item.type == "chunk":
            file, held = self._file, self._held
            # The first writers left the name of a chunk out.
            if file is None or held is None or item.name not in ("", file.name):
                raise MalformedError(f"the TOC has a chunk of {item.name[:200]!r} without its file")
            self._payload(held, item.chunk_offset)
            self._held = item
            return
        self._finish_file()
        if entry_path(item.name) in NOT_SHOWN:
            return
        if item.type == "reg" and item.size and item.offset != self._stretch_start:
            self._finish_stretch(item.offset)
            self._chunks.align(FILE_ALIGNMENT_BYTES)
        if self._names.add(item, self._chunks.content_end + self._stretch_bytes):
            self._file = self._held = item

    def finish(self) -> StargzToc:
        self._finish_file()
        self._finish_stretch(self._blob_stop)
        return StargzToc(self._names.entries, self._chunks, self._groups)

    def _finish_file(self) -> None:
        file, held = self._file, self._held
        self._file = self._held = None
        if file is None or held is None:
            return
        if held is file and not file.chunk_digest:
            file.chunk_digest = file.digest
        self._payload(held, file.size)

    def _payload(self, item: TocEntry, content_stop: int) -> None:
        size_bytes = chunk_bytes(item, content_stop)
        if item.offset != self._stretch_start:
            self._finish_stretch(item.offset)
        inner_stop = item.inner_offset + size_bytes
        is_behind = item.inner_offset >= self._inner_stop
        if size_bytes <= 0 or not is_behind or inner_stop > CONTENT_CHUNK_MOST_BYTES:
            raise MalformedError(
                f"a chunk of {item.name[:200]!r}, {size_bytes} bytes at {item.inner_offset} of "
                f"what is at byte {item.offset} of the blob, is giant or overlaps another"
            )
        digest = digest_value(item.chunk_digest, item.name)
        self._payloads += PAYLOAD.pack(item.inner_offset, size_bytes, digest)
        self._payload_count += 1
        if self._payload_count > CHUNKS_MOST:
            raise MalformedError("the TOC holds more chunks than any image has")
        self._inner_stop = inner_stop
        self._stretch_bytes += size_bytes

    def _finish_stretch(self, blob_stop: int) -> None:
        """Make the stretch's payloads a chunk; the next begins at `blob_stop`."""
        if self._payloads:
            inner, _, digest = PAYLOAD.unpack_from(self._payloads)
            if inner or len(self._payloads) > PAYLOAD.size:
                self._groups[len(self._chunks)] = bytes(self._payloads)
            blob = ByteRange(self._stretch_start, blob_stop)
            self._chunks.add(self._stretch_bytes, blob, digest)
            check_size(self._chunks)
        self._stretch_start = blob_stop
        self._stretch_bytes = self._inner_stop = 0
        self._payloads.clear()

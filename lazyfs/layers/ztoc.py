"""SOCI's zTOC: a flatbuffer that says what lies in a compressed tar, and where to enter it.

Sources: soci-snapshotter, `ztoc/fbs/ztoc.fbs` (the schema) and `ztoc/ztoc_marshaler.go` (how it
is written and read); FlatBuffers, "Internals" (the wire format). Numbers of fields are their
places in the schema.

Google's runtime goes wherever an offset points. So every table, vector and string is found to
lie within the buffer before the runtime is asked for it, and what is read in all is bounded by
the buffer's size: a buffer that points at the same bytes again and again, to become something
large, is refused. There is no recursion: the depth is the schema's.
"""

import struct
from collections.abc import Iterator
from typing import Any

import msgspec
from flatbuffers import number_types  # type: ignore[import-untyped]
from flatbuffers.table import Table  # type: ignore[import-untyped]

from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError
from lazyfs.layers.links import ENTRIES_MOST
from lazyfs.layers.names import PATH_MOST_BYTES

GZIP = 1
UNCOMPRESSED = 2
"""`CompressionAlgorithm` of the schema."""

_SHORT_MOST_BYTES = 256
_POINTER_BYTES = 4
_VTABLE_LEAST_BYTES = 4
_SHARING_MOST = 4
"""How often a byte is read on average; once, where no string is shared, as SOCI writes them."""
_RECORDS_MOST = 4 * ENTRIES_MOST
"""Files and their pax records; as a tar's headers, `lazyfs.layers.tar.HEADERS_MOST`."""
_FOREIGN_ERRORS = (struct.error, ValueError, TypeError, IndexError, OverflowError)
"""What the runtime, and Python's own reading of buffers, may raise for wrong bytes."""


class ZtocFile(msgspec.Struct, frozen=True):
    """A member of the tar: `FileMetadata` of the schema."""

    name: bytes
    type: bytes
    """reg, dir, symlink, hardlink, char, block or fifo."""
    offset: int
    """Where its data lies in the tar, or would lie."""
    size_bytes: int
    link: bytes
    mode: int
    uid: int
    gid: int
    modified: bytes
    """RFC 3339; empty for a time that cannot be written so."""
    pax_keys: tuple[bytes, ...]
    """Keys of the member's pax records; the schema calls them `xattrs`, and that a mistake."""


class Ztoc(msgspec.Struct, frozen=True):
    """A zTOC less its files, as it is written: no two of these values have been compared yet."""

    version: bytes
    compressed_bytes: int
    uncompressed_bytes: int
    """As far as a tar reader gets: what follows the archive's two zero blocks is not counted."""
    algorithm: int
    max_span_id: int
    span_digests: bytes
    """sha256 values, one after the other, of each span's compressed bytes."""
    checkpoints: memoryview
    """A view of the zTOC; see `lazyfs.layers.soci_checkpoints`."""


def read_ztoc(data: Data) -> Ztoc:
    """Read all of a zTOC but its files.

    Raises:
        MalformedError: it is no flatbuffer of this schema.
    """
    try:
        return _ztoc(_root(data))
    except _FOREIGN_ERRORS as err:
        raise _malformed(err) from err


def read_files(data: Data) -> Iterator[ZtocFile]:
    """Yield the members of the tar, in the zTOC's order.

    Raises:
        MalformedError: it is no flatbuffer of this schema, or holds more than any image does.
    """
    try:
        toc = _root(data).record(4)
        if toc is not None:
            for item in toc.records(0):
                yield _file(item)
    except _FOREIGN_ERRORS as err:
        raise _malformed(err) from err


def _ztoc(root: "_Record") -> Ztoc:
    packing = root.record(5)
    if packing is None:
        raise MalformedError("the zTOC says nothing of compression")
    return Ztoc(
        version=root.text(0, _SHORT_MOST_BYTES),
        compressed_bytes=root.number(2, number_types.Int64Flags),
        uncompressed_bytes=root.number(3, number_types.Int64Flags),
        algorithm=packing.number(0, number_types.Int8Flags, GZIP),
        max_span_id=packing.number(1, number_types.Int32Flags),
        span_digests=b"".join(map(_sha256_value, packing.texts(2, _SHORT_MOST_BYTES))),
        checkpoints=packing.data(3),
    )


def _file(item: "_Record") -> ZtocFile:
    return ZtocFile(
        name=item.text(0, PATH_MOST_BYTES),
        type=item.text(1, _SHORT_MOST_BYTES),
        offset=item.number(2, number_types.Int64Flags),
        size_bytes=item.number(3, number_types.Int64Flags),
        link=item.text(4, PATH_MOST_BYTES),
        mode=item.number(5, number_types.Int64Flags),
        uid=item.number(6, number_types.Uint32Flags),
        gid=item.number(7, number_types.Uint32Flags),
        modified=item.text(10, _SHORT_MOST_BYTES),
        pax_keys=tuple(record.text(0, PATH_MOST_BYTES) for record in item.records(13)),
    )


def _sha256_value(text: bytes) -> bytes:
    digest = Digest.parse(text.decode("ascii", "replace"))
    if digest.algorithm != "sha256":
        raise MalformedError(f"the zTOC has a span digest of {digest.algorithm}; want sha256")
    return bytes.fromhex(digest.hex)


def _malformed(reason: object) -> MalformedError:
    return MalformedError(f"the zTOC is not a flatbuffer of its schema: {reason}")


def _root(data: Data) -> "_Record":
    view = memoryview(data).cast("B").toreadonly()
    if len(view) < 2 * _POINTER_BYTES:
        raise _malformed(f"{len(view)} bytes")
    return _Record(_Buffer(view), Table(view, 0).Indirect(0))


class _Buffer:
    """The bytes, and how many of them, and tables in them, may still be read."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._left_bytes = _SHARING_MOST * len(view)
        self._left_records = _RECORDS_MOST

    def take_records(self, count: int) -> None:
        """See that so many more tables are not too many."""
        self._left_records -= count
        if self._left_records < 0:
            raise MalformedError(f"the zTOC holds more than {_RECORDS_MOST} files and records")

    def take(self, start: int, size_bytes: int) -> None:
        """See that a range lies within the buffer, and that it has not been read too often."""
        if not _POINTER_BYTES <= start <= start + size_bytes <= len(self.view):
            raise _malformed(f"it points at {size_bytes} bytes at {start} of {len(self.view)}")
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise _malformed("its parts point at the same bytes again and again")


class _Record:
    """A table of the flatbuffer, its own bytes and its vtable found to lie in the buffer."""

    __slots__ = ("_buffer", "_size_bytes", "_table")

    def __init__(self, buffer: _Buffer, at: int) -> None:
        buffer.take(at, _POINTER_BYTES)
        table = Table(buffer.view, at)
        vtable = at - table.Get(number_types.SOffsetTFlags, at)
        if not 0 <= vtable <= len(buffer.view) - _VTABLE_LEAST_BYTES:
            raise _malformed(f"the table at {at} has its vtable at {vtable}")
        vtable_bytes = table.Get(number_types.VOffsetTFlags, vtable)
        size_bytes = table.Get(number_types.VOffsetTFlags, vtable + 2)
        if vtable_bytes < _VTABLE_LEAST_BYTES or vtable_bytes % 2:
            raise _malformed(f"the vtable at {vtable} has {vtable_bytes} bytes")
        if max(vtable + vtable_bytes, at + size_bytes) > len(buffer.view):
            raise _malformed(f"the table at {at} or its vtable at {vtable} runs past the end")
        self._buffer = buffer
        self._table = table
        self._size_bytes = size_bytes

    def number(self, field: int, flags: Any, default: int = 0) -> int:
        """Return an integer of the type that `flags` names."""
        at = self._place(field, flags.bytewidth)
        return default if at is None else int(self._table.Get(flags, at))

    def text(self, field: int, most_bytes: int) -> bytes:
        """Return a string's bytes; empty where there is none."""
        at = self._place(field, _POINTER_BYTES)
        return b"" if at is None else self._text(at, most_bytes)

    def texts(self, field: int, most_bytes: int) -> Iterator[bytes]:
        """Yield the strings of a vector of strings."""
        start, count = self._vector(field, _POINTER_BYTES)
        for index in range(count):
            yield self._text(start + index * _POINTER_BYTES, most_bytes)

    def record(self, field: int) -> "_Record | None":
        """Return a table."""
        at = self._place(field, _POINTER_BYTES)
        return None if at is None else _Record(self._buffer, self._table.Indirect(at))

    def records(self, field: int) -> "Iterator[_Record]":
        """Yield the tables of a vector of tables."""
        start, count = self._vector(field, _POINTER_BYTES)
        self._buffer.take_records(count)
        for at in range(start, start + count * _POINTER_BYTES, _POINTER_BYTES):
            yield _Record(self._buffer, self._table.Indirect(at))

    def data(self, field: int) -> memoryview:
        """Return a view of a vector of bytes."""
        start, count = self._vector(field, 1)
        return self._buffer.view[start : start + count]

    def _place(self, field: int, size_bytes: int) -> int | None:
        """Where a field's own bytes are; None if it is left out."""
        offset: int = self._table.Offset(_VTABLE_LEAST_BYTES + 2 * field)
        if not offset:
            return None
        if not _POINTER_BYTES <= offset <= self._size_bytes - size_bytes:
            raise _malformed(f"field {field} of the table at {self._table.Pos} lies outside it")
        return int(self._table.Pos) + offset

    def _text(self, at: int, most_bytes: int) -> bytes:
        size_bytes = self._length(self._table.Indirect(at), 1)
        if size_bytes > most_bytes:
            raise MalformedError(f"the zTOC has a string of {size_bytes} bytes")
        return bytes(self._table.String(at))

    def _vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        """Return where a vector's first item is, and how many it has."""
        at = self._place(field, _POINTER_BYTES)
        if at is None:
            return 0, 0
        at = self._table.Indirect(at)
        return at + _POINTER_BYTES, self._length(at, item_bytes)

    def _length(self, at: int, item_bytes: int) -> int:
        """Return how many items follow the count at `at`, which lie in the buffer."""
        self._buffer.take(at, _POINTER_BYTES)
        count = int(self._table.Get(number_types.UOffsetTFlags, at))
        self._buffer.take(at + _POINTER_BYTES, count * item_bytes)
        return count

"""The table of contents of zstd:chunked: JSON of any size, in pieces, to entries and chunks.

A TOC has an object for each chunk, 95 MB of them for a 10 GiB image. So the text is cut
between two objects of the list, decoded a piece at a time by msgspec, and no object outlives
its piece. A cut is made only at `},{"` and a letter. No string of valid JSON can hold that (a
quote in a string has a backslash before it, and after a string's own closing quote no letter
can follow), and within nested lists it leaves brackets open: a wrong cut is an error, never
another meaning.

Source: containers/storage, `pkg/chunked/internal/minimal/compression.go` (`TOC`,
`FileMetadata`) and `pkg/chunked/storage_linux.go` (`mergeTocEntries`).
"""

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import DIGEST_BYTES, TableBuilder
from lazyfs.layers.links import ENTRIES_MOST, resolve_link
from lazyfs.layers.model import Entry, EntryType
from lazyfs.layers.names import entry_path, link_target

VERSION = 1
FILE_ALIGNMENT_BYTES = 4096
CONTENT_MOST_BYTES = 16 * 2**40
CHUNKS_MOST = 8_000_000
TEXT_MOST_BYTES = 4 * MIB
"""Of JSON that cannot be cut, because it was not written compactly."""

_CUT = b'},{"'
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"(Z|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_KINDS = {
    "dir": EntryType.DIRECTORY,
    "symlink": EntryType.SYMLINK,
    "char": EntryType.OTHER,
    "block": EntryType.OTHER,
    "fifo": EntryType.OTHER,
}
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Owner = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class TocEntry(msgspec.Struct, rename="camel", gc=False):
    """An object of the TOC's list, less what lazyfs has no use for."""

    type: str
    name: str
    link_name: str = ""
    mode: int = 0
    size: _Size = 0
    uid: _Owner = 0
    gid: _Owner = 0
    modtime: str | None = None
    digest: str = ""
    offset: _Size = 0
    end_offset: _Size = 0
    chunk_size: _Size = 0
    chunk_offset: _Size = 0
    chunk_digest: str = ""
    chunk_type: str = ""


class _Head(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """The TOC up to the first cut, which must lie in `entries`: so nothing else may be there."""

    entries: list[TocEntry]
    version: int | None = None
    tar_split_digest: str = ""


class _Whole(msgspec.Struct):
    version: int | None = None
    entries: list[TocEntry] | None = None


_head = msgspec.json.Decoder(_Head)
_middle = msgspec.json.Decoder(list[TocEntry])
_whole = msgspec.json.Decoder(_Whole)


def read_toc(pieces: Iterable[bytes], blob_stop: int) -> tuple[list[Entry], TableBuilder]:
    """Read a TOC that comes in pieces; all frames must lie before `blob_stop` in the blob.

    Raises:
        MalformedError: not a TOC, or one that lies about offsets, sizes or names.
        UnsupportedLayer: another version than 1.
    """
    reader = _Reader(blob_stop)
    for batch in _batches(pieces):
        for item in batch:
            reader.add(item)
    return reader.finish()


def _batches(pieces: Iterable[bytes]) -> Iterator[list[TocEntry]]:
    text = bytearray()
    version: int | None = None
    is_first = True
    try:
        for piece in pieces:
            text += piece
            cut = _last_cut(text)
            if cut < 0:
                if len(text) > TEXT_MOST_BYTES:
                    raise MalformedError("the TOC is not the compact JSON that Podman writes")
                continue
            if is_first:
                head = _head.decode(text[:cut] + b"]}")
                version, batch = head.version, head.entries
                if version is not None:
                    _check_version(version)
            else:
                batch = _middle.decode(b"".join((b"[", text[:cut], b"]")))
            is_first = False
            del text[: cut + 1]
            yield batch
        whole = _whole.decode(text if is_first else b'{"entries":[' + text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise MalformedError(f"the TOC is not a TOC's JSON: {err}") from err
    _check_version(whole.version if version is None else version)
    yield whole.entries or []


def _check_version(version: int | None) -> None:
    if version != VERSION:
        raise UnsupportedLayer(f"zstd:chunked TOC of version {version}; only {VERSION} is known")


def _last_cut(text: bytearray) -> int:
    """Position after the last object that is surely followed by another; -1 if none is."""
    stop = len(text) - 1
    while (at := text.rfind(_CUT, 0, stop)) >= 0:
        if chr(text[at + len(_CUT)]).isalpha():
            return at + 1
        stop = at + len(_CUT) - 1
    return -1


class _Reader:
    """Entries and chunks, as the TOC's objects go by.

    A chunk ends where the next one begins, so the last is held back until that is known.
    """

    def __init__(self, blob_stop: int) -> None:
        self._chunks = TableBuilder(blob_stop)
        self._entries: list[Entry] = []
        self._by_path: dict[str, Entry] = {}
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
        self._entry(item)

    def finish(self) -> tuple[list[Entry], TableBuilder]:
        self._finish_file()
        return self._entries, self._chunks

    def _chunk(self, item: TocEntry, content_stop: int, blob_stop: int) -> None:
        size_bytes = content_stop - item.chunk_offset
        if item.chunk_size not in (0, size_bytes):
            raise MalformedError(
                f"a chunk of {item.name[:200]!r} claims {item.chunk_size} bytes and fills "
                f"{size_bytes}"
            )
        digest = None
        if item.chunk_type == "":
            digest = _digest_value(item.chunk_digest, item.name)
        elif item.chunk_type != "zeros":
            raise MalformedError(f"a chunk of {item.name[:200]!r} is of type {item.chunk_type!r}")
        self._chunks.add(size_bytes, ByteRange(item.offset, blob_stop), digest)
        if len(self._chunks) > CHUNKS_MOST or self._chunks.content_end > CONTENT_MOST_BYTES:
            raise MalformedError("the TOC holds more chunks or bytes than any image has")

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

    def _entry(self, item: TocEntry) -> None:
        path = entry_path(item.name)
        if item.type == "hardlink":
            entry = resolve_link(self._by_path, path, entry_path(item.link_name))
        else:
            kind = EntryType.FILE if item.type == "reg" else _KINDS.get(item.type)
            if kind is None or (not path and kind is not EntryType.DIRECTORY):
                raise MalformedError(f"the TOC says that {path[:200]!r} is a {item.type[:40]!r}")
            is_file = kind is EntryType.FILE
            entry = Entry(
                path=path,
                type=kind,
                mode=item.mode & 0o7777,
                uid=item.uid,
                gid=item.gid,
                size_bytes=item.size if is_file else 0,
                mtime_ns=_mtime_ns(item.modtime, path),
                content_start=self._chunks.content_end if is_file else 0,
                symlink_target=(
                    link_target(item.link_name, path) if kind is EntryType.SYMLINK else ""
                ),
            )
            if is_file and item.size:
                if item.chunk_offset:
                    raise MalformedError(f"the first chunk of {path[:200]!r} is not at its start")
                self._file = self._held = item
        self._entries.append(entry)
        if len(self._entries) > ENTRIES_MOST:
            raise MalformedError(f"the TOC holds more than {ENTRIES_MOST} entries")
        self._by_path[path] = entry


def _digest_value(text: str, name: str) -> bytes:
    if not _DIGEST.fullmatch(text):
        raise MalformedError(f"a chunk of {name[:200]!r} has no sha256 digest: {text[:100]!r}")
    return bytes.fromhex(text[-2 * DIGEST_BYTES :])


def _mtime_ns(text: str | None, path: str) -> int:
    """Read Go's RFC 3339 with nanoseconds; its zero time, year 1, is no time."""
    if text is None or text == "0001-01-01T00:00:00Z":
        return 0
    match = _TIME.fullmatch(text)
    try:
        if not match:
            raise ValueError("not RFC 3339")  # noqa: TRY301 - one message for both
        when, fraction, zone = match.groups()
        since = datetime.fromisoformat(when + zone) - _EPOCH
    except (ValueError, OverflowError) as err:
        raise MalformedError(f"modtime {text[:60]!r} of {path[:200]!r}: {err}") from err
    return since // timedelta(seconds=1) * 10**9 + int((fraction or "").ljust(9, "0"))

"""What the TOCs of zstd:chunked and of eStargz share: JSON of any size, in pieces, to entries.

A TOC has an object for each chunk, 95 MB of them for a 10 GiB image. So the text is cut
between two objects of the list, decoded a piece at a time by msgspec, and no object outlives
its piece. A cut is made only at `},{"` and a letter (or the same with the line breaks and tabs
of Go's MarshalIndent). No string of valid JSON can hold that (a quote in a string has a
backslash before it, and after a string's own closing quote no letter can follow), and within
nested lists it leaves brackets open: a wrong cut is an error, never another meaning.

Sources: containers/storage, `pkg/chunked/internal/minimal/compression.go` (`TOC`,
`FileMetadata`); stargz-snapshotter, `estargz/types.go` (`JTOC`, `TOCEntry`), `docs/estargz.md`.
"""

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.chunks import DIGEST_BYTES, TableBuilder
from lazyfs.layers.links import ENTRIES_MOST, resolve_link
from lazyfs.layers.model import Entry, EntryType
from lazyfs.layers.names import entry_path, link_target

VERSION = 1
FILE_ALIGNMENT_BYTES = 4096
"""Where files begin in the content address space that a TOC stands for."""
CONTENT_MOST_BYTES = 16 * 2**40
CHUNKS_MOST = 8_000_000
TEXT_MOST_BYTES = 4 * MIB
"""Of JSON that cannot be cut, because it was written with other white space."""

_XATTRS_MOST_BYTES = 64 * KIB
"""Linux, `limits.h`: XATTR_SIZE_MAX. What has more keeps none, as with a plain tar."""
_CUTS = (b'},{"', b'},\n\t\t{\n\t\t\t"')
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
    "fifo": EntryType.FIFO,
}
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Owner = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]


class TocEntry(msgspec.Struct, rename="camel", gc=False):
    """An object of the TOC's list, less what lazyfs has no use for."""

    type: str
    name: str = ""
    link_name: str = ""
    mode: int = 0
    size: _Size = 0
    uid: _Owner = 0
    gid: _Owner = 0
    modtime: str | None = None
    xattrs: dict[str, bytes | None] | None = None
    """In the JSON, values are base64."""
    digest: str = ""
    offset: _Size = 0
    end_offset: _Size = 0
    """Of zstd:chunked alone, as is `chunk_type`."""
    inner_offset: _Size = 0
    """Of eStargz alone."""
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


def batches(pieces: Iterable[bytes], format_name: str) -> Iterator[list[TocEntry]]:
    """Yield the objects of a TOC whose JSON comes in pieces, some at a time, in its order.

    Raises:
        MalformedError: not a TOC.
        UnsupportedLayer: another version than 1.
    """
    text = bytearray()
    version: int | None = None
    is_first = True
    try:
        for piece in pieces:
            text += piece
            cut = _last_cut(text)
            if cut < 0:
                if len(text) > TEXT_MOST_BYTES:
                    raise MalformedError("the TOC is not laid out as any tool writes it")
                continue
            if is_first:
                head = _head.decode(text[:cut] + b"]}")
                version, batch = head.version, head.entries
                if version is not None:
                    _check_version(version, format_name)
            else:
                batch = _middle.decode(b"".join((b"[", text[:cut], b"]")))
            is_first = False
            del text[: cut + 1]
            yield batch
        whole = _whole.decode(text if is_first else b'{"entries":[' + text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise MalformedError(f"the TOC is not a TOC's JSON: {err}") from err
    _check_version(whole.version if version is None else version, format_name)
    yield whole.entries or []


def _check_version(version: int | None, format_name: str) -> None:
    if version != VERSION:
        raise UnsupportedLayer(f"{format_name} TOC of version {version}; only {VERSION} is known")


def _last_cut(text: bytearray) -> int:
    """Position after the last object that is surely followed by another; -1 if none is."""
    for cut in _CUTS:
        stop = len(text) - 1
        while (at := text.rfind(cut, 0, stop)) >= 0:
            if chr(text[at + len(cut)]).isalpha():
                return at + 1
            stop = at + len(cut) - 1
    return -1


class TocEntries:
    """Entries, as the TOC's objects go by; hard links are resolved to earlier ones."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._by_path: dict[str, Entry] = {}

    def add(self, item: TocEntry, content_start: int) -> bool:
        """Add what a named object stands for; return whether it has content at `content_start`.

        Raises:
            MalformedError: its name, link, type or time cannot be; too many entries.
        """
        path = entry_path(item.name)
        if item.type == "hardlink":
            self._keep(resolve_link(self._by_path, path, entry_path(item.link_name)))
            return False
        kind = EntryType.FILE if item.type == "reg" else _KINDS.get(item.type)
        if kind is None or (not path and kind is not EntryType.DIRECTORY):
            raise MalformedError(f"the TOC says that {path[:200]!r} is a {item.type[:40]!r}")
        is_file = kind is EntryType.FILE
        is_symlink = kind is EntryType.SYMLINK
        self._keep(
            Entry(
                path=path,
                type=kind,
                mode=item.mode & 0o7777,
                uid=item.uid,
                gid=item.gid,
                size_bytes=item.size if is_file else 0,
                mtime_ns=_mtime_ns(item.modtime, path),
                content_start=content_start if is_file else 0,
                symlink_target=link_target(item.link_name, path) if is_symlink else "",
                xattrs=_xattrs(item.xattrs) if item.xattrs else (),
            )
        )
        if not is_file or not item.size:
            return False
        if item.chunk_offset:
            raise MalformedError(f"the first chunk of {path[:200]!r} is not at its start")
        return True

    def _keep(self, entry: Entry) -> None:
        self.entries.append(entry)
        if len(self.entries) > ENTRIES_MOST:
            raise MalformedError(f"the TOC holds more than {ENTRIES_MOST} entries")
        self._by_path[entry.path] = entry


def chunk_bytes(item: TocEntry, content_stop: int) -> int:
    """Return the size of a chunk of a file that ends at `content_stop` in it.

    Raises:
        MalformedError: it is another than what the object claims.
    """
    size_bytes = content_stop - item.chunk_offset
    if item.chunk_size not in (0, size_bytes):
        raise MalformedError(
            f"a chunk of {item.name[:200]!r} claims {item.chunk_size} bytes and fills {size_bytes}"
        )
    return size_bytes


def digest_value(text: str, name: str) -> bytes:
    """Read a chunk's digest, `sha256:<hex>`, of the file `name`.

    Raises:
        MalformedError: it is not one.
    """
    if not _DIGEST.fullmatch(text):
        raise MalformedError(f"a chunk of {name[:200]!r} has no sha256 digest: {text[:100]!r}")
    return bytes.fromhex(text[-2 * DIGEST_BYTES :])


def check_size(builder: TableBuilder) -> None:
    """See that a TOC does not stand for more than any image has.

    Raises:
        MalformedError: it does.
    """
    if len(builder) > CHUNKS_MOST or builder.content_end > CONTENT_MOST_BYTES:
        raise MalformedError("the TOC holds more chunks or bytes than any image has")


def _xattrs(values: dict[str, bytes | None]) -> tuple[tuple[str, bytes], ...]:
    pairs = tuple((name, value or b"") for name, value in values.items())
    return pairs if sum(len(value) for _, value in pairs) <= _XATTRS_MOST_BYTES else ()


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

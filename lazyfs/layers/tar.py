"""A plain tar as a layer: content addresses are the tar's own offsets.

The walk goes from header to header and is alone in deciding where they are. To save round
trips it asks for more than the next header: whole blocks where headers are dense, and, before
a row of CRIU's pages files, every place where their pagemaps let the next headers be expected.
An expectation that fails costs a request, nothing else.
"""

from collections.abc import Generator, Sequence

from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.chunks import FIXED_CHUNK_BYTES, FixedChunks
from lazyfs.layers.links import ENTRIES_MOST, resolve_link
from lazyfs.layers.model import (
    Entry,
    EntryType,
    LayerDescriptor,
    LayerIndex,
    Opening,
    Walk,
)
from lazyfs.layers.names import PATH_MOST_BYTES, decode_name, entry_path, link_target
from lazyfs.layers.pagemap_hint import read_pagemap
from lazyfs.layers.tar_header import (
    BLOCK_BYTES,
    Header,
    apply_pax,
    is_zero_block,
    parse_header,
    parse_pax,
    sparse_error,
)

HEADERS_MOST = 4 * ENTRIES_MOST
"""Headers of all kinds; an entry has up to three in front of it."""
EXTENSION_MOST_BYTES = MIB
FILE_MOST_BYTES = 16 * 2**40
"""No memory is larger, and no address of content."""

_BLOCK_LEAST = FIXED_CHUNK_BYTES
_BLOCK_MOST = 2 * MIB
_BLOCK_SLACK = 16 * KIB
_PROBE_BYTES = 4 * KIB
"""A header that is expected somewhere, with an extended header in front of it."""
_PROBES_MOST = 512
_PROBE_GAP = 16 * KIB

_PREDICT_FROM = 3
"""Pagemaps in a directory from which reading them beats a round trip for each pages file."""
_PAGEMAP_MOST_BYTES = 128 * KIB
_PAGEMAPS_MOST_BYTES = 4 * MIB
"""Reading an entry costs 2 µs: what would take longer than the round trip it saves is left."""
_FAILURES_MOST = 2

_FILE_TYPES = frozenset((b"0", b"\0", b"7"))
_DATALESS_TYPES = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_KINDS = {
    b"2": EntryType.SYMLINK,
    b"5": EntryType.DIRECTORY,
    b"6": EntryType.FIFO,
    b"D": EntryType.DIRECTORY,
}

_Bytes = Generator[Sequence[ByteRange], Sequence[bytes], bytes]
_Nothing = Generator[Sequence[ByteRange], Sequence[bytes], None]


class Tar:
    """Uncompressed tar archives: ustar, pax, GNU, v7."""

    name = "tar"

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether the bytes begin with a tar header, or with the zeros that end an empty one."""
        return looks_like_tar(head)

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Return the even grid and the walk, which begins with what has been seen."""
        yield from ()
        entries: list[Entry] = []
        return LayerIndex(
            format_name=self.name,
            cache_tag="tar-256k",
            chunks=FixedChunks(layer.size_bytes),
            entries=entries,
            walk=walk_tar(layer.size_bytes, entries, head=head),
        )


def looks_like_tar(head: bytes) -> bool:
    """Whether an archive's first block is a header with the right checksum, or its end."""
    block = head[:BLOCK_BYTES]
    try:
        return is_zero_block(block) or bool(parse_header(block, 0))
    except (MalformedError, IndexError):
        return False


def walk_tar(size_bytes: int, entries: list[Entry], *, head: bytes = b"") -> Walk:
    """Walk a tar of `size_bytes`: yields ranges, is sent their bytes, appends to `entries`.

    `head`: the first bytes, if they are here already.

    Raises:
        MalformedError: not a tar, a truncated one, or one with names or links that cannot be.
        UnsupportedLayer: sparse files, volumes of a set.
    """
    yield from _TarWalk(size_bytes, entries, head, sequential=False).run()


def walk_tar_stream(entries: list[Entry]) -> Walk:
    """Walk a tar that comes as a stream, of unknown size.

    Asks for one range at a time and never for anything ahead of the next header. What it is
    sent may be longer than it asked for, and is shorter only where the stream ends.

    Raises:
        MalformedError, UnsupportedLayer: as `walk_tar`.
    """
    yield from _TarWalk(None, entries, b"", sequential=True).run()


class _TarWalk:
    """One walk. `_position` is where the next header is; all before it has been judged."""

    def __init__(
        self, size_bytes: int | None, entries: list[Entry], head: bytes, *, sequential: bool
    ) -> None:
        self._size_bytes = size_bytes  # None: not known before the end
        self._sequential = sequential
        self._position = 0
        self._data_stop = 0  # of the last entry; what follows is padding
        self._headers = 0
        self._entries = entries
        self._by_path: dict[str, Entry] = {}
        self._globals: dict[bytes, bytes] = {}
        # What the walk has been sent and not passed yet.
        self._seen: list[tuple[int, bytes]] = [(0, head)] if head else []
        self._block_bytes = _BLOCK_LEAST
        self._block_stop = 0
        # By directory: where pagemaps lie, and once they have been read, sizes of pages files.
        self._pagemaps: dict[str, list[ByteRange]] = {}
        self._pages: dict[str, dict[str, int]] = {}
        # The directory of the last prediction; a second in the same means that the first failed.
        self._predicted: str | None = None
        self._failures = 0

    def run(self) -> Walk:
        while not self._is_past(self._position):
            start = self._position
            if (yield from self._at_end()):
                break
            header = yield from self._member()
            entry, data_bytes = self._entry(header)
            data = ByteRange(self._position, self._position + data_bytes)
            self._data_stop = data.stop
            if self._is_past(data.stop - 1):
                raise MalformedError(
                    f"the tar is truncated: {entry.path[:200]!r} should lie at {data}, "
                    f"but the archive ends at {self._size_bytes}"
                )
            self._entries.append(entry)
            if len(self._entries) > ENTRIES_MOST:
                raise MalformedError(f"the tar holds more than {ENTRIES_MOST} entries")
            self._by_path[entry.path] = entry
            self._pass(data.stop)
            if not self._sequential and _is_criu_image(entry):
                yield from self._criu_image(entry, start, data)

    def _is_past(self, position: int) -> bool:
        """Whether the archive is known to end at `position` or before."""
        return self._size_bytes is not None and position >= self._size_bytes

    def _at_end(self) -> Generator[Sequence[ByteRange], Sequence[bytes], bool]:
        """Whether the two zero blocks that end an archive are here, or a stream has ended."""
        if self._size_bytes is None:
            # From where the data should end: whether it does is found out by that.
            yield from self._ask([ByteRange(self._data_stop, self._position + BLOCK_BYTES)])
            if self._is_past(self._position):
                return True
        if not is_zero_block((yield from self._see(self._position, BLOCK_BYTES))):
            return False
        self._pass(self._position + BLOCK_BYTES)
        if self._size_bytes is None:
            return True
        if self._position < self._size_bytes and not is_zero_block(
            (yield from self._see(self._position, BLOCK_BYTES))
        ):
            raise MalformedError(f"the tar goes on after a zero block, at byte {self._position}")
        return True

    def _member(self) -> Generator[Sequence[ByteRange], Sequence[bytes], Header]:
        """Read headers up to one that stands for an entry, and apply those before it."""
        name = link = b""
        records = self._globals
        while True:
            at = self._position
            self._headers += 1
            if self._headers > HEADERS_MOST:
                raise MalformedError(f"the tar holds more than {HEADERS_MOST} headers")
            header = parse_header((yield from self._see(at, BLOCK_BYTES)), at)
            self._position += BLOCK_BYTES
            if header.type in (b"x", b"X"):
                records = self._globals | parse_pax((yield from self._extension(header)), at)
            elif header.type == b"g":
                self._globals = self._globals | parse_pax((yield from self._extension(header)), at)
                records = self._globals | records
            elif header.type == b"L":
                name = (yield from self._extension(header)).partition(b"\0")[0]
            elif header.type == b"K":
                link = (yield from self._extension(header)).partition(b"\0")[0]
            else:
                header = apply_pax(header, records, at)
                return header._replace(name=name or header.name, link=link or header.link)

    def _extension(self, header: Header) -> _Bytes:
        """Read the data of a header that describes the next one."""
        at = self._position
        if header.size_bytes > EXTENSION_MOST_BYTES:
            raise MalformedError(
                f"extended tar header at byte {at} is larger than {EXTENSION_MOST_BYTES} bytes"
            )
        data = yield from self._see(at, header.size_bytes)
        self._pass(at + header.size_bytes)
        return data

    def _entry(self, header: Header) -> tuple[Entry, int]:
        """Return the entry that a header stands for, and how many bytes of data follow."""
        for text in (header.name, header.link):
            if len(text) > PATH_MOST_BYTES:
                raise MalformedError(f"name {text[:200]!r}… is longer than {PATH_MOST_BYTES} bytes")
        if header.type == b"S":
            raise sparse_error(header.name)
        if header.type == b"M":
            raise UnsupportedLayer(f"{header.name[:200]!r} continues from another tar volume")
        path = entry_path(decode_name(header.name))
        kind = _KINDS.get(header.type, EntryType.OTHER)
        if header.type in _FILE_TYPES:
            is_directory = header.type == b"\0" and header.name.endswith(b"/")
            kind = EntryType.DIRECTORY if is_directory else EntryType.FILE
        data_bytes = 0 if header.type in _DATALESS_TYPES else header.size_bytes
        if data_bytes > FILE_MOST_BYTES:
            raise MalformedError(f"{path[:200]!r} of {data_bytes} bytes is not believed")
        if not path and kind is not EntryType.DIRECTORY:
            raise MalformedError(f"the layer's root is no directory in the tar: {header.name!r}")
        if header.type == b"1":
            target = entry_path(decode_name(header.link))
            return resolve_link(self._by_path, path, target), data_bytes
        entry = Entry(
            path=path,
            type=kind,
            mode=header.mode,
            uid=header.uid,
            gid=header.gid,
            size_bytes=data_bytes if kind is EntryType.FILE else 0,
            mtime_ns=header.mtime_ns,
            content_start=self._position if kind is EntryType.FILE else 0,
            xattrs=header.xattrs,
            symlink_target=(
                link_target(decode_name(header.link), path) if kind is EntryType.SYMLINK else ""
            ),
        )
        return entry, data_bytes

    def _criu_image(self, entry: Entry, start: int, data: ByteRange) -> _Nothing:
        """Note pagemaps; at a pages file, ask for all headers that they let expect."""
        directory, _, name = entry.path.rpartition("/")
        if name.startswith("pagemap-"):
            if 0 < data.size_bytes <= _PAGEMAP_MOST_BYTES:
                self._pagemaps.setdefault(directory, []).append(data)
            return
        if not name.startswith("pages-"):
            return
        pagemaps = self._pagemaps.pop(directory, [])
        if len(pagemaps) >= _PREDICT_FROM:
            yield from self._read_pagemaps(directory, pagemaps)
        sizes = self._pages.get(directory, {})
        if self._is_past(self._position) or self._find(self._position, BLOCK_BYTES):
            return
        if sizes.get(name) != data.size_bytes or self._failures > _FAILURES_MOST:
            return
        self._failures += self._predicted == directory
        self._predicted = directory
        yield from self._ask(self._probes(sizes, name, data.start - start))

    def _read_pagemaps(self, directory: str, pagemaps: list[ByteRange]) -> _Nothing:
        wanted: list[ByteRange] = []
        for item in pagemaps:
            if sum(other.size_bytes for other in wanted) + item.size_bytes > _PAGEMAPS_MOST_BYTES:
                break
            wanted.append(item)
        sizes = self._pages.setdefault(directory, {})
        for data in (yield wanted):
            hint = read_pagemap(data)
            if hint is not None:
                sizes[f"pages-{hint.pages_id}.img"] = hint.size_bytes

    def _probes(self, sizes: dict[str, int], name: str, overhead: int) -> list[ByteRange]:
        """List where headers ought to be after pages file `name`, which has just been passed.

        Names follow each other sorted, each with as many header bytes as `name` has.
        """
        at = self._position
        probes = []
        for later in sorted(item for item in sizes if item > name)[:_PROBES_MOST]:
            probes.append(self._clipped(at, at + _PROBE_BYTES))
            at += _padded(overhead + sizes[later])
            if self._is_past(at):
                break
        else:
            probes.append(self._block(at))
        return list(coalesce(probes, _PROBE_GAP))

    def _pass(self, position: int) -> None:
        """Go to the block that follows `position`, and drop what lies before it."""
        self._position = _padded(position)
        self._seen = [item for item in self._seen if item[0] + len(item[1]) > self._position]

    def _see(self, start: int, size_bytes: int) -> _Bytes:
        """Return bytes of the archive, asking for a block of them if they were not sent yet."""
        if not size_bytes:
            return b""
        found = self._find(start, size_bytes)
        if found is None and not self._is_past(start + size_bytes - 1):
            stop = start + size_bytes
            if not self._sequential:
                stop = max(stop, self._block(start).stop)
            yield from self._ask([ByteRange(start, stop)])
            found = self._find(start, size_bytes)
        if found is None and self._is_past(start + size_bytes - 1):
            raise MalformedError(
                f"the tar is truncated: {size_bytes} bytes at {start} run past its end "
                f"at {self._size_bytes}"
            )
        if found is None:
            raise ValueError(f"the walk asked for {size_bytes} bytes at {start} and got fewer")
        return found

    def _find(self, start: int, size_bytes: int) -> bytes | None:
        for at, data in self._seen:
            if at <= start and start + size_bytes <= at + len(data):
                return data[start - at : start - at + size_bytes]
        return None

    def _block(self, start: int) -> ByteRange:
        """Choose what to ask for at an unseen header: to the end of a chunk, which costs no more.

        A block that follows another closely is twice as large: names are dense here.
        """
        dense = self._block_stop <= start <= self._block_stop + self._block_bytes
        grown = min(2 * self._block_bytes, _BLOCK_MOST)
        self._block_bytes = grown if dense and start else _BLOCK_LEAST
        stop = -(-(start + _BLOCK_SLACK) // _BLOCK_LEAST) * _BLOCK_LEAST
        block = self._clipped(start, stop + self._block_bytes - _BLOCK_LEAST)
        self._block_stop = block.stop
        return block

    def _clipped(self, start: int, stop: int) -> ByteRange:
        return ByteRange(start, stop if self._size_bytes is None else min(stop, self._size_bytes))

    def _ask(self, ranges: list[ByteRange]) -> _Nothing:
        if self._sequential and self._find(ranges[0].start, ranges[0].size_bytes) is not None:
            return
        replies = yield ranges
        for item, data in zip(ranges, replies, strict=True):
            self._seen.append((item.start, bytes(data)))
            if self._sequential and len(data) < item.size_bytes:
                self._size_bytes = item.start + len(data)


def _is_criu_image(entry: Entry) -> bool:
    return entry.type is EntryType.FILE and entry.path.endswith(".img") and not entry.link_of


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES

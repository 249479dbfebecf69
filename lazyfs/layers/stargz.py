"""eStargz whatever it is compressed with: how it is opened, and how its chunks are proven.

The manifest vouches for the TOC's JSON, and that for every payload. The footer, which says
where the TOC is, is vouched for by nobody: if it lies, what it points at is not what was
promised. Layout and grouping are `lazyfs.layers.stargz_toc`'s; what is particular to gzip and
to zstd is in `estargz` and `stargz_zstd`, each of which brings a `Packing`.

Source: stargz-snapshotter, `docs/estargz.md`, "Content Verification in eStargz".
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.chunks import PIECE_BYTES, ChunkTable, TableBuilder, check_sha256
from lazyfs.layers.deflate import Buffer
from lazyfs.layers.model import (
    HEAD_BYTES,
    LayerDescriptor,
    LayerFormat,
    LayerIndex,
    Opening,
    no_walk,
)
from lazyfs.layers.stargz_toc import PAYLOAD, read_stargz_toc

TOC_DIGEST_KEY = "containerd.io/snapshot/stargz/toc.digest"
"""Annotation: the digest of the TOC's JSON, uncompressed."""

TAIL_BYTES = 64 * KIB
"""Fetched to find the footer: the TOC of most checkpoints comes along."""
TOC_MOST_BYTES = 1024 * MIB
TOC_RATIO_MOST = 1000
"""Hex digests alone keep a real TOC below 20."""

_SKIP_BYTES = 64 * KIB


class TocPlace(NamedTuple):
    """Where the packed TOC lies, and where the stretches that it tells of end."""

    toc: ByteRange
    blob_stop: int


class Unpacker(Protocol):
    """Decompresses one stretch; used by one thread at a time."""

    def unpack(self, out: Buffer, start: int, stop: int) -> int:
        """Fill `out[start:stop]` and return its size; less only where the data ends.

        Raises:
            IntegrityError: the data is no compressed form of anything.
        """


class Packing(msgspec.Struct, frozen=True):
    """What eStargz needs to know of a compression."""

    find_toc: Callable[[bytes, int], TocPlace | None]
    """Where the TOC is, by the blob's tail and its size; None if there is no footer."""
    toc_json: Callable[[Data], Iterator[bytes]]
    """Unpacks the TOC, in pieces, and no more than `TOC_MOST_BYTES` of it."""
    unpacker: Callable[[Data], Unpacker]


def open_stargz(
    layer: LayerDescriptor, head: bytes, name: str, packing: Packing, otherwise: LayerFormat
) -> Opening:
    """Fetch, prove and read a TOC; where no footer tells of one, open as `otherwise` does.

    A layer may have been compressed anew by a tool that kept its annotations, or have its TOC
    in another image: then it is an ordinary layer, and proven as such.

    Raises:
        IntegrityError: the TOC contradicts its digest.
        MalformedError: it lies about offsets, sizes or names, or the footer or annotation does.
        UnsupportedLayer: another version of it.
    """
    promised = Digest.parse(layer.annotations[TOC_DIGEST_KEY])
    if not layer.size_bytes:
        raise MalformedError(f"a layer with the annotation {TOC_DIGEST_KEY} has no bytes at all")
    tail_start = max(0, layer.size_bytes - TAIL_BYTES)
    (tail,) = yield [ByteRange(tail_start, layer.size_bytes)]
    place = packing.find_toc(bytes(tail), layer.size_bytes)
    if place is None:
        if not head:
            (first,) = yield [ByteRange(0, min(HEAD_BYTES, layer.size_bytes))]
            head = bytes(first)
        return (yield from otherwise.open(layer, head))
    packed = yield from _packed_toc(place.toc, tail_start, tail)
    _check_toc(packing.toc_json(packed), promised, f"the {name} TOC")
    # Unpacked once more: nothing is parsed that is not proven, and none of it is kept.
    entries, builder, groups = read_stargz_toc(packing.toc_json(packed), place.blob_stop, name)
    return LayerIndex(
        format_name=name,
        cache_tag=f"stargz-1-{promised.hex}",
        chunks=StargzChunks(builder, groups, packing.unpacker),
        entries=entries,
        walk=no_walk(),
    )


def toc_place(toc: ByteRange, blob_stop: int, footer_start: int) -> TocPlace:
    """Return where a footer at `footer_start` says that the TOC is.

    Raises:
        MalformedError: it cannot be there.
    """
    if not 0 <= blob_stop <= toc.start < toc.stop <= footer_start:
        raise MalformedError(f"the footer at byte {footer_start} says that the TOC is {toc}")
    if toc.size_bytes > TOC_MOST_BYTES:
        raise MalformedError(f"the footer says that the TOC is {toc}: more than {TOC_MOST_BYTES}")
    return TocPlace(toc, blob_stop)


def _packed_toc(
    toc: ByteRange, tail_start: int, tail: Data
) -> Generator[Sequence[ByteRange], Sequence[Data], bytes]:
    """Return the TOC's bytes, asking for those that the tail does not hold."""
    if toc.start >= tail_start:
        return bytes(tail[toc.start - tail_start : toc.stop - tail_start])
    if toc.stop <= tail_start:
        (packed,) = yield [toc]
        return bytes(packed)
    (before,) = yield [ByteRange(toc.start, tail_start)]
    return bytes(before) + bytes(tail[: toc.stop - tail_start])


def _check_toc(pieces: Iterator[bytes], promised: Digest, what: str) -> None:
    hasher = promised.hasher()
    for piece in pieces:
        hasher.update(piece)
    if hasher.hexdigest() != promised.hex:
        raise IntegrityError(
            f"{what} does not match its digest: promised {promised}, "
            f"received {promised.algorithm}:{hasher.hexdigest()}"
        )


class StargzChunks(ChunkTable):
    """Stretches of the blob, each of one or more payloads, every one proven by its sha256."""

    proven = True

    def __init__(
        self,
        builder: TableBuilder,
        groups: Mapping[int, bytes],
        unpacker: Callable[[Data], Unpacker],
    ) -> None:
        super().__init__(builder)
        self._groups = groups
        self._unpacker = unpacker

    def decode(self, index: int, data: Data) -> Iterator[Data]:
        """Yield the chunk's content in pieces of at most `PIECE_BYTES`.

        Raises:
            IntegrityError: a payload is not what its digest promised, or not as long.
        """
        self.check_length(index, data)
        source = self._unpacker(data)
        out = Buffer(min(self.content_size(index), PIECE_BYTES))
        filled = position = 0
        for start, size_bytes, digest in self._payloads(index):
            what = f"chunk {index} ({self.blob_range(index)}, from {start} on)"
            _skip(source, start - position, what)
            position = start + size_bytes
            hasher = hashlib.sha256()
            left = size_bytes
            while left:
                stop = min(filled + left, len(out.view))
                _unpack(source, out, filled, stop, what)
                hasher.update(out.view[filled:stop])
                left -= stop - filled
                filled = stop
                if filled == len(out.view):
                    yield out.view
                    filled = 0
            check_sha256(what, digest, hasher)
        if filled:
            yield out.view[:filled]

    def _payloads(self, index: int) -> Iterator[tuple[int, int, bytes]]:
        packed = self._groups.get(index)
        if packed is None:
            return iter([(0, self.content_size(index), self.digest(index))])
        return PAYLOAD.iter_unpack(packed)


def _skip(source: Unpacker, size_bytes: int, what: str) -> None:
    """Decompress what belongs to nobody: headers and padding."""
    if not size_bytes:
        return
    out = Buffer(min(size_bytes, _SKIP_BYTES))
    while size_bytes:
        step = min(size_bytes, _SKIP_BYTES)
        _unpack(source, out, 0, step, what)
        size_bytes -= step


def _unpack(source: Unpacker, out: Buffer, start: int, stop: int, what: str) -> None:
    """Fill `out[start:stop]`.

    Raises:
        IntegrityError: the data ends before, or does not decompress.
    """
    if source.unpack(out, start, stop) != stop - start:
        raise IntegrityError(f"{what} decompresses to less than was promised")

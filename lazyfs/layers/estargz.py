"""eStargz: a tar in gzip members that begin where files do, with a TOC and a footer behind.

The TOC is the last member of the tar, `stargz.index.json`, in a gzip member of its own. The
footer is an empty gzip member whose extra field says where that is; 51 bytes, 47 in the first
version, which lacked the field's own header. To anybody else the blob is an ordinary gzip.

Source: stargz-snapshotter, `docs/estargz.md`, `estargz/types.go` (footer sizes) and
`estargz/gzip.go` (`gzipFooterBytes`, `ParseFooter`, `decompressTOCEStargz`); RFC 1952.
"""

import re
from collections.abc import Iterator

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB
from lazyfs.layers.deflate import (
    GZIP,
    Buffer,
    Inflater,
    PythonInflater,
    RestartInflater,
    Source,
    best_engine,
)
from lazyfs.layers.gzip import MAGIC, Gzip
from lazyfs.layers.model import LayerDescriptor, Opening
from lazyfs.layers.names import decode_name, entry_path
from lazyfs.layers.stargz import (
    TOC_DIGEST_KEY,
    TOC_MOST_BYTES,
    TOC_RATIO_MOST,
    Packing,
    TocPlace,
    open_stargz,
    toc_place,
)
from lazyfs.layers.stargz_toc import TOC_NAME
from lazyfs.layers.tar_header import BLOCK_BYTES, parse_header

_FOOTER = re.compile(
    rb"\x1f\x8b\x08\x04.{6}"  # a gzip header with an extra field, of whatever time and system
    rb"(?:\x1a\x00SG\x16\x00|\x16\x00)([0-9a-fA-F]{16})STARGZ"
    rb"\x01\x00\x00\xff\xff\x00{8}",  # one empty block, checksum and size of nothing
    re.DOTALL,
)
_FOOTER_SIZES_BYTES = (51, 47)
_TOC_PIECE_BYTES = 256 * KIB


class EStargz:
    """gzip layers with the annotation of eStargz."""

    name = "estargz"

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether an annotation names a TOC's digest, and the bytes, if any, are gzip's."""
        return TOC_DIGEST_KEY in layer.annotations and (not head or head.startswith(MAGIC))

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Fetch, prove and read the TOC; see `open_stargz`."""
        return open_stargz(layer, head, self.name, _PACKING, Gzip())


class Gunzip:
    """Decompresses gzip members one after the other; see `Unpacker`."""

    def __init__(self, data: Data, inflater: Inflater | None = None) -> None:
        """`inflater`: of one gzip member; the fastest there is, unless told."""
        engine = best_engine()
        fastest = PythonInflater(GZIP) if engine is None else RestartInflater(engine, GZIP)
        self._inflater: Inflater = inflater or fastest
        self._rest = memoryview(data)
        self._at_end = False

    def unpack(self, out: Buffer, start: int, stop: int) -> int:
        """Fill `out[start:stop]` and return its size; less only where the data ends.

        Raises:
            IntegrityError: it is no gzip, or a checksum is wrong.
        """
        filled = start
        with Source(self._rest) as source:
            try:
                while filled < stop and self._enter(source):
                    before = source.position
                    step = self._inflater.inflate(source, out, filled, stop)
                    filled += step.produced
                    self._at_end = step.ended
                    if not step.ended and not step.produced and source.position == before:
                        break
            except MalformedError as err:
                raise IntegrityError(f"gzip data does not decompress: {err}") from err
            self._rest = self._rest[source.position :]
        return filled - start

    def _enter(self, source: Source) -> bool:
        """Whether there is a member to go on with, or another one."""
        if not self._at_end:
            return True
        if source.left:
            self._inflater.reset()
            self._at_end = False
        return bool(source.left)


def find_toc(tail: bytes, blob_bytes: int) -> TocPlace | None:
    """Read the footer at the end of `tail`, which is that of a blob of `blob_bytes`.

    Returns None if there is none.

    Raises:
        MalformedError: the TOC cannot be where it says.
    """
    for size_bytes in _FOOTER_SIZES_BYTES:
        match = _FOOTER.fullmatch(tail[-size_bytes:])
        if match:
            start, stop = int(match[1], 16), blob_bytes - len(match[0])
            return toc_place(ByteRange(start, stop), start, stop)
    return None


def toc_json(packed: Data) -> Iterator[bytes]:
    """Unpack the JSON of a TOC, in pieces.

    Raises:
        IntegrityError: it does not decompress.
        MalformedError: there is no such file in it, or one that is too large or cut off.
    """
    source = Gunzip(packed)
    out = Buffer(_TOC_PIECE_BYTES)
    if source.unpack(out, 0, BLOCK_BYTES) != BLOCK_BYTES:
        raise MalformedError("the eStargz TOC is cut off within its tar header")
    header = parse_header(bytes(out.view[:BLOCK_BYTES]), 0)
    if entry_path(decode_name(header.name)) != TOC_NAME:
        raise MalformedError(f"the eStargz TOC is in a file {header.name[:100]!r}, not {TOC_NAME}")
    left = header.size_bytes
    if left > min(TOC_MOST_BYTES, TOC_RATIO_MOST * len(packed)):
        raise MalformedError(f"an eStargz TOC of {left} bytes in {len(packed)} cannot be")
    while left:
        got = source.unpack(out, 0, min(left, _TOC_PIECE_BYTES))
        if not got:
            raise MalformedError(f"the eStargz TOC is {left} bytes short")
        left -= got
        yield bytes(out.view[:got])


_PACKING = Packing(find_toc, toc_json, Gunzip)

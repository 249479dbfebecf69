"""zstd:chunked as stargz-snapshotter writes it: eStargz in zstd frames.

It has nothing but the name in common with Podman's (`zstd_chunked`): the TOC is eStargz's, its
digest is that of the JSON, and a frame holds a file's bytes and then tar headers. The TOC is a
skippable frame, and so is the footer of 40 bytes: four u64le (the packed TOC's offset and size,
its plain size, its type) and a magic.

The annotation `…manifest-checksum` is the digest of the packed TOC. It would prove as much, but
who writes it writes the other one too, and stargz-snapshotter itself reads that alone.

Source: stargz-snapshotter, `estargz/zstdchunked/zstdchunked.go` (`WriteTOCAndFooter`,
`zstdFooterBytes`, `ParseFooter`) and `nativeconverter/zstdchunked/zstdchunked.go` (annotations).
"""

import struct
from collections.abc import Iterator

from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB
from lazyfs.layers.deflate import Buffer
from lazyfs.layers.model import LayerDescriptor, Opening
from lazyfs.layers.seekable_zstd import SeekableZstd
from lazyfs.layers.stargz import (
    TOC_DIGEST_KEY,
    TOC_MOST_BYTES,
    TOC_RATIO_MOST,
    Packing,
    TocPlace,
    open_stargz,
    toc_place,
)
from lazyfs.layers.unzstd import Unzstd
from lazyfs.layers.zstd_chunked import FRAME_MAGIC

CHECKSUM_KEY = "io.containers.zstd-chunked.manifest-checksum"
"""Annotation that tells this variant from others; Podman's begins with `io.github`."""

_FOOTER = struct.Struct("<4sIQQQQ8s")
_FOOTER_FRAME = (b"\x50\x2a\x4d\x18", 40)
_FOOTER_MAGIC = b"GnUlInUx"
_FRAME_HEADER_BYTES = 8
_TOC_TYPE = 1
_TOC_PIECE_BYTES = 256 * KIB


class StargzZstd:
    """zstd layers with stargz-snapshotter's annotations."""

    name = "zstd:stargz"

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether an annotation names a TOC's digest, and bytes or annotations say zstd."""
        if TOC_DIGEST_KEY not in layer.annotations:
            return False
        return head.startswith(FRAME_MAGIC) if head else CHECKSUM_KEY in layer.annotations

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Fetch, prove and read the TOC; see `open_stargz`."""
        return open_stargz(layer, head, self.name, _PACKING, SeekableZstd())


def find_toc(tail: bytes, blob_bytes: int) -> TocPlace | None:
    """Read the footer at the end of `tail`, which is that of a blob of `blob_bytes`.

    Returns None if there is none.

    Raises:
        MalformedError: the TOC cannot be where it says.
    """
    if len(tail) < _FOOTER.size:
        return None
    *frame, start, size_bytes, _, kind, magic = _FOOTER.unpack(tail[-_FOOTER.size :])
    if (*frame, kind, magic) != (*_FOOTER_FRAME, _TOC_TYPE, _FOOTER_MAGIC):
        return None
    toc = ByteRange(start, start + size_bytes)
    return toc_place(toc, start - _FRAME_HEADER_BYTES, blob_bytes - _FOOTER.size)


def toc_json(packed: Data) -> Iterator[bytes]:
    """Unpack the JSON of a TOC, in pieces.

    Raises:
        IntegrityError: it does not decompress.
        MalformedError: it is too large.
    """
    left = min(TOC_MOST_BYTES, TOC_RATIO_MOST * len(packed))
    source = Unzstd(packed)
    out = Buffer(_TOC_PIECE_BYTES)
    while got := source.unpack(out, 0, _TOC_PIECE_BYTES):
        left -= got
        if left < 0:
            raise MalformedError(f"a TOC that unpacks to so much from {len(packed)} bytes")
        yield bytes(out.view[:got])


_PACKING = Packing(find_toc, toc_json, Unzstd)

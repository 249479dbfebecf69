"""zstd:chunked, as Podman, Buildah and Skopeo write it: a tar in zstd frames, and a TOC.

The manifest's annotations say where the TOC is and what its digest is, and the TOC holds the
digest of every chunk; so all that is read here is proven by the manifest. The tar headers in
the blob, its tar-split and its footer are not read at all.

Content layout "zstd-chunked-1": the regular files that are not empty, in the TOC's order, each
in one piece, each from a multiple of 4096 on; padding between them belongs to no file. Chunks
are the TOC's.

Source: containers/storage, `pkg/chunked/internal/minimal/compression.go` (the TOC, annotations)
and `pkg/chunked/compressor/compressor.go` (what is written). Checks are stricter than theirs:
frames must follow each other in the blob in the TOC's order, as every writer puts them.
"""

import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, MalformedError, UnsupportedLayer
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.chunks import PIECE_BYTES, TableChunks
from lazyfs.layers.model import LayerDescriptor, LayerIndex, Opening, no_walk
from lazyfs.layers.toc import read_toc

POSITION_KEY = "io.github.containers.zstd-chunked.manifest-position"
CHECKSUM_KEY = "io.github.containers.zstd-chunked.manifest-checksum"

FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
"""RFC 8878, section 3.1.1."""
TOC_TYPE = 1
"""`ManifestTypeCRFS`, the only one there is."""
TOC_MOST_BYTES = 1024 * MIB
TOC_RATIO_MOST = 1000
"""Hex digests alone keep a real TOC below 10."""
FRAME_HEADER_BYTES = 8
"""Of the skippable frame around the TOC: RFC 8878, section 3.1.2."""
WINDOW_MOST_BYTES = 128 * MIB
"""The largest that decoders accept unasked (`ZSTD_WINDOWLOG_LIMIT_DEFAULT`)."""

_POSITION = re.compile(r"([0-9]{1,19}):([0-9]{1,19}):([0-9]{1,19}):([0-9]{1,19})")
_TOC_PIECE_BYTES = 256 * KIB


class TocPosition(NamedTuple):
    """Where the compressed TOC lies in the blob, and its size when decompressed."""

    blob: ByteRange
    plain_bytes: int

    @classmethod
    def parse(cls, text: str, layer_bytes: int) -> "TocPosition":
        """Read the annotation `offset:length:uncompressed length:type`.

        Raises:
            MalformedError: not of that form, outside the layer, or of sizes that cannot be.
            UnsupportedLayer: a TOC of another type.
        """
        match = _POSITION.fullmatch(text)
        if not match:
            raise MalformedError(f"annotation {POSITION_KEY}={text[:200]!r} is not a:b:c:d")
        offset, size, plain, kind = map(int, match.groups())
        if kind != TOC_TYPE:
            raise UnsupportedLayer(f"zstd:chunked TOC of type {kind}; only {TOC_TYPE} is known")
        if not FRAME_HEADER_BYTES <= offset < offset + size <= layer_bytes:
            raise MalformedError(
                f"annotation {POSITION_KEY}={text!r} points outside a layer of {layer_bytes} bytes"
            )
        if not 0 < plain <= min(TOC_MOST_BYTES, TOC_RATIO_MOST * size) or size > TOC_MOST_BYTES:
            raise MalformedError(f"annotation {POSITION_KEY}={text!r}: a TOC cannot have this size")
        return cls(ByteRange(offset, offset + size), plain)


class ZstdChunked:
    """Layers with the annotations of zstd:chunked."""

    name = "zstd:chunked"

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether annotations name a TOC and its digest, and the bytes, if any, are zstd's."""
        annotated = POSITION_KEY in layer.annotations and CHECKSUM_KEY in layer.annotations
        return annotated and (not head or head.startswith(FRAME_MAGIC))

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Fetch, prove and read the TOC.

        Raises:
            IntegrityError: it contradicts its digest or its promised size.
            MalformedError: it lies about offsets, sizes or names, or the annotations do.
            UnsupportedLayer: another version or type of it.
        """
        checksum = Digest.parse(layer.annotations[CHECKSUM_KEY])
        position = TocPosition.parse(layer.annotations[POSITION_KEY], layer.size_bytes)
        (packed,) = yield [position.blob]
        checksum.check(packed, "the zstd:chunked TOC")
        entries, builder = read_toc(
            _toc_pieces(packed, position.plain_bytes),
            blob_stop=position.blob.start - FRAME_HEADER_BYTES,
        )
        return LayerIndex(
            format_name=self.name,
            cache_tag=f"zstd-chunked-1-{checksum.hex}",
            chunks=TableChunks(builder, decompress),
            entries=entries,
            walk=no_walk(),
        )


def decompress(data: Data, size_bytes: int) -> Iterator[Data] | tuple[Data, ...]:
    """Decompress one zstd frame; see `lazyfs.layers.chunks.Decompress`."""
    try:
        declared = zstandard.frame_content_size(data)
        if declared not in (-1, size_bytes):
            raise IntegrityError(_promised(size_bytes, f"a frame that declares {declared}"))
        if size_bytes > PIECE_BYTES:
            return _decompress_large(data, size_bytes)
        content = _thread.decompressor.decompress(data, max_output_size=size_bytes)
    except zstandard.ZstdError as err:
        raise IntegrityError(_promised(size_bytes, f"what does not decompress: {err}")) from err
    if len(content) != size_bytes:
        raise IntegrityError(_promised(size_bytes, f"{len(content)}"))
    return (content,)


def _decompress_large(data: Data, size_bytes: int) -> Iterator[Data]:
    # A decompressor of its own: between two pieces this thread may decode other chunks.
    buffer = memoryview(bytearray(PIECE_BYTES))
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MOST_BYTES)
    done = 0
    try:
        with decompressor.stream_reader(data) as reader:
            while done < size_bytes:
                got = _fill(reader, buffer[: size_bytes - done])
                if not got:
                    raise IntegrityError(_promised(size_bytes, f"{done}"))
                done += got
                yield buffer[:got]
            if reader.read(1):
                raise IntegrityError(_promised(size_bytes, "more"))
    except zstandard.ZstdError as err:
        raise IntegrityError(_promised(size_bytes, f"what does not decompress: {err}")) from err


def _fill(reader: zstandard.ZstdDecompressionReader, buffer: memoryview) -> int:
    """Read until `buffer` is full or the frame ends; return how many bytes were read."""
    filled = 0
    while filled < len(buffer):
        got = reader.readinto(buffer[filled:])
        if not got:
            break
        filled += got
    return filled


def _toc_pieces(packed: Data, plain_bytes: int) -> Iterator[bytes]:
    """Decompress the TOC; never more than its promised size, and all of it."""
    left = plain_bytes
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MOST_BYTES)
    try:
        with decompressor.stream_reader(packed, read_across_frames=True) as reader:
            while piece := reader.read(min(_TOC_PIECE_BYTES, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise MalformedError(f"the zstd:chunked TOC exceeds {plain_bytes} bytes")
                yield piece
    except zstandard.ZstdError as err:
        raise MalformedError(f"the zstd:chunked TOC does not decompress: {err}") from err
    if left:
        raise MalformedError(f"the zstd:chunked TOC is {left} bytes short of {plain_bytes}")


def _promised(size_bytes: int, got: str) -> str:
    return f"a chunk should hold {size_bytes} bytes, but it holds {got}"


class _Thread(threading.local):
    """What each thread has for itself: zstd contexts must not be shared."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MOST_BYTES)


_thread = _Thread()

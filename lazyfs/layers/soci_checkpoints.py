"""The checkpoints of a zTOC: where the deflate stream of a gzip layer can be taken up.

Little-endian: i32 count, i64 span size, then for each checkpoint i64 compressed offset, i64
uncompressed offset, u8 bits, and 32 KiB that precede it, zeros in front of the content's start.
The older version leaves the first one out: it takes a gzip header to be 10 bytes.

Span i is decoded, and its digest computed, from the byte that holds the first of its bits up to
where span i + 1 has its first whole byte: neighbours share a byte where a block does not end with
one. The gzip header belongs to no span; the last span goes to the blob's end, trailer and all.

Source: soci-snapshotter, `ztoc/compression/gzip_zinfo.c` (`blob_to_zinfo`, `zinfo_to_blob`),
`gzip_zinfo.go` (`StartCompressedOffset`, `EndCompressedOffset`), `ztoc/zinfo_builder.go`
(`getPerSpanDigests`).
"""

import struct
from array import array

import msgspec

from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.layers.chunks import BLOB_CHUNK_MOST_BYTES
from lazyfs.layers.restart import WINDOW_BYTES

GZIP_HEADER_LEAST_BYTES = 10
"""RFC 1952, section 2.3."""

DEFLATE_RATIO_MOST = 1032
"""A length of 258 in two bits; zlib's "Technical Details", "Maximum Compression Factor"."""

_HEADER = struct.Struct("<iq")
_POINT = struct.Struct("<qqB")
_STRIDE_BYTES = _POINT.size + WINDOW_BYTES
_BITS_MOST = 7


class Checkpoints(msgspec.Struct, frozen=True):
    """Columns of restart points; see `lazyfs.layers.restart.RestartPoint` for their meaning."""

    blob_starts: "array[int]"
    bits: "array[int]"
    content_starts: "array[int]"
    _windows: memoryview
    _left_out: int

    def __len__(self) -> int:
        return len(self.blob_starts)

    @property
    def first_is_assumed(self) -> bool:
        """Whether the gzip header was taken to be 10 bytes long, and not looked at."""
        return bool(self._left_out)

    def window(self, index: int) -> memoryview:
        """The content's last bytes before a point: a view of the zTOC, as long as they matter."""
        known = min(self.content_starts[index], WINDOW_BYTES)
        stop = (index + 1 - self._left_out) * _STRIDE_BYTES
        return self._windows[stop - known : stop]

    def check(self, blob_bytes: int, content_bytes: int) -> None:
        """See that these points can be of a layer of such sizes.

        Raises:
            MalformedError: they cannot: out of order, outside of it, or more content between
                two of them than deflate can hold.
            UnsupportedLayer: the layer can be entered in too few places.
        """
        if self.blob_starts[0] < GZIP_HEADER_LEAST_BYTES or self.content_starts[0] or self.bits[0]:
            raise MalformedError("the zTOC's first checkpoint is not at the start of the content")
        blob_stops = [*self.blob_starts[1:], blob_bytes]
        content_stops = [*self.content_starts[1:], content_bytes]
        largest_bytes = 0
        for index, (blob_stop, content_stop) in enumerate(
            zip(blob_stops, content_stops, strict=True)
        ):
            packed = blob_stop - self.blob_starts[index]
            content = content_stop - self.content_starts[index]
            if packed <= 0 or not 0 < content <= DEFLATE_RATIO_MOST * (packed + 1):
                raise MalformedError(
                    f"the zTOC's span {index} is said to hold {content} bytes in {packed}"
                )
            largest_bytes = max(largest_bytes, packed)
        if largest_bytes >= BLOB_CHUNK_MOST_BYTES:
            raise UnsupportedLayer(
                f"the zTOC has a span of {largest_bytes} bytes; make the index anew with a "
                "current soci, or with a smaller --span-size"
            )


def read_checkpoints(data: memoryview) -> Checkpoints:
    """Read the checkpoints of a gzip zTOC; windows stay where they are.

    Raises:
        MalformedError: they are not as many as they say, or numbers that cannot be.
    """
    if len(data) < _HEADER.size:
        raise MalformedError("the zTOC has no checkpoints")
    count, _ = _HEADER.unpack_from(data)
    written, rest = divmod(len(data) - _HEADER.size, _STRIDE_BYTES)
    left_out = count - written
    if count < 1 or rest or left_out not in (0, 1):
        raise MalformedError(
            f"the zTOC says that it has {count} checkpoints, in {len(data)} bytes of them"
        )
    first = [(GZIP_HEADER_LEAST_BYTES, 0, 0)] * left_out
    points = first + [
        _POINT.unpack_from(data, _HEADER.size + index * _STRIDE_BYTES) for index in range(written)
    ]
    for blob_start, content_start, bits in points:
        if min(blob_start, content_start) < 0 or bits > _BITS_MOST:
            raise MalformedError(
                f"the zTOC has a checkpoint at bytes {blob_start} and {content_start}, bit {bits}"
            )
    return Checkpoints(
        blob_starts=array("Q", [point[0] for point in points]),
        bits=array("B", [point[2] for point in points]),
        content_starts=array("Q", [point[1] for point in points]),
        _windows=data[_HEADER.size :],
        _left_out=left_out,
    )

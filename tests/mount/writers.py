"""Writes layers in the forms that tests/images.py does not: compressed ones, and their indexes."""

import gzip
import io
import tarfile
import zlib

import xxhash
import zstandard

from tests.images import Files, Layer, go_time, tar_bytes
from tests.layers.stargz_writer import TYPES
from tests.layers.test_seekable_zstd import table_of
from tests.layers.ztoc_writer import File, Point, Ztoc, checkpoints, span_digests

GZIP_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
SPAN_BYTES = 256 * 1024
_WINDOW_BYTES = 32 * 1024
_LEVEL = 1


def gzip_layer(files: Files) -> Layer:
    """As everybody pushes it."""
    return Layer(gzipped(tar_bytes(files)), {}, GZIP_TYPE)


def zstd_layer(files: Files) -> Layer:
    """One frame."""
    return Layer(zstded(tar_bytes(files)), {}, ZSTD_TYPE)


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, _LEVEL, mtime=0)


def zstded(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(_LEVEL, write_checksum=True).compress(data)


def seekable_layer(files: Files) -> Layer:
    """Frames of 256 KiB, and a seek table with checksums."""
    content, packer = tar_bytes(files), zstandard.ZstdCompressor(_LEVEL)
    blob, rows = bytearray(), []
    for start in range(0, len(content), SPAN_BYTES):
        piece = content[start : start + SPAN_BYTES]
        frame = packer.compress(piece)
        blob += frame
        rows.append((len(frame), len(piece), xxhash.xxh64_intdigest(piece) & 0xFFFFFFFF))
    return Layer(bytes(blob) + table_of(rows), {}, ZSTD_TYPE)


def soci_layer(files: Files) -> Layer:
    """A gzip layer that can be entered every 256 KiB, and the zTOC that says so."""
    content = tar_bytes(files)
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15)
    blob, points = bytearray(b"\x1f\x8b\x08" + bytes(6) + b"\xff"), []
    for start in range(0, len(content), SPAN_BYTES):
        window = content[max(0, start - _WINDOW_BYTES) : start]
        points.append(Point(len(blob), start, window=window))
        blob += packer.compress(content[start : start + SPAN_BYTES])
        blob += packer.flush(zlib.Z_FULL_FLUSH)
    blob += packer.flush() + zlib.crc32(content).to_bytes(4, "little")
    blob += len(content).to_bytes(4, "little")
    ztoc = Ztoc(
        compressed=len(blob),
        uncompressed=len(content),
        files=_rows(content),
        digests=span_digests(bytes(blob), points),
        checkpoints=checkpoints(points),
    )
    return Layer(bytes(blob), {}, GZIP_TYPE, ztoc.write())


def _rows(content: bytes) -> list[File]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [
            File(
                name=info.name,
                offset=info.offset_data,
                size=info.size,
                type=TYPES[info.type],
                link=info.linkname,
                mode=info.mode,
                uid=info.uid,
                gid=info.gid,
                modified=go_time(int(info.mtime // 1), info.mtime % 1),
            )
            for info in archive
        ]

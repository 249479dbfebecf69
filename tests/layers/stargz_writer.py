"""Writes eStargz, in gzip or zstd, cut as a test wants it.

After stargz-snapshotter, `estargz/estargz.go` (`appendTar`): what begins with a file or a chunk
goes on with the padding and the headers of what follows, up to the next one.
"""

import base64
import hashlib
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import zstandard

from tests.images import Files, Layer, Member, members, tar_bytes

DIGEST_KEY = "containerd.io/snapshot/stargz/toc.digest"
ZSTD_KEYS = "io.containers.zstd-chunked."
LANDMARK = Member(".no.prefetch.landmark", b"\x0f")
TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.DIRTYPE: "dir",
    tarfile.CHRTYPE: "char",
    tarfile.FIFOTYPE: "fifo",
}
Toc = dict[str, Any]


def gzipped(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def zstded(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


@dataclass
class Stretches:
    """The blob so far: whole stretches, and one that still grows."""

    pack: Callable[[bytes], bytes]
    least_bytes: int
    """Of decompressed bytes in a stretch, before another one begins."""
    blob: bytearray = field(default_factory=bytearray)
    current: bytearray = field(default_factory=bytearray)

    def place(self, *, anew: bool) -> tuple[int, int]:
        """Return offset and inner offset of what is written next."""
        if anew or len(self.current) >= self.least_bytes:
            self.finish()
        return len(self.blob), len(self.current)

    def finish(self) -> None:
        if self.current:
            self.blob += self.pack(bytes(self.current))
        self.current.clear()


def stargz_body(
    files: Files, pack: Callable[[bytes], bytes], chunk_bytes: int, least_bytes: int
) -> tuple[bytes, Toc]:
    """Return the stretches and their TOC."""
    out = Stretches(pack, least_bytes)
    entries: list[Toc] = []
    for member in [LANDMARK, *members(files)]:
        info = member.info()
        out.current += info.tobuf(tarfile.PAX_FORMAT)
        first: Toc = {"name": member.name, "type": TYPES[member.type], "mode": member.mode}
        first |= {"uid": member.uid, "gid": member.gid, "linkName": member.link}
        first["size"] = info.size
        if member.mtime:
            when = datetime.fromtimestamp(int(member.mtime), UTC)
            first["modtime"] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
        first["xattrs"] = {"user.x": base64.b64encode(b"x").decode()} if member.pax else None
        entries.append(first)
        data = member.data if info.size else b""
        for start in range(0, len(data), chunk_bytes):
            piece = data[start : start + chunk_bytes]
            row: Toc = first if not start else {"name": member.name, "type": "chunk"}
            offset, inner = out.place(anew=member is LANDMARK)
            row |= {"offset": offset, "innerOffset": inner, "chunkOffset": start}
            row["chunkSize"] = len(piece) if len(piece) == chunk_bytes else 0
            row["chunkDigest"] = f"sha256:{hashlib.sha256(piece).hexdigest()}"
            out.current += piece
            if start:
                entries.append(row)
        if data:
            first["digest"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        out.current += bytes(-len(data) % 512)
    out.finish()
    entries = [
        {key: value for key, value in row.items() if value or key == "name"} for row in entries
    ]
    return bytes(out.blob), {"version": 1, "entries": entries}


def toc_text(toc: Toc) -> bytes:
    """Return the JSON as Go writes it."""
    return json.dumps(toc, indent="\t", ensure_ascii=False).encode()


def gzip_footer(position: int, *, legacy: bool = False) -> bytes:
    extra = b"%016xSTARGZ" % position
    if not legacy:
        extra = b"SG" + struct.pack("<H", len(extra)) + extra
    return empty_member(extra)


def empty_member(extra: bytes) -> bytes:
    """Return an empty gzip member with an extra field."""
    header = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra))
    return header + extra + b"\x01\0\0\xff\xff" + bytes(8)


def with_gzip_toc(body: bytes, text: bytes, *, legacy: bool = False) -> Layer:
    """Return an eStargz layer of the stretches and a TOC of the given JSON."""
    toc = gzipped(tar_bytes({"stargz.index.json": text}, tarfile.USTAR_FORMAT))
    blob = body + toc + gzip_footer(len(body), legacy=legacy)
    annotations = {DIGEST_KEY: f"sha256:{hashlib.sha256(text).hexdigest()}"}
    return Layer(blob, annotations, "application/vnd.oci.image.layer.v1.tar+gzip")


def with_zstd_toc(body: bytes, text: bytes) -> Layer:
    """Return a layer of stargz' zstd variant, of the stretches and a TOC of the given JSON."""
    packed = zstded(text)
    position = len(body) + 8
    footer = struct.pack("<QQQQ8s", position, len(packed), len(text), 1, b"GnUlInUx")
    blob = body + skippable(packed) + skippable(footer)
    annotations = {
        DIGEST_KEY: f"sha256:{hashlib.sha256(text).hexdigest()}",
        ZSTD_KEYS + "manifest-checksum": f"sha256:{hashlib.sha256(packed).hexdigest()}",
        ZSTD_KEYS + "manifest-position": f"{position}:{len(packed)}:{len(text)}:1",
    }
    return Layer(blob, annotations, "application/vnd.oci.image.layer.v1.tar+zstd")


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(data)) + data


def estargz(
    files: Files,
    *,
    chunk_bytes: int = 4 * 2**20,
    least_bytes: int = 0,
    edit: Callable[[Toc], None] = lambda toc: None,
) -> Layer:
    """Return an eStargz layer; `edit` may falsify the TOC before it is written."""
    body, toc = stargz_body(files, gzipped, chunk_bytes, least_bytes)
    edit(toc)
    return with_gzip_toc(body, toc_text(toc))


def stargz_zstd(
    files: Files,
    *,
    chunk_bytes: int = 4 * 2**20,
    least_bytes: int = 0,
    edit: Callable[[Toc], None] = lambda toc: None,
) -> Layer:
    """Return a layer of stargz' zstd variant."""
    body, toc = stargz_body(files, zstded, chunk_bytes, least_bytes)
    edit(toc)
    return with_zstd_toc(body, toc_text(toc))

"""Writes small layers, for tests and benches: plain tars, and zstd:chunked as Podman writes it.

The zstd:chunked writer follows containers/storage, `pkg/chunked/compressor/compressor.go`, but
cuts files where it is told to, so that a test can have the chunks it wants.
"""

import base64
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import zstandard

KEYS = "io.github.containers.zstd-chunked."
SKIPPABLE = bytes((0x50, 0x2A, 0x4D, 0x18))
HOLE_BYTES = 1024
"""Zeros in a row from which Podman's writer makes a chunk of zeros."""


@dataclass(frozen=True)
class Member:
    """One member of an archive; a mapping from names to bytes is made into these."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = 0
    pax: dict[str, str] = field(default_factory=dict)

    def info(self) -> tarfile.TarInfo:
        """Return the member as tarfile wants it."""
        info = tarfile.TarInfo(self.name)
        info.size = len(self.data) if self.type == tarfile.REGTYPE else 0
        info.type, info.linkname, info.mode = self.type, self.link, self.mode
        info.uid, info.gid, info.mtime = self.uid, self.gid, self.mtime
        info.pax_headers = dict(self.pax)
        return info


@dataclass(frozen=True)
class Layer:
    """A layer's blob, and what the manifest says of it."""

    blob: bytes
    annotations: dict[str, str]
    media_type: str
    ztoc: bytes = b""
    """A SOCI index of it, which is a blob of its own."""

    @cached_property
    def digest(self) -> str:
        """The blob's digest."""
        return f"sha256:{hashlib.sha256(self.blob).hexdigest()}"


Files = Mapping[str, bytes] | Sequence[Member]
Cut = Callable[[bytes], Iterator[tuple[bytes, bool]]]
"""Cuts a file into chunks: the bytes, and whether it is a chunk of zeros."""


def members(files: Files) -> list[Member]:
    """Return `files` as members; names that end in "/" are directories."""
    if not isinstance(files, Mapping):
        return list(files)
    return [
        Member(name, data, type=tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE)
        for name, data in files.items()
    ]


def tar_bytes(files: Files, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of the files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for member in members(files):
            archive.addfile(member.info(), io.BytesIO(member.data))
    return out.getvalue()


def tar_layer(files: Files, tar_format: int = tarfile.PAX_FORMAT) -> Layer:
    """Return a plain tar layer."""
    return Layer(tar_bytes(files, tar_format), {}, "application/vnd.oci.image.layer.v1.tar")


def cut_evenly(chunk_bytes: int) -> Cut:
    """Cut every `chunk_bytes`; pieces of nothing but 1 KiB zeros or more become holes."""

    def cut(data: bytes) -> Iterator[tuple[bytes, bool]]:
        for start in range(0, len(data), chunk_bytes):
            piece = data[start : start + chunk_bytes]
            yield piece, len(piece) >= HOLE_BYTES and not any(piece)

    return cut


def zstd_chunked(
    files: Files,
    *,
    cut: Cut | None = None,
    level: int = 3,
    content_size: bool = True,
    edit: Callable[[dict[str, Any]], None] = lambda toc: None,
) -> Layer:
    """Return a zstd:chunked layer; `edit` may falsify the TOC before it is written.

    `content_size`: whether frames declare how much they hold; Podman's large ones do not.
    """
    cut = cut or cut_evenly(64 * 1024)
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=content_size)
    blob = bytearray()
    entries: list[dict[str, Any]] = []
    for member in members(files):
        info = member.info()
        # The header in front of the data: Podman compresses it as a frame of its own.
        blob += compressor.compress(info.tobuf(tarfile.PAX_FORMAT))
        entries += _entries(member, blob, cut, compressor)
        blob += compressor.compress(bytes(-len(member.data) % 512))
    blob += compressor.compress(bytes(1024))
    toc = {"version": 1, "entries": entries, "tarSplitDigest": "sha256:" + "0" * 64}
    edit(toc)
    text = json.dumps(toc, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "surrogateescape"
    )
    return with_toc(bytes(blob), text)


def with_toc(frames: bytes, text: bytes) -> Layer:
    """Return a layer of the frames and a TOC of the given JSON."""
    packed = zstandard.ZstdCompressor().compress(text)
    tar_split = zstandard.ZstdCompressor().compress(b"")
    blob = bytearray(frames)
    blob += SKIPPABLE + struct.pack("<I", len(packed))
    position = len(blob)
    blob += packed + SKIPPABLE + struct.pack("<I", len(tar_split))
    split_position = len(blob)
    footer = (position, len(packed), len(text), 1, split_position, len(tar_split), 0)
    blob += tar_split + SKIPPABLE + struct.pack("<I7Q8s", 64, *footer, b"GNUlInUx")
    annotations = {
        KEYS + "manifest-checksum": f"sha256:{hashlib.sha256(packed).hexdigest()}",
        KEYS + "manifest-position": f"{position}:{len(packed)}:{len(text)}:1",
        KEYS + "tarsplit-position": f"{split_position}:{len(tar_split)}:0",
    }
    return Layer(bytes(blob), annotations, "application/vnd.oci.image.layer.v1.tar+zstd")


_TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.DIRTYPE: "dir",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}


def _entries(
    member: Member, blob: bytearray, cut: Cut, compressor: zstandard.ZstdCompressor
) -> list[dict[str, Any]]:
    seconds, fraction = divmod(member.mtime, 1)
    first: dict[str, Any] = {
        "type": _TYPES[member.type],
        "name": member.name,
        "mode": member.mode,
        "uid": member.uid,
        "gid": member.gid,
        "modtime": go_time(int(seconds), fraction),
        "xattrs": {"user.test": base64.b64encode(b"x").decode()},
    }
    if member.link:
        first["linkName"] = member.link
    if not member.data or member.type != tarfile.REGTYPE:
        return [first]
    first |= {"size": len(member.data), "digest": _digest(member.data), "offset": len(blob)}
    rows = [first]
    chunk_offset = 0
    for index, (piece, zeros) in enumerate(cut(member.data)):
        if index:
            rows.append({"type": "chunk", "name": member.name, "offset": len(blob)})
        rows[-1] |= {
            "chunkSize": len(piece),
            "chunkOffset": chunk_offset,
            "chunkDigest": _digest(piece),
            "chunkType": "zeros" if zeros else "",
        }
        blob += compressor.compress(piece)
        chunk_offset += len(piece)
    first["endOffset"] = len(blob)
    if len(rows) == 1:
        for key in ("chunkSize", "chunkOffset", "chunkDigest", "chunkType"):
            del first[key]
    return [{key: value for key, value in row.items() if value not in ("", 0)} for row in rows]


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def go_time(seconds: int, fraction: float) -> str:
    """Write a time as Go's RFC3339Nano."""
    from datetime import UTC, datetime

    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    digits = f"{round(fraction * 10**9):09d}".rstrip("0")
    return f"{text}.{digits}Z" if digits else f"{text}Z"

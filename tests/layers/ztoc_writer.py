"""Writes zTOCs with Google's flatbuffers, as SOCI does, for any gzip blob, and wrong ones.

Sources: soci-snapshotter, `ztoc/fbs/ztoc.fbs`, `ztoc/ztoc_marshaler.go`,
`ztoc/compression/gzip_zinfo.c`.
"""

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers  # type: ignore[import-untyped]


@dataclass(frozen=True)
class File:
    """A row of the table of contents."""

    name: str
    offset: int
    size: int = 0
    type: str = "reg"
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    modified: str = "2023-11-14T22:13:20Z"
    pax: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A checkpoint: see `RestartPoint`."""

    blob: int
    content: int
    bits: int = 0
    window: bytes = b""

    def packed(self) -> bytes:
        head = struct.pack("<qqB", self.blob, self.content, self.bits)
        return head + self.window.rjust(32 * 1024, b"\0")


def checkpoints(points: Sequence[Point], *, left_out: int = 0, count: int | None = None) -> bytes:
    """Return the blob of checkpoints; `left_out` 1: as the older version has it."""
    head = struct.pack("<iq", len(points) if count is None else count, 1 << 22)
    return head + b"".join(point.packed() for point in points[left_out:])


def span_digests(blob: bytes, points: Sequence[Point]) -> list[str]:
    """Return the digests as `getPerSpanDigests` computes them."""
    starts = [point.blob - bool(point.bits) for point in points]
    stops = [*(point.blob for point in points[1:]), len(blob)]
    return [
        f"sha256:{hashlib.sha256(blob[start:stop]).hexdigest()}"
        for start, stop in zip(starts, stops, strict=True)
    ]


@dataclass
class Ztoc:
    """What is written; None leaves a field out."""

    compressed: int = 0
    uncompressed: int = 0
    files: Sequence[File] | None = ()
    digests: Sequence[str] = ()
    checkpoints: bytes = b""
    version: str = "0.9"
    algorithm: int | None = None
    max_span_id: int | None = None
    no_compression_info: bool = False

    def write(self) -> bytes:
        builder = flatbuffers.Builder(1024)
        version = builder.CreateString(self.version)
        toc = None if self.files is None else _toc(builder, self.files)
        packing = None if self.no_compression_info else self._packing(builder)
        builder.StartObject(6)
        _offset(builder, 0, version)
        _number(builder.PrependInt64Slot, 2, self.compressed)
        _number(builder.PrependInt64Slot, 3, self.uncompressed)
        _offset(builder, 4, toc)
        _offset(builder, 5, packing)
        builder.Finish(builder.EndObject())
        return bytes(builder.Output())

    def _packing(self, builder: Any) -> int:
        points = builder.CreateByteVector(self.checkpoints)
        digests = _vector(builder, [builder.CreateString(each) for each in self.digests])
        last = len(self.digests) - 1 if self.max_span_id is None else self.max_span_id
        builder.StartObject(4)
        builder.PrependInt8Slot(0, self.algorithm or 1, 1)
        _number(builder.PrependInt32Slot, 1, last)
        _offset(builder, 2, digests)
        _offset(builder, 3, points)
        return int(builder.EndObject())


def _number(prepend: Callable[[int, int, int], None], slot: int, value: int) -> None:
    prepend(slot, value, 0)


def _offset(builder: Any, slot: int, value: int | None) -> None:
    if value is not None:
        builder.PrependUOffsetTRelativeSlot(slot, value, 0)


def _vector(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _toc(builder: Any, files: Sequence[File]) -> int:
    rows = _vector(builder, [_file(builder, file) for file in files])
    builder.StartObject(1)
    _offset(builder, 0, rows)
    return int(builder.EndObject())


def _file(builder: Any, file: File) -> int:
    texts = {
        0: file.name,
        1: file.type,
        4: file.link,
        8: "root",
        9: "root",
        10: file.modified,
    }
    strings = {
        slot: builder.CreateString(text, "utf-8", "surrogateescape") for slot, text in texts.items()
    }
    records = _vector(builder, [_record(builder, *item) for item in file.pax.items()])
    builder.StartObject(14)
    for slot, string in strings.items():
        _offset(builder, slot, string)
    _number(builder.PrependInt64Slot, 2, file.offset)
    _number(builder.PrependInt64Slot, 3, file.size)
    _number(builder.PrependInt64Slot, 5, file.mode)
    _number(builder.PrependUint32Slot, 6, file.uid)
    _number(builder.PrependUint32Slot, 7, file.gid)
    _offset(builder, 13, records)
    return int(builder.EndObject())


def _record(builder: Any, key: str, value: str) -> int:
    pair = builder.CreateString(key), builder.CreateString(value)
    builder.StartObject(2)
    _offset(builder, 0, pair[0])
    _offset(builder, 1, pair[1])
    return int(builder.EndObject())

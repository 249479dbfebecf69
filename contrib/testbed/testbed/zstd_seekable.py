"""Seekable zstd: frames that decompress by themselves, and a seek table behind them.

The layout is the zstd project's (contrib/seekable_format/zstd_seekable_compression_format.md).
No tool of Debian writes it: the frames are the zstd command's, the table is written here.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

from .process import run

_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEK_TABLE_MAGIC = 0x8F92EAB1
_CHECKSUMS = 0x80


def write_seekable(
    source: Path, target: Path, *, frame_bytes: int = 1 << 20, checksums: bool = True
) -> None:
    """Compress a file into frames of `frame_bytes` of its content each.

    With `checksums` the table has each frame's too: the low half of the XXH64 of its content,
    which is what the frame itself ends with.
    """
    table: list[bytes] = []
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        source.open("rb") as plain,
        target.open("wb") as out,
    ):
        pieces: list[Path] = []
        while piece := plain.read(frame_bytes):
            pieces.append(Path(scratch, f"{len(pieces):08}"))
            pieces[-1].write_bytes(piece)
        run(["zstd", "-q", "--rm", "--check", *pieces], timeout_s=600)
        for path in pieces:
            frame = path.with_name(f"{path.name}.zst").read_bytes()
            size = min(frame_bytes, source.stat().st_size - len(table) * frame_bytes)
            entry = struct.pack("<II", len(frame), size)
            table.append(entry + frame[-4:] if checksums else entry)
            out.write(frame)
        footer = struct.pack("<IBI", len(table), _CHECKSUMS * checksums, _SEEK_TABLE_MAGIC)
        content = b"".join(table) + footer
        out.write(struct.pack("<II", _SKIPPABLE_MAGIC, len(content)) + content)

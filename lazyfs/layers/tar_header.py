"""The 512-byte tar header and its extensions: bytes in, values out.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual,
"Basic Tar Format" (its magic, base-256 numbers, types K, L, S). Where these are silent, what
Python's tarfile and Go's archive/tar agree upon; extended attributes are star's records
(`SCHILY.xattr.NAME`), which all of them write.
"""

import re
from typing import NamedTuple

from lazyfs.ground.errors import MalformedError, UnsupportedLayer

BLOCK_BYTES = 512

_ZERO_BLOCK = bytes(BLOCK_BYTES)
_POSIX_MAGIC = b"ustar\0"
_STAR_TRAILER = b"tar\0"
_CHECKSUM = slice(148, 156)
_UNSIGNED = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
_OCTAL = re.compile(rb"[0-7]*")
_TIME_MOST_NS = 2**63 - 1
_ID_MOST = 2**32 - 1
_XATTR = b"SCHILY.xattr."
_XATTRS_MOST_BYTES = 64 * 1024
"""Linux, `limits.h`: XATTR_SIZE_MAX, and of a file's names together XATTR_LIST_MAX."""


class Header(NamedTuple):
    """One header, its names as the bytes they are."""

    type: bytes
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size_bytes: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...] = ()


def is_zero_block(block: bytes) -> bool:
    """Whether the block is one of those that end an archive."""
    return block == _ZERO_BLOCK


def parse_header(block: bytes, at: int) -> Header:
    """Read the header in `block`, which lies at `at` in the archive.

    Raises:
        MalformedError: its checksum or a number in it is wrong.
    """
    if not block[_CHECKSUM].strip(b"\0 "):  # else zeros would be right for signed bytes that add up
        raise MalformedError(f"no tar header at byte {at}: it has no checksum")
    promised = _number(block[_CHECKSUM], at, "checksum")
    unsigned = sum(block) - sum(block[_CHECKSUM]) + 8 * 0x20
    if promised != unsigned and promised != _signed_sum(block):
        raise MalformedError(f"no tar header at byte {at}: its checksum is wrong")
    path = _text(block[0:100])
    if block[257:263] == _POSIX_MAGIC:
        # star keeps times where POSIX has the last 24 bytes of the prefix.
        stop = 476 if block[508:512] == _STAR_TRAILER else 500
        prefix = _text(block[345:stop])
        if prefix:
            path = prefix + b"/" + path
    return Header(
        type=block[156:157],
        name=path,
        link=_text(block[157:257]),
        mode=_number(block[100:108], at, "mode") & 0o7777,
        uid=_owner(_number(block[108:116], at, "uid"), at),
        gid=_owner(_number(block[116:124], at, "gid"), at),
        size_bytes=_not_negative(_number(block[124:136], at, "size"), at),
        mtime_ns=_time(_number(block[136:148], at, "mtime") * 10**9, at),
    )


def parse_pax(data: bytes, at: int) -> dict[bytes, bytes]:
    r"""Read the records of an extended header: `length key=value\n`, length in decimal.

    Raises:
        MalformedError: a record is not of that form.
    """
    records: dict[bytes, bytes] = {}
    offset = 0
    while offset < len(data):
        space = data.find(b" ", offset, offset + 20)
        digits = data[offset:space] if space > 0 else b""
        stop = offset + int(digits) if _UNSIGNED.fullmatch(digits) else 0
        key, equals, value = data[space + 1 : stop].partition(b"=")
        if not (space < stop <= len(data) and key and equals and value.endswith(b"\n")):
            raise MalformedError(f"extended tar header at byte {at} has a bad record")
        records[key] = value[:-1]
        offset = stop
    return records


def apply_pax(header: Header, records: dict[bytes, bytes], at: int) -> Header:
    """Return the header with what the records override; an empty value overrides nothing.

    Raises:
        MalformedError: a value is not of its key's form.
        UnsupportedLayer: the file is sparse (GNU tar's three pax forms).
    """
    changes: dict[str, bytes | int] = {}
    xattrs: list[tuple[str, bytes]] = []
    for key, value in records.items():
        if key.startswith(b"GNU.sparse."):
            raise sparse_error(header.name)
        if key.startswith(_XATTR):
            xattrs.append((key[len(_XATTR) :].decode("utf-8", "surrogateescape"), value))
        if not value:
            continue
        if key == b"path":
            changes["name"] = value
        elif key == b"linkpath":
            changes["link"] = value
        elif key == b"size":
            changes["size_bytes"] = _decimal(value, at, "size")
        elif key == b"uid":
            changes["uid"] = _owner(_decimal(value, at, "uid"), at)
        elif key == b"gid":
            changes["gid"] = _owner(_decimal(value, at, "gid"), at)
        elif key == b"mtime":
            changes["mtime_ns"] = _decimal_time(value, at)
    if xattrs and sum(len(value) for _, value in xattrs) <= _XATTRS_MOST_BYTES:
        header = header._replace(xattrs=tuple(xattrs))
    return header._replace(**changes) if changes else header  # type: ignore[arg-type]


def sparse_error(name: bytes) -> UnsupportedLayer:
    """Return the error for a file archived with holes."""
    return UnsupportedLayer(
        f"{name[:200]!r} is a sparse file in GNU tar's encoding, which lazyfs does not read; "
        "archive it without --sparse"
    )


def _text(field: bytes) -> bytes:
    """Return a header's text field up to its NUL, if it has one."""
    return field.partition(b"\0")[0]


def _number(field: bytes, at: int, what: str) -> int:
    """Read octal text, or base-256 with the first bit set (two's complement, big-endian)."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if field[0] & 0x40 else value
    digits = _text(field).strip(b" ")
    if not _OCTAL.fullmatch(digits):
        raise MalformedError(f"tar header at byte {at}: {what} {field!r} is no number")
    return int(digits or b"0", 8)


def _signed_sum(block: bytes) -> int:
    """Sum the bytes as some old programs did, as signed ones."""
    signed = memoryview(block).cast("b")
    return sum(signed) - sum(signed[_CHECKSUM]) + 8 * 0x20


def _decimal(value: bytes, at: int, what: str) -> int:
    if not _UNSIGNED.fullmatch(value):
        raise MalformedError(
            f"extended tar header at byte {at}: {what} {value[:40]!r} is no number"
        )
    return int(value)


def _decimal_time(value: bytes, at: int) -> int:
    match = _TIME.fullmatch(value)
    if not match:
        raise MalformedError(f"extended tar header at byte {at}: mtime {value[:40]!r} is no number")
    sign, seconds, fraction = match.groups()
    ns = int(seconds) * 10**9 + int((fraction or b"")[:9].ljust(9, b"0"))
    return _time(-ns if sign else ns, at)


def _time(ns: int, at: int) -> int:
    if not -_TIME_MOST_NS <= ns <= _TIME_MOST_NS:
        raise MalformedError(f"tar header at byte {at}: mtime is out of any clock's range")
    return ns


def _owner(value: int, at: int) -> int:
    if not 0 <= value <= _ID_MOST:
        raise MalformedError(f"tar header at byte {at}: owner {value} is no 32-bit id")
    return value


def _not_negative(value: int, at: int) -> int:
    if value < 0:
        raise MalformedError(f"tar header at byte {at}: size {value} is negative")
    return value

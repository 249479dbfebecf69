"""How large a pages file ought to be, from the pagemap that comes before it in an archive.

Only a hint of where the next tar headers lie: whoever uses it checks, and anything odd here
gives None. So it reads the three fields it needs by itself; the protobuf runtime would cost
every mount its import (some 30 ms) and saves nothing on messages of a dozen bytes.

A pages file is only as large as its pages if they lie in it as they are. Since images version 3
(criu-dev, 2026) they may be compressed or begin at page boundaries: fields and flags that are
not of version 2 give None.

Source: CRIU, `images/pagemap.proto`, `criu/include/magic.h`, `criu/include/pagemap.h`, and
`criu/pagemap.c:init_compat_pagemap_entry` for entries that older versions wrote. Framing: two
u32le magics, then `[u32le length][protobuf]` to the end of the file.
"""

from typing import NamedTuple

IMG_COMMON_MAGIC = 0x54564319
PAGEMAP_MAGIC = 0x56084025
_MAGICS = IMG_COMMON_MAGIC.to_bytes(4, "little") + PAGEMAP_MAGIC.to_bytes(4, "little")

PAGE_BYTES = 4096
"""A kernel with larger pages makes the hint wrong, no more."""

_PAGES_ID = 1
_COMPAT_NR_PAGES, _IN_PARENT, _FLAGS, _NR_PAGES = 2, 3, 4, 5
_ENTRY_FIELDS = frozenset({1, _COMPAT_NR_PAGES, _IN_PARENT, _FLAGS, _NR_PAGES})
_PE_PRESENT = 1 << 2
_PE_KNOWN = 0b111
_ENTRY_MOST_BYTES = 64


class PagesHint(NamedTuple):
    """`pages-{pages_id}.img` ought to hold `size_bytes`."""

    pages_id: int
    size_bytes: int


def read_pagemap(data: bytes) -> PagesHint | None:
    """Read a whole `pagemap-*.img`; None if it is not one, or not understood."""
    if data[:8] != _MAGICS:
        return None
    try:
        head, offset = _message(data, 8)
        pages_id = head[_PAGES_ID]
        pages = 0
        while offset < len(data):
            entry, offset = _message(data, offset)
            pages += _present_pages(entry)
    except (KeyError, IndexError, ValueError):
        return None
    return PagesHint(pages_id, pages * PAGE_BYTES)


def _present_pages(entry: dict[int, int]) -> int:
    flags = entry.get(_FLAGS, 0 if entry.get(_IN_PARENT) else _PE_PRESENT)
    if flags & ~_PE_KNOWN or not entry.keys() <= _ENTRY_FIELDS:
        raise ValueError
    if not flags & _PE_PRESENT:
        return 0
    return entry[_NR_PAGES] if _NR_PAGES in entry else entry[_COMPAT_NR_PAGES]


def _message(data: bytes, offset: int) -> tuple[dict[int, int], int]:
    """Read one framed message of varint fields; return its fields and where it ends.

    Encoding: protobuf.dev, "Encoding", base 128 varints: a key is `number << 3 | wire type`.
    """
    start = offset + 4
    size = int.from_bytes(data[offset:start], "little")
    stop = start + size
    if size > _ENTRY_MOST_BYTES or stop > len(data):
        raise ValueError
    fields: dict[int, int] = {}
    offset = start
    while offset < stop:
        key, offset = _varint(data, offset)
        if key & 7:
            raise ValueError
        fields[key >> 3], offset = _varint(data, offset)
    if offset != stop:
        raise ValueError
    return fields, offset


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    byte = data[offset]
    offset += 1
    if byte < 0x80:
        return byte, offset
    value = byte & 0x7F
    for shift in range(7, 70, 7):
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise ValueError

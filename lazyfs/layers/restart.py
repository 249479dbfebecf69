"""Where a deflate stream can be taken up again.

Sources: RFC 1951 (deflate); zlib, `examples/zran.c` (the idea); soci-snapshotter,
`ztoc/compression/gzip_zinfo.c` (the same points, as SOCI keeps them).
"""

import msgspec

WINDOW_BYTES = 32 * 1024
"""How far back deflate can refer: what has to be known to go on (RFC 1951, section 2)."""


class RestartPoint(msgspec.Struct, frozen=True):
    """A place in a gzip blob where a deflate block begins, and in the content it decodes to.

    `blob_offset`: of the first byte none of whose bits belong to what came before. Where `bits`
    is not 0, the block begins with the upper `bits` bits of the byte before that one
    (`blob_offset - 1`), as zlib's `inflatePrime` has it. At the start of a member it is where
    the member's first block begins, behind its header.

    `window`: the content's last 32 KiB up to here, fewer at the beginning of a member, and
    none at its start.
    """

    blob_offset: int
    bits: int
    content_offset: int
    window: bytes

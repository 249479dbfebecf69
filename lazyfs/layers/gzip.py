"""Plain gzip: decoded from its start, and on the way noted where it can be taken up again.

A blob is one member or many (pigz, bgzip and eStargz write many), with zeros behind the last at
most. Content addresses are those of the uncompressed tar.

Source: RFC 1952.
"""

import functools
from collections.abc import Iterator
from enum import Enum, auto

from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import MIB
from lazyfs.layers.chunks import PIECE_BYTES
from lazyfs.layers.deflate import (
    GZIP,
    Buffer,
    Engine,
    Inflater,
    PythonInflater,
    RestartInflater,
    Source,
    best_engine,
)
from lazyfs.layers.model import LayerDescriptor, Opening, StreamIndex
from lazyfs.layers.restart import RestartPoint
from lazyfs.layers.restart_index import (
    CACHE_TAG,
    FORMAT_NAME,
    SpanRecorder,
    open_restart_index,
)
from lazyfs.layers.spans import OFFSET_MOST

MAGIC = b"\x1f\x8b\x08"
"""ID1, ID2, and the only method there is: deflate (RFC 1952, section 2.3.1)."""

SPACING_BYTES = 4 * MIB
"""Content between two restart points, at least: decoded in 10 ms, and its window is 1 % of it.
Part of the cache tag."""

_ZEROS = bytes(PIECE_BYTES)


class Gzip:
    """Layers whose first bytes are those of a gzip member."""

    name = FORMAT_NAME

    def recognises(self, layer: LayerDescriptor, head: bytes) -> bool:
        """Whether the blob begins as gzip."""
        return head.startswith(MAGIC)

    def open(self, layer: LayerDescriptor, head: bytes) -> Opening:
        """Return the stream; nothing has to be fetched for it."""
        yield from ()
        engine = best_engine()
        reopen = functools.partial(open_restart_index, blob_bytes=layer.size_bytes)
        return StreamIndex(
            format_name=FORMAT_NAME,
            cache_tag=CACHE_TAG,
            decoder=functools.partial(GzipDecoder, engine),
            reopen=None if engine is None else reopen,
        )


class _At(Enum):
    MEMBER = auto()
    BORDER = auto()
    """Behind a member: another one, padding, or the end."""
    PADDING = auto()


class GzipDecoder:
    """A `StreamDecoder` of gzip members; without an engine it notes no restart points."""

    def __init__(self, engine: Engine | None, spacing_bytes: int = SPACING_BYTES) -> None:
        self._restart = None if engine is None else RestartInflater(engine, GZIP)
        self._inflater: Inflater = self._restart or PythonInflater(GZIP)
        self._recorder = SpanRecorder()
        self._spacing_bytes = spacing_bytes
        self._buffer = Buffer(PIECE_BYTES)
        self._at = _At.MEMBER
        self._blob_offset = 0
        self._content_offset = 0
        self._next_point = OFFSET_MOST if engine is None else 0
        self._last_byte = b""
        self._index: bytes | None = None

    def decode(self, data: Data) -> Iterator[Data]:
        """Yield what `data` completes; see `StreamDecoder`."""
        with Source(data) as source:
            self._seen = 0
            yield from self._pieces(source)
            self._see(source, len(source.view))
            self._last_byte = bytes(source.view[-1:]) or self._last_byte
            self._blob_offset += len(source.view)

    def finish(self) -> None:
        """Say that the blob has ended; see `StreamDecoder`."""
        if self._at is _At.MEMBER:
            raise MalformedError(f"the gzip data is cut off after {self._blob_offset} bytes")
        if self._restart is not None:
            self._restart.close()
            self._index = self._recorder.finish(self._blob_offset, self._content_offset)

    def restart_index(self) -> bytes | None:
        """What `open_restart_index` wants; None where there is no engine, or nothing to index."""
        return self._index

    def _pieces(self, source: Source) -> Iterator[Data]:
        filled, full = 0, True
        while (source.left or full) and self._enter(source):
            # A block that begins where a search begins may be missed: search one byte early,
            # so that which points are found does not depend on how the blob was cut.
            ahead = self._next_point - 1 - self._content_offset
            stop = min(PIECE_BYTES, filled + ahead) if ahead > 0 else PIECE_BYTES
            step = self._inflater.inflate(source, self._buffer, filled, stop, seek=ahead <= 0)
            full = step.produced == stop - filled
            filled += step.produced
            self._content_offset += step.produced
            if step.bits is not None and self._content_offset >= self._next_point:
                self._note(source, step.bits)
            if step.ended:
                self._at = _At.BORDER
            if filled == PIECE_BYTES:
                yield self._buffer.view
                filled = 0
        if filled:
            yield self._buffer.view[:filled]

    def _enter(self, source: Source) -> bool:
        """Go from one member to the next; False if there is nothing to inflate."""
        if self._at is _At.BORDER and source.left:
            self._at = _At.MEMBER if source.view[source.position] else _At.PADDING
            if self._at is _At.MEMBER:
                self._inflater.reset()
        if self._at is _At.PADDING:
            while source.left:
                zeros = source.view[source.position : source.position + PIECE_BYTES]
                if zeros != _ZEROS[: len(zeros)]:
                    raise MalformedError("there is something behind the padding of the gzip data")
                source.position += len(zeros)
        return self._at is _At.MEMBER

    def _note(self, source: Source, bits: int) -> None:
        """Note that the content can be taken up here."""
        if self._restart is None:
            return
        self._see(source, source.position)
        before = source.view[: source.position] if source.position else self._last_byte
        point = RestartPoint(
            blob_offset=self._blob_offset + source.position,
            bits=bits,
            content_offset=self._content_offset,
            window=self._restart.window(),
        )
        self._recorder.begin(point, before)
        self._next_point = self._content_offset + self._spacing_bytes

    def _see(self, source: Source, stop: int) -> None:
        self._recorder.see(source.view[self._seen : stop])
        self._seen = stop

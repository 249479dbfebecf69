"""Inflate that stops where deflate blocks begin, and goes on from there later.

No binding for Python tells where blocks begin, so zlib's own interface is called through
ctypes: zlib-ng's, which its wheel's extension module exports, or the system's zlib. Without
either, Python's `zlib` decodes as well, but finds no place to restart.

An inflater is used by one thread at a time; different ones at once, since every call releases
the GIL.

Sources: zlib, `zlib.h` (`z_stream`, `inflate` with `Z_BLOCK`, `data_type`); zlib-ng,
`zlib-ng.h.in` (`zng_stream`, the same functions with the prefix `zng_`).
"""

import ctypes
import functools
import importlib.util
import mmap
import weakref
import zlib
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.restart import WINDOW_BYTES

RAW = -15
"""Window bits of bare deflate: no header, no checksum."""
GZIP = 31
"""Window bits of one gzip member, whose header and trailer are read and checked too."""

_OK, _STREAM_END, _MEMORY_ERROR, _BUFFER_ERROR = 0, 1, -4, -5
_NO_FLUSH, _BLOCK = 0, 5
# Flags in `data_type`, beside the number of bits that were read and not used.
_LAST_BLOCK, _AT_BLOCK, _BITS = 64, 128, 63
# `avail_in` has 32 bits.
_INPUT_MOST = 1024 * MIB
_SLICE_BYTES = 64 * KIB


class Step(NamedTuple):
    """What one call of `inflate` has done."""

    produced: int
    """Bytes of content that were written."""
    ended: bool
    """The stream has ended; in `GZIP`, its trailer was read and is right."""
    bits: int | None
    """If a block begins here, how many bits of it are in the byte before; else None."""


_SMALL_BYTES = 256 * KIB


class Buffer:
    """Memory for content: what is large starts at a page, what is small is not paged in anew."""

    def __init__(self, size_bytes: int) -> None:
        small = size_bytes <= _SMALL_BYTES
        memory = bytearray(size_bytes) if small else mmap.mmap(-1, size_bytes)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Source:
    """Bytes to inflate, held in place while the context lasts; `position`: the first unused."""

    def __init__(self, data: Data) -> None:
        self.view = memoryview(data).cast("B")
        self.position = 0
        self._buffer = _PyBuffer()

    def __enter__(self) -> Self:
        # The only way to the address of memory that Python may only read, such as a mapping's.
        _get_buffer(self.view, ctypes.byref(self._buffer), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _release_buffer(ctypes.byref(self._buffer))

    @property
    def left(self) -> int:
        """How many bytes are unused."""
        return len(self.view) - self.position

    @property
    def address(self) -> int:
        """Where the first unused byte is in memory."""
        return (self._buffer.buf or 0) + self.position


class Inflater(Protocol):
    """Decodes one deflate stream after the other."""

    def inflate(
        self, source: Source, out: Buffer, start: int, stop: int, *, seek: bool = False
    ) -> Step:
        """Decode from `source` into `out[start:stop]`, which is not empty.

        Returns when that is full, the source used up, or the stream at its end; with `seek`
        also where a block begins. After a call that filled all of it, content may be pending
        even if the source is used up.

        Raises:
            MalformedError: no such stream, or its checksum is wrong.
        """

    def reset(self) -> None:
        """Expect a new stream."""


class Engine:
    """A zlib that can restart; made by `engines`.

    Raises:
        OSError: there is no such library.
        AttributeError: it lacks a function.
        ValueError: it is of another version than expected.
    """

    def __init__(self, path: str, prefix: str, stream: type[ctypes.Structure], version: str):
        library = ctypes.CDLL(path)
        pointer, number = ctypes.c_void_p, ctypes.c_int

        def function(name: str, *arguments: type) -> Any:
            found = getattr(library, prefix + name)
            found.argtypes = arguments
            return found

        told = getattr(library, version)
        told.restype = ctypes.c_char_p
        self._version: bytes = told()
        self.name = f"{version.partition('_')[0]} {self._version.decode('ascii', 'replace')}"
        self._stream = stream
        # This one compares the version and the size of the structure with the library's own.
        self._init = function("inflateInit2_", pointer, number, ctypes.c_char_p, number)
        self.inflate = function("inflate", pointer, number)
        self.reset = function("inflateReset2", pointer, number)
        self.end = function("inflateEnd", pointer)
        self.prime = function("inflatePrime", pointer, number, number)
        self.set_dictionary = function("inflateSetDictionary", pointer, pointer, ctypes.c_uint)
        self.get_dictionary = function("inflateGetDictionary", pointer, pointer, pointer)
        self.end(ctypes.byref(self.new_stream(RAW)))

    def new_stream(self, window_bits: int) -> Any:
        """Return a stream that `end` must be called with.

        Raises:
            MemoryError: no memory for its state.
            ValueError: the library is of another version.
        """
        stream = self._stream()
        status = self._init(ctypes.byref(stream), window_bits, self._version, ctypes.sizeof(stream))
        if status == _MEMORY_ERROR:
            raise MemoryError("no memory to inflate with")
        if status != _OK:
            raise ValueError(f"{self.name} answers {status}")
        return stream


class RestartInflater:
    """An `Inflater` that can begin in the middle of a stream."""

    def __init__(self, engine: Engine, window_bits: int) -> None:
        self.window_bits = window_bits
        self._engine = engine
        self._stream = engine.new_stream(window_bits)
        self._at = ctypes.byref(self._stream)
        self._close = weakref.finalize(self, engine.end, self._at)
        self._close.atexit = False

    def close(self) -> None:
        """Free the state; else it is freed with the object."""
        self._close()

    def inflate(
        self, source: Source, out: Buffer, start: int, stop: int, *, seek: bool = False
    ) -> Step:
        """See `Inflater.inflate`."""
        stream = self._stream
        given = min(source.left, _INPUT_MOST)
        stream.next_in, stream.avail_in = source.address, given
        stream.next_out, stream.avail_out = out.address + start, stop - start
        status = self._engine.inflate(self._at, _BLOCK if seek else _NO_FLUSH)
        source.position += given - stream.avail_in
        if status == _MEMORY_ERROR:
            raise MemoryError("no memory to inflate with")
        kind = stream.data_type
        # "Buffer error" says that no byte was read or written, which is no error at the end of
        # the data, nor where a block ends with bits that were read before.
        stuck = status == _BUFFER_ERROR and source.left and not kind & _AT_BLOCK
        if stuck or status not in (_OK, _STREAM_END, _BUFFER_ERROR):
            raise MalformedError(f"compressed data is damaged: {_message(stream, status)}")
        at_block = kind & _AT_BLOCK and not kind & _LAST_BLOCK and kind & _BITS < 8
        return Step(
            stop - start - stream.avail_out,
            status == _STREAM_END,
            kind & _BITS if at_block else None,
        )

    def reset(self, window_bits: int | None = None) -> None:
        """Expect a new stream, of another kind if `window_bits` says so."""
        self.window_bits = self.window_bits if window_bits is None else window_bits
        self._check(self._engine.reset(self._at, self.window_bits))

    def restart(self, bits: int, byte: int, window: Data) -> None:
        """Expect a block (`RAW`) whose first `bits` bits are the upper ones of `byte`.

        `window`: the content before it, at most 32 KiB.
        """
        if bits:
            self._check(self._engine.prime(self._at, bits, byte >> (8 - bits)))
        if window:
            with Source(window) as source:
                self._check(self._engine.set_dictionary(self._at, source.address, source.left))

    def window(self) -> bytes:
        """Return the content's last 32 KiB up to here, or what there is of this stream."""
        window = ctypes.create_string_buffer(WINDOW_BYTES)
        size = ctypes.c_uint(0)
        self._check(self._engine.get_dictionary(self._at, window, ctypes.byref(size)))
        return ctypes.string_at(window, size.value)

    def _check(self, status: int) -> None:
        if status != _OK:
            raise MalformedError(f"inflate cannot restart: {_message(self._stream, status)}")


class PythonInflater:
    """An `Inflater` over Python's own zlib; it never tells where a block begins."""

    def __init__(self, window_bits: int) -> None:
        self._window_bits = window_bits
        self.reset()

    def inflate(
        self, source: Source, out: Buffer, start: int, stop: int, *, seek: bool = False
    ) -> Step:
        """See `Inflater.inflate`."""
        # In slices, since what does not fit is copied each time.
        piece = source.view[source.position : source.position + _SLICE_BYTES]
        try:
            content = self._decompressor.decompress(piece, stop - start)
        except zlib.error as err:
            raise MalformedError(f"compressed data is damaged: {err}") from err
        ended = self._decompressor.eof
        unused = self._decompressor.unused_data if ended else self._decompressor.unconsumed_tail
        source.position += len(piece) - len(unused)
        out.view[start : start + len(content)] = content
        return Step(len(content), ended, None)

    def reset(self) -> None:
        """Expect a new stream."""
        self._decompressor = zlib.decompressobj(self._window_bits)


@functools.cache
def engines() -> tuple[Engine, ...]:
    """Return the libraries that can restart, the fastest first; none where there is none."""
    found = []
    for load in (_zlib_ng, _zlib):
        try:
            found.append(load())
        except (ImportError, OSError, AttributeError, ValueError):
            continue
    return tuple(found)


def best_engine() -> Engine | None:
    """Return the fastest of `engines`, or None."""
    return next(iter(engines()), None)


def _zlib_ng() -> Engine:
    spec = importlib.util.find_spec("zlib_ng.zlib_ng")
    if spec is None or spec.origin is None:
        raise ImportError("no zlib-ng")
    return Engine(spec.origin, "zng_", _ZngStream, "zlibng_version")


def _zlib() -> Engine:
    return Engine("libz.so.1", "", _ZStream, "zlibVersion")


def _message(stream: Any, status: int) -> str:
    text = stream.msg
    return text.decode("ascii", "replace") if text else f"status {status}"


def _stream_fields(count: type, total: type, checksum: type) -> list[tuple[str, type]]:
    pointer = ctypes.c_void_p
    return [
        ("next_in", pointer),
        ("avail_in", count),
        ("total_in", total),
        ("next_out", pointer),
        ("avail_out", count),
        ("total_out", total),
        ("msg", ctypes.c_char_p),
        ("state", pointer),
        ("zalloc", pointer),
        ("zfree", pointer),
        ("opaque", pointer),
        ("data_type", ctypes.c_int),
        ("adler", checksum),
        ("reserved", ctypes.c_ulong),
    ]


class _ZStream(ctypes.Structure):
    _fields_ = _stream_fields(ctypes.c_uint, ctypes.c_ulong, ctypes.c_ulong)


class _ZngStream(ctypes.Structure):
    _fields_ = _stream_fields(ctypes.c_uint32, ctypes.c_size_t, ctypes.c_uint32)


class _PyBuffer(ctypes.Structure):
    """Python's `Py_buffer`, part of the stable ABI since 3.11."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
_release_buffer.restype = None

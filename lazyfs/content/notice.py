"""What the daemon that decodes a stream tells those that read along, in a small file.

    offset 0      magic, beats, state, position, hashed bytes, troubles: u64 each, and their xxh3
           512    number of the latest trouble, its kind, its text, and their xxh3
           2048   what those that follow change when they want the source to be asked again

A record is written by one `pwrite` and carries its own hash, so whoever reads it while it is
written, or after a disk has damaged it, finds no record rather than a wrong one. Numbers are
little-endian. The file is only ever for daemons that live at the same time.
"""

import os
import struct
import threading
from contextlib import suppress
from enum import IntEnum

import msgspec
import xxhash
from msgspec.structs import replace

from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
    SourceError,
)

NOTICE_BYTES = 4096
_MAGIC = b"lazyfsn1"
_RECORD = struct.Struct("<8s5Q")
_SEAL = struct.Struct("<Q")
_TROUBLE_AT = 512
_TROUBLE = struct.Struct("<QHH")
_TEXT_MOST_BYTES = 1024
_ASKED_AT = 2048
_ASKED_BYTES = 8


class State(IntEnum):
    """What has become of a pass."""

    DECODING = 0
    WHOLE = 1
    """It has ended, and the blob matches its digest."""
    FAILED = 2
    """The blob is not what its digest promises; the latest trouble says how."""


class News(msgspec.Struct, frozen=True):
    """A moment of a pass."""

    beats: int = 0
    """Changes for as long as there is life in who decodes."""
    state: State = State.DECODING
    position: int = 0
    """So much content is in the file. Never becomes less."""
    hashed_bytes: int = 0
    """How far the blob has been hashed."""
    troubles: int = 0
    """How often the pass could not go on."""


class Notice:
    """The file, as the one who decodes writes it, and as the others read it.

    Methods that write may raise OSError, and may be called from several threads at once.
    """

    def __init__(self, fd: int) -> None:
        """`fd` is open for reading and writing, and becomes this object's."""
        self.fd = fd
        self._lock = threading.Lock()
        self._news = News()

    # -- by the one who decodes -------------------------------------------------------------

    def begin(self) -> None:
        """Make the file, all of it: what is written later takes no more room."""
        with self._lock:
            os.pwrite(self.fd, bytes(NOTICE_BYTES), 0)
            self._write(News())

    def take_over(self) -> News | None:
        """Go on from what another has told, and return it; None if it is damaged."""
        news = self.look()
        if news is not None:
            with self._lock:
                self._news = replace(news, hashed_bytes=0)
        return news

    def tell(
        self,
        *,
        state: State | None = None,
        position: int = 0,
        hashed_bytes: int | None = None,
        trouble: LazyfsError | None = None,
    ) -> None:
        """Tell what has changed, and that there is life in this daemon."""
        with self._lock:
            news = self._news
            if trouble is not None:
                news = replace(news, troubles=news.troubles + 1)
                _write_sealed(self.fd, _packed(news.troubles, trouble), _TROUBLE_AT)
            self._write(
                replace(
                    news,
                    beats=news.beats + 1,
                    state=news.state if state is None else state,
                    position=max(position, news.position),
                    hashed_bytes=news.hashed_bytes if hashed_bytes is None else hashed_bytes,
                )
            )

    def asked(self) -> bytes:
        """Return what changes whenever somebody wants the source to be asked again."""
        return os.pread(self.fd, _ASKED_BYTES, _ASKED_AT)

    def _write(self, news: News) -> None:
        record = _RECORD.pack(
            _MAGIC, news.beats, news.state, news.position, news.hashed_bytes, news.troubles
        )
        _write_sealed(self.fd, record, 0)
        self._news = news

    # -- by those that read along -----------------------------------------------------------

    def look(self) -> News | None:
        """Return what was told last; None if it is being written, or is damaged."""
        record = _read_sealed(self.fd, _RECORD.size, 0)
        if record is None:
            return None
        magic, beats, state, *numbers = _RECORD.unpack(record)
        if magic != _MAGIC or state > max(State):
            return None
        return News(beats, State(state), *numbers)

    def trouble(self) -> LazyfsError:
        """Return the latest trouble, as an error."""
        head = os.pread(self.fd, _TROUBLE.size, _TROUBLE_AT)
        if len(head) == _TROUBLE.size:
            _, kind, length = _TROUBLE.unpack(head)
            data = _read_sealed(self.fd, _TROUBLE.size + length, _TROUBLE_AT)
            if data is not None and length <= _TEXT_MOST_BYTES:
                return _error_of(kind, data[_TROUBLE.size :].decode(errors="replace"))
        return LazyfsError("another lazyfs of this host cannot go on decoding")

    def ask(self) -> None:
        """Say that the source should be asked again."""
        with suppress(OSError):
            os.pwrite(self.fd, os.urandom(_ASKED_BYTES), _ASKED_AT)

    def close(self) -> None:
        """Let go of the file, and of the lock on it."""
        os.close(self.fd)


def _write_sealed(fd: int, data: bytes, offset: int) -> None:
    data += _SEAL.pack(xxhash.xxh3_64_intdigest(data))
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError("pwrite wrote less than it was given")


def _read_sealed(fd: int, size_bytes: int, offset: int) -> bytes | None:
    with suppress(OSError):
        data = os.pread(fd, size_bytes + _SEAL.size, offset)
        if len(data) == size_bytes + _SEAL.size:
            record = data[:size_bytes]
            if _SEAL.pack(xxhash.xxh3_64_intdigest(record)) == data[size_bytes:]:
                return record
    return None


def _packed(number: int, error: LazyfsError) -> bytes:
    text = str(error).encode(errors="replace")[:_TEXT_MOST_BYTES]
    return _TROUBLE.pack(number, _kind_of(error), len(text)) + text


def _kind_of(error: LazyfsError) -> int:
    match error:
        case FetchError():
            return 1 if error.transient else 2
        case SourceError():
            return 3
        case MalformedError():
            return 4
        case IntegrityError():
            return 5
        case _:
            return 0


def _error_of(kind: int, text: str) -> LazyfsError:
    match kind:
        case 1 | 2:
            return FetchError(text, transient=kind == 1)
        case 3:
            return SourceError(text)
        case 4:
            return MalformedError(text)
        case 5:
            return IntegrityError(text)
        case _:
            return LazyfsError(text)

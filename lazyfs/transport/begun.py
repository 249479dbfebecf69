"""Ranges of one blob that are received before anybody has asked for them.

Decides nothing of what is worth it: who begins a range knows that it will be asked for within the
next moments. Then `give` hands it out in the place of a request, or says that it cannot, and the
blob is asked as ever: a range that fails here has cost nothing but itself, and nobody hears of it.

Each is given once, to whoever asks first: what a reader finds wrong must be had anew. Bytes are
in memory from when they come until they are given, or the blob's source is closed.

Used by several threads at once: `_pieces` changes under the lock.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Sink
from lazyfs.transport.wake import blocks_on


@runtime_checkable
class BeginsRanges(Protocol):
    """A blob that can be told which of its ranges will be wanted."""

    def begin(self, byte_range: ByteRange) -> "Future[bytes]":
        """Begin to receive a range, for who reads it next; return the bytes to be."""


class Begun:
    """The ranges of one blob that were begun and not given yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[_Piece] = []

    def begin(
        self, byte_range: ByteRange, ask: Callable[[ByteRange, Sink], None]
    ) -> "Future[bytes]":
        """Have `ask` receive a range, in a thread; return the bytes to be."""
        piece = _Piece(byte_range)
        with self._lock:
            self._pieces.append(piece)
        threading.Thread(target=piece.receive, args=(ask,), name="begun", daemon=True).start()
        return piece.future

    def give(self, byte_range: ByteRange, sink: Sink, *, most_s: float) -> bool:
        """Deliver a range that lies within one that was begun, once that is here.

        False: there is none, or it failed, or takes longer than `most_s`; nothing was delivered.

        Raises: what the sink raises.
        """
        piece = self._take(byte_range)
        data = None if piece is None else piece.wait(most_s)
        if piece is None or data is None:
            return False
        at = byte_range.start - piece.byte_range.start
        stop = at + byte_range.size_bytes
        while at < stop:
            room = sink.space()
            count = min(len(room), stop - at)
            room[:count] = data[at : at + count]
            sink.advance(count)
            at += count
        return True

    def _take(self, byte_range: ByteRange) -> "_Piece | None":
        """Return what a range lies in; each of its bytes is counted as given from now on."""
        with self._lock:
            for piece in self._pieces:
                whole = piece.byte_range
                if whole.start <= byte_range.start and byte_range.stop <= whole.stop:
                    piece.left_bytes -= byte_range.size_bytes
                    if piece.left_bytes <= 0:
                        self._pieces.remove(piece)
                    return piece
        return None


class _Piece:
    """One range; a sink of its own."""

    def __init__(self, byte_range: ByteRange) -> None:
        self.byte_range = byte_range
        self.left_bytes = byte_range.size_bytes
        """How much of it is still to be given."""
        self.future: Future[bytes] = Future()
        self._over = threading.Event()
        self._data = memoryview(bytearray(byte_range.size_bytes))
        self._fill = 0

    def space(self) -> memoryview:
        return self._data[self._fill :]

    def advance(self, count: int) -> None:
        self._fill += count

    def receive(self, ask: Callable[[ByteRange, Sink], None]) -> None:
        """Make one attempt; whatever becomes of it is the future's."""
        try:
            ask(self.byte_range, self)
        except BaseException as error:  # noqa: BLE001 - told to who waits for it
            self.future.set_exception(error)
        else:
            self.future.set_result(bytes(self._data))
        finally:
            self._over.set()

    def wait(self, most_s: float) -> bytes | None:
        """Return the bytes once they are here; None: they do not come."""
        blocks_on(self._over.set)
        self._over.wait(most_s)
        blocks_on(None)
        if not self.future.done() or isinstance(self.future.exception(), BaseException):
            return None
        return self.future.result()


def result_of(future: "Future[bytes]", most_s: float) -> bytes | None:
    """Return what a range that was begun has brought within `most_s`; None: nothing."""
    try:
        return future.result(most_s)
    except (LazyfsError, TimeoutError):
        return None

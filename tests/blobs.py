"""Blobs in memory, with the ways in which real ones fail."""

import threading
from collections.abc import Callable, Sequence

from lazyfs.ground.errors import FetchError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Sink
from lazyfs.transport.place import Health, ManyPlaces, Place, in_order
from lazyfs.transport.wake import blocks_on


class MemoryBlob:
    """A blob of known bytes. `before` is called in the worker thread ahead of each attempt and
    may block or raise; `cut_after` ends attempts after so many bytes. With a `health` it is taken
    for remote."""

    def __init__(self, data: bytes, name: str = "memory", health: Health | None = None) -> None:
        self.data = data
        self.name = name
        self.health = health
        self.asked: list[ByteRange] = []
        self.before: Callable[[ByteRange], None] | None = None
        self.cut_after: int | None = None
        self.piece_bytes = 64 * 1024

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        self.asked.append(byte_range)
        if self.before is not None:
            self.before(byte_range)
        sent = 0
        while byte_range.start + sent < byte_range.stop:
            if self.cut_after is not None and sent >= self.cut_after:
                raise FetchError("cut short", transient=True)
            start = byte_range.start + sent
            room = sink.space()
            piece = self.data[
                start : min(byte_range.stop, start + min(len(room), self.piece_bytes))
            ]
            room[: len(piece)] = piece
            sink.advance(len(piece))
            sent += len(piece)

    def close(self) -> None:
        pass


class Mirrored(ManyPlaces):
    """A blob that several others have, each a place of its own, the one to ask first first."""

    def __init__(self, *blobs: MemoryBlob) -> None:
        self.name = "the blob"
        self.size_bytes = blobs[0].size_bytes
        self.all = [Place(blob, blob.health or Health(blob.name)) for blob in blobs]

    def places(self) -> Sequence[Place]:
        return in_order(self.all)

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        self.places()[0].blob.read_into(byte_range, sink)

    def close(self) -> None:
        pass


class Hang:
    """Holds attempts back until they are woken, as a socket does, or `end` is called."""

    def __init__(self) -> None:
        self._ends = threading.Event()
        self.entered = 0
        self.woken = 0

    def __call__(self, byte_range: ByteRange) -> None:
        self.entered += 1
        woken = threading.Event()
        blocks_on(woken.set)
        while not woken.wait(0.002):
            if self._ends.is_set():
                return
        self.woken += 1
        raise FetchError("the connection was shut down", transient=True)

    def end(self) -> None:
        self._ends.set()


class Gate:
    """Holds attempts back until opened; `entered` counts those that have come."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._entered = threading.Semaphore(0)

    def __call__(self, byte_range: ByteRange) -> None:
        self._entered.release()
        if not self._open.wait(30):
            raise FetchError("the gate was never opened", transient=False)

    def wait_entered(self) -> None:
        assert self._entered.acquire(timeout=30)

    def open(self) -> None:
        self._open.set()

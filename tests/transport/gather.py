"""Sinks for tests, and the settings that make faults show soon."""

from collections.abc import Callable

from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.blob import Blob

QUICK = TransportSettings(
    connect_timeout_s=2.0,
    stall_timeout_s=1.0,
    deadline_s=15.0,
    backoff_first_s=0.01,
    backoff_most_s=0.05,
    whole_body_limit_bytes=100_000,
)


class Gather:
    """Keeps what is delivered; lends rooms of an odd size."""

    def __init__(
        self, room_bytes: int = 1000, on_advance: Callable[[int], None] | None = None
    ) -> None:
        self.data = bytearray()
        self._room = bytearray(room_bytes)
        self._on_advance = on_advance

    def space(self) -> memoryview:
        return memoryview(self._room)

    def advance(self, count: int) -> None:
        assert 0 < count <= len(self._room)
        self.data += self._room[:count]
        if self._on_advance is not None:
            self._on_advance(len(self.data))


def read(blob: Blob, start: int, stop: int) -> bytes:
    """Read a range in one attempt."""
    sink = Gather()
    blob.read_into(ByteRange(start, stop), sink)
    return bytes(sink.data)

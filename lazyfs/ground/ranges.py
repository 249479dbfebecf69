"""Half-open byte ranges. Only the writer of an HTTP header knows that HTTP's are closed."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class ByteRange(NamedTuple):
    """The bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """How many bytes lie in the range."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"bytes {self.start}..{self.stop}"


def coalesce(ranges: Iterable[ByteRange], gap_bytes: int = 0) -> Iterator[ByteRange]:
    """Yield the ranges in order, those that overlap or lie within `gap_bytes` made one."""
    pending: ByteRange | None = None
    for item in sorted(ranges):
        if pending is not None and item.start <= pending.stop + gap_bytes:
            pending = ByteRange(pending.start, max(pending.stop, item.stop))
            continue
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending

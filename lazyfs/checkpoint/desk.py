"""What the layers of one mount share, and how index bytes are fetched before there is a layer."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import trio

from lazyfs.content.cache import Cache
from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import at_once
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import ContentSettings, TransportSettings
from lazyfs.transport.blob import Blob
from lazyfs.transport.retry import Fetcher

if TYPE_CHECKING:
    from lazyfs.checkpoint.ahead import Ahead
    from lazyfs.checkpoint.trace import Trace


class OpenConfig(msgspec.Struct, frozen=True):
    """What opening a checkpoint takes beside its reference."""

    cache: Cache
    transport: TransportSettings = msgspec.field(default_factory=TransportSettings)
    content: ContentSettings = msgspec.field(default_factory=ContentSettings)
    referrers: Literal["auto", "always", "never"] = "auto"
    """Whether to read by an index that only refers to the image: anybody who may push could have
    added it. "auto": if the image is named by a tag, which they could have moved as well."""
    on_proof: Callable[[int, int], None] | None = None
    """Told how many bytes of how many are hashed, while a whole layer is proven beforehand."""
    shows_stubs: bool = False
    """Whether a stub is opened as it is, not what it stands for (`follow.py`)."""
    ahead: "Ahead | None" = None
    """The image, if it is being resolved already."""
    trace: Literal["off", "auto"] | Path = "off"
    """Where what to fetch first is had from: nowhere, what is attached to the image, a file."""
    given_trace: "Trace | None" = None
    """What that file says, read before anything began."""
    workload: str = ""
    """Of several traces that are attached, whose to take."""


class Desk(msgspec.Struct, frozen=True):
    """What all layers of one mount share."""

    config: OpenConfig
    fetcher: Fetcher
    lanes: Lanes
    source_name: str
    """Of the image, without its digest: part of the key of what nothing has proven yet."""
    trusts_referrers: bool = True

    @property
    def counters(self) -> Counters:
        """The mount's."""
        return self.fetcher.counters


async def read_ranges(blob: Blob, ranges: Sequence[ByteRange], desk: Desk) -> list[Data]:
    """Fetch blob ranges whole, at once."""
    if any(item.stop > blob.size_bytes for item in ranges):
        raise SourceError(f"{blob.name} is smaller than its own index says")
    limiter = trio.CapacityLimiter(max(1, len(ranges)))
    sinks = [_Collector(item.size_bytes, desk.config.cache) for item in ranges]
    fetches = [
        partial(
            desk.fetcher.fetch,
            blob,
            item,
            sink,
            limiter=limiter,
            why="index",
        )
        for item, sink in zip(ranges, sinks, strict=True)
    ]
    if fetches:
        await at_once(fetches)
    return [sink.data for sink in sinks]


class _Collector:
    """A sink that keeps what comes, in a mapped file if it is much.

    An index may be large, and a file's pages are not the daemon's own memory.
    """

    def __init__(self, size_bytes: int, cache: Cache) -> None:
        self._map = cache.scratch(size_bytes)
        self.data = memoryview(self._map)[:size_bytes]
        self._fill = 0

    def space(self) -> memoryview:
        return self.data[self._fill :]

    def advance(self, count: int) -> None:
        self._fill += count

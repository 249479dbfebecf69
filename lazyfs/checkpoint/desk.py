"""What the layers of one mount share, and how index bytes are fetched before there is a layer."""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import trio

from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import at_once
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB, ContentSettings, TransportSettings
from lazyfs.transport import retry
from lazyfs.transport.blob import Blob


@dataclass(frozen=True)
class OpenConfig:
    """What opening a checkpoint takes beside its reference."""

    cache_dir: Path
    transport: TransportSettings = field(default_factory=TransportSettings)
    content: ContentSettings = field(default_factory=ContentSettings)
    referrers: Literal["auto", "always", "never"] = "auto"
    """Whether to read by an index that only refers to the image: anybody who may push could have
    added it. "auto": if the image is named by a tag, which they could have moved as well."""
    on_proof: Callable[[int, int], None] | None = None
    """Told how many bytes of how many are hashed, while a whole layer is proven beforehand."""


@dataclass(frozen=True)
class Desk:
    """What all layers of one mount share."""

    config: OpenConfig
    counters: Counters
    lanes: Lanes
    source_name: str
    """Of the image, without its digest: part of the key of what nothing has proven yet."""
    trusts_referrers: bool = True


async def read_ranges(blob: Blob, ranges: Sequence[ByteRange], desk: Desk) -> list[Data]:
    """Fetch blob ranges whole, at once."""
    if any(item.stop > blob.size_bytes for item in ranges):
        raise SourceError(f"{blob.name} is smaller than its own index says")
    limiter = trio.CapacityLimiter(max(1, len(ranges)))
    sinks = [_Collector(item.size_bytes, desk.config.cache_dir) for item in ranges]
    fetches = [
        partial(
            retry.fetch,
            blob,
            item,
            sink,
            settings=desk.config.transport,
            limiter=limiter,
            counters=desk.counters,
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

    def __init__(self, size_bytes: int, directory: Path) -> None:
        self._map = _scratch(max(1, size_bytes), directory)
        self.data = memoryview(self._map)[:size_bytes]
        self._fill = 0

    def space(self) -> memoryview:
        return self.data[self._fill :]

    def advance(self, count: int) -> None:
        self._fill += count


def _scratch(size_bytes: int, directory: Path) -> mmap.mmap:
    if size_bytes > MIB:
        with suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                return mmap.mmap(file.fileno(), size_bytes)
    return mmap.mmap(-1, size_bytes)


def keep_in_file(directory: Path, data: Data) -> memoryview:
    """Return a copy of `data` that lies in a nameless file and is mapped for reading."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += file.write(view[written:])
        return memoryview(mmap.mmap(file.fileno(), len(view), prot=mmap.PROT_READ))

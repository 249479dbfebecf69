"""Which chunks go together: into one request, or into one check of what the cache holds.

Looks at the states of chunks and changes nothing; on the trio thread.
"""

from lazyfs.content.holdings import ABSENT, IN_MEMORY, READY, UNCHECKED
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import ContentSettings
from lazyfs.layers.model import ChunkMap

_CHECK_MOST_BYTES = 8 << 20
_CHECK_MOST_CHUNKS = 1024
_CHECK_HEAD_BYTES = 512 << 10
"""As much as a fault that begins a walk wants, checked in a fifth of a millisecond."""
_RUN_CONTENT_MOST_BYTES = 16 << 20
"""A few compressed bytes may be a lot of content; no more than so much is decoded in one go."""
_BRIDGE_BYTES = 64 << 10
"""Gaps in the blob up to this size are fetched along: a request of its own costs more."""
_SHARED_BYTES = 1
"""Neighbours may have so much of the blob in common: deflate's blocks end within a byte."""


class Runs:
    """Runs of chunks of one layer, as (first, behind the last)."""

    def __init__(self, chunks: ChunkMap, state: bytearray, settings: ContentSettings) -> None:
        """`state` is `Holdings.state`."""
        self._chunks = chunks
        self._state = state
        self._settings = settings

    def next_run(self, first: int, last: int, most_bytes: int) -> tuple[int, int] | None:
        """Return the first chunks from `first` up to `last` that nobody fetches yet.

        Those that only have to be checked may go on past `last`: a window that moves on by a chunk
        would else have each checked by itself.
        """
        absent = self._state.find(ABSENT, first, last)
        unchecked = self._state.find(UNCHECKED, first, last if absent < 0 else absent)
        if unchecked >= 0:
            return unchecked, self.unchecked_end(unchecked, len(self._state))
        return (absent, self._end(absent, last, most_bytes)) if absent >= 0 else None

    def absent(self, first: int, last: int, *, demand: bool) -> list[tuple[int, int]]:
        """Cut the absent chunks into requests; the last one may reach past `last` a little."""
        settings = self._settings
        most_bytes = settings.demand_most_bytes if demand else settings.readahead_request_bytes
        runs = []
        index = first
        while 0 <= index < last:
            end = self._end(index, last, most_bytes)
            if demand and end == last:
                end = max(end, self._end(index, len(self._state), settings.demand_least_bytes))
            runs.append((index, end))
            index = self._state.find(ABSENT, end, last)
        return runs

    def unchecked_end(self, first: int, last: int) -> int:
        """Return where a run of unchecked chunks ends that are checked in one go."""
        end = first + 1
        limit = self.check_limit(first, last)
        while end < limit and self._state[end] == UNCHECKED:
            end += 1
        return end

    def check_limit(self, first: int, last: int) -> int:
        """Return up to which chunk those from `first` on may be checked in one go."""
        return self._limit(first, min(last, first + _CHECK_MOST_CHUNKS), _CHECK_MOST_BYTES)

    def check_head(self, first: int, last: int) -> int:
        """Return up to which chunk those of a check are that somebody may be waiting for."""
        return self._limit(first, last, _CHECK_HEAD_BYTES)

    def _limit(self, first: int, last: int, most_bytes: int) -> int:
        limit_bytes = self._chunks.content_start(first) + most_bytes
        if limit_bytes < self._chunks.content_size_bytes:
            last = min(last, self._chunks.index_at(limit_bytes))
        return max(first + 1, last)

    def _end(self, first: int, last: int, most_bytes: int) -> int:
        """Return where a run of absent chunks that one request can fetch ends.

        Chunks that are here (zeros above all) may lie within it, if little is fetched in vain.
        """
        begin, end = self._chunks.blob_range(first)
        content_stop = self._chunks.content_start(first) + _RUN_CONTENT_MOST_BYTES
        run_end = index = first + 1
        while index < last and self._state[index] in (ABSENT, READY, IN_MEMORY):
            source: ByteRange = self._chunks.blob_range(index)
            if not -_SHARED_BYTES <= source.start - end <= _BRIDGE_BYTES:
                break
            if source.stop - begin > most_bytes:
                break
            if self._chunks.content_start(index) > content_stop:
                break
            index += 1
            if self._state[index - 1] == ABSENT:
                end = source.stop
                run_end = index
        return run_end

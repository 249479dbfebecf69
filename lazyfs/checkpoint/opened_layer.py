"""One layer that is being read: its format, its content, and what runs beside the readers."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from lazyfs.checkpoint.desk import Desk
from lazyfs.checkpoint.placed import PlacedLayer
from lazyfs.checkpoint.remembered import IndexMemory
from lazyfs.checkpoint.walker import Walker
from lazyfs.content.cache_file import CacheFile, open_cache_file
from lazyfs.content.chunk_note import leave_note
from lazyfs.content.completion import Completion
from lazyfs.content.decoded_completion import DecodedCompletion
from lazyfs.content.fill import fill
from lazyfs.content.lanes import Lane
from lazyfs.content.layer_content import LayerContent, at_once
from lazyfs.content.model import Reader
from lazyfs.content.prefetch import Prefetch
from lazyfs.content.readahead import FileReader, Readahead
from lazyfs.content.streamed import StreamedContent, StreamReader
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, MalformedError, UnsupportedLayer
from lazyfs.ground.ranges import ByteRange, coalesce
from lazyfs.ground.settings import MIB
from lazyfs.layers import table
from lazyfs.layers.chunks import FixedChunks
from lazyfs.layers.model import Entry, LayerDescriptor, LayerIndex, StreamIndex
from lazyfs.layers.tar import walk_tar_stream
from lazyfs.transport.blob import Blob

log = logging.getLogger(__name__)

_COALESCE_BYTES = MIB
_STREAM_LOOK_BYTES = 64 * 1024
_NOTE_AFTER_S = 3.0


class OpenedLayer:
    """A layer whose files can be read while `run` runs. From `open_layer`."""

    def __init__(
        self,
        placed: PlacedLayer,
        index: LayerIndex | StreamIndex,
        blob: Blob,
        desk: Desk,
    ) -> None:
        """Begin with an index; nothing is fetched before somebody asks, or `run` runs."""
        descriptor = placed.descriptor
        self.descriptor = descriptor
        self.blob_name = blob.name
        self.placed = placed
        self.format_name = index.format_name
        self.completion: Completion | DecodedCompletion | None = None
        self.walker: Walker
        """Finds its entries."""
        self.content: LayerContent | StreamedContent
        self._readahead: Readahead | None = None
        self._noted_in: Path | None = None
        """Where the cache wants to know how the layer is cut, if it cannot know that."""
        self.memory: IndexMemory | None = None
        """What told how it is to be read, for later mounts."""
        config = desk.config
        if isinstance(index, StreamIndex):
            entries: list[Entry] = []
            self.walker = Walker(walk_tar_stream(entries), entries, self.look)
            self.content = StreamedContent(
                blob,
                index,
                descriptor.digest,
                config.cache,
                desk.lanes,
                desk.fetcher,
                config.content,
                source_key=_source_key(desk),
            )
            return
        self.walker = Walker(index.walk, index.entries, self.look)
        cache_file = _open_cache(desk, descriptor, index)
        kept = cache_file is not None and cache_file.persistent
        if kept and descriptor.digest is not None and not isinstance(index.chunks, FixedChunks):
            self._noted_in = config.cache.home(descriptor.digest, _cache_tag(desk, index))
        self.content = LayerContent(
            blob,
            index.chunks,
            cache_file,
            desk.lanes,
            desk.fetcher,
            config.content,
        )
        self._readahead = Readahead(self.content)
        if descriptor.digest is None or index.chunks.proven:
            return
        name = f"layer {descriptor.digest}"
        if index.stream is None:
            self.completion = Completion(self.content, self._readahead, descriptor.digest, name)
        else:
            self.completion = DecodedCompletion(self.content, index.stream, descriptor.digest, name)

    @property
    def is_stream(self) -> bool:
        """Whether it can only be decoded from its start."""
        return isinstance(self.content, StreamedContent)

    @property
    def mislabelled(self) -> bool:
        """Whether the bytes are of another compression than the media type says."""
        return table.is_mislabelled(self.descriptor, self.format_name)

    @property
    def proof(self) -> str:
        """What proves its bytes: each "chunk" before it is served, the whole "layer", or "none"."""
        if isinstance(self.content, LayerContent) and self.content.chunks.proven:
            return "chunk"
        return "layer" if self.descriptor.digest is not None else "none"

    @property
    def content_bytes(self) -> int | None:
        """Size of its content when unpacked; None if that is not known yet."""
        return self.content.content_size_bytes

    @property
    def blob_proven(self) -> bool:
        """Whether the whole blob has been found to match its digest, now or by an earlier mount."""
        if isinstance(self.content, StreamedContent):
            return self.content.proven
        return self.content.holdings.sealed

    @property
    def is_local(self) -> bool:
        """Whether all of it is here, and was found whole by this daemon."""
        size_bytes = self.content.content_size_bytes
        if size_bytes is None:
            return False
        if isinstance(self.content, StreamedContent):
            return self.content.peek(ByteRange(0, size_bytes)) is not None
        return self.content.here_bytes() >= size_bytes

    @property
    def is_settled(self) -> bool:
        """Whether nothing of it remains to be proven: it is, or nothing promises a digest."""
        return self.content.proven or self.blob_proven or self.descriptor.digest is None

    def proven_bytes(self) -> int:
        """How much of the content is here and proven by a digest."""
        proven = self.content.proven or self.blob_proven
        return self.content.here_bytes() if proven else 0

    def reader(
        self, content_start: int, size_bytes: int, family: ByteRange | None = None
    ) -> Reader:
        """Return a reader of the file that lies there; `family`: as for `FileReader`."""
        if isinstance(self.content, StreamedContent):
            return StreamReader(self.content, content_start, size_bytes)
        if self._readahead is None:
            raise AssertionError("a layer that is read at random has a readahead")
        return FileReader(self.content, self._readahead, content_start, size_bytes, family)

    async def walk(self) -> None:
        """Find the entries; raises as `Walker.run`.

        Where nothing has proven what led it astray, the cache forgets it: it may have been the
        source's lie of a moment, which later mounts must not find.
        """
        try:
            await self.walker.run()
        except (MalformedError, UnsupportedLayer) as error:
            if not self.blob_proven:
                self.content.condemn(error, guilty=False)
            raise

    async def run(self) -> None:
        """Read ahead, or decode the stream; for ever, or to its end."""
        if isinstance(self.content, StreamedContent):
            await self.content.run()
        elif self._readahead is not None:
            await self._readahead.run()

    async def leave_note(self) -> None:
        """Leave a note in the cache of how the layer is cut, for `lazyfs cache verify`.

        Not at once: of 100,000 chunks it keeps the interpreter for 0.1 s, from those who read
        first.
        """
        if self._noted_in is not None:
            await trio.sleep(_NOTE_AFTER_S)
            await self._leave_note()

    async def _leave_note(self) -> None:
        noted_in, self._noted_in = self._noted_in, None
        if noted_in is None or not isinstance(self.content, LayerContent):
            return
        job = partial(leave_note, noted_in, self.content.chunks, trio.from_thread.check_cancelled)
        with suppress(OSError):
            await trio.to_thread.run_sync(job)

    async def remember(self) -> None:
        """Keep what told how it is to be read for later mounts, once that is proven."""
        with suppress(LazyfsError):
            if isinstance(self.content, StreamedContent):
                await self.content.wait_end()
            else:
                while not self._may_be_remembered and self.content.poison is None:
                    await self.content.wait_news()
            await self.save()

    async def leave(self) -> None:
        """Do at once what `leave_note` and `remember` would, as far as that can be."""
        await self._leave_note()
        await self.save()

    async def save(self) -> None:
        """Keep at once what `remember` would, if that is proven already."""
        if self.memory is not None and self._may_be_remembered:
            await trio.to_thread.run_sync(self.memory.save)

    @property
    def _may_be_remembered(self) -> bool:
        return self.content.poison is None and (self.proof == "chunk" or self.blob_proven)

    async def wait_end(self) -> None:
        """Come back when a stream is all here, and proven if it can be; raises as its reads do."""
        if isinstance(self.content, StreamedContent):
            await self.content.wait_end()

    async def prefetch(self, ranges: Iterable[ByteRange]) -> None:
        """Fetch ranges at once, neighbours in one request. A stream brings them by itself."""
        if not self.is_stream:
            await self._ensure(ranges, Lane.READAHEAD)

    async def expect(self, traced: Sequence[ByteRange]) -> None:
        """Fetch what a trace names, ahead of everything; a stream comes in its own order."""
        if self._readahead is not None:
            placed = await trio.to_thread.run_sync(self._readahead.prefetch.placed, traced)
            self._readahead.expect(placed)

    def follow(self, rest: Sequence[ByteRange]) -> None:
        """Fetch all that a restore reads, in its order, behind what is wanted at once."""
        if self._readahead is not None:
            self._readahead.follow(rest)

    async def wait_long_read(self) -> None:
        """Come back when somebody reads a file of it on and on, from now on; of a stream never."""
        if self._readahead is None:
            await trio.sleep_forever()
        else:
            await self._readahead.wait_long_read()

    async def wait_replayed(self, content: ByteRange) -> None:
        """Let a trace be fetched before `content`, for which nobody waits; see `Readahead`."""
        if self._readahead is not None:
            await self._readahead.wait_replayed(content)

    @property
    def prefetched(self) -> Prefetch | None:
        """What is fetched of it ahead of all readers; None for a stream."""
        return self._readahead.prefetch if self._readahead is not None else None

    async def prove(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Prove the whole layer, if its chunks do not prove themselves.

        Raises:
            IntegrityError: it is not what its digest promises.
            FetchError, SourceError: it could not be had.
        """
        if isinstance(self.content, StreamedContent):
            await self.content.prove(on_progress)
        elif self.completion is not None and not self.content.holdings.sealed:
            await self.completion.prove(eager=True, on_progress=on_progress)
        if self.descriptor.digest is None:
            log.warning("the archive has no digest that it could be verified by")

    async def complete(
        self, on_progress: Callable[[int, int], None] | None = None, *, alone: bool = False
    ) -> None:
        """Come back when all of it is here, and proven as far as it can be.

        `on_progress` is told bytes done, and bytes in all. `alone`: nobody else reads, and the
        layer's `completion` is not running.

        Raises:
            IntegrityError: it is not what its digest promises.
            FetchError, SourceError: it could not be had.
            LazyfsError: there is no room for it.
        """
        if isinstance(self.content, StreamedContent):
            await self.content.prove(on_progress)
            return
        if self._readahead is None:
            raise AssertionError("a layer that is read at random has a readahead")
        if self.completion is not None and not self.content.holdings.sealed:
            if alone:
                await self.completion.prove(eager=True, on_progress=on_progress)
            else:
                await self.completion.hurry(on_progress)
            on_progress = None
        await fill(self.content, self._readahead, eager=alone, on_progress=on_progress)

    async def look(self, wanted: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of content ranges, fetched at once, and nothing ahead of them.

        Of a stream there may be more than was wanted, or less where it ends.
        """
        if isinstance(self.content, StreamedContent):
            return [await self._look(self.content, item) for item in wanted]
        await self._ensure(wanted, Lane.DEMAND)
        return [bytes(await self.content.read(item)) for item in wanted]

    @staticmethod
    async def _look(content: StreamedContent, wanted: ByteRange) -> bytes:
        """Return what a stream has at `wanted`: more if it is there, less where it ends."""
        try:
            await content.ensure(wanted, Lane.DEMAND)
        except MalformedError as error:
            size_bytes = content.content_size_bytes
            if size_bytes is None:
                raise
            if size_bytes < wanted.start:
                raise MalformedError(
                    f"the tar is truncated: it should go on to byte {wanted.start}, but ends at "
                    f"{size_bytes}"
                ) from error
        stop = max(wanted.stop, min(content.here_bytes(), wanted.start + _STREAM_LOOK_BYTES))
        if content.content_size_bytes is not None:
            stop = min(stop, content.content_size_bytes)
        if stop <= wanted.start:
            return b""
        return bytes(await content.read(ByteRange(wanted.start, stop)))

    async def _ensure(self, ranges: Iterable[ByteRange], lane: Lane) -> None:
        """Have ranges fetched at once, as few requests as their distances allow."""
        merged = list(coalesce(ranges, _COALESCE_BYTES))
        if merged:
            await at_once([partial(self.content.ensure, item, lane) for item in merged])


def _source_key(desk: Desk) -> str:
    """Return what names the source in the cache, of bytes that nothing has proven yet."""
    return Digest.of(desk.source_name.encode()).hex[:16]


def _open_cache(desk: Desk, descriptor: LayerDescriptor, index: LayerIndex) -> CacheFile | None:
    chunks = index.chunks
    tag = _cache_tag(desk, index)
    try:
        return open_cache_file(
            desk.config.cache, descriptor.digest, tag, chunks.content_size_bytes, len(chunks)
        )
    except OSError as error:
        where, why = desk.config.cache, error.strerror or error
        log.warning("no cache in %s (%s): what is read is kept in memory", where, why)
        return None


def _cache_tag(desk: Desk, index: LayerIndex) -> str:
    """Return what names all that proves the chunks, or else the source that they come from."""
    if index.chunks.proven:
        return index.cache_tag
    return f"{index.cache_tag}-{_source_key(desk)}"

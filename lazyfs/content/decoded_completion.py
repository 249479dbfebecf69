"""The pass that proves a whole blob whose bytes are not its content, and whose chunks are unproven.

The blob is fetched and decoded from its start, beside what readers do, and hashed. Each chunk of
what comes out is compared, by its mark, with what was served for it, and what is served for it
later must be the same; what nobody has yet is stored. A mismatch condemns the content.

Nothing is fetched while readers miss anything, unless the pass is eager; so its ring is small.
"""

import logging
import mmap
from array import array
from collections.abc import Callable
from contextlib import suppress

import trio

from lazyfs.content.blob_stream import RING_BYTES, BlobStream
from lazyfs.content.completion import BlobProof
from lazyfs.content.decoding import READERS, decode_blob
from lazyfs.content.holdings import ABSENT, FLYING
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.marks import mark_from
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError, raise_sole_error
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import StreamIndex

log = logging.getLogger(__name__)

_LEISURE_RING_BYTES = 8 * MIB
_KEEP_MOST_BYTES = 8 * MIB
"""A chunk is put together in memory before it is stored; a larger one is only compared."""
_PROGRESS_S = 0.25


class DecodedCompletion(BlobProof):
    """The whole-blob proof of one layer that is decoded."""

    def __init__(
        self, content: LayerContent, stream: StreamIndex, digest: Digest, name: str
    ) -> None:
        """`stream`: how the layer is decoded from its start; `name`: the blob's, for messages."""
        super().__init__(content, digest, name)
        self._stream = stream
        self._was_proven = False

    @property
    def all_bytes(self) -> int:
        """Of the blob."""
        return self._content.blob.size_bytes

    async def prove(
        self, *, eager: bool, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Decode the whole blob; see `BlobProof`."""
        content = self._content
        hasher = self._digest.hasher()
        self.hashed_bytes = 0
        self._was_proven = False
        chunks = _Chunks(content)
        stream = BlobStream(
            content.blob,
            content.fetcher,
            content.settings,
            readers=READERS,
            on_trouble=_give_up if eager else self._complain,
            may_use=(lambda: None) if eager else self._connections,
            ring_bytes=RING_BYTES if eager else _LEISURE_RING_BYTES,
        )
        decoder = self._stream.decoder()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, on_progress, nursery.cancel_scope)
                await decode_blob(stream, decoder, chunks, hasher, self._hashed)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            self._raise(group)
        finally:
            chunks.close()
        if self._was_proven:
            return
        if on_progress is not None:
            on_progress(self.hashed_bytes, content.blob.size_bytes)
        self._settle(hasher)

    def _raise(self, group: BaseExceptionGroup[BaseException]) -> None:
        """Raise what ended the pass; condemn the content if it has been found wrong."""
        try:
            raise_sole_error(group)
        except MalformedError as error:
            found = IntegrityError(f"{self._name} cannot be decoded to its end: {error}")
            self._content.condemn(found)
            raise found from error
        except IntegrityError as error:
            self._content.condemn(error)
            raise

    async def _watch(
        self, on_progress: Callable[[int, int], None] | None, scope: trio.CancelScope
    ) -> None:
        """Tell how far it is; end the pass when it has become idle: condemned, or proven."""
        while self._content.poison is None and not self._was_proven:
            if on_progress is not None:
                on_progress(self.hashed_bytes, self._content.blob.size_bytes)
            with trio.move_on_after(_PROGRESS_S):
                await self._content.condemned.wait()
            self._was_proven = self._has_been_proven()
        scope.cancel()

    def _connections(self) -> int:
        """Keep out of the way of readers and of what is fetched for them."""
        lanes, settings = self._content.lanes, self._content.settings
        is_idle = lanes.idle_for_s >= settings.idle_s and not self._content.is_fetching
        if not is_idle and not self.hurried:
            return 0
        return 1 if lanes.is_gentle else settings.completion_connections

    def _hashed(self, count: int) -> None:
        self.hashed_bytes += count


class _Chunks:
    """Cuts what is decoded into chunks. Used by the decoding thread."""

    def __init__(self, content: LayerContent) -> None:
        self._content = content
        self._chunks = content.chunks
        self._token = trio.lowlevel.current_trio_token()
        self._marker = content.holdings.marker
        self._hasher = self._marker.hasher()
        self._index = -1
        self._size_bytes = self._filled = 0
        self._kept = False
        self._marks = array("Q")
        self._buffer = mmap.mmap(-1, _KEEP_MOST_BYTES)
        self._begin()

    def take(self, piece: Data) -> None:
        """Take in what comes next.

        Raises:
            IntegrityError: there is more than the index says, or it is not what it was.
        """
        view = memoryview(piece)
        while len(view):
            if self._index >= len(self._chunks):
                raise self._another_size()
            part = view[: self._size_bytes - self._filled]
            if self._kept:
                self._buffer[self._filled : self._filled + len(part)] = part
            else:
                self._hasher.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self._size_bytes:
                self._end()

    def finish(self) -> None:
        """Say that the content has ended.

        Raises:
            IntegrityError: there should be more of it.
        """
        if self._index < len(self._chunks):
            raise self._another_size()

    def part_ends(self) -> None:
        """Have the content compare the chunks that have ended with what it has of them."""
        if self._marks:
            first = self._index - len(self._marks)
            self._token.run_sync_soon(self._content.witness, first, self._marks)
            self._marks = array("Q")

    def close(self) -> None:
        """Give the memory back."""
        with suppress(BufferError):
            self._buffer.close()

    def _begin(self) -> None:
        self._index += 1
        self._filled = 0
        self._hasher.reset()
        if self._index == len(self._chunks):
            return
        holdings = self._content.holdings
        self._size_bytes = self._chunks.content_size(self._index)
        self._kept = (
            self._size_bytes <= _KEEP_MOST_BYTES
            and holdings.keeps_all
            and holdings.state[self._index] in (ABSENT, FLYING)
        )

    def _end(self) -> None:
        if self._kept:
            with memoryview(self._buffer) as whole, whole[: self._size_bytes] as chunk:
                self._marks.append(self._marker.of(chunk))
                self._store(chunk)
        else:
            self._marks.append(mark_from(self._hasher))
        self._begin()

    def _store(self, chunk: memoryview) -> None:
        holdings = self._content.holdings
        if not holdings.claim(self._index):
            return  # somebody was faster
        try:
            stored = holdings.store(self._index, [chunk])
        except IntegrityError:
            holdings.unclaim(self._index)
            raise
        self._token.run_sync_soon(self._content.adopt, self._index, *stored)

    def _another_size(self) -> IntegrityError:
        return IntegrityError(
            f"{self._content.blob.name} does not decode to the "
            f"{self._chunks.content_size_bytes} bytes that its index promises"
        )


def _give_up(error: LazyfsError) -> None:
    raise error

"""The content of a layer that can only be decoded from its start, served while it comes.

One pass fetches the blob, hashes it and decodes it, always at full speed, into a file that grows.
Bytes behind the pass's position are slices of that file's mapping; who wants others waits for the
pass. Once the blob has been found to match its digest, later mounts find the content (`kept.py`)
and need no pass; where what they find turns out to be damaged, the pass is made after all.

A pass that cannot go on (the source is gone, the disk is full) tells all who wait, rests, and
goes on where it was when somebody asks again or `REST_S` have passed.

State belongs to the trio thread. Of the pass's threads (`decoding.py`) only the one that decodes
touches it: it appends to the file (whose rules are its own), and wakes the loop where somebody
waits for what has come (`waiters.py`).
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from lazyfs.content.blob_stream import REST_S, BlobStream
from lazyfs.content.cache import Cache
from lazyfs.content.decoding import READERS, decode_blob
from lazyfs.content.growing_file import GrowingFile
from lazyfs.content.kept import Kept, forget, open_kept, publish
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.model import Content
from lazyfs.content.waiters import NEVER, Waiters
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    CONDEMNED,
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import ContentSettings
from lazyfs.layers.model import StreamDecoder, StreamIndex
from lazyfs.transport.blob import Blob
from lazyfs.transport.retry import Fetcher

log = logging.getLogger(__name__)

CONTENT_MOST_BYTES = 1 << 44
_PROGRESS_S = 0.25


class StreamedContent(Content):
    """Bytes of one layer by content address; `run` must be started for anything to come."""

    def __init__(
        self,
        blob: Blob,
        stream: StreamIndex,
        digest: Digest | None,
        cache: Cache,
        lanes: Lanes,
        fetcher: Fetcher,
        settings: ContentSettings,
    ) -> None:
        """Without a `digest` nothing is proven, and nothing left for later mounts.

        `cache` must have room for the whole content.
        """
        self.counters = fetcher.counters
        self._fetcher = fetcher
        self.condemned = trio.Event()
        self._blob = blob
        self._stream = stream
        self._digest = digest
        self._cache = cache
        self._lanes = lanes
        self._settings = settings
        self._kept = open_kept(cache, digest, stream.cache_tag)
        self._kept_lost = trio.Event()
        self._lost: Kept | None = None
        self._growing: GrowingFile | None = None
        self._size_bytes = self._kept.size_bytes if self._kept is not None else None
        self._proven = self._kept is not None
        self._poison: LazyfsError | None = None
        self._waiters = Waiters()
        self._pass: BlobStream | None = None
        self._pass_scope = trio.CancelScope()
        self._asked_again = trio.Event()
        self._in_trouble_at = -1
        self._token = trio.lowlevel.current_trio_token()
        self.hashed_bytes = 0
        """How far the blob has been hashed."""

    # -- reading ----------------------------------------------------------------------------

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return the bytes as a slice of the cache's mapping, if they are all there."""
        if content.start >= content.stop:
            return memoryview(b"")
        here = self._kept or self._growing
        return here.peek(content) if here is not None and self._poison is None else None

    async def read(
        self, content: ByteRange, lane: Lane = Lane.DEMAND, *, out_of_the_blue: bool = True
    ) -> Data:
        """Return exactly the bytes of `content`, waiting until they have come.

        Raises:
            MalformedError: the content ends before, or is none.
            IntegrityError: the blob does not match its digest.
            FetchError, SourceError: it cannot be had, or there is no room for it.
        """
        view = self.peek(content)
        if view is not None:
            return view
        if lane is Lane.DEMAND:
            self.counters.reads_waited += 1
            self._lanes.note_demand(out_of_the_blue=out_of_the_blue)
        while view is None:
            await self.ensure(content, lane)
            view = self.peek(content)
        return view

    async def ensure(self, content: ByteRange, lane: Lane) -> None:
        """Come back when the bytes are here; raises as `read`. All lanes are alike."""
        while content.start < content.stop:
            self.raise_if_condemned()
            if self.peek(content) is not None:
                return
            if self._size_bytes is not None and content.stop > self._size_bytes:
                raise MalformedError(
                    f"{self._blob.name}: its content ends at {self._size_bytes}, "
                    f"asked for {content}"
                )
            if self._kept is not None:
                await self._check(self._kept, content)
            else:
                await self._wait(content.stop)

    async def wait_end(self) -> None:
        """Come back when all of the content is here and proven as far as it can be.

        Raises as `read`.
        """
        while True:
            self.raise_if_condemned()
            if self._size_bytes is not None:
                return
            await self._wait(NEVER)

    async def prove(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Come back when the blob is proven; `on_progress` is told bytes done, and bytes in all.

        What an earlier mount proved is checked to be as it was. Raises as `read`.
        """
        while (kept := self._kept) is not None:
            await self._check(kept, ByteRange(0, kept.size_bytes))
            if kept is self._kept:
                return
        while self._size_bytes is None:
            with trio.move_on_after(_PROGRESS_S):
                await self.wait_end()
            if on_progress is not None:
                on_progress(self.hashed_bytes, self._blob.size_bytes)
        self.raise_if_condemned()

    async def _wait(self, stop: int) -> None:
        self._asked_again.set()
        if self._pass is not None:
            self._pass.ask_again()
        await self._waiters.wait(stop, self._position)

    def _position(self) -> int:
        return self._growing.size_bytes if self._growing is not None else 0

    async def _check(self, kept: Kept, content: ByteRange) -> None:
        """See that what is kept is as it was; if not, begin the pass."""
        good = await kept.check(content)
        self.counters.chunks_from_cache += max(0, good)
        if good >= 0 or self._kept is not kept:
            return
        log.warning("what is kept of %s has changed on disk; doing it over", self._blob.name)
        self.counters.cache_refused += 1
        self._kept = None
        self._size_bytes = None
        self._proven = False
        kept.forget()
        self._lost = kept  # others may be looking at it still
        self._kept_lost.set()

    # -- what it comes to -------------------------------------------------------------------

    @property
    def content_size_bytes(self) -> int | None:
        """Size of the content; None until the pass has ended."""
        return self._size_bytes

    @property
    def proven(self) -> bool:
        """Whether the blob has been found to match the digest that the manifest vouches for."""
        return self._proven

    def here_bytes(self) -> int:
        """How much content is here."""
        return self._kept.size_bytes if self._kept is not None else self._position()

    @property
    def poison(self) -> LazyfsError | None:
        """Why nothing is served any more, if that is so."""
        return self._poison

    def condemn(self, error: LazyfsError, *, guilty: bool = True) -> None:
        """Serve nothing more of this layer, say why, and forget what the cache holds of it.

        One that is not `guilty` shares the fate of another layer. What it has proven is kept.
        """
        if self._poison is not None:
            return
        self._poison = error.with_traceback(None)  # which would hold on to buffers
        if guilty:
            log.critical("%s" + CONDEMNED, error)
        if guilty or not self._proven:
            self._proven = False
            self._purge()
        self.condemned.set()
        self._pass_scope.cancel()
        self._waiters.wake(NEVER)

    def _purge(self) -> None:
        if self._kept is not None:
            self._kept.forget()
        elif self._growing is not None and self._growing.published:
            forget(self._growing.directory, self._growing.fd)

    def raise_if_condemned(self) -> None:
        """Raise the error of a verification that has failed, if any has."""
        if self._poison is not None:
            raise self._poison

    def close(self) -> None:
        """Let go of what is held, when nobody reads any more and `run` has ended."""
        for file in (self._kept, self._lost, self._growing):
            if file is not None:
                file.close()
        self._kept = self._lost = self._growing = None

    # -- the pass, on the trio thread -------------------------------------------------------

    async def run(self) -> None:
        """Bring the content here, unless it is kept; come back when later mounts find it."""
        if self._kept is not None:
            await self._kept_lost.wait()
        try:
            with self._pass_scope:
                decoder = await self._decode_all()
                await self._settle(decoder)
        except (MalformedError, IntegrityError) as error:
            self.condemn(error)
        except Exception as error:  # a bug must not end the mount, nor may readers wait for ever
            log.exception("%s cannot be decoded: please report this", self._blob.name)
            self.condemn(LazyfsError(f"{self._blob.name} cannot be decoded: {error!r}"))
        if self._poison is not None:
            self._purge()  # what was being published when it was condemned

    async def _decode_all(self) -> StreamDecoder:
        """Fetch, hash and decode the whole blob; return its decoder, which has finished.

        Raises:
            MalformedError: it cannot be decoded.
            IntegrityError: it does not match its digest, or is not what it was.
        """
        growing = self._growing = await self._make_file()
        decoder = self._stream.decoder()
        hasher = self._digest.hasher() if self._digest is not None else None
        stream = self._pass = BlobStream(
            self._blob,
            self._fetcher,
            self._settings,
            readers=1 if hasher is None else READERS,
            on_trouble=self._trouble,
        )
        try:
            await decode_blob(stream, decoder, _Writer(self, growing), hasher, self._hashed)
        finally:
            self._pass = None
        if self._digest is not None and hasher is not None:
            if hasher.hexdigest() != self._digest.hex:
                raise IntegrityError(
                    f"{self._blob.name} does not match its digest: promised {self._digest}, "
                    f"received {self._digest.algorithm}:{hasher.hexdigest()}"
                )
            self._proven = True
            log.info("%s is whole and matches its digest", self._blob.name)
        self._size_bytes = growing.size_bytes
        self._waiters.wake(NEVER)
        return decoder

    async def _make_file(self) -> GrowingFile:
        while True:
            try:
                return await trio.to_thread.run_sync(GrowingFile, self._cache)
            except OSError as problem:
                await self._rest(self._no_room(problem))

    async def _settle(self, decoder: StreamDecoder) -> None:
        """Leave what has been proven for later mounts, as far as the disk will have it."""
        if self._digest is None or self._growing is None:
            return
        home = self._cache.home(self._digest, self._stream.cache_tag)
        if home is None:
            return
        with trio.CancelScope(shield=True):  # all the work is done: it is kept, whoever leaves now
            try:
                await trio.to_thread.run_sync(self._publish, decoder, self._growing, home)
            except OSError as problem:
                log.warning("later mounts will not find %s: %s", self._blob.name, problem)
            except LazyfsError as error:
                log.info("later mounts will not find %s: %s", self._blob.name, error)

    def _trouble(self, error: LazyfsError) -> None:
        """Tell all who wait that the pass cannot go on now."""
        position = self._position()
        known = self._in_trouble_at == position
        self._in_trouble_at = position
        log.log(logging.DEBUG if known else logging.WARNING, "waiting to go on: %s", error)
        self._waiters.fail(error)

    async def _rest(self, error: LazyfsError) -> None:
        self._trouble(error)
        self._asked_again = trio.Event()
        with trio.move_on_after(REST_S):
            await self._asked_again.wait()

    def _no_room(self, problem: OSError) -> LazyfsError:
        return FetchError(
            f"{self._blob.name} can only be decoded from its start, into a file, and the cache in "
            f"{self._cache} takes no more after {self._position()} bytes of it ({problem}); "
            "make room there, or choose another directory",
            transient=False,
        )

    def _wake(self) -> None:
        self._waiters.wake(self._position())

    # -- in worker threads ------------------------------------------------------------------

    def _hashed(self, count: int) -> None:
        self.hashed_bytes += count

    def append(self, growing: GrowingFile, piece: Data) -> None:
        """Take in what the pass has decoded. Only for the pass.

        Raises:
            MalformedError: it is more than can be.
        """
        if growing.size_bytes + len(piece) > CONTENT_MOST_BYTES:
            raise MalformedError(
                f"{self._blob.name}: more than {CONTENT_MOST_BYTES} bytes are not believed"
            )
        self.insist(partial(growing.append, piece))
        if growing.size_bytes >= self._waiters.least:
            self._token.run_sync_soon(self._wake, idempotent=True)

    def insist(self, store: Callable[[], None]) -> None:
        """Have something stored, however often it takes. Only for the pass."""
        while True:
            try:
                return store()
            except OSError as problem:
                trio.from_thread.run(self._rest, self._no_room(problem))

    def _publish(self, decoder: StreamDecoder, growing: GrowingFile, home: Path) -> None:
        data, reopen = decoder.restart_index(), self._stream.reopen
        index = None
        if data is not None and reopen is not None:
            try:
                index = data, reopen(data).chunks
            except LazyfsError as error:
                log.warning("%s cannot be read at random: %s", self._blob.name, error)
        publish(growing, home, index, self.raise_if_condemned)


class _Writer:
    """Where the pass puts what it decodes."""

    def __init__(self, content: StreamedContent, growing: GrowingFile) -> None:
        self._content = content
        self._growing = growing

    def take(self, piece: Data) -> None:
        self._content.append(self._growing, piece)

    def part_ends(self) -> None:
        pass

    def finish(self) -> None:
        self._content.insist(self._growing.finish)


class StreamReader:
    """One open file in a content that is read as it comes."""

    def __init__(self, content: Content, start: int, size_bytes: int) -> None:
        """The file's bytes are the content from `start` on, `size_bytes` of them."""
        self._content = content
        self._start = start
        self._stop = start + size_bytes

    async def read(self, offset: int, size_bytes: int) -> Data:
        """Return the bytes from `offset` on: `size_bytes` of them, or all up to the file's end.

        A checkpoint only if they are not here.

        Raises:
            IntegrityError, FetchError, SourceError: never a short read instead.
        """
        begin = min(self._start + offset, self._stop)
        wanted = ByteRange(begin, min(begin + size_bytes, self._stop))
        view = self._content.peek(wanted)
        return view if view is not None else await self._content.read(wanted)

"""The content of a layer that can only be decoded from its start, served while it comes.

One pass fetches the blob, hashes it and decodes it, always at full speed, into a file that grows
(`stream_pass.py`). It is made once for all mounts of the host that show this layer at the same
time: one daemon leads, the others follow (`following.py`) and may lead next. Bytes behind the
pass's position are slices of that file's mapping; who wants others waits for the pass. Once the
blob has been found to match its digest, later mounts find the content (`kept.py`) and need no
pass; where what they find turns out to be damaged, the pass is made after all.

Nothing of an unproven layer is shared with mounts of another source: the file is found by the
digest that somebody claims *and* by who gives the bytes.

State belongs to the trio thread, but for the file, whose rules are its own.
"""

import logging
from collections.abc import Callable
from contextlib import suppress

import trio

from lazyfs.content.cache import Cache
from lazyfs.content.coming import Coming
from lazyfs.content.following import Follower, Outcome
from lazyfs.content.growing_file import GrowingFile
from lazyfs.content.incoming import make_private, make_shared, shared_name
from lazyfs.content.kept import Kept, forget, open_kept, touch
from lazyfs.content.lanes import Lane, Lanes
from lazyfs.content.model import Content
from lazyfs.content.notice import State
from lazyfs.content.served import Former
from lazyfs.content.stream_pass import Job, StreamPass
from lazyfs.content.waiters import NEVER
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import CONDEMNED, IntegrityError, LazyfsError, MalformedError
from lazyfs.ground.journal import Steps
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import ContentSettings
from lazyfs.layers.model import StreamIndex
from lazyfs.transport.blob import Blob
from lazyfs.transport.retry import Fetcher

log = logging.getLogger(__name__)

_PROGRESS_S = 0.25
_VERDICTS_BELIEVED = 2
"""So many other daemons, one after the other, have found the blob wrong: it is."""


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
        *,
        source_key: str | None = None,
    ) -> None:
        """Without a `digest` nothing is proven, and nothing left for later mounts.

        `source_key` names who gives the bytes; without it no other daemon reads along. `cache`
        must have room for the whole content.
        """
        self.counters = fetcher.counters
        self.condemned = trio.Event()
        self._job = Job(blob, stream, digest, cache, fetcher, settings)
        self._blob = blob
        self._lanes = lanes
        self._name = None
        if digest is not None and source_key is not None:
            self._name = shared_name(digest, stream.cache_tag, source_key)
        journal = self.counters.journal
        self._coming = Coming(Steps(journal, blob.name) if journal is not None else None)
        self._kept = open_kept(cache, digest, stream.cache_tag, stream.reopen)
        self._kept_lost = trio.Event()
        self._lost: list[Kept] = []
        self._size_bytes = self._kept.size_bytes if self._kept is not None else None
        self._proven = self._kept is not None
        self._led = False
        self._poison: LazyfsError | None = None
        self._pass_scope = trio.CancelScope()

    @property
    def hashed_bytes(self) -> int:
        """How far the blob has been hashed."""
        return self._coming.hashed_bytes

    # -- reading ----------------------------------------------------------------------------

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return the bytes as a slice of the cache's mapping, if they are all there."""
        if content.start >= content.stop:
            return memoryview(b"")
        here = self._kept or self._coming
        return here.peek(content) if self._poison is None else None

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
                await self._coming.wait(content.stop)

    async def wait_end(self) -> None:
        """Come back when all of the content is here and proven as far as it can be.

        Raises as `read`.
        """
        while True:
            self.raise_if_condemned()
            if self._size_bytes is not None:
                return
            await self._coming.wait(NEVER)

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
        self._lost.append(kept)  # others may be looking at it still
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
        return self._kept.size_bytes if self._kept is not None else self._coming.position()

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
        self._coming.wake_all()

    def _purge(self) -> None:
        if self._kept is not None:
            self._kept.forget()
        elif self._led and self._coming.file is not None and self._job.home is not None:
            forget(self._job.home, self._coming.file.fd)

    def raise_if_condemned(self) -> None:
        """Raise the error of a verification that has failed, if any has."""
        if self._poison is not None:
            raise self._poison

    def close(self) -> None:
        """Let go of what is held, when nobody reads any more and `run` has ended."""
        for kept in (self._kept, *self._lost):
            if kept is not None:
                kept.close()
        self._coming.close()
        if self._proven and self._job.home is not None:
            touch(self._job.home)
        self._kept, self._lost = None, []

    # -- how it comes here ------------------------------------------------------------------

    async def run(self) -> None:
        """Bring the content here, unless it is kept; come back when later mounts find it."""
        try:
            with self._pass_scope:
                await self._bring()
        except (MalformedError, IntegrityError) as error:
            self.condemn(error)
        except Exception as error:  # a bug must not end the mount, nor may readers wait for ever
            log.exception("%s cannot be decoded: please report this", self._blob.name)
            self.condemn(LazyfsError(f"{self._blob.name} cannot be decoded: {error!r}"))
        if self._poison is not None and not self._proven:
            self._purge()  # what was being published when it was condemned

    async def _bring(self) -> None:
        """Bring it here, by whichever way; come back when it is and later mounts find it.

        Raises:
            MalformedError: it cannot be decoded.
            IntegrityError: it does not match its digest, or is not what it was.
        """
        verdicts = 0
        while True:
            if self._kept is not None:
                await self._kept_lost.wait()
                self._kept_lost = trio.Event()
            file = await self._open()
            if file is None:
                continue
            outcome = await self._take_part(file)
            if outcome is Outcome.WHOLE:
                return
            if outcome is Outcome.FAILED:
                file.withdraw()
                verdicts += 1
                error = _verdict(file)
                log.warning("what another lazyfs has decoded is not served any more: %s", error)
                if verdicts >= _VERDICTS_BELIEVED:
                    raise error
            await trio.to_thread.run_sync(_give_up, file)

    async def _take_part(self, file: GrowingFile) -> Outcome:
        """Lead or follow, until it is whole and later mounts find it, or all begin anew."""
        notice = file.cradle.notice
        leads = file.cradle.lead() and file.cradle.state() is State.DECODING
        if notice is not None and not leads:
            follower = Follower(self._job, self._coming, file, notice)
            outcome = await follower.run()
            if outcome is Outcome.WHOLE:
                self._here(file)
                await follower.settle()
            if outcome is not Outcome.LEAD:
                return outcome
            log.info("going on to decode %s, which another lazyfs has begun", self._blob.name)
        if not await trio.to_thread.run_sync(file.begin):
            return Outcome.STUCK
        self._led = True
        work = StreamPass(self._job, self._coming, file)
        decoder = await work.run()
        if decoder is None:
            return Outcome.STUCK
        self._here(file)
        await work.settle(decoder, self.raise_if_condemned)
        return Outcome.WHOLE

    def _here(self, file: GrowingFile) -> None:
        """Take note that all of it is here."""
        self._proven = self._job.digest is not None
        if self._proven:
            file.prove()
        self._size_bytes = file.size_bytes
        self._coming.wake_all()

    async def _open(self) -> GrowingFile | None:
        """Open the file that it comes in; None if it is kept meanwhile, or was."""
        before = self._coming.file
        formers = before.as_formers() if before is not None else []
        while True:
            try:
                found = await trio.to_thread.run_sync(self._make_file, formers)
                break
            except OSError as problem:
                await self._coming.rest(self._job.no_room(problem, 0))
        if isinstance(found, Kept):
            await self._adopt(found, formers)
            return None
        self._coming.file = found
        if before is not None:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(before.close)
        return found

    def _make_file(self, formers: list[Former]) -> GrowingFile | Kept:
        job = self._job
        kept: list[Kept] = []

        def is_kept() -> bool:
            found = open_kept(job.cache, job.digest, job.stream.cache_tag, job.stream.reopen)
            if found is not None:
                kept.append(found)
            return bool(kept)

        if self._name is None:
            cradle = make_private(job.cache)
        else:
            shared = make_shared(job.cache, self._name, is_kept)
            if shared is None:
                return kept[0]
            cradle = shared
        return GrowingFile(cradle, job.cache, job.blob.name, formers)

    async def _adopt(self, kept: Kept, formers: list[Former]) -> None:
        """Serve what others have kept meanwhile; it has to be what has been served before.

        Raises:
            IntegrityError: it is not.
        """
        self._lost.append(kept)  # until it is served; it is closed in any case
        for former in formers:
            former.check_size(kept.size_bytes, self._blob.name)
            served = ByteRange(0, min(former.size_bytes, kept.size_bytes))
            if await kept.check(served) < 0:
                await trio.to_thread.run_sync(kept.forget)
                return
            view = kept.peek(served) or b""
            await trio.to_thread.run_sync(former.compare, 0, view, self._blob.name)
        self._lost.remove(kept)
        self._kept = kept
        self._size_bytes = kept.size_bytes
        self._proven = True
        self._coming.wake_all()


def _verdict(file: GrowingFile) -> LazyfsError:
    """Return what the one who has decoded the file has found wrong."""
    notice = file.cradle.notice
    error = notice.trouble() if notice is not None else LazyfsError("it has failed")
    if isinstance(error, MalformedError | IntegrityError):
        return error
    return IntegrityError(str(error))


def _give_up(file: GrowingFile) -> None:
    """Let nobody join those who use the file."""
    with suppress(OSError):
        file.cradle.discard()


class StreamReader:
    """One open file in a content that is read as it comes."""

    def __init__(self, content: Content, start: int, size_bytes: int) -> None:
        """The file's bytes are the content from `start` on, `size_bytes` of them."""
        self._content = content
        self._start = start
        self._stop = start + size_bytes

    async def read(self, offset: int, size_bytes: int, lane: Lane = Lane.DEMAND) -> Data:
        """Return the bytes from `offset` on: `size_bytes` of them, or all up to the file's end.

        A checkpoint only if they are not here.

        Raises:
            IntegrityError, FetchError, SourceError: never a short read instead.
        """
        begin = min(self._start + offset, self._stop)
        wanted = ByteRange(begin, min(begin + size_bytes, self._stop))
        view = self._content.peek(wanted)
        return view if view is not None else await self._content.read(wanted, lane)

    def is_here(self, offset: int, size_bytes: int) -> bool:
        """Whether `read` would have them at once."""
        begin = min(self._start + offset, self._stop)
        wanted = ByteRange(begin, min(begin + size_bytes, self._stop))
        return self._content.peek(wanted) is not None

    def is_kept(self) -> bool:
        """Whether all of the file has been decoded, or is kept and has been checked.

        Where it is not what it was all is decoded anew, which is no short wait.
        """
        return self.is_here(0, self._stop - self._start)

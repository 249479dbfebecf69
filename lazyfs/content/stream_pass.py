"""The pass over a blob that is decoded from its start: fetched, hashed, decoded, written.

It is made by the one daemon of the host that leads (`incoming.py`), which tells the others how
far it is, that it lives, and what keeps it from going on (`notice.py`). A pass that cannot go on
(the source is gone, the disk is full) rests, and goes on where it was when somebody asks again,
here or elsewhere, or `REST_S` have passed.

State belongs to the trio thread. Of the pass's threads (`decoding.py`) only the one that decodes
touches the file, whose rules are its own.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

from lazyfs.content.blob_stream import BlobStream
from lazyfs.content.cache import Cache
from lazyfs.content.coming import Coming
from lazyfs.content.decoding import READERS, decode_blob
from lazyfs.content.growing_file import Contradiction, GrowingFile
from lazyfs.content.kept import publish
from lazyfs.content.notice import State
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
    raise_sole_error,
)
from lazyfs.ground.settings import ContentSettings
from lazyfs.layers.model import StreamDecoder, StreamIndex
from lazyfs.transport.blob import Blob
from lazyfs.transport.retry import Fetcher

log = logging.getLogger(__name__)

CONTENT_MOST_BYTES = 1 << 44
_BEAT_S = 0.25
"""Much less than the patience of those that follow (`following.py`)."""


class Job(msgspec.Struct, frozen=True):
    """What is to be brought here, and with what."""

    blob: Blob
    stream: StreamIndex
    digest: Digest | None
    cache: Cache
    fetcher: Fetcher
    settings: ContentSettings

    @property
    def home(self) -> Path | None:
        """Where later mounts look for it; None if they never will."""
        if self.digest is None:
            return None
        return self.cache.home(self.digest, self.stream.cache_tag)

    def no_room(self, problem: OSError, position: int) -> LazyfsError:
        """Return the error for content that cannot be stored."""
        where, what = f"the cache in {self.cache}", "make room there, or choose another directory"
        if self.cache.directory is None:
            where, what = "the cache in memory", "allow it more, or keep it on a disk"
        return FetchError(
            f"{self.blob.name} can only be decoded from its start, into a file, and {where} "
            f"takes no more after {position} bytes of it ({problem.strerror or problem}); {what}",
            transient=False,
        )


class StreamPass:
    """One pass into one file, whose cradle this daemon leads."""

    def __init__(self, job: Job, coming: Coming, file: GrowingFile) -> None:
        """Do nothing yet."""
        self._job = job
        self._coming = coming
        self._file = file
        self._notice = file.cradle.notice

    async def run(self) -> StreamDecoder | None:
        """Bring all of the content here, proven if it has a digest; return its decoder.

        None if all have to begin anew: others have given this daemon up, or what they have
        written is not what comes now.

        Raises:
            MalformedError: it cannot be decoded.
            IntegrityError: it does not match its digest, or is not what it was.
        """
        try:
            decoder = await self._decode_while_living()
            if decoder is not None:
                await self._prove()
        except (MalformedError, IntegrityError) as error:
            await self._fail(error)
            raise
        except Contradiction:
            name = self._job.blob.name
            await self._fail(IntegrityError(f"{name} decodes to other bytes than at first"))
            return None
        except Exception as error:
            await self._fail(LazyfsError(f"{self._job.blob.name} cannot be decoded: {error!r}"))
            raise
        return decoder

    async def settle(self, decoder: StreamDecoder, check: Callable[[], None]) -> None:
        """Leave what has been proven for later mounts, as far as the disk will have it.

        `check` may raise, which ends it.
        """
        home = self._job.home
        if home is None:
            return
        name = self._job.blob.name
        with trio.CancelScope(shield=True):  # all the work is done: it is kept, whoever leaves now
            try:
                await trio.to_thread.run_sync(self._publish, decoder, home, check)
            except OSError as problem:
                log.warning("later mounts will not find %s: %s", name, problem)
            except LazyfsError as error:
                log.info("later mounts will not find %s: %s", name, error)

    # -- on the trio thread -----------------------------------------------------------------

    async def _decode_while_living(self) -> StreamDecoder | None:
        decoder = None
        try:
            async with trio.open_nursery() as nursery:
                if self._notice is not None:
                    nursery.start_soon(self._beat, nursery.cancel_scope)
                decoder = await self._decode()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            _raise_contradiction(group)
            raise_sole_error(group)
        finally:
            self._coming.on_ask = _nothing
        return decoder

    async def _decode(self) -> StreamDecoder:
        job = self._job
        decoder = job.stream.decoder()
        self._hasher = job.digest.hasher() if job.digest is not None else None
        stream = BlobStream(
            job.blob,
            job.fetcher,
            job.settings,
            readers=1 if self._hasher is None else READERS,
            on_trouble=self._trouble,
        )
        self._coming.on_ask = stream.ask_again
        self._coming.hashed_bytes = 0
        await decode_blob(stream, decoder, self, self._hasher, self._hashed)
        return decoder

    async def _prove(self) -> None:
        digest, hasher = self._job.digest, self._hasher
        if digest is None or hasher is None:
            return
        if hasher.hexdigest() != digest.hex:
            raise IntegrityError(
                f"{self._job.blob.name} does not match its digest: promised {digest}, "
                f"received {digest.algorithm}:{hasher.hexdigest()}"
            )
        log.info("%s is whole and matches its digest", self._job.blob.name)
        if self._notice is not None:
            tell = partial(self._notice.tell, state=State.WHOLE)
            await trio.to_thread.run_sync(self._insist, tell)

    async def _beat(self, scope: trio.CancelScope) -> None:
        """Show that there is life here; end the pass where others have begun another."""
        limiter = trio.CapacityLimiter(1)
        asked = await trio.to_thread.run_sync(self._look_around, limiter=limiter)
        while True:
            await trio.sleep(_BEAT_S)
            now = await trio.to_thread.run_sync(self._look_around, limiter=limiter)
            if now is None:
                log.info("another lazyfs has begun to decode %s anew", self._job.blob.name)
                scope.cancel()
            elif now != asked:
                asked = now
                self._coming.asked.set()
                self._coming.on_ask()

    async def _fail(self, error: LazyfsError) -> None:
        """Tell the others that the blob is no good, and let nobody find what came of it."""
        self._file.withdraw()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._give_up, error)

    def _trouble(self, error: LazyfsError) -> None:
        self._coming.trouble(error)
        self._tell_trouble(error)

    def _tell_trouble(self, error: LazyfsError) -> None:
        if self._notice is not None:
            with suppress(OSError):
                self._notice.tell(trouble=error)

    async def _rest(self, problem: OSError) -> None:
        error = self._job.no_room(problem, self._file.decoded_bytes)
        self._tell_trouble(error)
        await self._coming.rest(error)

    # -- in worker threads ------------------------------------------------------------------

    def take(self, piece: Data) -> None:
        """Take in what has been decoded.

        Raises:
            MalformedError: it is more than can be.
            IntegrityError: it is something else than before.
        """
        if self._file.decoded_bytes + len(piece) > CONTENT_MOST_BYTES:
            raise MalformedError(
                f"{self._job.blob.name}: more than {CONTENT_MOST_BYTES} bytes are not believed"
            )
        self._insist(partial(self._file.append, piece))
        self._coming.moved()

    def part_ends(self) -> None:
        """Nothing has to be done then."""

    def finish(self) -> None:
        """Say that the content has ended."""
        self._insist(self._file.finish)

    def _insist(self, store: Callable[[], None]) -> None:
        """Have something stored, however often it takes."""
        while True:
            try:
                return store()
            except OSError as problem:
                trio.from_thread.run(self._rest, problem)

    def _hashed(self, count: int) -> None:
        self._coming.hashed_bytes += count
        if self._notice is not None:
            with suppress(OSError):
                self._notice.tell(hashed_bytes=self._coming.hashed_bytes)

    def _look_around(self) -> bytes | None:
        """Show life; return what changes when somebody asks. None: others have begun anew."""
        if self._notice is None or self._file.cradle.is_replaced():
            return None
        with suppress(OSError):
            self._notice.tell()
            return self._notice.asked()
        return b""

    def _give_up(self, error: LazyfsError) -> None:
        with suppress(OSError):
            self._file.cradle.discard()
        with suppress(OSError):
            if self._notice is not None:
                self._notice.tell(state=State.FAILED, trouble=error)

    def _publish(self, decoder: StreamDecoder, home: Path, check: Callable[[], None]) -> None:
        data, reopen = decoder.restart_index(), self._job.stream.reopen
        index = None
        if data is not None and reopen is not None:
            try:
                index = data, reopen(data).chunks
            except LazyfsError as error:
                log.warning("%s cannot be read at random: %s", self._job.blob.name, error)
        publish(self._file, home, index, check)


def _raise_contradiction(group: BaseExceptionGroup[BaseException]) -> None:
    ours, others = group.split(Contradiction)
    if ours is not None and others is None:
        raise Contradiction from group


def _nothing() -> None:
    pass

"""The pass that proves a whole blob whose chunks carry no digests of their own.

It hashes the content in order, as it was served (what is held, not what the source would say
now), and has fetched what nobody asked for once readers have been idle for a while; what readers
bring in is hashed at once. A mismatch condemns the content.

Of the daemons that share the content one makes the pass at leisure, and the others learn from
what it notes in the cache (`Holdings.learn_seal`). One whose directory in the cache has been taken
away, by a proof that failed, makes its own.

`Completion` is for content and blob that are the same bytes (a plain tar); for others see
`decoded_completion.py`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from lazyfs.content.lanes import Lane
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.readahead import Readahead
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError
from lazyfs.ground.ranges import ByteRange

if TYPE_CHECKING:
    from hashlib import _Hash

log = logging.getLogger(__name__)

_STEP_BYTES = 4 << 20
_AHEAD_BYTES = 32 << 20
_LOOK_AGAIN_S = 0.5
_REST_S = 5.0
_LEADER_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 200e6
"""Who has all of a blob and does not hash it at this speed is not at it."""


class BlobProof(ABC):
    """The proof of one whole blob, made in the background; again if it is lost."""

    def __init__(self, content: LayerContent, digest: Digest, name: str) -> None:
        """`name` is the blob's, for messages."""
        self._content = content
        self._digest = digest
        self._name = name
        self.hashed_bytes = 0
        self.hurried = False
        """Somebody waits for the proof: `run` fetches what is missing while others read, too."""
        self._trouble: LazyfsError | None = None

    async def hurry(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Come back when `run`, which must be running, has proven the blob; sooner than else.

        Raises:
            IntegrityError: it is not what its digest promises.
            FetchError, SourceError: it could not be had; `run` goes on trying.
        """
        self.hurried = True
        self._forget_trouble()
        try:
            while not self._content.holdings.sealed:
                self._content.raise_if_condemned()
                if self._trouble is not None:
                    raise self._trouble
                with trio.move_on_after(_LOOK_AGAIN_S):
                    await self._content.wait_news()
                if on_progress is not None:
                    on_progress(self.hashed_bytes, self.all_bytes)
        finally:
            self.hurried = False

    @property
    @abstractmethod
    def all_bytes(self) -> int:
        """What `hashed_bytes` comes to."""

    async def run(self) -> None:
        """Prove the blob at leisure, and again whenever its proof is lost; for ever."""
        while True:
            if self._content.holdings.sealed or self._content.poison is not None:
                await self._content.wait_news()
            elif await self._led_by_another():
                continue
            else:
                try:
                    await self.prove(eager=False)
                except IntegrityError:
                    continue  # said, and the content condemned, where it was found
                except LazyfsError as error:
                    self._complain(error)
                    await trio.sleep(_REST_S)
                except Exception:  # a bug must not end the mount
                    log.exception("%s cannot be proven: please report this", self._name)
                    await trio.sleep(_REST_S)
                finally:
                    self._content.holdings.locks.leave_lead()

    async def _led_by_another(self) -> bool:
        """Wait while another daemon is proving the blob; say whether the proof is settled by that.

        False: this one is to do it, and has the lead if that was to be had.
        """
        content, holdings = self._content, self._content.holdings
        patience_s = _LEADER_PATIENCE_S + content.content_size_bytes / _SLOWEST_BYTES_PER_S
        moved_ns, moved_at_s = holdings.marks_changed_ns(), trio.current_time()
        while content.poison is None and not holdings.sealed:
            if self._has_been_proven():
                return True
            if holdings.locks.take_lead() or not holdings.is_found:
                return self._has_been_proven()
            if holdings.marks_changed_ns() != moved_ns:
                moved_ns, moved_at_s = holdings.marks_changed_ns(), trio.current_time()
            if trio.current_time() - moved_at_s >= patience_s:
                return False
            with trio.move_on_after(_LOOK_AGAIN_S):
                await content.condemned.wait()
        return True

    def _has_been_proven(self) -> bool:
        """Whether another daemon has proven the blob meanwhile."""
        if not self._content.note_seal():
            return False
        log.info("%s is whole and matches its digest: another daemon has found so", self._name)
        return True

    @abstractmethod
    async def prove(
        self, *, eager: bool, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Hash the whole blob and compare; `on_progress` is told bytes done, and bytes in all.

        `eager`: fetch at full speed, whoever is reading, and give up when the source does;
        otherwise a source that fails is asked again later.

        Raises:
            IntegrityError: the blob is not what its digest promises; the content is condemned.
            FetchError, SourceError: `eager`, and it could not be had.
        """

    def _forget_trouble(self) -> None:
        """Forget what went wrong before somebody asked."""
        self._trouble = None

    def _complain(self, error: LazyfsError) -> None:
        log.warning("%s is not proven yet: %s", self._name, error)
        self._trouble = error

    def _settle(self, hasher: "_Hash") -> None:
        """Compare, and seal or condemn."""
        self._content.raise_if_condemned()
        if hasher.hexdigest() != self._digest.hex:
            error = IntegrityError(
                f"{self._name} does not match its digest: promised {self._digest}, "
                f"received {self._digest.algorithm}:{hasher.hexdigest()}"
            )
            self._content.condemn(error)
            raise error
        self._content.holdings.seal()
        log.info("%s is whole and matches its digest", self._name)


class Completion(BlobProof):
    """The whole-blob proof of one layer whose blob is its content."""

    def __init__(
        self, content: LayerContent, readahead: Readahead, digest: Digest, name: str
    ) -> None:
        """`readahead` must be running; `name` is the blob's, for messages."""
        super().__init__(content, digest, name)
        self._readahead = readahead

    @property
    def all_bytes(self) -> int:
        """Of the content, which is the blob."""
        return self._content.chunks.content_size_bytes

    async def prove(
        self, *, eager: bool, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Hash the content as it is served; see `BlobProof`."""
        hasher = self._digest.hasher()
        size_bytes = self._content.chunks.content_size_bytes
        self.hashed_bytes = 0
        while self.hashed_bytes < size_bytes:
            if self._has_been_proven():
                return
            start = self.hashed_bytes
            step = ByteRange(start, min(start + _STEP_BYTES, size_bytes))
            await self._obtain(step, ByteRange(start, min(start + _AHEAD_BYTES, size_bytes)), eager)
            if self._content.holdings.sealed:
                return
            data = await self._content.read(step, Lane.COMPLETION)
            await trio.to_thread.run_sync(_update, hasher, data)
            self.hashed_bytes = step.stop
            if on_progress is not None:
                on_progress(self.hashed_bytes, size_bytes)
        self._settle(hasher)

    def _forget_trouble(self) -> None:
        """Forget it, also where a fetch of before has failed since."""
        super()._forget_trouble()
        self._readahead.take_fill_error()

    async def _obtain(self, step: ByteRange, ahead: ByteRange, eager: bool) -> None:
        """Come back when `step` is here, or when its time has come to be read."""
        lanes, idle_s = self._content.lanes, self._content.settings.idle_s
        while not self._content.is_here(step) and not self._has_been_proven():
            self._content.raise_if_condemned()
            error = self._readahead.take_fill_error()
            if error is not None:
                if eager:
                    raise error
                self._complain(error)
                await trio.sleep(_REST_S)
            is_idle = lanes.idle_for_s >= idle_s
            if eager or self.hurried or is_idle:
                if not self._content.holdings.keeps_all:
                    return  # what is fetched ahead would have to go before it is hashed
                self._readahead.fill(ahead, eager=eager or (self.hurried and is_idle))
            with trio.move_on_after(_LOOK_AGAIN_S):
                await self._content.wait_change(step)


def _update(hasher: "_Hash", data: Data) -> None:
    hasher.update(data)

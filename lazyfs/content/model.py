"""What the floor above may do with the content of a layer, however that comes to be here."""

from typing import Protocol

import trio

from lazyfs.content.lanes import Lane
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.ranges import ByteRange


class Content(Protocol):
    """Bytes by content address: exactly those that are asked for, or an error."""

    counters: Counters
    condemned: trio.Event
    """Set when there is a `poison`."""

    @property
    def poison(self) -> LazyfsError | None:
        """Why nothing is served any more, if that is so."""

    @property
    def content_size_bytes(self) -> int | None:
        """Size of the content address space; None if that is not known yet."""

    @property
    def proven(self) -> bool:
        """Whether a digest that the manifest vouches for has proven all that is served."""

    def peek(self, content: ByteRange) -> memoryview | None:
        """Return the bytes as a slice of the cache's mapping, if they are all there."""

    async def read(
        self, content: ByteRange, lane: Lane = Lane.DEMAND, *, out_of_the_blue: bool = True
    ) -> Data:
        """Return exactly the bytes of `content`.

        Raises:
            MalformedError: the content ends before.
            IntegrityError: bytes contradict their digest, now or at any time before.
            FetchError, SourceError: not obtained.
        """

    async def ensure(self, content: ByteRange, lane: Lane) -> None:
        """Come back when the bytes are here; raises as `read`."""

    def condemn(self, error: LazyfsError, *, guilty: bool = True) -> None:
        """Serve nothing more of this layer, say why, and forget what the cache holds of it.

        One that is not `guilty` shares the fate of another layer. What it has proven is kept.
        """

    def raise_if_condemned(self) -> None:
        """Raise the error of a verification that has failed, if any has."""

    def here_bytes(self) -> int:
        """How much content is here."""

    def close(self) -> None:
        """Let go of what is held, when nobody reads any more."""


class Reader(Protocol):
    """One open file."""

    async def read(self, offset: int, size_bytes: int, lane: Lane = Lane.DEMAND) -> Data:
        """Return the bytes from `offset` on: `size_bytes` of them, or all up to the file's end.

        `lane`: why they are wanted.

        Raises:
            IntegrityError, FetchError, SourceError: never a short read instead.
        """

    def is_here(self, offset: int, size_bytes: int) -> bool:
        """Whether `read` would have them at once."""

    def is_kept(self) -> bool:
        """Whether all of the file is in the cache, so that nothing needs to be fetched for it.

        Checked it may not be yet; what is then found damaged is fetched.
        """

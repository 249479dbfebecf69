"""One pass over a blob: fetched, decoded and hashed at once, in threads of their own.

The two threads read the same `BlobStream`, each at its own pace: a decoder is slower than a hash
by far, and should not wait for it.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from lazyfs.content.blob_stream import BlobStream, Stopped
from lazyfs.ground.data import Data
from lazyfs.ground.errors import raise_sole_error
from lazyfs.layers.model import StreamDecoder

if TYPE_CHECKING:
    from hashlib import _Hash

_DECODE, _HASH = range(2)
READERS = 2
"""How many readers the stream must have; one, if it is not hashed."""


class ContentSink(Protocol):
    """Where decoded content goes. Called in the decoding thread; may raise."""

    def take(self, piece: Data) -> None:
        """Take in what comes next; it is good only during the call."""

    def part_ends(self) -> None:
        """Take note that nothing more comes until more of the blob has."""

    def finish(self) -> None:
        """Take note that the content has ended, as it should."""


async def decode_blob(
    stream: BlobStream,
    decoder: StreamDecoder,
    sink: ContentSink,
    hasher: "_Hash | None",
    on_hashed: Callable[[int], None] = lambda count: None,
) -> None:
    """Run `stream` to its end, decode it into `sink`, hash it; `on_hashed` is told bytes passed.

    Raises:
        MalformedError: it cannot be decoded.
        IntegrityError: the blob is not what it was.
        Whatever `sink` or the stream's `on_trouble` raises.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.run)
            nursery.start_soon(_in_thread, partial(_decode, stream, decoder, sink))
            if hasher is not None:
                nursery.start_soon(_in_thread, partial(_hash, stream, hasher, on_hashed))
    except BaseExceptionGroup as group:
        raise_sole_error(group)
    finally:
        stream.close()


async def _in_thread(work: Callable[[], None]) -> None:
    # A limiter of its own: it lasts as long as the pass, and must not keep others waiting.
    await trio.to_thread.run_sync(work, limiter=trio.CapacityLimiter(1))


def _decode(stream: BlobStream, decoder: StreamDecoder, sink: ContentSink) -> None:
    with suppress(Stopped):
        for part in stream.parts(_DECODE):
            for piece in decoder.decode(part):
                trio.from_thread.check_cancelled()
                sink.take(piece)
            sink.part_ends()
        decoder.finish()
        sink.finish()


def _hash(stream: BlobStream, hasher: "_Hash", on_hashed: Callable[[int], None]) -> None:
    with suppress(Stopped):
        for part in stream.parts(_HASH):
            hasher.update(part)
            on_hashed(len(part))

"""What the floors above know of a source: a blob of known size that gives byte ranges.

`read_into` blocks and is called in worker threads, several at once on one blob; it makes a
single attempt. Retrying is `retry.Fetcher`'s, so that every kind of blob is retried alike. A blob
that comes from elsewhere has an attribute `health` (`place.Health`), by which that judges.
"""

from typing import Protocol, runtime_checkable

from lazyfs.ground.ranges import ByteRange


class Sink(Protocol):
    """Where a blob's bytes go: the receiver lends its buffer, the blob fills it in order."""

    def space(self) -> memoryview:
        """Return writable room for the next bytes; at least one byte.

        May raise anything, as `advance`. Whoever calls it has bytes to put there.
        """

    def advance(self, count: int) -> None:
        """Say that `count` bytes of the last `space()` are filled.

        May raise anything, which ends the attempt; it is also where a cancelled reader's
        thread learns of it.
        """


@runtime_checkable
class RewindingSink(Sink, Protocol):
    """A sink that judges what it is given part by part, and so wants each part of one giver."""

    def rewind(self) -> int:
        """Forget what has come of a part that is not whole yet; return how many bytes those were.

        They are given anew. Called while nobody else has to do with the sink.
        """


@runtime_checkable
class WishingSink(Sink, Protocol):
    """A sink that has a say before its first byte: in how it is received, or whether at all."""

    def begin(self) -> None:
        """Say it (`window.allow_on_the_way`), in the thread that is about to ask.

        Changes nothing else, since there may be several, of which others have the sink. May raise
        anything, as `advance`.
        """


class Blob(Protocol):
    """Bytes that do not change."""

    @property
    def name(self) -> str:
        """What a person calls it in messages: no credentials, no query string."""

    @property
    def size_bytes(self) -> int:
        """Its size as promised by whoever named it."""

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver exactly the bytes of `byte_range` into `sink`, in order.

        What was delivered before an error is good and need not be asked for again. Between
        `space()` and `advance()` it only copies and waits for nothing: that is when a cancelled
        fetch cannot take its sink back.

        Raises:
            FetchError: `.transient` says if asking again may help.
            SourceError: it will not.
        """

    def close(self) -> None:
        """Let go of connections and descriptors. Reads under way may fail."""

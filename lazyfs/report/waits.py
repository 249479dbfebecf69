"""What each read or fault waited for: which fetch brought its bytes, and what took that so long.

A recording does not say which fetch brought what: fetches are of a layer's blob, arrivals of its
files. So the fetch is found by time: the one that was begun for the read, or else the one that
ended when the bytes came. What is said of it is likely, and said so in the report.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from lazyfs.checkpoint.trace import Fetch, Read, Trace
from lazyfs.report.spans import INSTANT_MS, Flow, Piece, total_ms, union

SOON_MS = 2.0
"""What is begun so soon after a read is begun for it; what is noted at once may differ so much."""
_DECODING_MOST_MS = 500.0
"""So long before bytes could be read their fetch may have ended."""
_LOOKED_AT_MOST = 64
"""Fetches, for each wait: no more are under way at one time."""
_BUSY = 0.3
"""What part of its rate the link carries when somebody's answer is behind others."""
DEMAND = "demand"


class Causes(NamedTuple):
    """A wait's milliseconds, by what it waited for; or many waits'. They add up to all of it."""

    queue_ms: float = 0.0
    """Until the fetch was begun: for a connection, or for others."""
    behind_ms: float = 0.0
    """From then until its first byte, beyond a round trip, while others' bytes came."""
    first_byte_ms: float = 0.0
    """From then until its first byte, else."""
    transfer_ms: float = 0.0
    """From then until its last, or until the bytes that were asked for could be read."""
    decoding_ms: float = 0.0
    """From the fetch's last byte until the bytes could be read: decoded, checked, stored."""
    answering_ms: float = 0.0
    """From then until the answer."""
    unknown_ms: float = 0.0
    """No fetch is known that brought the bytes."""

    @property
    def all_ms(self) -> float:
        """The whole of it."""
        return sum(self)

    def plus(self, other: "Causes") -> "Causes":
        """Return both together."""
        return Causes(*(mine + its for mine, its in zip(self, other, strict=True)))


class Wait(NamedTuple):
    """A read or a fault whose bytes were not there."""

    read: Read
    causes: Causes
    arrived_ms: float | None
    fetch: Fetch | None
    """Which brought its bytes, as far as is known."""
    asked: bool
    """Whether that was begun for it, rather than before anybody waited."""
    behind_bytes: int
    """What came of others while it waited for its first byte."""

    @property
    def waited_ms(self) -> float:
        """How long it took."""
        return max(0.0, self.read.ended_ms - self.read.began_ms)


class Fetched:
    """A layer's fetches, by when they began and when they ended."""

    def __init__(self, fetches: Sequence[Fetch]) -> None:
        self._by_end = sorted(fetches, key=lambda fetch: fetch.ended_ms)
        self._ends = [fetch.ended_ms for fetch in self._by_end]
        self._asked = sorted(
            (fetch for fetch in fetches if fetch.why == DEMAND), key=lambda fetch: fetch.began_ms
        )
        self._begins = [fetch.began_ms for fetch in self._asked]

    def that_brought(self, read: Read, arrived_ms: float) -> Fetch | None:
        """Return the likeliest fetch of what `read` waited for, which came at `arrived_ms`."""
        first = bisect_left(self._begins, read.began_ms - SOON_MS)
        last = bisect_right(self._begins, arrived_ms)
        asked = [
            fetch
            for fetch in self._asked[first : min(last, first + _LOOKED_AT_MOST)]
            if fetch.first_ms <= arrived_ms + SOON_MS
        ]
        if asked:
            return min(asked, key=lambda fetch: abs(arrived_ms - fetch.ended_ms))
        first = bisect_left(self._ends, max(read.began_ms, arrived_ms - _DECODING_MOST_MS))
        under_way = [
            fetch
            for fetch in self._by_end[first : first + _LOOKED_AT_MOST]
            if fetch.first_ms <= arrived_ms + SOON_MS
        ]
        return min(under_way, key=lambda fetch: abs(arrived_ms - fetch.ended_ms), default=None)


def waits_of(
    trace: Trace, reads: Sequence[Read], arrivals: Mapping[int, Sequence[Piece]], flow: Flow
) -> list[Wait]:
    """Explain the reads that waited, in their order.

    Args:
        trace: whose files and fetches they are.
        reads: of a recording; those that did not wait are passed over.
        arrivals: by a file's index, as `earliest` returns them.
        flow: of all fetches.
    """
    recording = trace.recording
    of_layers: dict[int, list[Fetch]] = {}
    for fetch in recording.fetches if recording else ():
        of_layers.setdefault(fetch.layer, []).append(fetch)
    fetched = {layer: Fetched(fetches) for layer, fetches in of_layers.items()}
    link = _Link(recording.fetches if recording else (), flow)
    starts = {file: [piece.start for piece in pieces] for file, pieces in arrivals.items()}
    found = []
    for read in reads:
        if not read.waited:
            continue
        arrived_ms = None
        if read.file in arrivals:
            arrived_ms = _arrived_ms(read, arrivals[read.file], starts[read.file])
        layer = fetched.get(trace.files[read.file].layer)
        brought = layer.that_brought(read, arrived_ms) if layer and arrived_ms is not None else None
        found.append(_explained(read, arrived_ms, brought, link))
    return found


def _arrived_ms(read: Read, pieces: Sequence[Piece], starts: Sequence[int]) -> float | None:
    """Return when the last of a read's bytes came, of those that came while it waited."""
    first = max(0, bisect_right(starts, read.offset) - 1)
    last = bisect_left(starts, read.offset + read.size_bytes)
    moments = [piece.at_ms for piece in pieces[first:last] if piece.stop > read.offset]
    came = [moment for moment in moments if read.began_ms <= moment <= read.ended_ms + SOON_MS]
    return max(came, default=None)


class _Link:
    """What is usual on it."""

    def __init__(self, fetches: Sequence[Fetch], flow: Flow) -> None:
        receiving = union((fetch.first_ms, fetch.ended_ms) for fetch in fetches)
        self.flow = flow
        self.bytes_a_ms = sum(fetch.stop - fetch.start for fetch in fetches) / max(
            total_ms(receiving), INSTANT_MS
        )
        self.round_trip_ms = min(
            (max(0.0, fetch.first_ms - fetch.began_ms) for fetch in fetches), default=0.0
        )


def _explained(read: Read, arrived_ms: float | None, fetch: Fetch | None, link: _Link) -> Wait:
    began_ms, ended_ms = read.began_ms, max(read.began_ms, read.ended_ms)
    here_ms = ended_ms if arrived_ms is None else min(max(arrived_ms, began_ms), ended_ms)
    if fetch is None:
        unknown = Causes(unknown_ms=here_ms - began_ms, answering_ms=ended_ms - here_ms)
        return Wait(read, unknown, arrived_ms, None, False, 0)
    moments = [began_ms]
    for moment_ms in (fetch.began_ms, fetch.first_ms, fetch.ended_ms, here_ms):
        moments.append(min(max(moment_ms, moments[-1]), here_ms))
    moments.append(ended_ms)
    queue_ms, first_byte_ms, *others_ms = (after - before for before, after in pairwise(moments))
    # Its own bytes come after its first, so what came before that was others'.
    behind_bytes = link.flow.between(moments[0], moments[2])
    behind_ms = max(0.0, first_byte_ms - link.round_trip_ms)
    if link.flow.between(moments[1], moments[2]) < _BUSY * link.bytes_a_ms * behind_ms:
        behind_ms = 0.0
    return Wait(
        read,
        Causes(queue_ms, behind_ms, first_byte_ms - behind_ms, *others_ms),
        arrived_ms,
        fetch,
        asked=fetch.began_ms >= began_ms - SOON_MS,
        behind_bytes=int(behind_bytes),
    )

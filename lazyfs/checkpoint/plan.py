"""What is to be fetched before anybody asks, first needed first: of files, by ranges of them.

Made of a trace, if there is one for these layers, and of the order in which CRIU reads
(`read_order.py`). Both are hints: what is wrong in them costs time, never a byte. So what does not
fit the tree is dropped, and said once.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lazyfs.ground.ranges import Covered
from lazyfs.layers.model import EntryType

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.trace import Trace

log = logging.getLogger(__name__)


class Stretch(NamedTuple):
    """A range of a file."""

    path: str
    """In the image's tree."""
    offset: int
    size_bytes: int


class Plan(NamedTuple):
    """The order; who fetches and who fills memory both follow it."""

    traced: Sequence[Stretch] = ()
    """What a trace says was needed, in the order of its need."""
    rest: Sequence[Stretch] = ()
    """All that CRIU reads, pages and else, in the order in which it asks."""


async def plan_of(
    trace: "Trace | None", checkpoint: "OpenedCheckpoint", *, everything: bool
) -> Plan:
    """Return what to fetch; `everything`: all that CRIU reads, not only what was traced.

    All names must be there. What of the order cannot be read is left out of it.

    Raises:
        IntegrityError, FetchError, SourceError: CRIU's small files cannot be had.
    """
    from lazyfs.checkpoint.read_order import all_stretches

    traced = traced_stretches(trace, checkpoint) if trace is not None else ()
    rest = await all_stretches(checkpoint) if everything else ()
    return Plan(traced, rest)


def traced_stretches(trace: "Trace", checkpoint: "OpenedCheckpoint") -> tuple[Stretch, ...]:
    """Return what a trace says of files that are here, of the same layers as then, each byte once.

    Whoever made it may have named all of a file half a million times over.
    """
    is_known = [_is_same(trace, number, checkpoint) for number in range(len(trace.files))]
    covered: dict[str, Covered] = defaultdict(Covered)
    found: list[Stretch] = []
    dropped = 0
    for need in trace.needs:
        if not is_known[need.file] or not need.size_bytes:
            dropped += 1
            continue
        path = trace.files[need.file].path
        for start, stop in covered[path].add(need.offset, need.offset + need.size_bytes):
            found.append(Stretch(path, start, stop - start))
    if dropped:
        log.info(
            "the trace is not of %s alone: %d of its %d ranges are of other layers or files",
            checkpoint.reference,
            dropped,
            len(trace.needs),
        )
    return tuple(found)


def _is_same(trace: "Trace", number: int, checkpoint: "OpenedCheckpoint") -> bool:
    file = trace.files[number]
    node = checkpoint.tree.find(file.path)
    if node is None or node.type is not EntryType.FILE or node.size_bytes != file.size_bytes:
        return False
    descriptor = checkpoint.layers[node.layer].descriptor
    digest = str(descriptor.digest) if descriptor.digest is not None else ""
    layer = trace.layers[file.layer]
    return layer.digest == digest and layer.size_bytes == descriptor.size_bytes

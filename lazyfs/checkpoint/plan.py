"""What is to be fetched before anybody asks, first needed first: of files, by ranges of them.

Made of a trace, if there is one for these layers, and of the order in which CRIU reads
(`read_order.py`). Both are hints: what is wrong in them costs time, never a byte. So what does not
fit the tree is dropped, and said once.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

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
    """Return what a trace says of files that are here, of the same layers as then.

    No byte is needed for the first time twice. A trace that has it so is nobody's recording, and
    could name whole files a million times: once it has named as much as a file has, no more is
    taken of that file.
    """
    is_known = [_is_same(trace, number, checkpoint) for number in range(len(trace.files))]
    left = {file.path: file.size_bytes for file in trace.files}
    stretches = []
    for need in trace.needs:
        path = trace.files[need.file].path
        if is_known[need.file] and 0 < need.size_bytes <= left[path]:
            left[path] -= need.size_bytes
            stretches.append(Stretch(path, need.offset, need.size_bytes))
    found = tuple(stretches)
    dropped = len(trace.needs) - len(found)
    if dropped:
        log.info(
            "the trace is not of %s alone: %d of its %d ranges are of other layers or files, or "
            "named again",
            checkpoint.reference,
            dropped,
            len(trace.needs),
        )
    return found


def _is_same(trace: "Trace", number: int, checkpoint: "OpenedCheckpoint") -> bool:
    file = trace.files[number]
    node = checkpoint.tree.find(file.path)
    if node is None or node.type is not EntryType.FILE or node.size_bytes != file.size_bytes:
        return False
    descriptor = checkpoint.layers[node.layer].descriptor
    digest = str(descriptor.digest) if descriptor.digest is not None else ""
    layer = trace.layers[file.layer]
    return layer.digest == digest and layer.size_bytes == descriptor.size_bytes

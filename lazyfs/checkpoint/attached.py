"""The trace that a mount is to follow: from a file, or attached to the image by whoever may.

What is attached is a hint from a stranger. It is bounded, looked for beside the opening of layers,
and given up after some seconds; whatever is wrong with it is a line of the log, and there is none.
"""

from typing import NamedTuple

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.trace import Trace


class FoundTrace(NamedTuple):
    """A trace of at least one of the image's layers."""

    trace: Trace
    source: str
    """"file", or the digest of the document that is attached to the image."""


async def find_trace(image: ResolvedImage, config: OpenConfig) -> FoundTrace | None:
    """Return the trace to follow, if there is one; within some seconds.

    Raises nothing of ours.
    """
    if config.given_trace is not None:
        return FoundTrace(config.given_trace, "file")
    return None

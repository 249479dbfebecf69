"""What is to be fetched before anybody asks, first needed first: of files, by ranges of them.

Made of a trace, if there is one for these layers, and of the order in which CRIU reads.
"""

from collections.abc import Sequence
from typing import NamedTuple


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
    """All other pages, in the order in which CRIU asks for them."""

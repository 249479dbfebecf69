"""Who asks: the three lanes on which bytes are fetched, and the connections each may use.

A demand read never queues behind background work: each lane has its own limiter. The lanes
share the link all the same, so while faults come out of the blue the background keeps to few
connections (`ContentSettings.gentle_connections`) with little on their way.
"""

import time
from enum import Enum

import trio

from lazyfs.ground.settings import ContentSettings


class Lane(Enum):
    """Why bytes are fetched."""

    DEMAND = "demand"
    """Somebody waits for exactly these."""
    READAHEAD = "readahead"
    """A reader that goes forward will want them next."""
    COMPLETION = "completion"
    """Nobody asked: the pass that proves a whole blob."""


class Lanes:
    """The limiters of one mount's lanes, shared by all its layers."""

    def __init__(self, settings: ContentSettings) -> None:
        """Take the connections of each lane from `settings`."""
        self._settings = settings
        self._demand_at_s = trio.current_time()  # whoever has just come will want something
        self._fault_at_s = self._demand_at_s
        self._fault_at_monotonic_s = time.monotonic()
        self._limiters = {
            Lane.DEMAND: trio.CapacityLimiter(settings.demand_connections),
            Lane.READAHEAD: trio.CapacityLimiter(settings.readahead_connections),
            Lane.COMPLETION: trio.CapacityLimiter(settings.readahead_connections),
        }

    def limiter(self, lane: Lane) -> trio.CapacityLimiter:
        """Return the limiter for worker threads of this lane."""
        return self._limiters[lane]

    def note_demand(self, *, out_of_the_blue: bool) -> None:
        """Remember that a reader had to wait just now."""
        self._demand_at_s = trio.current_time()
        if out_of_the_blue:
            self._fault_at_s = self._demand_at_s
            self._fault_at_monotonic_s = time.monotonic()

    @property
    def yielding(self) -> bool:
        """Whether a fault came so lately that another is likely."""
        return trio.current_time() - self._fault_at_s < self._settings.yield_s

    @property
    def is_gentle(self) -> bool:
        """As `yielding`, from any thread: little of the background may be on its way."""
        return time.monotonic() - self._fault_at_monotonic_s < self._settings.yield_s

    @property
    def idle_for_s(self) -> float:
        """Seconds since a reader last had to wait."""
        return trio.current_time() - self._demand_at_s

"""Who asks: the three lanes on which bytes are fetched, and the connections each may use.

A demand read never queues behind background work: each lane has its own limiter. The lanes
share the link all the same, so while faults come out of the blue the background keeps to few
connections (`ContentSettings.gentle_connections`) with little on their way (`transport/window.py`),
for as long as another fault is likely, by how quickly the latest followed each other. Beside who
*walks*, has much fetched ahead at each fault and waits for it all the same, it asks for nothing but
what a trace names: such a reader can use all of the link.
"""

import time
from enum import Enum

import trio

from lazyfs.ground.settings import ContentSettings
from lazyfs.transport.window import NARROW_BYTES, SHARED_BYTES

_APART_WEIGHT = 0.25
_APART_TIMES = 4
_YIELD_LEAST_S = 0.05
_WALK_S = 0.1
"""Who walks asks for more, and waits for it, several times in so long."""
_LOOK_AGAIN_S = 0.02


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
        self._gentle_until_s = float("-inf")
        """By time.monotonic()."""
        self._fault_at_s = float("-inf")
        self._apart_s = settings.yield_s
        """How long after a fault the next one comes, as of late."""
        self._walked_at_s = float("-inf")
        self._waited_at_s = float("-inf")
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
        self._waited_at_s = now_s = time.monotonic()
        if out_of_the_blue:
            apart_s = min(now_s - self._fault_at_s, self._settings.yield_s)
            self._apart_s += _APART_WEIGHT * (apart_s - self._apart_s)
            self._fault_at_s = now_s
            self._be_gentle(_APART_TIMES * self._apart_s)

    def expect_faults(self) -> None:
        """Tasks are about to run whose memory is not here."""
        self._be_gentle(self._settings.yield_s)

    def note_walk(self) -> None:
        """Much is fetched ahead of a reader who goes from one fault to the next."""
        self._walked_at_s = time.monotonic()

    async def wait_walked(self) -> None:
        """Come back when nobody walks; at once, if so."""
        # It ends by the passing of time: there is no event to wait for.
        while self.is_walked:  # noqa: ASYNC110
            await trio.sleep(_LOOK_AGAIN_S)

    def _be_gentle(self, for_s: float) -> None:
        for_s = min(max(for_s, _YIELD_LEAST_S), self._settings.yield_s)
        self._gentle_until_s = time.monotonic() + for_s

    @property
    def is_gentle(self) -> bool:
        """Whether another fault is likely, so little of the background may be on its way.

        From any thread.
        """
        return time.monotonic() < self._gentle_until_s

    def is_surprised(self, since_s: float) -> bool:
        """Whether another fault out of the blue is likely, which even a trace makes room for.

        `since_s`: by time.monotonic(), when the trace was known; earlier ones were none to it.
        """
        if self._fault_at_s < since_s:
            return False
        now_s = time.monotonic()
        return now_s < self._gentle_until_s and now_s - self._fault_at_s < self._settings.yield_s

    @property
    def gentle_bytes(self) -> int:
        """How much may be on its way to each background connection then. From any thread."""
        return NARROW_BYTES if self.is_walked else SHARED_BYTES

    @property
    def is_walked(self) -> bool:
        """Whether somebody walks, and bytes do not come as quickly as he does. From any thread."""
        return time.monotonic() - min(self._walked_at_s, self._waited_at_s) < _WALK_S

    @property
    def idle_for_s(self) -> float:
        """Seconds since a reader last had to wait."""
        return trio.current_time() - self._demand_at_s

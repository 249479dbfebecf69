"""What a server of lazy pages tells of itself: numbers, kept on the trio thread."""

from collections import deque
from typing import Any

_TIMES_KEPT = 4096


class Counts:
    """Of one mount, all restores together."""

    def __init__(self) -> None:
        self.faults = 0
        """Pages that somebody waited for."""
        self.faults_fetched = 0
        """Of those, the ones whose bytes were not here yet."""
        self.faults_zero = 0
        """Of those, the ones that the checkpoint has nothing for: they read as zeros."""
        self.bytes_faulted = 0
        """Filled because of faults: their pages, and what lies around them."""
        self.bytes_background = 0
        """Filled before anybody asked."""
        self._times_s: deque[float] = deque(maxlen=_TIMES_KEPT)

    def note_served(self, seconds: float) -> None:
        """Note how long a fault has waited for us."""
        self._times_s.append(seconds)

    def as_json(self) -> dict[str, Any]:
        """Return the numbers; times are of the latest 4,096 faults."""
        times_s = sorted(self._times_s)
        return {
            "faults": self.faults,
            "faults_fetched": self.faults_fetched,
            "faults_zero": self.faults_zero,
            "bytes_faulted": self.bytes_faulted,
            "bytes_background": self.bytes_background,
            "fault_median_ms": _at(times_s, 0.5),
            "fault_p99_ms": _at(times_s, 0.99),
        }


def _at(times_s: list[float], share: float) -> float | None:
    if not times_s:
        return None
    return round(1000 * times_s[min(len(times_s) - 1, int(share * len(times_s)))], 3)

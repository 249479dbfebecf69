"""When to ask again, when to ask twice, and when to give up. Sans-I/O."""

import logging
import random

from lazyfs.ground.errors import FetchError
from lazyfs.ground.settings import TransportSettings

_log = logging.getLogger(__name__)


class Patience:
    """What to do after a failed attempt: it is told how long things took."""

    def __init__(self, what: str, settings: TransportSettings) -> None:
        self._what = what
        self._settings = settings
        self._silence_s = 0.0
        self._failures = 0
        self._attempts = 0

    def pause_after(self, error: FetchError, *, silent_s: float, progressed: bool) -> float:
        """Return how many seconds to wait before the same is asked again: `spend`, then `pause`.

        Raises:
            FetchError: `error` itself if it is not transient, or as `spend`.
        """
        if not error.transient:
            raise error
        self.spend(silent_s, progressed=progressed, why=str(error))
        return self.pause(silent_s, error.retry_after_s or 0.0, why=str(error))

    def spend(self, silent_s: float, *, progressed: bool, why: str) -> None:
        """Take note of a failed attempt.

        `silent_s`: for how long no byte had come when it ended. `progressed`: it delivered
        something; that starts the backoff and the deadline anew.

        Raises:
            FetchError: it was the last; says how long was tried and why that one failed.
        """
        if progressed:
            self._silence_s = 0.0
            self._failures = 0
        self._silence_s += silent_s
        self._attempts += 1
        if self._silence_s >= self._settings.deadline_s:
            raise FetchError(
                f"{self._what}: gave up, {self._silence_s:.0f} s without a byte in "
                f"{self._attempts} attempts; the last: {why}",
                transient=False,
            )

    def pause(self, silent_s: float, wish_s: float, why: str) -> float:
        """Return how many seconds to wait, after `spend`.

        Exponential with full jitter, less what the attempt itself has waited in vain. The
        server's wish (Retry-After) is obeyed as far as the deadline allows: then one last attempt
        is made sooner than it asked for.
        """
        left_s = self._settings.deadline_s - self._silence_s
        most_s = min(
            self._settings.backoff_most_s,
            self._settings.backoff_first_s * 2.0 ** min(self._failures, 30),
        )
        self._failures += 1
        pause_s = random.uniform(0, most_s)  # noqa: S311 - spreads clients, guards no secret
        pause_s = min(max(pause_s - silent_s, wish_s, 0.0), left_s)
        self._silence_s += pause_s
        _log.info(
            "%s: asking again in %.1f s: %s", self._what, pause_s, why, extra={"pause_s": pause_s}
        )
        return pause_s


class HedgeBudget:
    """How many second attempts may be made: a small burst, then one for ten that succeeded.

    A source that is slow all over is not made faster by asking it twice. Source: gRPC's proposal
    A6 (client retries), "Throttling Retry Attempts and Hedged RPCs".
    """

    _BURST = 5.0
    _EARNED = 0.1

    def __init__(self) -> None:
        self._tokens = self._BURST

    def earn(self) -> None:
        """Note an attempt that succeeded."""
        self._tokens = min(self._BURST, self._tokens + self._EARNED)

    def lose(self) -> None:
        """Note an attempt that failed."""
        self._tokens = max(0.0, self._tokens - 1.0)

    def spend(self) -> bool:
        """Take a second attempt, if one is left."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

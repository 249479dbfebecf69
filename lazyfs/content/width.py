"""How many connections readahead uses: as few as fill the link.

Two large transfers fill most links, and more only overfill the queues on the way (seen on 1 Gbit/s
with 10 ms: six connections lost 5% of their packets and 10% of the rate). Where each connection
is held back by itself, as by many object stores, more are faster. So one more is tried now and
then, and kept if it pays.

Sans-I/O: it is told the time, and what has come so far.
"""

_EPOCH_S = 0.4
_WORTH = 0.6
"""One connection more must bring so much of what an average one brings, to be kept."""
_HOLD_FIRST_EPOCHS = 4
_HOLD_MOST_EPOCHS = 64


class Width:
    """A number of connections between `least` and `most` that follows the link."""

    def __init__(self, least: int, most: int) -> None:
        """Begin with `least`."""
        self.connections = least
        self._most = most
        self._epoch_began_s = float("-inf")
        self._epoch_began_bytes = 0
        self._rate = 0.0
        self._probing = False
        self._hold_epochs = _HOLD_FIRST_EPOCHS
        self._epochs_to_probe = 1

    def idle(self) -> None:
        """Not all connections are in use: what comes now says nothing about the link."""
        self._epoch_began_s = float("-inf")

    def observe(self, now_s: float, total_bytes: int) -> None:
        """Take in how many bytes have come up to now, all connections being in use."""
        passed_s = now_s - self._epoch_began_s
        if passed_s < _EPOCH_S:
            return
        if passed_s < 2 * _EPOCH_S:  # else it is the first look after a pause
            self._judge((total_bytes - self._epoch_began_bytes) / passed_s)
        self._epoch_began_s, self._epoch_began_bytes = now_s, total_bytes

    def _judge(self, rate: float) -> None:
        if not self._probing:
            self._rate = rate
            self._epochs_to_probe -= 1
            if self._epochs_to_probe <= 0 and self.connections < self._most:
                self.connections += 1
                self._probing = True
        elif rate >= self._rate * (1 + _WORTH / (self.connections - 1)):
            self._rate = rate
            self._hold_epochs = _HOLD_FIRST_EPOCHS
            if self.connections < self._most:
                self.connections += 1
            else:
                self._stop_probing()
        else:
            self.connections -= 1
            self._hold_epochs = min(2 * self._hold_epochs, _HOLD_MOST_EPOCHS)
            self._stop_probing()

    def _stop_probing(self) -> None:
        self._probing = False
        self._epochs_to_probe = self._hold_epochs

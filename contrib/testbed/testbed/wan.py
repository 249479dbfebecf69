"""A slow link to a network namespace: the project's target is 1 Gbit/s with a 10 ms round trip.

The namespace has no name. It lives in the wanlink process, which ends when its standard input
does: when this process ends, however it does, the link and the namespace go too.
"""

from __future__ import annotations

import json
import os
import subprocess
from types import TracebackType

from .errors import TestbedError
from .process import run, stop, wait_line
from .roots import Testbed

_NETWORK = "198.18"  # for benchmarks of networks: RFC 2544
_PAIRS = 64 * 256


class Wan:
    """A link with delay and rate; a context manager, up within the block."""

    def __init__(
        self,
        testbed: Testbed,
        *,
        one_way_ms: float = 5,
        rate_mbit: float = 1000,
        queue_ms: float = 60,
    ) -> None:
        self.near_ip = ""
        """This side's address."""
        self.far_ip = ""
        """The far side's address: where a `Registry` in the far namespace listens."""
        self.enter: list[str] = []
        """Words put before a command to run it in the far namespace."""
        self._program = str(testbed.program("wanlink"))
        self._shape = [f"{one_way_ms:g}", f"{rate_mbit:g}", f"{queue_ms:g}"]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Wan:
        self.near_ip, self.far_ip = _free_pair()
        process = subprocess.Popen(
            [self._program, "-e", self.near_ip, self.far_ip, *self._shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us: we end it after what runs beyond it
        )
        try:
            wait_line(process, b"up ", "the link does not come up", timeout_s=10)
        except BaseException:
            stop(process)
            raise
        self._process = process
        self.enter = ["nsenter", f"--net=/proc/{process.pid}/ns/net", "--"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None


def _free_pair() -> tuple[str, str]:
    """Two neighbouring addresses that no interface here has."""
    interfaces = json.loads(run(["ip", "-json", "-4", "address"]))
    taken = {address["local"] for each in interfaces for address in each["addr_info"]}
    for attempt in range(_PAIRS):
        third, fourth = divmod((os.getpid() + attempt) % _PAIRS, 64)
        near, far = (f"{_NETWORK}.{third}.{fourth * 4 + side}" for side in (1, 2))
        if near not in taken:
            return near, far
    raise TestbedError(f"no address is left in {_NETWORK}.0.0/16")

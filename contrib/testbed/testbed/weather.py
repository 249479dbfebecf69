"""Weather: a proxy before a real registry that does to answers what networks and servers do.

    with Registry(testbed, data) as registry, Weather(registry.address) as weather:
        push_oci_image(registry.address, "team/app", "1", layers)      # in the clear
        ... weather.address stands for the registry's ...
        weather.turn(Forecast({Fault.RESET_MIDWAY: 3, Fault.DRIP: 1}, chance=0.5))
        ...
        weather.clear()
        print(weather.counts)

Which request meets which fault is drawn from a seeded generator, or told one by one (`script`).
Only what carries bytes is hit, GETs of blobs; manifests come through, since a mount that cannot
begin shows nothing. Every fault that was met is counted.

With `token_life_s` it wants Bearer tokens, gives them to everybody, and refuses old ones; with
`url_life_s` it sends those who ask for blobs to signed URLs on another port of its own, which
expire. `rate_bytes_s` makes the whole link slow, so that there is a middle to be hit.

What each fault looks like on the wire is in `weather_faults.py`.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import select
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self

from .errors import TestbedError
from .process import wait_until


class Fault(Enum):
    """What may become of an answer; the value is what a person calls it."""

    RESET_BEFORE = "reset before the answer"
    RESET_MIDWAY = "reset in mid-body"
    STALL_BEFORE = "stall before the answer"
    STALL_MIDWAY = "stall in mid-body"
    DRIP = "drip"
    STORM = "storm of 5xx"
    BUSY = "429 with Retry-After"
    TRUNCATED = "truncated body"
    GARBAGE = "garbage for a header"
    TOKEN_EXPIRED = "token expired"
    URL_EXPIRED = "signed URL expired"
    SHIFTED_RANGE = "another range than asked"
    WHOLE_BODY = "200 with everything"
    WRONG_BYTES = "right header, other bytes"
    FLIPPED_BITS = "flipped bits"


REFUSING = frozenset({Fault.SHIFTED_RANGE, Fault.WHOLE_BODY})
"""An answer that says itself that it is not what was asked for."""
ALTERING = frozenset({Fault.WRONG_BYTES, Fault.FLIPPED_BITS})
"""An answer that only its digest gives away."""
PASSING = frozenset(Fault) - REFUSING - ALTERING
"""Who asks again gets what he wanted."""


@dataclass(frozen=True)
class Forecast:
    """What may happen to a blob's GET."""

    faults: Mapping[Fault, float]
    """And how likely each is among the others."""
    chance: float = 0.5
    """That anything happens to it."""
    stall_s: float = 4.0
    """For how long a stall holds an answer back, unless it clears up before; then it goes on."""
    storm_s: float = 0.3
    """For how long, once it has begun, every request gets a 5xx."""

    @classmethod
    def of(cls, *faults: Fault, chance: float = 0.5, stall_s: float = 4.0) -> Self:
        """Forecast these, all alike."""
        return cls(dict.fromkeys(faults, 1.0), chance=chance, stall_s=stall_s)


CLEAR = Forecast({}, chance=0)
_BRAND_NEW_S = 0.2


class Weather:
    """A proxy; a context manager that serves within the block. Its methods are thread-safe."""

    def __init__(
        self,
        upstream: str,
        *,
        seed: int = 1,
        ip: str = "127.0.0.1",
        rate_bytes_s: float | None = None,
        token_life_s: float | None = None,
        url_life_s: float | None = None,
    ) -> None:
        """Stand before `upstream` (`host:port`, plain HTTP), with clear weather at first."""
        self.upstream = upstream
        self.ip = ip
        self.token_life_s = token_life_s
        self.url_life_s = url_life_s
        self.forecast = CLEAR
        self.counts: Counter[Fault] = Counter()
        """How many answers met each fault."""
        self.requests = 0
        """How many GETs of blobs there were."""
        self.sent_bytes: Counter[str] = Counter()
        """Body bytes sent of each blob, by the last part of its path: its digest."""
        self._random = random.Random(seed)
        self._rate_bytes_s = rate_bytes_s
        self._sent_until_s = 0.0
        self._script: list[Fault | None] = []
        self._storm_until_s = 0.0
        self._passes: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()
        self._turned = threading.Condition()
        self._turns = 0
        self._closing = False
        self._connections: set[socket.socket] = set()
        self._problems: list[str] = []
        self._registry = _Server(self, is_store=False)
        self._store = _Server(self, is_store=True)

    @property
    def address(self) -> str:
        """`host:port`, in the place of the registry's."""
        return f"{self.ip}:{self._registry.port}"

    @property
    def store_address(self) -> str:
        """`host:port` of the signed URLs."""
        return f"{self.ip}:{self._store.port}"

    def turn(self, forecast: Forecast) -> None:
        """Let it be so from the next request on; what is stalled goes on."""
        with self._turned:
            self.forecast = forecast
            self._storm_until_s = 0.0
            self._turns += 1
            self._turned.notify_all()

    def clear(self) -> None:
        """Let the sun come out: nothing happens any more, and what is stalled goes on."""
        with self._lock:
            self._script.clear()
        self.turn(CLEAR)

    def script(self, *faults: Fault | None) -> None:
        """Let the next GETs of blobs meet these, one each (None: nothing), before any forecast."""
        with self._lock:
            self._script += faults

    def wait_sent(self, count: int, timeout_s: float = 60) -> None:
        """Wait until so many bytes of blobs have been sent, of all together."""
        wait_until(lambda: self.sent_bytes.total() >= count, f"{count} bytes sent", timeout_s)

    def drop_connections(self) -> None:
        """Reset every connection that is open."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._registry.start()
        self._store.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        self.clear()
        self.drop_connections()
        self._registry.stop()
        self._store.stop()
        if self._problems and error is None:
            raise TestbedError("the weather's own mistakes:\n" + "\n".join(self._problems))

    # -- for the faults -----------------------------------------------------------------------

    def draw(self) -> Fault | None:
        """Return what a GET of a blob is to meet."""
        with self._lock:
            self.requests += 1
            if self._script:
                return self._script.pop(0)
            forecast = self.forecast
            if time.monotonic() < self._storm_until_s:
                return Fault.STORM
            if not forecast.faults or self._random.random() >= forecast.chance:
                return None
            kinds, weights = zip(*forecast.faults.items(), strict=True)
            drawn: Fault = self._random.choices(kinds, weights)[0]
            if drawn is Fault.STORM:
                self._storm_until_s = time.monotonic() + forecast.storm_s
            return drawn

    def count(self, fault: Fault) -> None:
        """Note that an answer has met it."""
        with self._lock:
            self.counts[fault] += 1

    def pick(self, below: int) -> int:
        """Return a random number from 0 on, below `below`; 0 if there is none."""
        with self._lock:
            return self._random.randrange(below) if below > 0 else 0

    def hold(self, seconds: float, client: socket.socket) -> None:
        """Come back after so long, when the weather turns, or when the client has gone."""
        until_s = time.monotonic() + seconds
        with self._turned:
            turns = self._turns
            while self._turns == turns and not self._closing:
                left_s = until_s - time.monotonic()
                if left_s <= 0 or _has_gone(client):
                    return
                self._turned.wait(min(left_s, 0.05))

    def note_sent(self, blob: str, count: int) -> None:
        """Account for body bytes, and wait for as long as the link would take for them."""
        with self._lock:
            self.sent_bytes[blob] += count
            if self._rate_bytes_s is None:
                return
            now_s = time.monotonic()
            self._sent_until_s = max(now_s, self._sent_until_s) + count / self._rate_bytes_s
            wait_s = self._sent_until_s - now_s
        time.sleep(wait_s)

    def new_pass(self, life_s: float | None) -> str:
        """Return a token, or a URL's signature, that is good for so long."""
        with self._lock:
            word = secrets.token_hex(8)
            self._passes[word] = (time.monotonic(), life_s or 0)
        return word

    def knows_pass(self, word: str) -> bool | None:
        """Return whether it is still good; None if it was never given."""
        born_s, life_s = self._passes.get(word, (0.0, None))
        return None if life_s is None else time.monotonic() < born_s + life_s

    def revoke(self, word: str) -> bool:
        """Let it be expired, unless it is brand-new: nobody is turned away twice in a row."""
        with self._lock:
            born_s, _ = self._passes.get(word, (0.0, 0.0))
            old = time.monotonic() > born_s + _BRAND_NEW_S
            if old:
                self._passes[word] = (born_s, 0.0)
        return old

    def admit(self, connection: socket.socket) -> None:
        """Take note of a connection, for `drop_connections`."""
        with self._lock:
            self._connections.add(connection)

    def dismiss(self, connection: socket.socket) -> None:
        """Forget a connection that is over."""
        with self._lock:
            self._connections.discard(connection)

    def confess(self, problem: str) -> None:
        """Note a mistake of the weather's own, for the end of the block."""
        with self._lock:
            self._problems.append(problem)


class _Server:
    """One port and its threads."""

    def __init__(self, weather: Weather, *, is_store: bool) -> None:
        from .weather_faults import handler_of

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = False
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the handler has told of what is not a client's going away

        handler: type[BaseHTTPRequestHandler] = handler_of(weather, is_store)
        self._server = Server((weather.ip, 0), handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def _has_gone(client: socket.socket) -> bool:
    try:
        poll = select.poll()
        poll.register(client, select.POLLIN | select.POLLRDHUP)
        return bool(poll.poll(0))  # nobody sends the next request before this is answered
    except (OSError, ValueError):
        return True

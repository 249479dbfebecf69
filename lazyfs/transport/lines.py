"""A response whose header cannot be dripped for ever.

`http.client` reads status, headers, chunk sizes and trailers by lines, each receive with the
socket's timeout anew. Assumes what it has done since Python 2: that it reads through `fp`.
"""

import contextlib
import http.client
import io
import socket
import time
from typing import Any

from lazyfs.transport.window import Window

_PATIENCE_DEFAULT_S = 60.0
_SO_RCVBUFFORCE = 33
"""socket(7); Python has no name for it."""
_WINDOW_BYTES = 2 * 1024 * 1024
"""Left to itself the kernel grows a connection's window to 6 MB or more, and a few of them
overfill the queues on the way: lost packets, and a fault that waits behind them (seen at 1 Gbit/s,
10 ms: 5% of packets lost, stalls of a second). Where more has to be under way, readahead takes
more connections."""
_QUICK_S = 0.02
_GATHER_BYTES = 64 * 1024
"""Half of the kernel's first receive buffer: a higher mark would clamp the window (tcp.c)."""


def _narrow(sock: socket.socket) -> None:
    """Let no more be on its way to this connection than `_WINDOW_BYTES`.

    Needs CAP_NET_ADMIN; without it the kernel's own choice stands, since the buffer that anybody
    may ask for (net.core.rmem_max) is too small for a long way.
    """
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _WINDOW_BYTES)


class _Lines(io.BufferedReader):
    """A response's bytes; the lines between two pieces of body have `patience_s` in all.

    A socket's timeout is per receive: without this a server that drips a header, or a trailer
    without end, holds a thread for as long as it likes.
    """

    def __init__(self, raw: io.RawIOBase, patience_s: float) -> None:
        super().__init__(raw)
        self._patience_s = patience_s
        self._began_s: float | None = None

    def readline(self, size: int | None = -1, /) -> bytes:
        most = io.DEFAULT_BUFFER_SIZE * 16 if size is None or size < 0 else size
        line = b""
        while len(line) < most:
            ahead = self.peek(1)
            now_s = time.monotonic()
            if self._began_s is None:
                self._began_s = now_s
            if now_s - self._began_s > self._patience_s:
                raise TimeoutError("a header came too slowly")
            if not ahead:
                break
            ahead = ahead[: most - len(line)]
            line += self.read(ahead.find(b"\n") + 1 or len(ahead))
            if line.endswith(b"\n"):
                break
        return line

    def read1(self, size: int = -1, /) -> bytes:
        self._began_s = None
        return super().read1(size)


class BoundedResponse(http.client.HTTPResponse):
    """http.client's response, its header and chunk lines bounded in time.

    While much of a body is to come, a receive waits until some of it can be had at once
    (SO_RCVLOWAT, socket(7)): with eight connections on a link of 1 Gbit/s a thread would
    otherwise be woken for every 17 KiB, and half of the CPU time go into waking. Only while bytes
    come quickly; the mark is 1 again well before the body's end, and for whatever comes after it.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        """Take what `http.client` gives; the patience is the socket's own timeout."""
        super().__init__(sock, *args, **kwargs)
        self.fp = _Lines(self.fp.detach(), sock.gettimeout() or _PATIENCE_DEFAULT_S)
        self._socket = sock
        _narrow(sock)
        self._window = Window(sock)
        self._low_water_bytes = 1
        self._is_quick = False

    def read1(self, n: int = -1) -> bytes:
        """Return what has come of the body, once it is worth a receive."""
        self._window.follow_wish()
        began_s = time.monotonic()
        piece = super().read1(n)
        self._is_quick = time.monotonic() - began_s < _QUICK_S
        self._mark_low_water()
        return piece

    def _mark_low_water(self) -> None:
        left_bytes = self.length
        enough = left_bytes is not None and left_bytes >= 2 * _GATHER_BYTES and self._is_quick
        wanted_bytes = _GATHER_BYTES if enough else 1
        if wanted_bytes != self._low_water_bytes:
            # OSError: it was closed meanwhile, and the read will tell. AttributeError: TLS to a
            # proxy has no socket options.
            with contextlib.suppress(OSError, AttributeError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted_bytes)
            self._low_water_bytes = wanted_bytes

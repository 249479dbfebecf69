"""How much may be on its way to a thread that receives.

Who takes bytes in knows whether somebody waits for others, and who receives them holds the socket;
between the two are blobs, clients and places, and all of it happens in one thread. So the wish is
left with the thread (`allow_on_the_way`), and the connection looks at it with each piece.

What is on its way to background connections stands in the queues before a demand read's bytes: at
1 Gbit/s and 10 ms, two windows of 2 MiB are 24 ms of queue; one of 256 KiB fills none, and a fifth
of the link.
"""

import contextlib
import socket
import threading

from lazyfs.ground.settings import KIB, MIB

NARROW_BYTES = 256 * KIB
"""For what nobody waits for, while somebody waits for something else."""
SHARED_BYTES = 512 * KIB
"""For what several connections fetch, each of which should come early."""
_WIDE_BYTES = 64 * MIB
"""More than any receive buffer is: that alone bounds the window then."""

_here = threading.local()


def allow_on_the_way(size_bytes: int | None) -> None:
    """Wish that no more than so much is on its way to this thread's connection; None: any."""
    _here.size_bytes = size_bytes


class Window:
    """The receive window of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        """Leave it as it is: narrow perhaps, from an earlier response."""
        self._socket = sock
        self._clamp_bytes: int | None = None
        with contextlib.suppress(OSError, AttributeError):
            clamp_bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
            if clamp_bytes in (NARROW_BYTES, SHARED_BYTES):
                self._clamp_bytes = clamp_bytes

    def follow_wish(self) -> None:
        """Do what was wished in this thread; where a socket knows no window, nothing.

        A window that was announced is not taken back: it takes a round trip to be narrower.
        Source: tcp(7), TCP_WINDOW_CLAMP; Linux, net/ipv4/tcp.c (tcp_set_window_clamp).
        """
        wish: int | None = getattr(_here, "size_bytes", None)
        if wish == self._clamp_bytes:
            return
        self._clamp_bytes = wish
        with contextlib.suppress(OSError, AttributeError):
            value = _WIDE_BYTES if wish is None else wish
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, value)

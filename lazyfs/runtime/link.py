"""Words between the front and the keeper: small JSON objects, one a packet.

The kernel closes a dead process's end, so each learns of the other's death, however it came.
"""

import json
import socket
from collections.abc import Mapping
from typing import Any

_MESSAGE_MOST_BYTES = 64 * 1024
_TEXT_MOST = 8000


class Link:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """Return the descriptor; it can be read when there is a word, or the other is gone."""
        return self._socket.fileno()

    def send(self, **words: Any) -> bool:
        """Say something; return whether there is somebody to hear it."""
        short = {
            key: value[:_TEXT_MOST] if isinstance(value, str) else value
            for key, value in words.items()
        }
        try:
            self._socket.sendall(json.dumps(short).encode())
        except OSError:
            return False
        return True

    def receive(self) -> Mapping[str, Any] | None:
        """Return the next word; None when the other is gone."""
        try:
            data = self._socket.recv(_MESSAGE_MOST_BYTES)
        except OSError:
            return None
        words = json.loads(data) if data else None
        return words if isinstance(words, dict) else None

    def close(self) -> None:
        """Be gone, for the other."""
        self._socket.close()


def link_pair() -> tuple[Link, Link]:
    """Return two ends; both are closed on exec."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(ours), Link(theirs)

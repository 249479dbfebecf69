"""Where to listen, as a person writes it: `HOST:PORT`, `[HOST]:PORT` or `unix:PATH`."""

from pathlib import Path

import msgspec

from lazyfs.ground.errors import UsageError

_PORT_MOST = 65535


class Address(msgspec.Struct, frozen=True):
    """One of the two: a path, or a host and a port."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that `text` means; a relative path is the caller's.

    Raises:
        UsageError: it is none.
    """
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Address(path=Path(text.removeprefix("unix:")).absolute())
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    is_port = port.isascii() and port.isdigit() and int(port) <= _PORT_MOST
    if not colon or not host or not is_port:
        raise UsageError(
            f"{text!r} is no address to listen on: HOST:PORT (127.0.0.1:9100), [HOST]:PORT or "
            "unix:PATH"
        )
    return Address(host, int(port))

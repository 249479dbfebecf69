"""One request being answered, and the ways to answer it wrongly. Used through tests/faults.py."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs


class Server(Protocol):
    """What an exchange needs of its server."""

    def pause(self, seconds: float | None, event: threading.Event | None) -> bool: ...

    def drop(self, connection: socket.socket) -> None: ...


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    path: str
    query: str
    headers: dict[str, str]
    connection: int
    """Which connection it came by, counted from 0."""
    method: str = "GET"
    body: bytes = b""


@dataclass
class Resource:
    """What a path holds."""

    body: bytes
    content_type: str = "application/octet-stream"
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True


@dataclass
class Exchange:
    """One request being answered; what a fault acts on."""

    server: Server
    handler: Any
    seen: Seen
    resource: Resource | None

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Send a whole answer; Content-Length is added unless it is given."""
        self.head(status, {"Content-Length": str(len(body)), **headers})
        self.write(body)

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()

    def write(self, data: bytes) -> None:
        self.handler.wfile.write(b"" if self.seen.method == "HEAD" else data)
        self.handler.wfile.flush()

    def wait(self, seconds: float | None = None, event: threading.Event | None = None) -> bool:
        """Wait for the event or the time; False if the server stops meanwhile."""
        return self.server.pause(seconds, event)

    def close(self) -> None:
        self.handler.close_connection = True

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        sock = self.handler.connection
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.drop(sock)
        self.close()

    def normal(self) -> tuple[int, dict[str, str], bytes]:
        """Return the answer a good server would give."""
        resource = self.resource
        if resource is None:
            code = {"errors": [{"code": "NAME_UNKNOWN", "message": "no such thing"}]}
            return 404, {"Content-Type": "application/json"}, json.dumps(code).encode()
        headers = {"Content-Type": resource.content_type, **resource.headers}
        conditions = {
            "If-Match": resource.headers.get("ETag"),
            "If-Unmodified-Since": resource.headers.get("Last-Modified"),
        }
        for name, now in conditions.items():
            if name in self.seen.headers and self.seen.headers[name] != now:
                return 412, {}, b""
        body = resource.body
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.seen.headers.get("Range", ""))
        if asked is None or not resource.ranges:
            return 200, headers, body
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(body))
        if start >= len(body):
            return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return 206, headers, body[start:stop]


def written_to(exchange: Exchange, resources: dict[str, Resource]) -> bool:
    """Answer a request that writes, as a good registry does; False if it is none."""
    seen = exchange.seen
    found = re.fullmatch(r"(/v2/.+)/(blobs/uploads|blobs|manifests)/([^/]*)", seen.path)
    if seen.method not in ("POST", "PUT") or found is None:
        return False
    base, kind, name = found.groups()
    query = {key: values[0] for key, values in parse_qs(seen.query).items()}
    if seen.method == "PUT":
        digest = f"sha256:{hashlib.sha256(seen.body).hexdigest()}"
        content_type = seen.headers.get("Content-Type", "")
        stored = Resource(seen.body, content_type, {"Docker-Content-Digest": digest})
        if kind == "blobs/uploads" and query["digest"] != digest:
            exchange.answer(400, {}, b'{"errors":[{"code":"DIGEST_INVALID"}]}')
            return True
        place = "blobs" if kind == "blobs/uploads" else kind
        for each in {digest} | ({name} if kind == "manifests" else set()):
            resources[f"{base}/{place}/{each}"] = stored
        exchange.answer(201, {"Docker-Content-Digest": digest})
        return True
    there = resources.get(f"/v2/{query.get('from')}/blobs/{query.get('mount')}")
    if there is not None:
        resources[f"{base}/blobs/{query['mount']}"] = there
        exchange.answer(201, {"Location": f"{base}/blobs/{query['mount']}"})
    else:
        exchange.answer(202, {"Location": f"{base}/blobs/uploads/1?state=a"})
    return True


Fault = Callable[[Exchange], None]


def behave(exchange: Exchange) -> None:
    """No fault."""
    exchange.answer(*exchange.normal())


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Fault:
    """Answer so, whatever was asked."""
    return lambda exchange: exchange.answer(code, headers or {}, body)


def redirect(location: str, code: int = 307) -> Fault:
    return status(code, {"Location": location}, b"elsewhere")


def whole(exchange: Exchange) -> None:
    """200 with everything for a range."""
    assert exchange.resource is not None
    exchange.answer(200, exchange.resource.headers, exchange.resource.body)


def headers(changes: dict[str, str | None]) -> Fault:
    """A normal answer with headers replaced, added or (None) left out."""

    def fault(exchange: Exchange) -> None:
        code, sent, body = exchange.normal()
        merged = {"Content-Length": str(len(body)), **sent, **changes}
        exchange.head(code, {name: value for name, value in merged.items() if value is not None})
        exchange.write(body)
        if "Content-Length" in changes:
            exchange.close()

    return fault


def short(after: int) -> Fault:
    """Promise everything, send `after` bytes, close."""

    def fault(exchange: Exchange) -> None:
        code, sent, body = exchange.normal()
        exchange.head(code, {**sent, "Content-Length": str(len(body))})
        exchange.write(body[:after])
        exchange.close()

    return fault


def reset(after: int | None = None) -> Fault:
    """Reset the connection before any answer, or `after` bytes into the body."""

    def fault(exchange: Exchange) -> None:
        if after is not None:
            code, sent, body = exchange.normal()
            exchange.head(code, {**sent, "Content-Length": str(len(body))})
            exchange.write(body[:after])
        exchange.reset()

    return fault


def drip(every_s: float, count: int = 1, header: bool = False) -> Fault:
    """Send the body, or the header, `count` bytes at a time."""

    def fault(exchange: Exchange) -> None:
        code, sent, body = exchange.normal()
        if header:
            body = b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000
        else:
            exchange.head(code, {**sent, "Content-Length": str(len(body))})
        for at in range(0, len(body), count):
            exchange.write(body[at : at + count])
            if not exchange.wait(every_s):
                break
        exchange.close()

    return fault


def stall(after: int | None = None, until: threading.Event | None = None) -> Fault:
    """Send nothing, or `after` bytes of body, then nothing until the event (then the rest)."""

    def fault(exchange: Exchange) -> None:
        code, sent, body = exchange.normal()
        if after is not None:
            exchange.head(code, {**sent, "Content-Length": str(len(body))})
            exchange.write(body[:after])
        if not exchange.wait(None, until):
            exchange.close()
        elif after is not None:
            exchange.write(body[after:])
        else:
            exchange.answer(code, sent, body)

    return fault


def corrupt(exchange: Exchange) -> None:
    """A normal answer whose first byte is another."""
    code, sent, body = exchange.normal()
    exchange.answer(code, sent, bytes([body[0] ^ 1]) + body[1:])


def chunked(exchange: Exchange) -> None:
    """A normal answer without Content-Length, in chunks."""
    code, sent, body = exchange.normal()
    exchange.head(code, {**sent, "Transfer-Encoding": "chunked"})
    for at in range(0, len(body), 1000):
        piece = body[at : at + 1000]
        exchange.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    exchange.write(b"0\r\n\r\n")

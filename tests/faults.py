"""A registry, token server and web server in one, that misbehaves as it is told.

    with FaultServer() as server:
        digest = server.add_blob(b"...")
        server.script("/blobs/", reset(after=100), drip(...))   # the next two such requests
        ...
        assert server.count("/blobs/") == 3

What is scripted for a part of a path is used up one request at a time; then the server behaves.
Faults are functions of an `Exchange`; a test may write its own. No faults wait longer than the
server lives: `stop()` frees all of them, closes every connection, and joins every thread.
"""

import base64
import contextlib
import hashlib
import json
import socket
import socketserver
import ssl
import threading
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.exchange import (
    Exchange,
    Fault,
    Resource,
    Seen,
    behave,
    chunked,
    corrupt,
    drip,
    headers,
    redirect,
    reset,
    short,
    stall,
    status,
    whole,
    written_to,
)

__all__ = [
    "Exchange",
    "Fault",
    "FaultServer",
    "Resource",
    "Seen",
    "behave",
    "chunked",
    "corrupt",
    "digest_of",
    "drip",
    "headers",
    "redirect",
    "reset",
    "short",
    "stall",
    "status",
    "whole",
]

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class FaultServer:
    """See the module. All methods may be called from any thread while it serves."""

    def __init__(
        self,
        repository: str = "team/checkpoint",
        tls: ssl.SSLContext | None = None,
        address: str = "127.0.0.1",
    ):
        self.repository = repository
        self.address = address
        self.resources: dict[str, Resource] = {}
        self.seen: list[Seen] = []
        self.auth: str | None = None
        """None, "bearer" or "basic": what /v2/ asks for."""
        self.password: tuple[str, str] | None = None
        """What the token server, or Basic, wants; None: anybody gets a token."""
        self.identity_token: str | None = None
        """A refresh token that the token server takes by POST; None: it knows no POST."""
        self.token_life_s: float | None = 300
        self.realm: str | None = None
        self.scopes: list[str] = [f"repository:{repository}:pull"]
        """What a token has to be asked for."""
        self.writable = False
        """Whether it takes uploads, into any repository, and mounts blobs of its other ones."""
        self.tokens_issued = 0
        self._valid_token: str | None = None
        self._scripts: list[tuple[str, list[Fault]]] = []
        self._lock = threading.Lock()
        self._moved = threading.Condition()
        self._stopping = False
        self._connections: list[socket.socket] = []
        self._connection_count = 0
        self._tls = tls
        self._server: socketserver.ThreadingTCPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def host(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}"

    @property
    def connections(self) -> int:
        """How many connections were ever opened."""
        return self._connection_count

    def start(self) -> None:
        """Serve; after `stop`, on the same port."""
        owner = self

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = False
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away

            def shutdown_request(self, request: Any) -> None:
                owner.drop(request)

        self._stopping = False
        self._server = Server((self.address, self.port), _handler_of(self))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Free all faults, close all connections, and the port."""
        server, thread = self._server, self._thread
        if server is None or thread is None:
            return
        self._server = self._thread = None
        with self._moved:
            self._stopping = True
            self._moved.notify_all()
        server.shutdown()
        thread.join()
        with self._lock:
            connections = self._connections[:]
        for connection in connections:
            self.drop(connection, close=False)
        server.server_close()

    def add_blob(self, data: bytes) -> str:
        """Serve a blob of the repository; return its digest."""
        digest = digest_of(data)
        self.resources[f"/v2/{self.repository}/blobs/{digest}"] = Resource(data)
        return digest

    def add_manifest(
        self, document: Any, tag: str | None = None, media_type: str = OCI_MANIFEST
    ) -> str:
        """Serve a manifest (bytes, or what becomes JSON) by digest and tag; return its digest."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = digest_of(data)
        resource = Resource(data, media_type, {"Docker-Content-Digest": digest})
        for name in filter(None, (digest, tag)):
            self.resources[f"/v2/{self.repository}/manifests/{name}"] = resource
        return digest

    def add_file(self, path: str, data: bytes, headers: dict[str, str] | None = None) -> str:
        """Serve a file as a web server does; return its URL."""
        self.resources[path] = Resource(data, "application/x-tar", dict(headers or {}))
        return self.url + path

    def script(self, part: str, *faults: Fault) -> None:
        """Let the next requests whose path contains `part` meet these faults, one each."""
        with self._lock:
            self._scripts.append((part, list(faults)))

    def always(self, part: str, fault: Fault) -> None:
        """Let all requests whose path contains `part` meet this fault, after what is scripted."""
        with self._lock:
            self._scripts.append((part, [fault] * 10_000))

    def forgive(self) -> None:
        """Forget all that is scripted; requests that are being answered go on as they are."""
        with self._lock:
            self._scripts.clear()

    def count(self, part: str) -> int:
        """How many requests there were with `part` in their path."""
        return sum(part in seen.path for seen in list(self.seen))

    def wait_count(self, part: str, count: int, timeout_s: float = 10) -> None:
        """Wait until there were so many."""
        with self._moved:
            assert self._moved.wait_for(lambda: self.count(part) >= count, timeout_s)

    def revoke(self) -> None:
        """Forget the tokens that were issued."""
        self._valid_token = None

    def pause(self, seconds: float | None, event: threading.Event | None) -> bool:
        if event is not None:
            while not event.wait(0.01):
                if self._stopping:
                    return False
            return True
        with self._moved:
            return not self._moved.wait_for(lambda: self._stopping, seconds)

    def drop(self, connection: socket.socket, close: bool = True) -> None:
        """Close a connection for both sides at once."""
        with self._lock:
            if connection in self._connections and close:
                self._connections.remove(connection)
        try:
            if close:
                connection.close()
            else:
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def admit(self, connection: socket.socket) -> int:
        with self._lock:
            self._connections.append(connection)
            self._connection_count += 1
            return self._connection_count - 1

    def wrap(self, connection: socket.socket) -> socket.socket:
        if self._tls is None:
            return connection
        connection.settimeout(10)
        if connection.recv(1, socket.MSG_PEEK) not in (b"\x16", b""):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\nthis is TLS, as Go says it\n")
            raise OSError("plain HTTP where there is TLS")
        wrapped = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        try:
            wrapped.do_handshake()
        except OSError:
            _hear_out(socket.socket(fileno=wrapped.detach()))
            raise
        return wrapped

    def handle(self, handler: Any, connection: int) -> None:
        parts = urlsplit(handler.path)
        sent = dict(handler.headers.items())
        body = handler.rfile.read(int(sent.get("Content-Length", 0)))
        seen = Seen(parts.path, parts.query, sent, connection, handler.command, body)
        with self._moved:
            self.seen.append(seen)
            self._moved.notify_all()
        exchange = Exchange(self, handler, seen, self.resources.get(parts.path))
        fault = self._next_fault(parts.path)
        if fault is not None:
            fault(exchange)
        elif parts.path == "/token":
            self._token(exchange)
        elif parts.path.startswith("/v2/") and self.auth and not self._admitted(exchange):
            realm = self.realm or f"{self.url}/token"
            challenge = {
                "bearer": f'Bearer realm="{realm}",service="test, with a comma",scope="x"',
                "basic": 'Basic realm="here"',
            }[self.auth]
            exchange.answer(401, {"WWW-Authenticate": challenge}, b"{}")
        elif self.writable and written_to(exchange, self.resources):
            pass
        else:
            behave(exchange)

    def _next_fault(self, path: str) -> Fault | None:
        with self._lock:
            for part, faults in self._scripts:
                if part in path and faults:
                    return faults.pop(0)
        return None

    def _admitted(self, exchange: Exchange) -> bool:
        sent = exchange.seen.headers.get("Authorization")
        if self.auth == "basic":
            return sent is not None and sent == self._basic()
        return sent is not None and sent == f"Bearer {self._valid_token}"

    def _basic(self) -> str | None:
        if self.password is None:
            return None
        return "Basic " + base64.b64encode(":".join(self.password).encode()).decode()

    def _token(self, exchange: Exchange) -> None:
        sent = exchange.seen.headers.get("Authorization")
        query = parse_qs(exchange.seen.query)
        if exchange.seen.method == "POST":
            if self.identity_token is None:
                exchange.answer(404, {}, b"{}")
                return
            query = parse_qs(exchange.seen.body.decode())
            assert query["grant_type"] == ["refresh_token"], query
            if query["refresh_token"] != [self.identity_token]:
                exchange.answer(401, {}, b"{}")
                return
        elif self.password is not None and sent != self._basic():
            exchange.answer(401, {}, b"{}")
            return
        assert query["scope"] == self.scopes, query
        assert query["service"] == ["test, with a comma"], query
        with self._lock:
            self.tokens_issued += 1
            self._valid_token = f"token-{self.tokens_issued}"
            reply: dict[str, Any] = {"token": self._valid_token}
        if self.token_life_s is not None:
            reply["expires_in"] = self.token_life_s
        exchange.answer(200, {"Content-Type": "application/json"}, json.dumps(reply).encode())


def _hear_out(connection: socket.socket) -> None:
    """Close a connection once its client has: else what was said last is lost to a reset.

    With TLS 1.3 a client may be sending its request already when it is refused for its
    certificate; to close before that is read resets the connection, alert and all.
    """
    with connection, contextlib.suppress(OSError):
        connection.settimeout(10)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


def _handler_of(owner: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1
        disable_nagle_algorithm = True

        def setup(self) -> None:
            self.request = owner.wrap(self.request)
            self._number = owner.admit(self.request)
            super().setup()

        def do_GET(self) -> None:
            owner.handle(self, self._number)
            self.wfile.flush()

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def do_HEAD(self) -> None:
            self.do_GET()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()
            owner.drop(self.connection)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler

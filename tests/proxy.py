"""An HTTP proxy: tunnels by CONNECT, and forwards GET, for who knows its password."""

import base64
import contextlib
import socket
import socketserver
import threading
from types import TracebackType
from typing import Any, Self


class Proxy:
    """Listens on loopback; sends everything to one server, whatever name is asked for."""

    def __init__(self, to_port: int, password: tuple[str, str] | None = None) -> None:
        self.seen: list[str] = []
        """The first lines of the requests."""
        self._wanted = password and base64.b64encode(":".join(password).encode()).decode()
        owner = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    owner._serve(self, to_port)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url(self, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.port}"

    def _serve(self, handler: Any, to_port: int) -> None:
        head = []
        while (line := handler.rfile.readline().strip()) != b"":
            head.append(line)
        self.seen.append(head[0].decode())
        sent = {name.lower(): value.strip() for name, _, value in (h.partition(b":") for h in head)}
        if self._wanted and sent.get(b"proxy-authorization") != f"Basic {self._wanted}".encode():
            handler.wfile.write(
                b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n"
                b"Connection: close\r\n\r\n"
            )
            return
        with socket.create_connection(("127.0.0.1", to_port)) as server:
            if head[0].startswith(b"CONNECT "):
                handler.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                method, url, version = head[0].split()
                path = b"/" + url.split(b"/", 3)[3]
                head[0] = b" ".join((method, path, version))
                kept = [line for line in head if not line.lower().startswith(b"proxy-")]
                server.sendall(b"\r\n".join([*kept, b"Connection: close", b"", b""]))
            back = threading.Thread(target=_pump, args=(server, handler.connection))
            back.start()
            _pump(handler.connection, server)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)

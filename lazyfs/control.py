"""A small HTTP server by which a mount answers questions about itself.

One request a connection; nothing that a client sends is large, and none may take long over it.
Parsing is h11's. On a control socket only the user whom the mount belongs to, and root, are heard
(SO_PEERCRED): its mode says so too, but a directory may be opened by mistake.
"""

import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import trio

from lazyfs.address import Address
from lazyfs.ground.errors import LazyfsError
from lazyfs.rundir import peer_user

if TYPE_CHECKING:
    import h11

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 16 * 1024
_BODY_MOST_BYTES = 64 * 1024
_TIMEOUT_S = 10.0
_CONNECTIONS_MOST = 32


class Answer(msgspec.Struct, frozen=True):
    """What a request is answered with."""

    body: bytes
    content_type: str = "application/json"
    code: int = 200


def as_json(value: object, code: int = 200) -> Answer:
    """Return an answer in JSON."""
    return Answer(json.dumps(value).encode() + b"\n", code=code)


class Route(NamedTuple):
    """What is asked for: a method and a path."""

    method: str
    path: str


Handlers = Mapping[Route, Callable[[], Answer]]


class Server:
    """Answers on one listening socket."""

    def __init__(self, handlers: Handlers, *, only_user: int | None = None) -> None:
        """`only_user`: hear nobody but this user and root."""
        self._handlers = handlers
        self._only_user = only_user
        self._limit = trio.CapacityLimiter(_CONNECTIONS_MOST)

    async def serve(self, listening: socket.socket) -> None:
        """Answer until cancelled. The socket stays the caller's."""
        listener = trio.socket.from_stdlib_socket(listening)
        async with trio.open_nursery() as nursery:
            while True:
                async with self._limit:
                    pass  # no more connections than there are answers under way
                try:
                    link, _ = await listener.accept()
                except OSError as error:
                    if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                        raise  # else it is the new connection's, or passes: accept(2)
                    log.warning("nobody can ask about this mount now: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._converse, link)

    async def _converse(self, link: trio.socket.SocketType) -> None:
        with link:
            try:
                async with self._limit:
                    with trio.move_on_after(_TIMEOUT_S):
                        if self._is_welcome(link):
                            await _Conversation(trio.SocketStream(link)).hold(self._answer)
            except (OSError, trio.BrokenResourceError) as error:
                log.debug("whoever asked is gone: %s", error)
            except Exception:  # a bug must not end the mount
                log.exception("a question about the mount failed: please report this")

    def _is_welcome(self, link: trio.socket.SocketType) -> bool:
        if self._only_user is None:
            return True
        user = peer_user(link)
        if user in (0, self._only_user):
            return True
        log.warning("user %d has no business with this mount", user)
        return False

    def _answer(self, asked: Route) -> Answer:
        handler = self._handlers.get(asked)
        if handler is not None:
            return handler()
        if any(asked.path == known.path for known in self._handlers):
            return as_json({"error": "another method, please"}, 405)
        return as_json({"error": "there is no such thing here"}, 404)


class _Conversation:
    """One request and its answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        import h11

        self._h11 = h11
        self._stream = stream
        self._wants_head = False
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_RECEIVE_BYTES)

    async def hold(self, answer: Callable[[Route], Answer]) -> None:
        try:
            request = await self._request()
        except self._h11.RemoteProtocolError as error:
            await self._send(as_json({"error": str(error)}, error.error_status_hint))
            return
        if request is None:
            return
        path = request.target.partition(b"?")[0].decode("ascii", "replace")
        route = Route(request.method.decode("ascii", "replace"), path)
        self._wants_head = route.method == "HEAD"
        if self._wants_head:
            route = Route("GET", path)
        await self._send(answer(route))

    async def _request(self) -> "h11.Request | None":
        """Return the request, once all of it has come; None if it never does."""
        request = None
        body_bytes = 0
        while True:
            event = self._http.next_event()
            if event is self._h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some(_RECEIVE_BYTES))
            elif isinstance(event, self._h11.Request):
                request = event
            elif isinstance(event, self._h11.Data):
                body_bytes += len(event.data)
                if body_bytes > _BODY_MOST_BYTES:
                    raise self._h11.RemoteProtocolError("too much", error_status_hint=413)
            elif isinstance(event, self._h11.EndOfMessage):
                return request
            else:  # the connection was closed
                return None

    async def _send(self, answer: Answer) -> None:
        h11 = self._h11
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            ("Connection", "close"),
        ]
        out = self._http.send(h11.Response(status_code=answer.code, headers=headers)) or b""
        if not self._wants_head:
            out += self._http.send(h11.Data(data=answer.body)) or b""
        out += self._http.send(h11.EndOfMessage()) or b""
        await self._stream.send_all(out)


async def listen(address: Address) -> Sequence[socket.socket]:
    """Listen: on all addresses of a name.

    Raises:
        LazyfsError: it cannot be listened on.
    """
    try:
        if address.path is not None:
            return [_listen_at(address.path)]
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise LazyfsError(f"cannot listen on {address}: {error.strerror or error}") from None
    return [_taken_from(listener) for listener in listeners]


def _taken_from(listener: trio.SocketListener) -> socket.socket:
    with listener.socket as theirs:
        return socket.socket(fileno=os.dup(theirs.fileno()))


def _listen_at(path: Path) -> socket.socket:
    """Listen at a path; a socket on which nobody listens is in nobody's way."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX) as link:
                link.setblocking(False)  # one that is stuck would hold us up for ever
                try:
                    link.connect(str(path))
                except BlockingIOError:
                    pass
                except ConnectionRefusedError:
                    path.unlink()
    listening = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(str(path))
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening

"""HTTP(S) for all the URLs of one source: connections kept warm, redirects, credentials.

Decides which connection a request gets, which redirects are followed, who sees credentials, and
what becomes of a connection afterwards; who may lead to this machine itself is `local.py`'s. A
request leases a `Connection`; idle ones are taken back last in, first out, so that few stay warm
rather than many lukewarm. What was read to its end is used again; after any error, or a body not
read to its end, the connection is closed.
"""

import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from lazyfs.ground.errors import ClosedEarly, FetchError, SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.local import LocalGuard
from lazyfs.transport.proxies import proxy_for
from lazyfs.transport.tls import Endpoints, TlsConfig, plain_endpoint
from lazyfs.transport.urls import Origin, origin_of, redirect_target, shown

if TYPE_CHECKING:
    from lazyfs.transport.http import Connection, Upload

_REDIRECTS = {301, 302, 303, 307, 308}
_REFUSALS = {401, 403}
_AUTHORIZATION = "Authorization"
_HOPS_MOST = 5
_DISCARD_MOST_BYTES = 64 * 1024
_IDLE_MOST_S = 55.0
"""Servers and NATs forget idle connections from a minute on; some without a word."""
_IDLE_CONNECTIONS_MOST = 32


class Authorizer(Protocol):
    """Who knows what to put into `Authorization`. Called in several threads at once."""

    def authorization(self, origin: Origin) -> str | None:
        """Return the header for requests to `origin`; None: ask without."""

    def renew(self, origin: Origin, challenge: str | None, rejected: str | None) -> str | None:
        """Return the header to try after `origin` refused `rejected` (None: nothing was sent).

        `challenge` is its `WWW-Authenticate`. None: there is no other.
        """


class Reply:
    """An answer whose body is still to be read; a context that lets go of the connection."""

    def __init__(
        self,
        client: "HttpClient",
        connection: "Connection",
        url: str,
        answer: tuple[int, Mapping[str, str]],
    ) -> None:
        """Hold `connection` until `close`."""
        self._client = client
        self._connection = connection
        self._ended = False
        self._closed = False
        self.url = url
        """Who answered in the end: not to be shown."""
        self.status, self.headers = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it comes, a receive at a time.

        Raises:
            FetchError: transient: it was cut short, stalled, or drips.
        """
        settings = self._client.settings
        began_s = time.monotonic()
        window_bytes = 0
        while True:
            piece = self._connection.receive()
            if not piece:
                self._ended = True
                return
            window_bytes += len(piece)
            window_s = time.monotonic() - began_s
            if window_s >= settings.stall_timeout_s:
                if window_bytes < settings.stall_floor_bytes:
                    raise FetchError(
                        f"{shown(self.url)} came too slowly: {window_bytes} bytes in "
                        f"{window_s:.0f} s",
                        transient=True,
                    )
                began_s += window_s
                window_bytes = 0
            yield piece

    def read(self, limit_bytes: int) -> bytes:
        """Return the whole body.

        Raises:
            FetchError: it was cut short.
            SourceError: it is longer than `limit_bytes`.
        """
        pieces = []
        size_bytes = 0
        for piece in self.pieces():
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > limit_bytes:
                raise SourceError(
                    f"{shown(self.url)} sent more than the {limit_bytes} bytes allowed for it"
                )
        return b"".join(pieces)

    def discard(self) -> bytes:
        """Read what is left if that is little, to keep the connection; return it."""
        try:
            return self.read(_DISCARD_MOST_BYTES)
        except SourceError:
            return b""
        finally:
            self.close()

    def close(self) -> None:
        """Give the connection back, or close it if the body was not read to its end."""
        if not self._closed:
            self._closed = True
            self._client.give_back(self._connection, clean=self._ended)


class SmallReply(msgspec.Struct, frozen=True):
    """An answer that was read whole."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Connections, redirects and credentials for all the URLs of one source. Thread-safe."""

    def __init__(
        self, settings: TransportSettings, *, endpoints: Endpoints = plain_endpoint
    ) -> None:
        """Connect to nobody yet. `endpoints` says how each origin is spoken to."""
        self.settings = settings
        self._endpoints = endpoints
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[Connection]] = {}
        self._proxies: dict[Origin, str | None] = {}
        self._guard = LocalGuard(allow=settings.allow_local_redirects)
        self._contexts = _Contexts()
        self._closed = False

    def with_settings(self, settings: TransportSettings) -> "HttpClient":
        """Return another client, of other timeouts, that need not read certificates again."""
        other = HttpClient(settings, endpoints=self._endpoints)
        other._contexts = self._contexts
        return other

    def open(
        self,
        url: str,
        headers: Mapping[str, str],
        authorizer: Authorizer | None = None,
        *,
        led_by: Origin | None = None,
    ) -> Reply:
        """GET `url`, through redirects, and return the answer, whatever its status.

        A 401 or 403 of the first origin is answered once, if `authorizer` knows how. `led_by` is
        who says that one should ask there, if it is not the user.

        Raises:
            FetchError: transient: nobody answered.
            SourceError: TLS failed, or a redirect, or `led_by`, leads where none may.
        """
        if authorizer is None:
            return self._follow(url, headers, None, led_by)
        origin = origin_of(url)
        sent = authorizer.authorization(origin)
        reply = self._follow(url, headers, sent, led_by)
        if reply.status not in _REFUSALS or origin_of(reply.url) != origin:
            return reply
        challenge = reply.headers.get("WWW-Authenticate")
        if challenge is None and sent is None:
            return reply
        try:
            renewed = authorizer.renew(origin, challenge, sent)
        except BaseException:
            reply.close()
            raise
        if renewed is None:
            return reply
        reply.discard()
        return self._follow(url, headers, renewed, led_by)

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        limit_bytes: int,
        authorizer: Authorizer | None = None,
        led_by: Origin | None = None,
    ) -> SmallReply:
        """GET `url` like `open` and return the answer with its body.

        The body of an answer other than 200 is cut at 64 KiB.

        Raises:
            FetchError: transient: nobody answered, or the body was cut short.
            SourceError: as `open`; or the body is longer than `limit_bytes`, or encoded.
        """
        return _read_whole(self.open(url, headers, authorizer, led_by=led_by), limit_bytes)

    def post(
        self,
        url: str,
        headers: Mapping[str, str],
        form: bytes,
        *,
        limit_bytes: int,
        led_by: Origin | None = None,
    ) -> SmallReply:
        """POST `form` to `url` and return the answer. A redirect is not followed: it is secret.

        Raises:
            FetchError: as `get`.
            SourceError: as `get`.
        """
        return _read_whole(self._ask_once(url, headers, None, led_by, form), limit_bytes)

    def send(
        self,
        url: str,
        headers: Mapping[str, str],
        upload: "Upload",
        authorizer: Authorizer,
        *,
        led_by: Origin | None = None,
    ) -> SmallReply:
        """Do what `upload` says and return the answer, of its body at most 64 KiB.

        A redirect is followed for a HEAD alone. A 401 or 403 is answered once, as by `open`; a
        file is then sent again from where it stood.

        Raises:
            FetchError: as `get`.
            SourceError: as `get`.
        """
        origin = origin_of(url)
        sent = authorizer.authorization(origin)
        start = 0 if isinstance(upload.body, bytes) else upload.body.tell()
        reply = self._send(url, headers, upload, sent, led_by)
        challenge = reply.headers.get("WWW-Authenticate")
        refused = reply.status in _REFUSALS and origin_of(reply.url) == origin
        if refused and not (challenge is None and sent is None):
            renewed = authorizer.renew(origin, challenge, sent)
            if renewed is not None:
                if not isinstance(upload.body, bytes):
                    upload.body.seek(start)
                reply = self._send(url, headers, upload, renewed, led_by)
        return reply

    def give_back(self, connection: "Connection", *, clean: bool) -> None:
        """Take a connection back, to be used again if its last answer was read to the end."""
        if clean:
            connection.used = True
            connection.idle_since_s = time.monotonic()
            with self._lock:
                idle = self._idle.setdefault(connection.origin, [])
                if not self._closed and len(idle) < _IDLE_CONNECTIONS_MOST:
                    idle.append(connection)
                    return
        connection.close()

    def close(self) -> None:
        """Close what is idle; what is under way closes when it ends."""
        with self._lock:
            self._closed = True
            connections = [each for idle in self._idle.values() for each in idle]
            self._idle.clear()
        for each in connections:
            each.close()

    def _send(
        self,
        url: str,
        headers: Mapping[str, str],
        upload: "Upload",
        authorization: str | None,
        led_by: Origin | None,
    ) -> SmallReply:
        if upload.method == "HEAD":
            reply = self._follow(url, headers, authorization, led_by, upload)
        else:
            reply = self._ask_once(url, headers, authorization, led_by, upload=upload)
        with reply:
            return SmallReply(reply.url, reply.status, reply.headers, reply.discard())

    def _follow(
        self,
        url: str,
        headers: Mapping[str, str],
        authorization: str | None,
        led_by: Origin | None,
        upload: "Upload | None" = None,
    ) -> Reply:
        asked = url
        for _ in range(_HOPS_MOST + 1):
            reply = self._ask_once(url, headers, authorization, led_by, upload=upload)
            if reply.status not in _REDIRECTS:
                return reply
            reply.discard()
            target = redirect_target(url, reply.headers.get("Location"))
            led_by = origin_of(url)
            if origin_of(target) != led_by:  # for good: a way back must not bring it back
                authorization = None
                headers = {name: headers[name] for name in headers if name != _AUTHORIZATION}
            url = target
        raise SourceError(f"{shown(asked)} redirects more than {_HOPS_MOST} times")

    def _ask_once(
        self,
        url: str,
        headers: Mapping[str, str],
        authorization: str | None,
        led_by: Origin | None,
        form: bytes | None = None,
        upload: "Upload | None" = None,
    ) -> Reply:
        origin = origin_of(url)
        body = b"" if upload is None else upload.body
        start = 0 if isinstance(body, bytes) else body.tell()
        self._guard.check(origin, origin.host, led_by)

        def judge(peer: str) -> None:
            self._guard.check(origin, peer, led_by)
            self._guard.note(origin, peer)

        if authorization is not None:
            headers = {**headers, _AUTHORIZATION: authorization}
        if origin not in self._proxies:
            self._proxies[origin] = proxy_for(origin, os.environ)
        while True:
            connection = self._lease(origin)
            try:
                if connection.peer is not None:
                    judge(connection.peer)
                if not isinstance(body, bytes):
                    body.seek(start)
                answer = connection.ask(
                    url,
                    headers,
                    form=form,
                    upload=upload,
                    proxy=self._proxies[origin],
                    on_peer=judge,
                )
            except BaseException as error:
                connection.close()
                if connection.used and isinstance(error, ClosedEarly):
                    continue  # it was closed while idle; the next may be, too, a new one is not
                raise
            return Reply(self, connection, url, answer)

    def _lease(self, origin: Origin) -> "Connection":
        stale: list[Connection] = []
        with self._lock:
            idle = self._idle.get(origin)
            if idle:
                connection = idle.pop()
                if time.monotonic() - connection.idle_since_s <= _IDLE_MOST_S:
                    return connection
                stale = [connection, *idle]  # the others have been idle for longer
                idle.clear()
        for each in stale:
            each.close()
        # Only now: a mount that finds all in the cache asks nobody, and imports no HTTP library.
        from lazyfs.transport import http

        endpoint = self._endpoints(origin)
        context = self._contexts.of(endpoint.tls) if origin.scheme == "https" else None
        return http.Connection(origin, self.settings, context, endpoint.headers)


class _Contexts:
    """What TLS is spoken with: reading the authorities takes longer than a round trip."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[TlsConfig, tuple[object, ssl.SSLContext]] = {}

    def of(self, tls: TlsConfig) -> ssl.SSLContext:
        """Return a context that is made once, and anew when one of its files is another."""
        from lazyfs.transport.http import context_for

        stamp = tls.stamp()
        with self._lock:
            kept = self._kept.get(tls)
            if kept is None or kept[0] != stamp:
                kept = self._kept[tls] = (stamp, context_for(tls))
        return kept[1]


def _read_whole(reply: Reply, limit_bytes: int) -> SmallReply:
    with reply:
        if reply.status == 200:
            refuse_encoding(reply)
            body = reply.read(limit_bytes)
        else:
            body = reply.discard()
        return SmallReply(reply.url, reply.status, reply.headers, body)


def refuse_encoding(reply: Reply) -> None:
    """Make sure that the body is the bytes themselves.

    Raises:
        SourceError: it is compressed although that was declined.
    """
    encoding = reply.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise SourceError(
            f"{shown(reply.url)} came with Content-Encoding {encoding[:40]!r} although it was "
            "declined: a proxy or the server rewrites what it serves"
        )

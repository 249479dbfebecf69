"""One connection to one origin: a request at a time, the answer's body a receive at a time.

The only module that knows requests and urllib3; it translates their exceptions. Connecting,
each receive and the lines of a header have their bound (`TransportSettings`), a body that drips
is its reader's to judge; name resolution is bounded by resolv.conf.

The environment is consulted for the trust store as OpenSSL reads it (SSL_CERT_FILE, SSL_CERT_DIR)
and nothing else: no .netrc, no cookies, no bundle of requests' own; a proxy is given.

Messages never hold the libraries' own text: it has whole URLs in it, signatures included. The
chain of causes is cut (`from None`) and urllib3's log silenced for the same reason.
"""

import contextlib
import http.client
import logging
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, BinaryIO, Literal

import msgspec
import requests
import urllib3
from msgspec.structs import replace
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lazyfs import __version__
from lazyfs.ground.errors import (
    ClosedEarly,
    FetchError,
    LazyfsError,
    NotTls,
    SourceError,
    UnknownHost,
)
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.lines import BoundedResponse
from lazyfs.transport.tls import TlsConfig, machine_bundle
from lazyfs.transport.urls import Origin, origin_of, shown
from lazyfs.transport.wake import blocks_on

logging.getLogger("urllib3").setLevel(logging.CRITICAL)

PIECE_BYTES = 256 * 1024
_TAKEN_IN_BYTES_PER_S = 4 << 20
"""What the slowest of registries do with a blob before they answer, such as a copy in an object
store; an assumption."""
_FOREIGN_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)
_WANTS_CERTIFICATE = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "BAD_CERTIFICATE", "UNKNOWN_CA")
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")


class Upload(msgspec.Struct, frozen=True):
    """A request that is no GET, and what goes with it."""

    method: Literal["HEAD", "POST", "PUT"]
    body: bytes | BinaryIO = b""
    """A file is read from where it stands to its end."""
    size_bytes: int = 0


class _Gate:
    """Who hears to what address a connection was made, before a byte is sent, and may refuse."""

    def __init__(self) -> None:
        self.on_peer: Callable[[str], None] | None = None
        self.on_connected: Callable[[Any], None] = lambda sock: None
        """Told the socket: urllib3 has no way to it from a request that waits for its answer."""

    def pass_on(self, connection: socket.socket) -> socket.socket:
        try:
            if self.on_peer is not None:
                self.on_peer(connection.getpeername()[0])
        except BaseException:
            connection.close()
            raise
        return connection


class _Connection(HTTPConnection):
    response_class = BoundedResponse
    gate: _Gate

    def _new_conn(self) -> socket.socket:
        return self.gate.pass_on(super()._new_conn())

    def connect(self) -> None:
        super().connect()
        self.gate.on_connected(self.sock)


class _TlsConnection(HTTPSConnection):
    response_class = BoundedResponse
    gate: _Gate

    def _new_conn(self) -> socket.socket:
        return self.gate.pass_on(super()._new_conn())

    def connect(self) -> None:
        super().connect()
        self.gate.on_connected(self.sock)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection
    gate: _Gate

    def _new_conn(self) -> Any:
        connection: Any = super()._new_conn()
        connection.gate = self.gate
        return connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
    gate: _Gate

    def _new_conn(self) -> Any:
        connection: Any = super()._new_conn()
        connection.gate = self.gate
        return connection

    def _validate_conn(self, conn: Any) -> None:
        """Connect, and do not warn where certificates are not checked: that was told once."""
        if conn.is_closed:
            conn.connect()


def _pools(gate: _Gate) -> dict[str, Callable[..., HTTPConnectionPool]]:
    """Return what makes the pools of one session."""

    def made(pool: Any) -> Callable[..., HTTPConnectionPool]:
        def make(*args: Any, **kwargs: Any) -> HTTPConnectionPool:
            made_pool: HTTPConnectionPool = pool(*args, **kwargs)
            made_pool.gate = gate  # type: ignore[attr-defined]
            return made_pool

        return make

    return {"http": made(_Pool), "https": made(_TlsPool)}


class _Adapter(HTTPAdapter):
    """One connection; certificates checked as its context says."""

    def __init__(self, context: ssl.SSLContext | None, gate: _Gate) -> None:
        self._context = context
        self._pools = _pools(gate)
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def build_connection_pool_key_attributes(
        self, request: requests.PreparedRequest, verify: Any, cert: Any = None
    ) -> Any:
        host, tls = super().build_connection_pool_key_attributes(request, False, None)
        tls["cert_reqs"] = self._cert_reqs
        if self._context is not None:
            tls["ssl_context"] = self._context
        return host, tls

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        conn.cert_reqs = self._cert_reqs

    @property
    def _cert_reqs(self) -> Literal["CERT_NONE", "CERT_REQUIRED"]:
        unchecked = self._context is not None and self._context.verify_mode == ssl.CERT_NONE
        return "CERT_NONE" if unchecked else "CERT_REQUIRED"


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> None:
        """Know of no redirect.

        Who does not follow one has it read to its end all the same, whatever its length, for the
        sake of `Response.next` (requests, `sessions.py`, `resolve_redirects`).
        """


class Connection:
    """One `requests.Session`, which holds one connection. Not thread-safe: lease it."""

    def __init__(
        self,
        origin: Origin,
        settings: TransportSettings,
        context: ssl.SSLContext | None,
        headers: Mapping[str, str],
    ) -> None:
        """Connect to nobody yet. `context` is needed for https; `headers` go with each request."""
        self.origin = origin
        self._headers = headers
        self.used = False
        """Whether it has answered before."""
        self.idle_since_s = 0.0
        self.peer: str | None = None
        """The address that it was made to; None: there is none yet, or a proxy is on the way."""
        self._settings = settings
        self._gate = _Gate()
        self._gate.on_connected = self._note_socket
        self._session = _Session()
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.mount(f"{origin.scheme}://", _Adapter(context, self._gate))
        self._prepared: tuple[str, requests.PreparedRequest] | None = None
        self._response: requests.Response | None = None
        self._socket: socket.socket | None = None

    def abort(self) -> None:
        """End what another thread does with it: that fails at once. Does not block.

        While it connects, nothing happens.
        """
        sock = self._socket
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                # Not SSLSocket's own: it would drop the cipher under the reader's feet.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def ask(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        form: bytes | None = None,
        upload: Upload | None = None,
        proxy: str | None = None,
        on_peer: Callable[[str], None] = lambda peer: None,
    ) -> tuple[int, Mapping[str, str]]:
        """GET `url`, or POST `form` to it, or do what `upload` says; return status and headers.

        `receive` the body.

        `on_peer` is told the address when a connection is made to it, before a byte is sent, and
        may raise; not where a proxy is on the way.

        Raises:
            ClosedEarly: transient.
            FetchError: transient: nobody answered.
            SourceError: TLS failed, or the URL is none.
        """
        if proxy is None:
            self._gate.on_peer = lambda peer: self._met(peer, on_peer)
        blocks_on(self.abort)
        answer_timeout_s = self._answer_timeout_s(upload)
        try:
            if self._prepared is None or self._prepared[0] != url:
                self._prepared = (url, requests.Request("GET", url).prepare())
            request = self._prepared[1].copy()
            request.headers = CaseInsensitiveDict(self._headers)
            request.headers.update(headers)
            if form is not None:
                request.method = "POST"
                request.body = form
                request.headers["Content-Length"] = str(len(form))
            if upload is not None:
                request.method = upload.method
                if upload.method != "HEAD":
                    request.body = upload.body  # type: ignore[assignment]  # a file is fine
                    request.headers["Content-Length"] = str(upload.size_bytes)
            request.headers["Accept-Encoding"] = "identity"
            request.headers["User-Agent"] = f"lazyfs/{__version__}"
            self._response = self._session.send(
                request,
                stream=True,
                timeout=(self._settings.connect_timeout_s, answer_timeout_s),
                proxies={} if proxy is None else {self.origin.scheme: proxy},
                allow_redirects=False,
            )
        except _FOREIGN_ERRORS as error:
            settings = replace(self._settings, stall_timeout_s=answer_timeout_s)
            raise _translated(error, url, settings) from None
        return self._response.status_code, self._response.headers

    def receive(self) -> bytes:
        """Return what has come of the body, waiting for the first byte of it; empty at its end.

        Raises:
            FetchError: transient: it was cut short, or nothing came.
        """
        if self._response is None:
            return b""
        try:
            piece: bytes = self._response.raw.read1(PIECE_BYTES, decode_content=False)
        except _FOREIGN_ERRORS as error:
            url = self._response.url
            raise _translated(error, url, self._settings, in_body=True) from None
        if not piece:
            blocks_on(None)  # others may use it from now on
        return piece

    def _answer_timeout_s(self, upload: Upload | None) -> float:
        """Return for how long an answer may take: who was given much hashes and moves it first."""
        size_bytes = 0 if upload is None else upload.size_bytes
        return self._settings.stall_timeout_s + size_bytes / _TAKEN_IN_BYTES_PER_S

    def _met(self, peer: str, on_peer: Callable[[str], None]) -> None:
        on_peer(peer)
        self.peer = peer

    def _note_socket(self, sock: Any) -> None:
        self._socket = sock
        blocks_on(self.abort)

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._response is not None:
            self._response.close()
        self._session.close()


def context_for(tls: TlsConfig) -> ssl.SSLContext:
    """Return a context that trusts what this machine trusts, and does what `tls` says.

    Some 10 ms: once for many connections.

    Raises:
        SourceError: a file that `tls` names is of no use.
    """
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and paths.capath is None:
        # a machine without a trust store, or an OpenSSL that looks for it elsewhere
        context.load_verify_locations(machine_bundle() or requests.certs.where())
    tls.apply(context)
    return context


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and all that it wraps, however the libraries chose to wrap it."""
    found: list[BaseException] = [error]
    for each in found:
        reason = getattr(each, "reason", None)
        for inner in (each.__cause__, each.__context__, reason, *each.args):
            if isinstance(inner, BaseException) and not any(inner is seen for seen in found):
                found.append(inner)
    return found


def _translated(
    error: BaseException, url: str, settings: TransportSettings, *, in_body: bool = False
) -> LazyfsError:
    """Return our error for one of the libraries', without its words."""
    causes = _causes(error)
    who = str(origin_of(url))
    for each in causes:
        if isinstance(each, ssl.SSLError) and not in_body:
            return _tls_error(each, who)
        if isinstance(each, OSError) and (found := _TUNNEL.search(str(each))):
            wants = "; its URL (HTTPS_PROXY) needs a user and password" if found[1] == "407" else ""
            return FetchError(
                f"{who}: the proxy on the way answered {found[1]} to a tunnel{wants}",
                transient=not found[1].startswith("4"),
            )
    if any(isinstance(each, TimeoutError | requests.Timeout) for each in causes):
        connecting = any(isinstance(each, requests.ConnectTimeout) for each in causes)
        within_s = settings.connect_timeout_s if connecting else settings.stall_timeout_s
        did = "accept a connection" if connecting else "send anything"
        return FetchError(f"{who} did not {did} within {within_s:g} s", transient=True)
    for each in causes:
        if isinstance(each, socket.gaierror):
            known = each.errno != socket.EAI_NONAME
            kind = FetchError if known else UnknownHost
            return kind(f"{who}: its address is not known: {each.strerror}", transient=True)
    if not in_body and any(
        isinstance(each, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError)
        for each in causes
    ):
        return ClosedEarly(f"{who} closed the connection before it answered", transient=True)
    for each in causes:
        if isinstance(each, OSError) and each.errno is not None and each.strerror:
            by_proxy = isinstance(error, requests.exceptions.ProxyError)
            reason = each.strerror.lower() + (" (by the proxy on the way)" if by_proxy else "")
            return FetchError(f"{who}: {reason}", transient=True)
    if in_body:
        return FetchError(f"{who} closed the connection in mid-answer", transient=True)
    if isinstance(error, requests.ConnectionError):
        return FetchError(f"{who} did not answer as HTTP has it", transient=True)
    return SourceError(f"{shown(url)} cannot be asked for ({type(error).__name__})")


_OF_TIME = "whoever runs it has to renew it, unless this machine's clock is wrong"
_OF_NAMES = "call it by a name that its certificate has"
_OF_CERTIFICATES = {9: _OF_TIME, 10: _OF_TIME, 62: _OF_NAMES, 64: _OF_NAMES}
"""What to do, by OpenSSL's X509_V_ERR_…: CERT_NOT_YET_VALID, CERT_HAS_EXPIRED, HOSTNAME_MISMATCH
and IP_ADDRESS_MISMATCH (x509_vfy.h)."""


def _tls_error(error: ssl.SSLError, who: str) -> LazyfsError:
    if isinstance(error, ssl.SSLCertVerificationError):
        advice = _OF_CERTIFICATES.get(
            error.verify_code,
            f"if it should be, put its authority into certs.d/{who}/ca.crt (containers-certs.d(5)) "
            "or this machine's trust store, or name it in SSL_CERT_FILE",
        )
        said = error.verify_message.rstrip(".")
        return SourceError(f"{who}: its TLS certificate is not trusted ({said}); {advice}")
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError):
        return FetchError(f"{who} closed the connection while TLS was set up", transient=True)
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return NotTls(
            f"{who}: TLS failed ({error.reason}); if it speaks plain HTTP, say so: --plain-http"
        )
    hint = ""
    if error.reason and error.reason.endswith(_WANTS_CERTIFICATE):
        hint = f"; it may want a client certificate: certs.d/{who}/*.cert and *.key"
    return SourceError(f"{who}: TLS failed ({error.reason or 'unknown reason'}){hint}")

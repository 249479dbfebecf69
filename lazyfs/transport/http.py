"""One connection to one origin: a GET at a time, the answer's body a receive at a time.

The only module that knows requests and urllib3; it translates their exceptions. Connecting,
each receive and the lines of a header have their bound (`TransportSettings`), a body that drips
is its reader's to judge; name resolution is bounded by resolv.conf.

The environment is consulted for proxies, and for the trust store as OpenSSL reads it
(SSL_CERT_FILE, SSL_CERT_DIR): no .netrc, no cookies, no bundle of requests' own.

Messages never hold the libraries' own text: it has whole URLs in it, signatures included. The
chain of causes is cut (`from None`) and urllib3's log silenced for the same reason.
"""

import http.client
import logging
import re
import socket
import ssl
from collections.abc import Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from requests.utils import get_environ_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from lazyfs import __version__
from lazyfs.ground.errors import FetchError, LazyfsError, SourceError, UnknownHost
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.lines import BoundedResponse
from lazyfs.transport.tls import TlsConfig
from lazyfs.transport.urls import Origin, is_loopback, origin_of, shown

logging.getLogger("urllib3").setLevel(logging.CRITICAL)

PIECE_BYTES = 256 * 1024
_FOREIGN_ERRORS = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")


class ClosedEarly(FetchError):
    """The connection was closed before any answer; on one that was idle, that is nobody's fault."""


class _Connection(HTTPConnection):
    response_class = BoundedResponse


class _TlsConnection(HTTPSConnection):
    response_class = BoundedResponse


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection

    def _validate_conn(self, conn: Any) -> None:
        """Connect, and do not warn where certificates are not checked: that was told once."""
        if conn.is_closed:
            conn.connect()


_POOLS = {"http": _Pool, "https": _TlsPool}


class _Adapter(HTTPAdapter):
    """One connection; certificates checked as its context says."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
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
        self._settings = settings
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.mount(f"{origin.scheme}://", _Adapter(context))
        self._prepared: tuple[str, requests.PreparedRequest] | None = None
        self._response: requests.Response | None = None

    def ask(
        self, url: str, headers: Mapping[str, str], proxies: dict[str, str]
    ) -> tuple[int, Mapping[str, str]]:
        """GET `url` and return status and headers; `receive` gives the body.

        Raises:
            ClosedEarly: transient.
            FetchError: transient: nobody answered.
            SourceError: TLS failed, or the URL is none.
        """
        try:
            if self._prepared is None or self._prepared[0] != url:
                self._prepared = (url, requests.Request("GET", url).prepare())
            request = self._prepared[1].copy()
            request.headers = CaseInsensitiveDict(self._headers)
            request.headers.update(headers)
            request.headers["Accept-Encoding"] = "identity"
            request.headers["User-Agent"] = f"lazyfs/{__version__}"
            self._response = self._session.send(
                request,
                stream=True,
                timeout=(self._settings.connect_timeout_s, self._settings.stall_timeout_s),
                proxies=proxies,
                allow_redirects=False,
            )
        except _FOREIGN_ERRORS as error:
            raise _translated(error, url, self._settings) from None
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
        return piece

    def close(self) -> None:
        """Close the connection, whatever is under way."""
        if self._response is not None:
            self._response.close()
        self._session.close()


def environment_proxies(origin: Origin, url: str) -> dict[str, str]:
    """Return the proxies that the environment names for `url`; this machine needs none."""
    return {} if is_loopback(origin.host) else get_environ_proxies(url)


def context_for(tls: TlsConfig) -> ssl.SSLContext:
    """Return a context that trusts what this machine trusts, and does what `tls` says.

    Some 10 ms: once for many connections.

    Raises:
        SourceError: a file that `tls` names is of no use.
    """
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and paths.capath is None:
        context.load_verify_locations(requests.certs.where())  # a machine without a trust store
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
            return FetchError(
                f"{who}: the proxy on the way answered {found[1]} to a tunnel",
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


def _tls_error(error: ssl.SSLError, who: str) -> LazyfsError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return SourceError(
            f"{who}: its TLS certificate is not trusted ({error.verify_message}); if it should "
            "be, add its authority to this machine's trust store or name it in SSL_CERT_FILE"
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError):
        return FetchError(f"{who} closed the connection while TLS was set up", transient=True)
    hint = ""
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        hint = "; if it speaks plain HTTP, say so: --plain-http"
    return SourceError(f"{who}: TLS failed ({error.reason or 'unknown reason'}){hint}")

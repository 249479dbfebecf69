"""What each fault of the weather looks like on the wire; `weather.py` decides when.

A request is relayed to the registry over a connection of the client connection's own, and the
answer's body streamed back in pieces. A fault is a function of the `_Exchange` in the place of
that; it counts itself once it has happened.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from .weather import Fault

if TYPE_CHECKING:
    from .weather import Weather

_PIECE_BYTES = 64 * 1024
_DRIP_BYTES, _DRIP_S = 512, 0.05
_UPSTREAM_TIMEOUT_S = 20
_STORM = (500, 502, 503, 504)
_TOKEN_PATH = "/weather/token"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_ALWAYS_CLOSED = (ConnectionError, TimeoutError, http.client.HTTPException, OSError)


def handler_of(weather: Weather, is_store: bool) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests to the registry's port, or to the store's."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 120

        def setup(self) -> None:
            super().setup()
            weather.admit(self.connection)
            self.upstream = http.client.HTTPConnection(
                weather.upstream, timeout=_UPSTREAM_TIMEOUT_S
            )

        def do_GET(self) -> None:
            exchange = _Exchange(weather, self, self.upstream)
            try:
                _answer(exchange, is_store)
            except _ALWAYS_CLOSED:
                self.close_connection = True  # the client, or the registry, has gone away
                self.upstream.close()
            except Exception:  # noqa: BLE001 - a bug here must not pass for weather
                weather.confess(traceback.format_exc())
                self.close_connection = True
                self.upstream.close()

        do_HEAD = do_GET  # noqa: N815 - as the base class wants it

        def finish(self) -> None:
            weather.dismiss(self.connection)
            self.upstream.close()
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@dataclass
class _Exchange:
    """One request, and the means to answer it."""

    weather: Weather
    handler: BaseHTTPRequestHandler
    upstream: http.client.HTTPConnection

    @property
    def path(self) -> str:
        return urlsplit(self.handler.path).path

    @property
    def blob(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def token(self) -> str:
        return self.handler.headers.get("Authorization", "").partition(" ")[2]

    @property
    def signature(self) -> str:
        query = parse_qs(urlsplit(self.handler.path).query)
        return query.get("signature", [""])[0]

    @property
    def is_blob(self) -> bool:
        return self.handler.command == "GET" and "/blobs/" in self.path

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte that are asked for."""
        found = _RANGE.fullmatch(self.handler.headers.get("Range", ""))
        return (int(found[1]), int(found[2])) if found else None

    def ask(self, byte_range: tuple[int, int] | None) -> http.client.HTTPResponse:
        """Ask the registry itself; its body must be read to the end, or the connection closed."""
        kept = {
            name: value
            for name, value in self.handler.headers.items()
            if name.lower() not in ("host", "authorization", "range", "connection")
        }
        if byte_range is not None:
            kept["Range"] = f"bytes={byte_range[0]}-{byte_range[1]}"
        for is_last in (False, True):
            try:
                self.upstream.request(self.handler.command, self.path, headers=kept)
                return self.upstream.getresponse()
            except (ConnectionError, http.client.HTTPException):
                self.upstream.close()  # it was closed while idle
                if is_last:
                    raise
        raise AssertionError

    def head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name, value)
        self.handler.send_header("Content-Length", str(length))
        self.handler.end_headers()

    def say(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"{}") -> None:
        """Answer by oneself."""
        self.head(status, {"Content-Type": "application/json"} | (headers or {}), len(body))
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body)

    def relay(
        self,
        answer: http.client.HTTPResponse,
        meddle: Callable[[int, bytes], bytes] | None = None,
        changed: dict[str, str] | None = None,
    ) -> None:
        """Send an answer on; `meddle` gets offsets and pieces and gives what is sent instead."""
        headers = {
            name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP
        }
        length = int(answer.getheader("Content-Length") or 0)
        self.head(answer.status, headers | (changed or {}), length)
        at = 0
        for piece in _pieces(answer):
            sent = meddle(at, piece) if meddle is not None else piece
            at += len(piece)
            self.send(sent)

    def send(self, piece: bytes) -> None:
        self.handler.wfile.write(piece)
        if self.is_blob:
            self.weather.note_sent(self.blob, len(piece))

    def reset(self) -> None:
        """Close with a RST, as a dying host or a firewall does."""
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.connection.close()
        raise ConnectionResetError

    def close(self) -> None:
        """Close in good order, in the middle of whatever it is."""
        with contextlib.suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError

    def hold(self) -> None:
        self.weather.hold(self.weather.forecast.stall_s, self.handler.connection)


def _pieces(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    while piece := answer.read(_PIECE_BYTES):
        yield piece


def _answer(exchange: _Exchange, is_store: bool) -> None:
    weather = exchange.weather
    if exchange.path == _TOKEN_PATH:
        life_s = int(max(1, weather.token_life_s or 60))
        reply = {"token": weather.new_pass(life_s), "expires_in": life_s}
        exchange.say(200, body=json.dumps(reply).encode())
        return
    if is_store:
        if not _is_signed(exchange):
            return
    elif weather.token_life_s is not None and not _is_admitted(exchange):
        return
    if exchange.is_blob and weather.url_life_s is not None and not is_store:
        signature = weather.new_pass(weather.url_life_s)
        target = f"http://{weather.store_address}{exchange.path}?signature={signature}"
        exchange.say(307, {"Location": target})
        return
    fault = weather.draw() if exchange.is_blob else None
    if fault is None:
        exchange.relay(exchange.ask(exchange.range))
    else:
        _FAULTS[fault](exchange)


def _is_admitted(exchange: _Exchange) -> bool:
    weather = exchange.weather
    known = weather.knows_pass(exchange.token)
    if known:
        return True
    if known is False:
        weather.count(Fault.TOKEN_EXPIRED)
    _challenge(exchange)
    return False


def _challenge(exchange: _Exchange) -> None:
    realm = f'Bearer realm="http://{exchange.weather.address}{_TOKEN_PATH}",service="weather"'
    exchange.say(401, {"WWW-Authenticate": realm})


def _is_signed(exchange: _Exchange) -> bool:
    if exchange.weather.knows_pass(exchange.signature):
        return True
    exchange.weather.count(Fault.URL_EXPIRED)
    exchange.say((401, 403, 410)[exchange.weather.pick(3)])
    return False


# -- the faults -------------------------------------------------------------------------------

_FAULTS: dict[Fault, Callable[[_Exchange], None]] = {}


def _fault(
    fault: Fault,
) -> Callable[[Callable[[_Exchange], None]], Callable[[_Exchange], None]]:
    """Let a function be what happens; it is counted when it begins."""

    def add(act: Callable[[_Exchange], None]) -> Callable[[_Exchange], None]:
        def counted(exchange: _Exchange) -> None:
            exchange.weather.count(fault)
            act(exchange)

        _FAULTS[fault] = counted
        return act

    return add


@_fault(Fault.RESET_BEFORE)
def _reset_before(exchange: _Exchange) -> None:
    exchange.reset()


@_fault(Fault.RESET_MIDWAY)
def _reset_midway(exchange: _Exchange) -> None:
    _break_off(exchange, exchange.reset)


@_fault(Fault.TRUNCATED)
def _truncated(exchange: _Exchange) -> None:
    """All that was promised does not come, and the connection ends as if it had."""
    _break_off(exchange, exchange.close)


def _break_off(exchange: _Exchange, end: Callable[[], None]) -> None:
    answer = exchange.ask(exchange.range)
    stop = exchange.weather.pick(int(answer.getheader("Content-Length") or 0))

    def cut(at: int, piece: bytes) -> bytes:
        if at + len(piece) > stop:
            exchange.send(piece[: stop - at])
            end()
        return piece

    exchange.relay(answer, cut)


@_fault(Fault.STALL_BEFORE)
def _stall_before(exchange: _Exchange) -> None:
    exchange.hold()
    exchange.relay(exchange.ask(exchange.range))


@_fault(Fault.STALL_MIDWAY)
def _stall_midway(exchange: _Exchange) -> None:
    answer = exchange.ask(exchange.range)
    stop = exchange.weather.pick(int(answer.getheader("Content-Length") or 0))

    def hold(at: int, piece: bytes) -> bytes:
        if not at <= stop < at + len(piece):
            return piece
        exchange.send(piece[: stop - at])
        exchange.hold()
        return piece[stop - at :]

    exchange.relay(answer, hold)


@_fault(Fault.DRIP)
def _drip(exchange: _Exchange) -> None:
    """A few bytes at a time; after a stall's time, or when it clears up, all the rest."""
    left = int(exchange.weather.forecast.stall_s / _DRIP_S)
    forecast = exchange.weather.forecast

    def drip(_at: int, piece: bytes) -> bytes:
        nonlocal left
        while left > 0 and piece and exchange.weather.forecast is forecast:
            exchange.send(piece[:_DRIP_BYTES])
            piece = piece[_DRIP_BYTES:]
            exchange.weather.hold(_DRIP_S, exchange.handler.connection)
            left -= 1
        return piece

    exchange.relay(exchange.ask(exchange.range), drip)


@_fault(Fault.STORM)
def _storm(exchange: _Exchange) -> None:
    exchange.say(_STORM[exchange.weather.pick(len(_STORM))])


@_fault(Fault.BUSY)
def _busy(exchange: _Exchange) -> None:
    exchange.say(429, {"Retry-After": "1"})


@_fault(Fault.GARBAGE)
def _garbage(exchange: _Exchange) -> None:
    """Bytes where a status line should be, or a header that has no end."""
    noise = bytes(exchange.weather.pick(256) for _ in range(400))
    start = (b"", b"HTTP/1.1 206 Partial Content\r\n", b"HTTP/1.1 ")[exchange.weather.pick(3)]
    exchange.handler.wfile.write(start + noise)
    exchange.close()


def _token_expired(exchange: _Exchange) -> None:
    """The request's token is revoked, before its time."""
    if exchange.weather.revoke(exchange.token):
        exchange.weather.count(Fault.TOKEN_EXPIRED)
        _challenge(exchange)
    else:
        exchange.relay(exchange.ask(exchange.range))


def _url_expired(exchange: _Exchange) -> None:
    if exchange.weather.revoke(exchange.signature):
        exchange.weather.count(Fault.URL_EXPIRED)
        exchange.say((401, 403, 410)[exchange.weather.pick(3)])
    else:
        exchange.relay(exchange.ask(exchange.range))


_FAULTS |= {Fault.TOKEN_EXPIRED: _token_expired, Fault.URL_EXPIRED: _url_expired}


@_fault(Fault.SHIFTED_RANGE)
def _shifted_range(exchange: _Exchange) -> None:
    """Bytes from elsewhere, and a Content-Range that says so."""
    exchange.relay(exchange.ask(_elsewhere(exchange)))


@_fault(Fault.WRONG_BYTES)
def _wrong_bytes(exchange: _Exchange) -> None:
    """Bytes from elsewhere under the header of those that were asked for."""
    wanted = exchange.range
    answer = exchange.ask(_elsewhere(exchange))
    total = (answer.getheader("Content-Range") or "/*").partition("/")[2]
    said = f"bytes {wanted[0]}-{wanted[1]}/{total}" if wanted else ""
    exchange.relay(answer, changed={"Content-Range": said})


def _elsewhere(exchange: _Exchange) -> tuple[int, int] | None:
    """Return a range as long as the one that was asked for, beside it."""
    wanted = exchange.range
    if wanted is None:
        return None
    first, last = wanted
    shift = 1 + exchange.weather.pick(4096)
    return (first - shift, last - shift) if first >= shift else (first + shift, last + shift)


@_fault(Fault.WHOLE_BODY)
def _whole_body(exchange: _Exchange) -> None:
    exchange.relay(exchange.ask(None))


@_fault(Fault.FLIPPED_BITS)
def _flipped_bits(exchange: _Exchange) -> None:
    answer = exchange.ask(exchange.range)
    stop = exchange.weather.pick(int(answer.getheader("Content-Length") or 0))
    bit = 1 << exchange.weather.pick(8)

    def flip(at: int, piece: bytes) -> bytes:
        if not at <= stop < at + len(piece):
            return piece
        flipped = bytearray(piece)
        flipped[stop - at] ^= bit
        return bytes(flipped)

    exchange.relay(answer, flip)

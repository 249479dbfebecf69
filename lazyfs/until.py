"""When a recording is over: what `--until` names, looked at gently.

Whoever started the work looks: the process that keeps a restore, or for a mount one of the user's
that is forked beside the daemon. Nothing here blocks for long, and only light things are imported:
it is used between forks.
"""

import math
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePath
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from lazyfs.ground.errors import UsageError

FORMS = "port:[HOST:]PORT, http://HOST:PORT/PATH, exec:COMMAND, SECONDS"
_HTTP_PORT = 80
_TRY_S = 10.0
"""For one try."""
_PAUSE_FIRST_S = 0.05
_PAUSE_MOST_S = 0.5
_SECONDS_MOST = 24 * 3600.0
_HEAD_BYTES = 12
"""`HTTP/1.1 200`. Source: RFC 9112, section 4."""
_ADDRESSES_MOST = 8
_Lookup = Callable[..., Sequence[Any]]
"""As `socket.getaddrinfo`."""


class Check(Protocol):
    """One look after the other, until it is so."""

    def poll(self) -> str | None:
        """Return how it came to be, once it is; never waits."""

    def close(self) -> None:
        """Look no more."""


class Until(msgspec.Struct, frozen=True):
    """What a recording lasts until."""

    text: str
    """As it was given."""

    @property
    def name(self) -> str:
        """What others may read: what follows a command's name, or a URL's port, may be secret."""
        kind, _, rest = self.text.partition(":")
        if kind == "exec":
            return f"{PurePath(_words(rest)[0]).name} succeeded"
        if kind == "port":
            return f"port {_host_and_port(rest, self.text)[1]} answered"
        if kind == "http":
            return f"port {urlsplit(self.text).port or _HTTP_PORT} answered over HTTP"
        return f"{float(self.text):g} s passed"

    @property
    def least_s(self) -> float:
        """How long it takes at least."""
        return 0.0 if ":" in self.text else float(self.text)

    def begin(self, lookup: _Lookup = socket.getaddrinfo) -> Check:
        """Begin to look; `lookup` tells the addresses of hosts."""
        kind, _, rest = self.text.partition(":")
        if kind == "exec":
            return _Tries(_Command(_words(rest)), self.name)
        if kind == "port":
            return _Tries(_Connection(lookup, *_host_and_port(rest, self.text)), self.name)
        if kind == "http":
            parts = urlsplit(self.text)
            path = parts.path + (f"?{parts.query}" if parts.query else "") or "/"
            ask = _Connection(lookup, parts.hostname or "", parts.port or _HTTP_PORT, path)
            return _Tries(ask, self.name)
        return _Pause(float(self.text), self.name)


def parse_until(text: str) -> Until:
    """Return what `--until` says.

    Raises:
        UsageError: nothing that is known.
    """
    kind, _, rest = text.partition(":")
    if kind == "exec":
        words = _words(rest)
        if not words:
            raise UsageError("--until exec: names no command: --until 'exec:curl -f localhost'")
        _check_program(words[0], text)
    elif kind == "port":
        _host_and_port(rest, text)
    elif kind == "http":
        try:
            parts = urlsplit(text)
            found = parts.hostname and (parts.port is None or parts.port > 0)
            found = found and _can_be_asked_for(parts.hostname or "")
        except ValueError:
            found = None
        if not found or not text.isascii() or any(each.isspace() for each in text):
            raise UsageError(f"--until {text}: no URL; http://localhost:8080/health is one")
    else:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= _SECONDS_MOST:
            raise UsageError(f"--until {text}: it is one of {FORMS}")
    return Until(text)


def _check_program(word: str, given: str) -> None:
    """See that there is such a program, on the PATH or where a path leads to from here."""
    try:
        found = shutil.which(word)
    except ValueError:  # a null byte
        found = None
    if found is None:
        what = "cannot be executed" if "/" in word and os.path.lexists(word) else "is not there"
        if "/" not in word:
            what = "is not on the PATH"
        raise UsageError(f"--until {given}: the program {word} {what}")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--until exec:{text} is no command: {error}") from None


def _host_and_port(text: str, given: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 1 << 16
    if not (is_port and _can_be_asked_for(host.strip("[]"))):
        raise UsageError(f"--until {given}: no port; port:8080 or port:HOST:8080 is one")
    return host.strip("[]") or "localhost", int(port)


def _can_be_asked_for(host: str) -> bool:
    """Whether a resolver takes it for a name."""
    try:
        return b"\0" not in host.encode("idna")
    except UnicodeError:
        return False


# -- the checks ------------------------------------------------------------------------------


class _Pause:
    """So many seconds."""

    def __init__(self, seconds: float, text: str) -> None:
        self._text = text
        self._end_s = time.monotonic() + seconds

    def poll(self) -> str | None:
        return self._text if time.monotonic() >= self._end_s else None

    def close(self) -> None:
        """There is nothing to close."""


class _Try(Protocol):
    """What is tried again and again."""

    def begin(self) -> None:
        """Begin a try."""

    def look(self) -> bool | None:
        """Return how it ended; None while it goes on."""

    def end(self) -> None:
        """Be rid of it."""


class _Tries:
    """Tries one after the other, with pauses that grow."""

    def __init__(self, attempt: _Try, text: str) -> None:
        self._try = attempt
        self._text = text
        self._is_on = False
        self._pause_s = _PAUSE_FIRST_S
        self._next_s = self._until_s = 0.0

    def poll(self) -> str | None:
        now_s = time.monotonic()
        if not self._is_on:
            if now_s < self._next_s:
                return None
            self._is_on, self._until_s = True, now_s + _TRY_S
            self._try.begin()
        found = self._try.look()
        if found is None and now_s < self._until_s:
            return None
        self.close()
        self._next_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _PAUSE_MOST_S)
        return self._text if found else None

    def close(self) -> None:
        self._is_on = False
        self._try.end()


class _Command:
    """A command that is to exit with 0, without a shell and without our descriptors."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        with suppress(OSError):
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def look(self) -> bool | None:
        if self._process is None:
            return False
        code = self._process.poll()
        return None if code is None else code == 0

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Connection:
    """A port that is to take a connection; and, if asked for a path, to answer well over HTTP.

    A host has several addresses, and a server may listen on any: `localhost` is ::1 first.
    """

    def __init__(self, lookup: _Lookup, host: str, port: int, path: str | None = None) -> None:
        self._lookup = lookup
        self._address = host, port
        name = f"[{host}]" if ":" in host else host
        self._ask = None
        if path is not None:
            head = f"GET {path} HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n\r\n"
            self._ask = head.encode()
        self._looking: _LookUp | None = None
        self._talks: list[_Talk] = []

    def begin(self) -> None:
        if self._looking is None or self._looking.found is not None:
            self._looking = _LookUp(partial(self._lookup, *self._address, type=socket.SOCK_STREAM))

    def look(self) -> bool | None:
        looking = self._looking
        if looking is None or looking.found is None:
            return None
        if not self._talks:
            for family, kind, number, _, address in looking.found[:_ADDRESSES_MOST]:
                with suppress(OSError):
                    link = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
                    self._talks.append(_Talk(link, address, self._ask))
        found = [talk.look() for talk in self._talks]
        if True in found:
            return True
        return None if None in found else False

    def end(self) -> None:
        for talk in self._talks:
            talk.close()
        self._talks.clear()


class _LookUp:
    """A question to whoever knows the addresses of hosts, who may take long: in a thread."""

    def __init__(self, ask: Callable[[], Sequence[Any]]) -> None:
        self.found: Sequence[Any] | None = None
        """None: there is no answer yet."""
        self._ask = ask
        threading.Thread(target=self._run, name="addresses", daemon=True).start()

    def _run(self) -> None:
        found: Sequence[Any] = ()
        try:
            with suppress(OSError):
                found = self._ask()
        finally:
            self.found = found


class _Talk:
    """One connection, and what is heard over it."""

    def __init__(self, link: socket.socket, address: Any, ask: bytes | None) -> None:
        """Begin to connect; `ask` is what to ask then."""
        self._link = link
        self._ask = ask
        self._has_asked = self._has_failed = False
        self._heard = b""
        try:
            link.connect(address)
        except BlockingIOError:
            pass
        except OSError:
            self._has_failed = True

    def look(self) -> bool | None:
        """Return whether it is answered well; None while it goes on."""
        if self._has_failed:
            return False
        poll = select.poll()
        poll.register(self._link, select.POLLIN if self._has_asked else select.POLLOUT)
        if not poll.poll(0):
            return None
        try:
            found = self._go_on()
        except OSError:
            found = False
        self._has_failed = found is False
        return found

    def close(self) -> None:
        self._link.close()

    def _go_on(self) -> bool | None:
        if self._link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return False
        if self._ask is None:
            return True
        if not self._has_asked:
            self._link.sendall(self._ask)
            self._has_asked = True
            return None
        piece = self._link.recv(_HEAD_BYTES)
        self._heard += piece
        if len(self._heard) < _HEAD_BYTES and piece:
            return None
        return self._heard.startswith(b"HTTP/1.") and self._heard[9:10] in (b"2", b"3")

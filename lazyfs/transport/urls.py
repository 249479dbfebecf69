"""What may be said of a URL, to whom it leads, and where a redirect may go. Sans-I/O."""

import ipaddress
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from lazyfs.ground.errors import SourceError

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """Who answers: credentials for one origin are never shown to another (RFC 6454)."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def origin_of(url: str) -> Origin:
    """Return whom the URL leads to.

    Raises:
        SourceError: it is not an http or https URL, or carries credentials.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        host = parts.hostname
    except (ValueError, KeyError):
        raise SourceError(f"{shown(url)} is not an http or https URL") from None
    # Libraries differ over a backslash and `%` there, and who is judged must be who is spoken to.
    is_odd = "\\" in parts.netloc or ("%" in parts.netloc and not parts.netloc.startswith("["))
    if not host or is_odd:
        raise SourceError(f"{shown(url)} names no host")
    if "@" in parts.netloc:
        raise SourceError(f"{shown(url)}: a URL with a user name or password in it is not taken")
    return Origin(parts.scheme, host, port)


def shown(url: str) -> str:
    """Return the URL as it may be shown: no user, no password, no query, no fragment."""
    bare = url.partition("?")[0].partition("#")[0]
    scheme, separator, rest = bare.partition("://")
    if not separator:
        return repr(bare.rpartition("@")[2][:200])
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"[:500]


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without port, always means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def redirect_target(url: str, location: str | None) -> str:
    """Return where a reply to `url` with this `Location` leads.

    Raises:
        SourceError: nowhere, or from https to http.
    """
    if not location:
        raise SourceError(f"{shown(url)} redirects without saying where to")
    try:
        target = urljoin(url, location.strip()).partition("#")[0]
    except ValueError:
        raise SourceError(f"{shown(url)} redirects to what is not a URL") from None
    before, after = origin_of(url), origin_of(target)
    if before.scheme == "https" and after.scheme == "http":
        raise SourceError(
            f"{shown(url)} redirects from https to plain http ({after}), which is refused"
        )
    return target

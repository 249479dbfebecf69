"""Which proxy the environment names for an origin. Sans-I/O.

HTTPS_PROXY and HTTP_PROXY by scheme, ALL_PROXY where there is none, each in large letters before
small ones, as Podman and Docker read them; NO_PROXY excepts names, addresses, networks and ports.
This machine itself is never spoken to through a proxy.

A proxy's URL may hold a password: it is in no message.

Source: golang.org/x/net, `http/httpproxy/proxy.go`, for the meaning of NO_PROXY; ALL_PROXY is
curl's.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from lazyfs.ground.errors import SourceError
from lazyfs.transport.urls import Origin, is_loopback


def proxy_for(origin: Origin, environ: Mapping[str, str]) -> str | None:
    """Return the proxy's URL, which may hold a password; None: there is no proxy on the way.

    Raises:
        SourceError: the variable's value is no proxy that can be used.
    """
    if is_loopback(origin.host):
        return None
    for variable in (f"{origin.scheme.upper()}_PROXY", "ALL_PROXY"):
        value = _variable(environ, variable)
        if value:
            if excepted(origin, _variable(environ, "NO_PROXY")):
                return None
            return _checked(variable, value)
    return None


def excepted(origin: Origin, exceptions: str) -> bool:
    """Whether NO_PROXY with this value says that no proxy is to be asked for `origin`."""
    return any(_matches(origin, item.strip().lower()) for item in exceptions.split(","))


def _variable(environ: Mapping[str, str], name: str) -> str:
    return (environ.get(name) or environ.get(name.lower()) or "").strip()


def _matches(origin: Origin, item: str) -> bool:
    if item in ("", "*"):
        return item == "*"
    host = origin.host.lower().rstrip(".")
    address = _address(host)
    if "/" in item:
        try:
            return address is not None and address in ipaddress.ip_network(item, strict=False)
        except ValueError:
            return False
    name, port = _name_and_port(item)
    if not name or (port and port != str(origin.port)):
        return False
    if (excepted_address := _address(name)) is not None:
        return address == excepted_address
    name = name.removeprefix("*")
    return host.endswith(name) if name.startswith(".") else f".{host}".endswith(f".{name}")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _name_and_port(item: str) -> tuple[str, str]:
    if item.startswith("["):
        name, _, rest = item[1:].partition("]")
        return name, rest.removeprefix(":")
    if item.count(":") > 1:  # an IPv6 address
        return item, ""
    name, _, port = item.partition(":")
    return name, port


def _checked(variable: str, value: str) -> str:
    url = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
        parts = urlsplit("")
    if usable and parts.scheme in ("http", "https"):
        return url
    if usable and parts.scheme.isalnum():
        raise SourceError(
            f"{variable} names a proxy that is spoken to by {parts.scheme[:10]}, which lazyfs "
            "does not know; http and https work"
        )
    raise SourceError(f"{variable} does not hold a proxy's URL (http://HOST:PORT)")

"""Who may lead us to this machine's own addresses: no registry from elsewhere.

A registry says where to go on: by a redirect, by the realm of its challenge. One that is not on
loopback itself must not send us to loopback, nor to the link's own addresses, where clouds keep
their metadata: what answers there trusts whoever is near, and we are. Private networks are no
matter: a registry on the premises may keep its blobs beside it.

Judged is the address that a connection has in fact, before a byte is sent on it: a name may mean
another address each time it is asked for. Through a proxy that cannot be seen; then the address
or name in the URL is judged alone.

Sources: RFC 6890 (special addresses), RFC 6761 (`localhost`); the documentation of AWS, Google
Cloud, Azure, Alibaba Cloud and Oracle Cloud for the addresses of their metadata.
"""

import ipaddress
import socket
import threading
from enum import Enum

from lazyfs.ground.errors import SourceError
from lazyfs.transport.urls import Origin

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_THIS_HOST = ipaddress.ip_network("0.0.0.0/8")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_METADATA = {
    ipaddress.ip_address(each)
    for each in ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
}
"""AWS and Google Cloud by IPv6, Alibaba Cloud, Azure (its WireServer), Oracle Cloud."""


class Near(Enum):
    """What is close to this machine alone, in words for a person."""

    LOOPBACK = "this machine's own address"
    LINK_LOCAL = "an address of this link alone, where clouds keep their metadata"


def near(host: str) -> Near | None:
    """Return what an address, or a name that has only one meaning, is; None: anything else."""
    host = host.strip("[]").partition("%")[0].rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return Near.LOOPBACK
    address = _address(host)
    if address is None:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    if address.is_loopback or address.is_unspecified or address in _THIS_HOST:
        return Near.LOOPBACK
    return Near.LINK_LOCAL if address.is_link_local or address in _METADATA else None


def _address(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))  # `127.1`, `0x7f000001`
    except (OSError, UnicodeEncodeError, ValueError):
        return None


class LocalGuard:
    """What the origins of one client have been seen to be, and so where they may lead.

    Thread-safe.
    """

    def __init__(self, *, allow: bool) -> None:
        """`allow`: a person said that anybody may lead here."""
        self._allow = allow
        self._lock = threading.Lock()
        self._seen: dict[Origin, Near | None] = {}

    def note(self, origin: Origin, peer: str) -> None:
        """Note the address that answers for `origin`; who has several is not near."""
        found = near(peer)
        with self._lock:
            if self._seen.setdefault(origin, found) != found:
                self._seen[origin] = None

    def check(self, origin: Origin, address: str, led_by: Origin | None) -> None:
        """Let a request go to `origin` at `address`, to which `led_by` leads (None: a person).

        Raises:
            SourceError: it may not.
        """
        if led_by is None or self._allow:
            return
        found = near(address)
        if found is None:
            return
        with self._lock:
            leader = self._seen[led_by] if led_by in self._seen else near(led_by.host)
        if leader != found:
            raise SourceError(
                f"{led_by} leads to {origin}, {found.value}, which is refused; if that is meant, "
                "say --allow-local-redirects"
            )

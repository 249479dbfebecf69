"""Where a repository is to be had, as a value: at its registry, or at a mirror. Sans-I/O.

Decides how what registries.conf and hosts.toml say becomes addresses in the order of asking, the
registry's own last.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import MalformedError, SourceError
from lazyfs.transport.hosts_toml import HostServer
from lazyfs.transport.registries_conf import Location, RegistryEntry, find_entry
from lazyfs.transport.tls import ClientPair, TlsConfig

_SERVED_BY = {"docker.io": "registry-1.docker.io"}
_CALLED = {server: host for host, server in _SERVED_BY.items()}


class Address(Discreet, frozen=True):
    """One repository at one server."""

    unprinted = ("headers",)
    host: str
    """As a person calls it, and logs in to it: `docker.io`, `mirror.example:5000`."""
    repository: str
    """What it is called there."""
    schemes: tuple[str, ...] = ()
    """`http`, `https`, in the order in which they are tried; empty: as the settings have it."""
    root: str = "/v2"
    """Where the server's API begins."""
    namespace: str | None = None
    """Sent as `?ns=`: the registry that the server stands in for (containerd's mirrors)."""
    tls: TlsConfig = msgspec.field(default_factory=TlsConfig)
    """What is to be done beside what holds for the host anyway."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    connect_timeout_s: float | None = None
    for_tags: bool = True
    """Whether it may say what a tag means, and who refers to what."""
    for_digests: bool = True

    @property
    def served_by(self) -> str:
        """The host and port to connect to."""
        return _SERVED_BY.get(self.host, self.host)

    @property
    def name(self) -> str:
        """`host/repository`."""
        return f"{self.host}/{self.repository}"


def addresses_by_registries_conf(
    entries: Sequence[RegistryEntry], host: str, repository: str, *, by_digest: bool
) -> list[Address] | None:
    """Return where to ask for `host/repository`; None: no entry is for it.

    A mirror for digests only is asked for the blobs of an image that is named by its tag too:
    the tag is the registry's to resolve, and all below it has digests.

    `by_digest`: whether the image is named by its digest.

    Raises:
        SourceError: the registry is blocked.
        MalformedError: a location makes no name with the repository's.
    """
    name = f"{host}/{repository}"
    entry = find_entry(entries, name)
    if entry is None:
        return None
    if entry.blocked:
        raise SourceError(
            f"{name}: registries.conf blocks the registry (prefix {entry.prefix!r}, blocked = true)"
        )
    found = []
    for mirror in entry.mirrors:
        address = _at(entry, mirror, name)
        own = find_entry(entries, address.name)
        only_tags = mirror.pull_from_mirror == "tag-only"
        if (own is None or not own.blocked) and not (only_tags and by_digest):
            found.append(address)
    return [*found, _at(entry, entry.itself, name)]


def addresses_by_hosts_toml(
    servers: Sequence[HostServer], host: str, repository: str
) -> list[Address]:
    """Return where to ask for `host/repository`, by the hosts.toml for that host."""
    found = [_server(server, host, repository) for server in servers]
    return [address for address in found if address.for_digests or address.for_tags]


def _at(entry: RegistryEntry, location: Location, name: str) -> Address:
    host, _slash, repository = entry.rewritten(name, location).partition("/")
    if not host or not repository:
        raise MalformedError(
            f"registries.conf: {location.location!r} makes no repository of {name!r}"
        )
    return Address(
        host=_CALLED.get(host, host),
        repository=repository,
        tls=TlsConfig(verify=not location.insecure),
        for_tags=location.pull_from_mirror != "digest-only",
    )


def _server(server: HostServer, host: str, repository: str) -> Address:
    own = server.host in ("", host) or _CALLED.get(server.host) == host
    there = host if own else server.host
    schemes: tuple[str, ...] = (server.scheme,) if server.scheme else ()
    if server.scheme == "http" and server.says_tls and not there.endswith(":80"):
        schemes = ("https", "http")  # what is said of TLS would be for nothing
    pulls = "pull" in server.capabilities
    return Address(
        host=there,
        repository=repository,
        schemes=schemes,
        root=server.path,
        namespace=None if own else host,
        tls=TlsConfig(
            authorities=tuple(Path(each) for each in server.ca_files),
            clients=tuple(
                ClientPair(Path(certificate), None if key == certificate else Path(key))
                for certificate, key in server.client_pairs
            ),
            verify=not server.skip_verify,
        ),
        headers=server.headers,
        connect_timeout_s=server.dial_timeout_s,
        for_tags=pulls and "resolve" in server.capabilities,
        for_digests=pulls,
    )

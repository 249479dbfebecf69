"""Certificates that a person has put down for a registry: the directories `certs.d`.

Decides which directory counts (the first there is for `HOST[:PORT]`; they are not added up), what
its files are by their names, and how far they reach: `*.crt` are authorities, trusted for the
registry and for where it leads; `NAME.cert` and `NAME.key` are shown to the registry alone. To
trust an authority for where the registry leads gives nothing away: whoever could misuse it could
as well be the registry, and lead anywhere. `verify=False` is for the registry's own host only.

Source: containers/image, `docker/docker_client.go` (`dockerCertDir`), `pkg/tlsclientconfig`;
containers-certs.d(5). There, what is set for the registry also holds wherever it leads.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from lazyfs.ground.errors import SourceError
from lazyfs.transport.tls import ClientPair, Endpoint, Endpoints, TlsConfig
from lazyfs.transport.urls import Origin, origin_of

_log = logging.getLogger(__name__)


def certs_directories(environ: Mapping[str, str]) -> list[Path]:
    """Return the directories to look into, first to last."""
    home = Path(environ.get("HOME") or "/")
    return [
        home / ".config/containers/certs.d",
        Path("/etc/containers/certs.d"),
        Path("/etc/docker/certs.d"),
    ]


def certs_for(host: str, directories: Sequence[Path]) -> TlsConfig:
    """Return what is put down for a registry by this name, `HOST[:PORT]`.

    Raises:
        SourceError: a certificate lacks its key, a key its certificate, or the directory cannot
            be read.
    """
    if not host or host in (".", "..") or "/" in host or "\0" in host:
        return TlsConfig()
    for directory in directories:
        try:
            names = sorted(path.name for path in (directory / host).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            _log.info("%s is not looked into: permission denied", directory / host)
            continue
        except OSError as error:
            raise SourceError(
                f"{directory / host} cannot be read: {error.strerror or error}"
            ) from None
        return _sorted_out(directory / host, names)
    return TlsConfig()


def registry_endpoints(
    name: str,
    *,
    served_by: str | None = None,
    own: Endpoint | None = None,
    directories: Sequence[Path],
) -> Endpoints:
    """Return how a registry, and whoever it leads to, is spoken to.

    `name` is what a person calls it, `HOST[:PORT]`; `served_by` who serves it, if that is another
    (docker.io). `own` is what is said of it elsewhere; `certs.d` adds to that. What is put down is
    read for each new connection: certificates are renewed while we run.

    Raises:
        SourceError: `served_by` is no host.
    """
    origins = {origin_of(f"{scheme}://{served_by or name}") for scheme in ("http", "https")}
    hosts = {origin.host for origin in origins}
    said = own or Endpoint()

    def endpoint(origin: Origin) -> Endpoint:
        for_registry = certs_for(name, directories)
        if origin in origins:
            return replace(said, tls=_added(said.tls, for_registry))
        there = certs_for(str(origin), directories)
        beside = TlsConfig((*said.tls.authorities, *for_registry.authorities))
        verify = said.tls.verify or origin.host not in hosts
        return Endpoint(replace(_added(beside, there), verify=verify))

    return endpoint


def _added(first: TlsConfig, second: TlsConfig) -> TlsConfig:
    return TlsConfig(
        authorities=(*first.authorities, *second.authorities),
        clients=(*first.clients, *second.clients),
        verify=first.verify and second.verify,
    )


def _sorted_out(directory: Path, names: Sequence[str]) -> TlsConfig:
    authorities, clients = [], []
    for name in names:
        path = directory / name
        if name.endswith(".crt"):
            authorities.append(path)
        elif name.endswith(".cert"):
            key = path.with_suffix(".key")
            if key.name not in names:
                raise SourceError(
                    f"the client certificate {path} has no key beside it ({key.name}); an "
                    "authority's certificate is called *.crt"
                )
            clients.append(ClientPair(path, key))
        elif name.endswith(".key") and path.with_suffix(".cert").name not in names:
            raise SourceError(f"the key {path} has no certificate beside it (*.cert)")
    return TlsConfig(tuple(authorities), tuple(clients))

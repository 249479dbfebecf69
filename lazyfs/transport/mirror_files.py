"""Which files say where mirrors are, and what they say of one repository.

Decides which of the two families counts. `auto`: registries.conf, if any entry of it is for the
repository; else the hosts.toml of containerd that is for its host; else there are no mirrors. So
a machine with both has each image pulled as the engine pulls it whose administrator wrote
something about it. Nothing is written, and nothing is kept: each opening reads anew.

registries.conf: the file that $CONTAINERS_REGISTRIES_CONF names, else
`~/.config/containers/registries.conf`, else `/etc/containers/registries.conf`; over it
`/etc/containers/registries.conf.d/*.conf` (unless it was the user's own) and
`~/.config/containers/registries.conf.d/*.conf`, each sorted by name. hosts.toml: the first
directory that there is of `HOST_PORT_`, `HOST:PORT`, `_default` in `/etc/containerd/certs.d`; one
without that file may hold certificates for the registry itself.

A registries.conf that cannot be read is an error, since it may block a registry; a hosts.toml is
gone on without, and warned of: so do the tools whose files they are.

Sources: containers/image, `pkg/sysregistriesv2`, `pkg/cli/environment`; containerd,
`core/remotes/docker/config/hosts.go`, `config_unix.go`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from lazyfs.ground.errors import MalformedError, SourceError, UsageError
from lazyfs.ground.settings import MIRRORS
from lazyfs.transport import hosts_toml, registries_conf
from lazyfs.transport.address import (
    Address,
    addresses_by_hosts_toml,
    addresses_by_registries_conf,
)
from lazyfs.transport.certs import certs_for
from lazyfs.transport.registries_conf import RegistryEntry
from lazyfs.transport.tls import TlsConfig

_log = logging.getLogger(__name__)


def find_addresses(
    host: str,
    repository: str,
    *,
    by_digest: bool,
    mirrors: str,
    environ: Mapping[str, str],
    root: Path = Path("/"),
) -> list[Address]:
    """Return where to ask for `host/repository`, first to last; the registry itself is the last.

    Args:
        host: as in the reference, with its port.
        repository: as in the reference.
        by_digest: whether the image is named by its digest.
        mirrors: one of `MIRRORS`, or the path of a registries.conf, or of a directory like
            `/etc/containerd/certs.d`.
        environ: HOME and CONTAINERS_REGISTRIES_CONF are looked at.
        root: where `etc` is.

    Raises:
        UsageError: `mirrors` is none of that, or the file that it names is not there.
        SourceError: a file cannot be read or makes no sense; the registry is blocked.
    """
    found: list[Address] | None = None
    try:
        if "/" in mirrors:
            path = Path(mirrors)
            if path.is_dir():
                found = _by_hosts_toml(path, host, repository)
            else:
                entries = _entries_of(path, must_exist=True)
                found = addresses_by_registries_conf(entries, host, repository, by_digest=by_digest)
        elif mirrors not in MIRRORS:
            raise UsageError(
                f"mirrors are {', '.join(MIRRORS)} or the path of a registries.conf or of a "
                f"directory with hosts.toml files, not {mirrors!r}"
            )
        if mirrors in ("auto", "containers"):
            entries = _read_registries_conf(environ, root)
            found = addresses_by_registries_conf(entries, host, repository, by_digest=by_digest)
        if mirrors == "containerd" or (mirrors == "auto" and found is None):
            found = _by_hosts_toml(root / "etc/containerd/certs.d", host, repository)
    except MalformedError as error:
        raise SourceError(f"{error}; or go on without mirrors: --mirrors=none") from None
    addresses = found or [Address(host, repository)]
    if len(addresses) > 1:
        _log.info("%s/%s is asked for at %s", host, repository, _listed(addresses))
    return addresses


def registries_conf_files(environ: Mapping[str, str], root: Path = Path("/")) -> list[Path]:
    """Return the files that make up registries.conf, a later one over those before it."""
    config = Path(environ.get("HOME") or "/") / ".config/containers"
    system = root / "etc/containers"
    named = environ.get("CONTAINERS_REGISTRIES_CONF")
    main = Path(named) if named else config / "registries.conf"
    directories = [system / "registries.conf.d", config / "registries.conf.d"]
    if not named:
        if main.exists():
            del directories[0]
        else:
            main = system / "registries.conf"
    found = [main]
    for directory in directories:
        try:
            names = sorted(path.name for path in directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise SourceError(f"{directory} cannot be read: {error.strerror or error}") from error
        paths = [directory / name for name in names if name.endswith(".conf")]
        found += [path for path in paths if not path.is_dir()]
    return found


def _read_registries_conf(environ: Mapping[str, str], root: Path) -> tuple[RegistryEntry, ...]:
    files = registries_conf_files(environ, root)
    named = bool(environ.get("CONTAINERS_REGISTRIES_CONF"))
    return registries_conf.merge(
        _entries_of(path, must_exist=named and path is files[0]) for path in files
    )


def _entries_of(path: Path, *, must_exist: bool) -> tuple[RegistryEntry, ...]:
    text = _read(path, registries_conf.SIZE_LIMIT_BYTES)
    if text is None:
        if must_exist:
            raise UsageError(f"{path}, which should say where mirrors are, does not exist")
        return ()
    return registries_conf.parse_registries_conf(text, str(path))


def _by_hosts_toml(directory: Path, host: str, repository: str) -> list[Address] | None:
    name, colon, port = host.rpartition(":")
    names = [f"{name}_{port}_"] if colon and port.isdecimal() else []
    home = next(
        (directory / each for each in (*names, host, "_default") if (directory / each).exists()),
        None,
    )
    if home is None:
        return None
    path = home / "hosts.toml"
    try:
        text = _read(path, hosts_toml.SIZE_LIMIT_BYTES)
        if not text:
            tls = certs_for(home.name, [directory])
            return None if tls == TlsConfig() else [Address(host, repository, tls=tls)]
        servers = hosts_toml.parse_hosts_toml(text, str(path), str(home.absolute()))
    except (MalformedError, SourceError) as error:
        _log.warning("%s is asked without mirrors: %s", host, error)
        return None
    return addresses_by_hosts_toml(servers, host, repository)


def _read(path: Path, limit_bytes: int) -> str | None:
    """Return a file's text; None if there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > limit_bytes:
        raise MalformedError(f"{path} has more than {limit_bytes} bytes: that is no such file")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise MalformedError(f"{path} is not UTF-8") from None


def _listed(addresses: list[Address]) -> str:
    return ", ".join(address.name for address in addresses)

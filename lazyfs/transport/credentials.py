"""User names and passwords as Podman and Docker keep them: the `auths` of their auth files.

Files in the order that containers/image has (`pkg/docker/config`): one that is named, by
`--authfile` or $REGISTRY_AUTH_FILE, stands alone. Within a file the longest path wins:
`host/a/b`, `host/a`, `host`. Read anew each time: a person may log in while we run.

What `auths` does not hold, `credHelpers` and `credsStore` might: a lookup of theirs belongs in
`_in_file`, before and after `auths`.
"""

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lazyfs.ground.errors import SourceError

_FILE_LIMIT_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and a password, and the file they are from. Its repr tells only the last."""

    username: str = field(repr=False)
    password: str = field(repr=False)
    source: Path

    def basic(self) -> str:
        """Return the `Authorization` header's value (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""


class _AuthFile(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry] = {}


def auth_files(authfile: Path | None, environ: Mapping[str, str]) -> list[Path]:
    """Return the files to look into, first to last; those that must exist, alone."""
    named = authfile or environ.get("REGISTRY_AUTH_FILE")
    if named:
        return [Path(named)]
    home = Path(environ.get("HOME") or "/")
    runtime = environ.get("XDG_RUNTIME_DIR")
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    docker = Path(environ.get("DOCKER_CONFIG") or home / ".docker")
    return [
        Path(runtime or f"/run/containers/{os.getuid()}")
        / ("containers/auth.json" if runtime else "auth.json"),
        config / "containers/auth.json",
        docker / "config.json",
        home / ".dockercfg",
    ]


def find_credentials(
    host: str, repository: str, *, authfile: Path | None, environ: Mapping[str, str]
) -> Credentials | None:
    """Return the credentials for `host/repository`; None: ask anonymously.

    Raises:
        SourceError: a file cannot be read, or is not an auth file.
    """
    for path in auth_files(authfile, environ):
        try:
            with path.open("rb") as file:
                data = file.read(_FILE_LIMIT_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            if authfile is not None:
                raise SourceError(f"the auth file {path} does not exist") from error
            continue
        except OSError as error:
            raise SourceError(
                f"the auth file {path} cannot be read: {error.strerror or error}"
            ) from error
        found = _in_file(path, data, host, repository)
        if found is not None:
            return found
    return None


def _in_file(path: Path, data: bytes, host: str, repository: str) -> Credentials | None:
    auths = _parse(path, data)
    names = [host]
    for part in repository.split("/"):
        names.append(f"{names[-1]}/{part}")
    for name in reversed(names):
        entry = auths.get(name)
        if entry is not None and (found := _credentials(path, name, entry)) is not None:
            return found
    by_host = {_host_of(key): entry for key, entry in auths.items()}
    entry = by_host.get(_host_of(host))
    return None if entry is None else _credentials(path, host, entry)


def _parse(path: Path, data: bytes) -> Mapping[str, _Entry]:
    if not data.strip():
        return {}
    try:
        if path.name == ".dockercfg":
            return msgspec.json.decode(data, type=dict[str, _Entry])
        return msgspec.json.decode(data, type=_AuthFile).auths
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise SourceError(f"{path} is not an auth file: log in anew to have it rewritten") from None


def _host_of(key: str) -> str:
    """Return the host that an old key means: `https://index.docker.io/v1/` is docker.io."""
    _scheme, separator, rest = key.partition("://")
    host, slash, path = (rest if separator else key).partition("/")
    if slash and path.strip("/") not in ("v1", "v2", ""):
        return key  # a repository's, not a host's
    host = host.lower()
    return "docker.io" if host in ("index.docker.io", "registry-1.docker.io") else host


def _credentials(path: Path, name: str, entry: _Entry) -> Credentials | None:
    if entry.username and entry.password:
        return Credentials(entry.username, entry.password, path)
    if not entry.auth:
        return None
    try:
        pair = base64.b64decode(entry.auth, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        pair = ""
    username, colon, password = pair.partition(":")
    if not colon:
        raise SourceError(f"{path}: the entry of {name} cannot be read; log in anew")
    return Credentials(username, password.rstrip("\0"), path) if password else None

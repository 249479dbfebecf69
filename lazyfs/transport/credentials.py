"""Credentials as Podman and Docker keep them: auth files, and the helpers that these name.

Files in the order that containers/image has (`pkg/docker/config`): one that is named, by
`--authfile` or $REGISTRY_AUTH_FILE, stands alone. Within a file the registry's own helper
(`credHelpers`) is the last word; else `auths`, where the longest path wins (`host/a/b`, `host/a`,
`host`); else the helper for all registries (`credsStore`). Read, and asked, anew each time: a
person may log in while we run.

Source: containers-auth.json(5); docker/cli, `cli/config/configfile`.
"""

import base64
import binascii
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import SourceError
from lazyfs.transport.helpers import HelperAnswer, NoHelper, ask_helper

_log = logging.getLogger(__name__)

_FILE_LIMIT_BYTES = 4 * 1024 * 1024
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
"""As docker/cli calls it, in files and to helpers."""

AskHelper = Callable[[str, str], HelperAnswer | None]
"""`ask_helper` as far as name and server."""


class Credentials(Discreet, frozen=True):
    """What a registry or its token server is shown. The repr tells only where it is from."""

    unprinted = ("username", "password", "identity_token", "registry_token")
    username: str
    password: str
    source: Path | str
    """The file, or the helper."""
    identity_token: str = ""
    """An OAuth2 refresh token, for the token server."""
    registry_token: str = ""
    """A bearer token for the registry itself."""

    def basic(self) -> str | None:
        """Return the `Authorization` header's value (RFC 7617), if there is a password."""
        if not self.password:
            return None
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"


class _Entry(msgspec.Struct, frozen=True):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identity_token: str | None = msgspec.field(default=None, name="identitytoken")
    registry_token: str | None = msgspec.field(default=None, name="registrytoken")


class _AuthFile(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry | None] | None = None
    helpers: dict[str, str] | None = msgspec.field(default=None, name="credHelpers")
    store: str | None = msgspec.field(default=None, name="credsStore")


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
    host: str,
    repository: str,
    *,
    authfile: Path | None,
    environ: Mapping[str, str],
    ask: AskHelper | None = None,
) -> Credentials | None:
    """Return the credentials for `host/repository`; None: ask anonymously.

    May run a helper, and block for as long as that takes.

    Raises:
        SourceError: a file cannot be read, or is not an auth file.
        NoHelper: a helper that is named for this registry is not there.
        HelperError: a helper failed.
    """
    if ask is None:
        ask = _asking_by(environ)
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
        found = credentials_in(data, path, host, repository, ask)
        if found is not None:
            return found
    return None


def _asking_by(environ: Mapping[str, str]) -> AskHelper:
    return lambda name, server: ask_helper(name, server, environ=environ)


def credentials_in(
    data: bytes, path: Path, host: str, repository: str, ask: AskHelper
) -> Credentials | None:
    """Return what a file's bytes say about `host/repository`, and the helpers that they name.

    Raises:
        SourceError: they are no auth file's.
    """
    parsed = _parse(path, data)
    helpers = parsed.helpers or {}
    servers = _servers(host)
    for server in servers:
        helper = helpers.get(server)
        if helper:
            return _from_helper(path, helper, [server], ask)
    auths = parsed.auths or {}
    names = [host]
    for part in repository.split("/"):
        names.append(f"{names[-1]}/{part}")
    by_host = {_host_of(key): key for key in auths}
    keys = [name for name in reversed(names) if name in auths]
    if (same_host := by_host.get(_host_of(host))) is not None:
        keys.append(same_host)
    for key in keys:
        entry = auths[key]
        if entry is not None and (found := _credentials(path, key, entry)) is not None:
            return found
    if not parsed.store:
        return None
    try:
        return _from_helper(path, parsed.store, servers, ask)
    except NoHelper as error:
        if keys:
            raise  # there is an empty entry: who logged in is known to the helper alone
        _log.info("%s; %s is asked without credentials", error, host)
        return None


def _servers(host: str) -> list[str]:
    """Return by what names a helper may know a registry."""
    return [_DOCKER_HUB_KEY, *_DOCKER_HUB] if host in _DOCKER_HUB else [host]


def _from_helper(
    path: Path, helper: str, servers: Iterable[str], ask: AskHelper
) -> Credentials | None:
    for server in servers:
        try:
            answer = ask(helper, server)
        except NoHelper as error:
            raise NoHelper(f"{error}, though {path} names it: install it, or log in anew") from None
        if answer is None:
            continue
        source = f"docker-credential-{helper} (named in {path})"
        if answer.is_identity_token:
            return Credentials("", "", source, identity_token=answer.secret)
        return Credentials(answer.username, answer.secret, source)
    return None


def _parse(path: Path, data: bytes) -> _AuthFile:
    if not data.strip():
        return _AuthFile()
    try:
        if path.name == ".dockercfg":
            return _AuthFile(msgspec.json.decode(data, type=dict[str, _Entry | None]))
        return msgspec.json.decode(data, type=_AuthFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise SourceError(f"{path} is not an auth file: log in anew to have it rewritten") from None


def _host_of(key: str) -> str:
    """Return the host that an old key means: `https://index.docker.io/v1/` is docker.io."""
    _scheme, separator, rest = key.partition("://")
    host, slash, path = (rest if separator else key).partition("/")
    if slash and path.strip("/") not in ("v1", "v2", ""):
        return key  # a repository's, not a host's
    host = host.lower()
    return "docker.io" if host in _DOCKER_HUB else host


def _credentials(path: Path, name: str, entry: _Entry) -> Credentials | None:
    username, password = entry.username or "", entry.password or ""
    if entry.auth and not (username and password):
        try:
            pair = base64.b64decode(entry.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            pair = ""
        username, colon, password = pair.partition(":")
        if not colon:
            raise SourceError(f"{path}: the entry of {name} cannot be read; log in anew")
        password = password.strip("\0")
    found = Credentials(
        username, password, path, entry.identity_token or "", entry.registry_token or ""
    )
    if not (found.password or found.identity_token or found.registry_token):
        return None
    return found

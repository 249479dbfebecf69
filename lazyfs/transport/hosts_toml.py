"""hosts.toml: which servers containerd asks for a registry's images. Sans-I/O.

Decides what the text of one `certs.d/HOST/hosts.toml` means: servers in the order of the file,
the registry's own (`server`) last. Which file is read is `mirror_files.py`'s.

Sources: containerd, docs/hosts.md; `core/remotes/docker/config/hosts.go`. There, too, tables
without `[host."URL"]` headings of their own do not count as servers.
"""

import posixpath
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import MalformedError

SIZE_LIMIT_BYTES = 1024 * 1024

_SERVERS_MOST = 1000
_CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]{0,8192}")
_DURATION = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{0,12})?(?:ns|us|µs|μs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9.]+)(ns|us|µs|μs|ms|s|m|h)")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}


class HostServer(Discreet, frozen=True):
    """One server of a hosts.toml. Its repr tells no headers: credentials may be in them."""

    unprinted = ("headers",)
    scheme: str
    """`http`, `https`; empty, like `host`, where the file does not name the registry's own."""
    host: str
    path: str
    """Of the API's root: `/v2`, or whatever override_path makes of the URL's."""
    capabilities: frozenset[str] = _CAPABILITIES
    ca_files: tuple[str, ...] = ()
    client_pairs: tuple[tuple[str, str], ...] = ()
    """Files of certificate and key; the same one twice where both are in it."""
    skip_verify: bool | None = None
    """None: the file does not say."""
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)
    dial_timeout_s: float | None = None

    @property
    def says_tls(self) -> bool:
        """Whether the file has anything to say of its TLS."""
        return bool(self.ca_files or self.client_pairs) or self.skip_verify is not None


def parse_hosts_toml(text: str, name: str, directory: str) -> tuple[HostServer, ...]:
    """Read the file called `name`, whose relative paths begin in `directory`.

    Never empty: the last is the registry's own server.

    Raises:
        MalformedError: it is not TOML, or says something that makes no sense.
    """
    import tomllib  # only where there is such a file: it is 3 ms of a start

    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{name} is not TOML: {str(error)[:200]}") from None
    tables = document.get("host", {})
    if not isinstance(tables, dict) or not all(isinstance(each, dict) for each in tables.values()):
        raise MalformedError(f'{name}: host is not a table of tables; write [host."https://…"]')
    if len(tables) > _SERVERS_MOST:
        raise MalformedError(f"{name} has more than {_SERVERS_MOST} hosts")
    servers = []
    for url, table in tables.items():
        if not url:
            raise MalformedError(f"{name}: a host without a URL")
        servers.append(_server(url, table, name, directory))
    server = document.get("server", "")
    if not isinstance(server, str):
        raise MalformedError(f"{name}: server is not a string")
    servers.append(_server(server, document, name, directory))
    return tuple(servers)


def _server(url: str, table: Mapping[str, Any], name: str, directory: str) -> HostServer:
    override = table.get("override_path", False)
    if not isinstance(override, bool):
        raise MalformedError(f"{name}: override_path is neither true nor false")
    scheme, host, path = _address(url, override, name) if url else ("", "", "/v2")
    verify = table.get("skip_verify")
    if verify is not None and not isinstance(verify, bool):
        raise MalformedError(f"{name}: skip_verify is neither true nor false")
    return HostServer(
        scheme=scheme,
        host=host,
        path=path,
        capabilities=_capabilities(table.get("capabilities"), name),
        ca_files=_files(table.get("ca"), "ca", name, directory),
        client_pairs=_pairs(table.get("client"), name, directory),
        skip_verify=verify,
        headers=_headers(table.get("header"), name),
        dial_timeout_s=_duration_s(table.get("dial_timeout"), name),
    )


def _address(url: str, override: bool, name: str) -> tuple[str, str, str]:
    whole = url if url.startswith("http") else f"https://{url}"
    try:
        parts = urlsplit(whole)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if not host or parts.scheme not in ("http", "https") or re.search(r"[\x00-\x20\x7f]", whole):
        raise MalformedError(f"{name}: a server whose URL makes no sense")
    if "@" in parts.netloc:
        raise MalformedError(
            f"{name}: the URL of {host} has a user name or password in it, which is not taken; "
            f"log in with `podman login {host}`"
        )
    if parts.query or parts.fragment:
        raise MalformedError(f"{name}: the URL of {host} has a query or a fragment")
    path = _clean(parts.path)
    if not override and not path.endswith("/v2"):
        path += "/v2"
    return parts.scheme, parts.netloc, path


def _clean(path: str) -> str:
    """Return the path without `.`, `..` and doubled slashes; empty for the root."""
    return posixpath.normpath("/" + path.lstrip("/")).rstrip("/") if path else ""


def _capabilities(value: object, name: str) -> frozenset[str]:
    if value is None or value == []:
        return _CAPABILITIES
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise MalformedError(f"{name}: capabilities is not a list of strings")
    found = frozenset(each.lower() for each in value)
    if found - _CAPABILITIES:
        raise MalformedError(
            f"{name}: {min(found - _CAPABILITIES)[:50]!r} is no capability; there are "
            f"{', '.join(sorted(_CAPABILITIES))}"
        )
    return found


def _files(value: object, key: str, name: str, directory: str) -> tuple[str, ...]:
    paths = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(paths, list) or not all(isinstance(each, str) and each for each in paths):
        raise MalformedError(f"{name}: {key} is neither a file nor a list of files")
    return tuple(posixpath.join(directory, each) for each in paths)


def _pairs(value: object, name: str, directory: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        files = _files(each, "client", name, directory)
        if len(files) != (2 if isinstance(each, list) else 1):
            raise MalformedError(f"{name}: client is not a file, or [certificate, key]")
        pairs.append((files[0], files[-1]))
    return tuple(pairs)


def _headers(value: object, name: str) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise MalformedError(f"{name}: header is not a table")
    found = {}
    for key, said in value.items():
        lines = [said] if isinstance(said, str) else said
        if not isinstance(lines, list) or not all(isinstance(each, str) for each in lines):
            raise MalformedError(f"{name}: the header {key[:50]!r} is no string")
        if not _HEADER_NAME.fullmatch(key) or not all(map(_HEADER_VALUE.fullmatch, lines)):
            raise MalformedError(f"{name}: the header {key[:50]!r} cannot be sent")
        found[key] = ", ".join(lines)
    return found


def _duration_s(value: object, name: str) -> float | None:
    """Read a duration as Go writes it: `1m30s`, `300ms`; None, or nothing said: no such wish."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not _DURATION.fullmatch(value):
        raise MalformedError(f"{name}: dial_timeout is no duration such as 3s or 500ms")
    seconds = sum(float(n) * _UNIT_S[unit] for n, unit in _DURATION_PART.findall(value))
    return seconds or None

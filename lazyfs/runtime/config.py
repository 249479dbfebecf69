"""What an administrator has decided about restores of stubs: /etc/lazyfs/runtime.toml.

Decides what may stand there and what each key means; nothing is read twice. The script
`lazyfs-runtime` reads `runtime` from the same file, with the shell's means.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from lazyfs.ground.errors import UsageError

DEFAULT_PATH = Path("/etc/lazyfs/runtime.toml")
ENVIRONMENT = "LAZYFS_RUNTIME_CONFIG"
_FILE_LIMIT_BYTES = 1 << 20
_ANYWHERE = "*"

_Path = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
_AbsolutePath = Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern="^/")]


class Log(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Where and how much is logged, beside what the engine is told."""

    file: _AbsolutePath | None = None
    """None: `log/runtime.log` in the cache directory."""
    level: Literal["error", "warning", "info", "debug"] = "info"


class Registry(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True
):
    """How one registry is spoken to."""

    plain_http: bool = False
    tls_verify: bool = True


class Kubelet(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True
):
    """The kubelet's credential providers, which are asked as it asks them."""

    config: _AbsolutePath
    """`--image-credential-provider-config`."""
    bin_dir: _AbsolutePath
    """`--image-credential-provider-bin-dir`."""


class RuntimeConfig(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True
):
    """The file."""

    runtime: _Path | None = None
    """The real runtime; for the script."""
    lazy_pages: Literal["never", "always", "annotation"] = "annotation"
    on_failure: Literal["fail", "fetch"] = "fail"
    allowed: Annotated[list[_Path], msgspec.Meta(max_length=1000)] = msgspec.field(
        default_factory=lambda: [_ANYWHERE]
    )
    """What a stub may name: hosts, or HOST/REPOSITORY and all below; `*.HOST`, `*`."""
    cache: Literal["disk", "memory"] = "disk"
    cache_dir: _AbsolutePath | None = None
    cache_size: str | None = None
    authfile: _AbsolutePath | None = None
    mirrors: str = "auto"
    verify: Literal["background", "full", "strict"] = "background"
    trace: Literal["auto", "off"] = "auto"
    """Whether to follow a trace that is attached to the image, of what to fetch first."""
    deadline: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 90.0
    connections: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 64
    log: Log = Log()
    registries: Annotated[dict[str, Registry], msgspec.Meta(max_length=1000)] = {}
    kubelet: Kubelet | None = None

    def registry(self, host: str) -> Registry:
        """Return how a registry is spoken to."""
        return self.registries.get(host, Registry())

    def allows(self, host: str, repository: str) -> bool:
        """Whether a stub may name an image of this repository."""
        return any(_covers(each, host, repository) for each in self.allowed)


def read_config(environ: Mapping[str, str]) -> RuntimeConfig:
    """Read the file; if there is none, all is as by default, unless the environment names it.

    Raises:
        UsageError: it cannot be read or understood; the message names file and key.
    """
    named = environ.get(ENVIRONMENT)
    path = Path(named) if named else DEFAULT_PATH
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        if named:
            raise UsageError(f"{ENVIRONMENT} names {path}, which does not exist") from None
        return RuntimeConfig()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    return parse_config(data, path)


def parse_config(data: bytes, path: Path) -> RuntimeConfig:
    """Understand a file's bytes.

    Raises:
        UsageError: they are no TOML, or a key is unknown or has a value that it cannot have.
    """
    if len(data) > _FILE_LIMIT_BYTES:
        raise UsageError(f"{path} is larger than {_FILE_LIMIT_BYTES} bytes")
    try:
        words = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    try:
        return msgspec.convert(words, RuntimeConfig)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {_in_words(str(error))}") from None


def _in_words(message: str) -> str:
    """Name the key first; msgspec says "... - at `$.log.level`", and what is unknown unplaced."""
    message = message.replace("Expected `str` matching regex '^/'", "not a full path (/...)")
    what, at, place = message.rpartition(" - at `$")
    if not at:
        return message.replace("Object contains unknown field", "there is no key")
    what = what.replace("Object contains unknown field", "there is no key")
    return f"{place.strip('`').lstrip('.')}: {what}"


def _covers(pattern: str, host: str, repository: str) -> bool:
    if pattern == _ANYWHERE:
        return True
    pattern_host, _, path = pattern.strip("/").partition("/")
    if pattern_host.startswith("*."):
        if not host.endswith(pattern_host[1:]):
            return False
    elif pattern_host != host:
        return False
    return not path or repository == path or repository.startswith(path + "/")

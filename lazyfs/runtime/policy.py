"""What is to be done about one stub: may it be restored here, and do its pages come lazily?

Decides by the configuration, then by the container's annotation, then by the stub's own word; a
stub was written by whoever pushed it, a container's annotations by whoever may create containers.
Sans-I/O, but for reading the bundle's config.json.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from lazyfs.checkpoint.stub import Stub, real_reference
from lazyfs.ground.errors import LazyfsError, UsageError
from lazyfs.runtime.config import RuntimeConfig

LAZY_ANNOTATION = "io.lazyfs.lazy-pages"
WORKLOAD_ANNOTATION = "io.lazyfs.workload"
_BUNDLE_LIMIT_BYTES = 16 << 20
_YES, _NO = ("true", "1", "yes"), ("false", "0", "no")


class _Linux(msgspec.Struct, frozen=True):
    cgroups_path: str = msgspec.field(default="", name="cgroupsPath")


class Bundle(msgspec.Struct, frozen=True):
    """What matters here of a bundle's config.json (OCI runtime-spec, `config.md`)."""

    annotations: dict[str, str] = {}
    linux: _Linux | None = None

    @property
    def workload(self) -> str:
        """Whose trace to follow, of several that are attached to the image; or ""."""
        return self.annotations.get(WORKLOAD_ANNOTATION, "")

    @property
    def cgroups_path(self) -> str:
        """Where the container's cgroup is: a path, or systemd's `SLICE:PREFIX:NAME`; or ""."""
        return self.linux.cgroups_path if self.linux is not None else ""


class NotAllowed(LazyfsError):
    """The configuration does not let a stub name this image."""


def read_bundle(directory: Path) -> Bundle:
    """Read a bundle's config.json; what cannot be read is the runtime's to complain of."""
    try:
        with open(directory / "config.json", "rb") as file:
            data = file.read(_BUNDLE_LIMIT_BYTES)
        return msgspec.json.decode(data, type=Bundle)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Bundle()


def check_allowed(stub: Stub, config: RuntimeConfig) -> None:
    """See that the image which a stub names may be fetched.

    Raises:
        NotAllowed: it may not.
        MalformedError: it names none.
    """
    reference = real_reference(stub)
    if not config.allows(reference.host, reference.repository):
        raise NotAllowed(
            f"the stub names {reference}, which `allowed` in runtime.toml does not cover"
        )


def wants_lazy_pages(
    config: RuntimeConfig, annotations: Mapping[str, str], stub: Stub, *, asked: bool
) -> bool:
    """Whether pages are to come lazily: by the configuration, the engine, the container, the stub.

    `asked`: the engine itself gave --lazy-pages.

    Raises:
        UsageError: the annotation says neither yes nor no.
    """
    if config.lazy_pages != "annotation":
        return config.lazy_pages == "always"
    if asked:
        return True
    word = annotations.get(LAZY_ANNOTATION)
    if word is None:
        return bool(stub.lazy_pages)
    if word.lower() not in _YES + _NO:
        raise UsageError(f'the annotation {LAZY_ANNOTATION} is {word[:100]!r}: "true" or "false"')
    return word.lower() in _YES

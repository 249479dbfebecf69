"""registries.conf, version 2: where Podman, Buildah, Skopeo and CRI-O look for an image. Sans-I/O.

Decides what an entry may say, which entry is a repository's (the longest prefix), and where its
mirrors have it. Which files are read, and in which order, is `mirror_files.py`'s.

Sources: containers-registries.conf(5); containers/image, `pkg/sysregistriesv2`. Two things are
done otherwise: a prefix without a port is not taken for a host with one (there it is, and said to
be a mistake not to be relied on), and version 1 of the format is refused, not converted.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import msgspec

from lazyfs.ground.errors import MalformedError

SIZE_LIMIT_BYTES = 1024 * 1024
PullFromMirror: TypeAlias = Literal["all", "digest-only", "tag-only"]

_REGISTRIES_MOST = 10_000
_V1 = ("search", "insecure", "block")


class Location(msgspec.Struct, frozen=True):
    """A mirror, or the registry itself."""

    location: str
    """`host[:port][/path]`; empty for the registry itself where its prefix has a wildcard."""
    insecure: bool = False
    """HTTPS without a look at its certificate; plain HTTP if it does not speak that."""
    pull_from_mirror: PullFromMirror = "all"


class RegistryEntry(msgspec.Struct, frozen=True):
    """One `[[registry]]`: what is known of the names that begin with `prefix`."""

    prefix: str
    """`host[:port][/path]`, or `*.example.com` for all hosts below it."""
    itself: Location
    mirrors: tuple[Location, ...] = ()
    blocked: bool = False

    def rewritten(self, name: str, location: Location) -> str:
        """Return what `host/repository` is called at a location of this entry.

        Raises:
            MalformedError: the entry is not for this name.
        """
        length = match_length(name, self.prefix)
        if length is None:
            raise MalformedError(f"{name!r} does not begin with {self.prefix!r}")
        return location.location + name[length:] if location.location else name


def parse_registries_conf(text: str, name: str) -> tuple[RegistryEntry, ...]:
    """Read one file called `name`: its entries, of each prefix the first.

    Raises:
        MalformedError: it is not TOML, is of version 1, or an entry contradicts itself or another.
    """
    import tomllib  # only where there is such a file: it is 3 ms of a start

    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{name} is not TOML: {str(error)[:200]}") from None
    first = document.get("registries")
    if isinstance(first, dict) and any(key in first for key in _V1):
        raise MalformedError(
            f"{name} is in version 1 of its format ([registries.search] and the like), which is "
            "not read: write [[registry]] tables, as containers-registries.conf(5) has them"
        )
    tables = document.get("registry", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise MalformedError(f"{name}: registry is not a list of tables; write [[registry]]")
    if len(tables) > _REGISTRIES_MOST:
        raise MalformedError(f"{name} has more than {_REGISTRIES_MOST} registries")
    entries = [_entry(table, name) for table in tables]
    _refuse_contradictions(entries, name)
    found: dict[str, RegistryEntry] = {}
    for entry in entries:
        found.setdefault(entry.prefix, entry)
    return tuple(found.values())


def merge(files: Iterable[tuple[RegistryEntry, ...]]) -> tuple[RegistryEntry, ...]:
    """Lay files over each other: a later one's entry takes the place of one with its prefix."""
    return tuple({entry.prefix: entry for entries in files for entry in entries}.values())


def find_entry(entries: Iterable[RegistryEntry], name: str) -> RegistryEntry | None:
    """Return the entry with the longest prefix of `host/repository`; None: there is none."""
    best: RegistryEntry | None = None
    for entry in entries:
        longer = best is None or len(entry.prefix) > len(best.prefix)
        if longer and match_length(name, entry.prefix) is not None:
            best = entry
    return best


def match_length(name: str, prefix: str) -> int | None:
    """Return how much of `host/repository` a prefix covers; None: it is of other names.

    `*.example.com` covers the whole host, of any depth below example.com, without its port.
    """
    if prefix.startswith("*."):
        host = name.partition("/")[0]
        bare = host if host.endswith("]") else host.partition(":")[0]
        return len(bare) if bare.endswith(prefix[1:]) and len(bare) >= len(prefix) else None
    if not name.startswith(prefix):
        return None
    rest = name[len(prefix) :]
    return len(prefix) if rest == "" or rest.startswith("/") else None


def _entry(table: Mapping[str, Any], name: str) -> RegistryEntry:
    location = _place(_text(table, "location", name), name)
    prefix = _place(_text(table, "prefix", name), name) or location
    if not prefix:
        raise MalformedError(f"{name}: a [[registry]] with neither location nor prefix")
    if prefix.startswith("*."):
        if any(character in prefix for character in "/@:"):
            raise MalformedError(
                f"{name}: the prefix {prefix!r} is not of the form *.example.com: no port, no path"
            )
    elif not location:
        raise MalformedError(f"{name}: the registry {prefix!r} has no location")
    if "pull-from-mirror" in table:
        raise MalformedError(
            f"{name}: pull-from-mirror is for a [[registry.mirror]], not for {prefix!r} itself"
        )
    by_digest_only = _flag(table, "mirror-by-digest-only", name)
    mirrors = table.get("mirror", [])
    if not isinstance(mirrors, list) or not all(isinstance(each, dict) for each in mirrors):
        raise MalformedError(f"{name}: the mirrors of {prefix!r} are no list of tables")
    return RegistryEntry(
        prefix=prefix,
        itself=Location(location, _flag(table, "insecure", name)),
        mirrors=tuple(_mirror(each, prefix, by_digest_only, name) for each in mirrors),
        blocked=_flag(table, "blocked", name),
    )


def _mirror(table: Mapping[str, Any], prefix: str, by_digest_only: bool, name: str) -> Location:
    location = _place(_text(table, "location", name), name)
    if not location:
        raise MalformedError(f"{name}: a mirror of {prefix!r} without a location")
    pull = _text(table, "pull-from-mirror", name)
    if by_digest_only and pull:
        raise MalformedError(
            f"{name}: {prefix!r} has mirror-by-digest-only and its mirror {location!r} "
            "pull-from-mirror: only one of them may be set"
        )
    kinds: tuple[PullFromMirror, ...] = get_args(PullFromMirror)
    kind = next((kind for kind in kinds if kind == (pull or "all")), None)
    if kind is None:
        raise MalformedError(
            f"{name}: pull-from-mirror of {location!r} is {pull[:50]!r}, which is none of "
            f"{', '.join(kinds)}"
        )
    return Location(
        location, _flag(table, "insecure", name), "digest-only" if by_digest_only else kind
    )


def _refuse_contradictions(entries: Iterable[RegistryEntry], name: str) -> None:
    """Make sure that one location is not insecure or blocked here and not so there."""
    said: dict[str, tuple[bool, bool]] = {}
    for entry in entries:
        where = entry.itself.location or entry.prefix
        says = (entry.itself.insecure, entry.blocked)
        before = said.setdefault(where, says)
        for key, now, then in zip(("insecure", "blocked"), says, before, strict=True):
            if now != then:
                raise MalformedError(f"{name}: {where!r} is there twice, and {key} only once")


def _text(table: Mapping[str, Any], key: str, name: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise MalformedError(f"{name}: {key} is not a string")
    return value


def _flag(table: Mapping[str, Any], key: str, name: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise MalformedError(f"{name}: {key} is neither true nor false")
    return value


def _place(text: str, name: str) -> str:
    if text.startswith(("http://", "https://")):
        raise MalformedError(f"{name}: {text[:100]!r} is a URL; write host[:port][/path]")
    return text.rstrip("/")

"""registries.conf: what its entries mean, which one counts, and what it may not say."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.ground.errors import MalformedError, SourceError
from lazyfs.transport.address import Address, addresses_by_registries_conf
from lazyfs.transport.registries_conf import (
    Location,
    RegistryEntry,
    find_entry,
    match_length,
    merge,
    parse_registries_conf,
)
from lazyfs.transport.tls import TlsConfig

WHOLE = """
unqualified-search-registries = ["docker.io"]
short-name-mode = "enforcing"

[[registry]]
prefix = "example.com/team"
location = "internal.example.net/upstream/team/"
insecure = true

[[registry.mirror]]
location = "mirror.example.net:5000/cache"
[[registry.mirror]]
location = "tags.example.net"
pull-from-mirror = "tag-only"
[[registry.mirror]]
location = "digests.example.net/d"
pull-from-mirror = "digest-only"
insecure = true

[[registry]]
location = "example.com"
blocked = true

[aliases]
"busybox" = "docker.io/library/busybox"
"""


def parse(text: str) -> tuple[RegistryEntry, ...]:
    return parse_registries_conf(text, "registries.conf")


def test_entries() -> None:
    team, blocked = parse(WHOLE)
    assert team == RegistryEntry(
        prefix="example.com/team",
        itself=Location("internal.example.net/upstream/team", insecure=True),
        mirrors=(
            Location("mirror.example.net:5000/cache"),
            Location("tags.example.net", pull_from_mirror="tag-only"),
            Location("digests.example.net/d", True, "digest-only"),
        ),
    )
    assert blocked == RegistryEntry("example.com", Location("example.com"), blocked=True)
    assert parse("") == ()
    assert parse("registry = []") == ()


def test_mirrors_for_digests_only() -> None:
    (entry,) = parse(
        '[[registry]]\nlocation="a.b"\nmirror-by-digest-only=true\n[[registry.mirror]]\n'
        'location="c.d"'
    )
    assert entry.mirrors == (Location("c.d", pull_from_mirror="digest-only"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("registry = [", "is not TOML"),
        ("[registry]\nlocation='a.b'", r"write \[\[registry\]\]"),
        ("registry = ['a.b']", r"write \[\[registry\]\]"),
        ("[registries.search]\nregistries = ['docker.io']", "version 1"),
        ("[registries.insecure]\nregistries = []", "version 1"),
        ("[registries.block]\nregistries = ['a.b']", "version 1"),
        ("[[registry]]\ninsecure = true", "neither location nor prefix"),
        ("[[registry]]\nprefix = 'a.b'", "'a.b' has no location"),
        ("[[registry]]\nprefix = '*.a.b:5000'", r"not of the form \*\.example\.com"),
        ("[[registry]]\nprefix = '*.a.b/c'\nlocation='d.e'", r"not of the form \*\.example\.com"),
        ("[[registry]]\nlocation = 'https://a.b'", "is a URL"),
        ("[[registry]]\nlocation = 'a.b'\nprefix = 'http://a.b/'", "is a URL"),
        ("[[registry]]\nlocation = 3", "location is not a string"),
        ("[[registry]]\nlocation = 'a.b'\ninsecure = 'yes'", "insecure is neither"),
        ("[[registry]]\nlocation = 'a.b'\npull-from-mirror = 'all'", "not for 'a.b' itself"),
        ("[[registry]]\nlocation = 'a.b'\nmirror = 'c.d'", "no list of tables"),
        (
            "[[registry]]\nlocation = 'a.b'\n[[registry.mirror]]\ninsecure=true",
            "without a location",
        ),
        (
            "[[registry]]\nlocation='a.b'\n[[registry.mirror]]\nlocation='c.d'\n"
            "pull-from-mirror='some'",
            "'some', which is none of all, digest-only, tag-only",
        ),
        (
            "[[registry]]\nlocation='a.b'\nmirror-by-digest-only=true\n[[registry.mirror]]\n"
            "location='c.d'\npull-from-mirror='all'",
            "only one of them",
        ),
        (
            "[[registry]]\nlocation='a.b'\n[[registry]]\nprefix='x.y'\nlocation='a.b'\n"
            "blocked=true",
            "'a.b' is there twice, and blocked only once",
        ),
        (
            "[[registry]]\nlocation='a.b'\ninsecure=true\n[[registry]]\nprefix='x.y'\n"
            "location='a.b'",
            "insecure only once",
        ),
    ],
)
def test_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(MalformedError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("name", "prefix", "length"),
    [
        ("a.b/c/d", "a.b", 3),
        ("a.b/c/d", "a.b/c", 5),
        ("a.b/c/d", "a.b/c/d", 7),
        ("a.b/c/d", "a.b/c/d/e", None),
        ("a.b/cd", "a.b/c", None),
        ("a.bc/d", "a.b", None),
        ("a.b:5000/d", "a.b", None),
        ("a.b:5000/d", "a.b:5000", 8),
        ("x.a.b/c", "*.a.b", 5),
        ("y.x.a.b/c", "*.a.b", 7),
        ("x.a.b:5000/c", "*.a.b", 5),
        ("a.b/c", "*.a.b", None),
        (".a.b/c", "*.a.b", None),
        ("xa.b/c", "*.a.b", None),
        ("x.a.bc/c", "*.a.b", None),
        ("host/x.a.b/c", "*.a.b", None),
        ("[::1]:5000/c", "[::1]:5000", 10),
        ("[::1]/c", "*.1]", None),
    ],
)
def test_what_a_prefix_covers(name: str, prefix: str, length: int | None) -> None:
    assert match_length(name, prefix) == length


def test_the_longest_prefix_counts_and_a_later_file() -> None:
    entries = parse(
        "".join(
            f"[[registry]]\nprefix='{prefix}'\nlocation='l.m/{number}'\n"
            for number, prefix in enumerate(["a.b", "a.b/c/d", "a.b/c", "*.b", "a.b"])
        )
    )
    assert [entry.itself.location for entry in entries] == [f"l.m/{n}" for n in range(4)]

    def found(name: str) -> str | None:
        entry = find_entry(entries, name)
        return entry.prefix if entry is not None else None

    assert found("a.b/c/d/e") == "a.b/c/d"
    assert found("a.b/c/x") == "a.b/c"
    assert found("a.b/x") == "a.b"
    assert found("z.b/x") == "*.b"
    assert found("z.c/x") is None
    later = parse("[[registry]]\nlocation='a.b'\nblocked=true")
    merged = merge([entries, later])
    assert len(merged) == 4
    assert find_entry(merged, "a.b/x") == later[0]


def addresses(text: str, name: str, *, by_digest: bool = False) -> list[Address] | None:
    host, _, repository = name.partition("/")
    return addresses_by_registries_conf(parse(text), host, repository, by_digest=by_digest)


def test_addresses_in_order() -> None:
    insecure = TlsConfig(verify=False)
    everywhere = [
        Address("mirror.example.net:5000", "cache/app/x"),
        Address("tags.example.net", "app/x"),
        Address("digests.example.net", "d/app/x", for_tags=False, tls=insecure),
        Address("internal.example.net", "upstream/team/app/x", tls=insecure),
    ]
    assert addresses(WHOLE, "example.com/team/app/x") == everywhere
    del everywhere[1]
    assert addresses(WHOLE, "example.com/team/app/x", by_digest=True) == everywhere
    assert addresses(WHOLE, "example.org/team/app") is None


def test_a_blocked_registry_is_refused() -> None:
    with pytest.raises(SourceError, match=r"example\.com/other: registries\.conf blocks") as caught:
        addresses(WHOLE, "example.com/other")
    assert caught.value.exit_code == 3


def test_a_blocked_mirror_is_left_out() -> None:
    text = """
        [[registry]]
        location = "a.b"
        [[registry.mirror]]
        location = "c.d/x"
        [[registry.mirror]]
        location = "e.f"
        [[registry]]
        location = "c.d"
        blocked = true
    """
    assert addresses(text, "a.b/r") == [Address("e.f", "r"), Address("a.b", "r")]


def test_hosts_below_a_domain() -> None:
    text = "[[registry]]\nprefix='*.a.b'\n[[registry.mirror]]\nlocation='m.n/cache'"
    assert addresses(text, "x.a.b/r/s") == [Address("m.n", "cache/r/s"), Address("x.a.b", "r/s")]


def test_docker_hub_by_either_name() -> None:
    text = "[[registry]]\nprefix='docker.io'\nlocation='registry-1.docker.io'"
    (address,) = addresses(text, "docker.io/library/alpine") or []
    assert (address.host, address.served_by) == ("docker.io", "registry-1.docker.io")


def test_a_location_that_makes_no_name() -> None:
    text = "[[registry]]\nprefix='a.b/c'\nlocation='x.y'"
    with pytest.raises(MalformedError, match="makes no repository"):
        addresses(text, "a.b/c")


SCALAR = st.one_of(
    st.booleans(),
    st.integers(),
    st.sampled_from(["a.b", "*.b", "a.b/c", "http://x", "all", "tag-only", "", "/", "*."]),
).map(lambda value: str(value).lower() if isinstance(value, bool | int) else f"'{value}'")
KEY = st.sampled_from(
    ["location", "prefix", "insecure", "blocked", "mirror-by-digest-only", "pull-from-mirror", "x"]
)
TABLE = st.tuples(
    st.sampled_from(["[[registry]]", "[[registry.mirror]]", "[registries.search]", "[registry]"]),
    st.dictionaries(KEY, SCALAR, max_size=4),
).map(lambda each: "\n".join([each[0], *(f"{key} = {value}" for key, value in each[1].items())]))


@given(st.one_of(st.text(max_size=200), st.lists(TABLE, max_size=4).map("\n".join)))
@example("x = " + "[" * 5000)
@example("x = 1" + "0" * 5000)
@example("x = 0000-00-00")
def test_any_text_is_entries_or_an_error(text: str) -> None:
    try:
        entries = parse(text)
    except MalformedError:
        return
    for entry in entries:
        assert entry.prefix
        assert entry.itself.location or entry.prefix.startswith("*.")
        assert all(mirror.location for mirror in entry.mirrors)
    try:
        addresses_by_registries_conf(entries, "a.b", "c/d", by_digest=False)
    except (MalformedError, SourceError):
        return

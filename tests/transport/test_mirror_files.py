"""Which files say where mirrors are: their order, the two families, and what is wrong with them."""

import logging
from pathlib import Path

import pytest

from lazyfs.ground.errors import LazyfsError, SourceError, UsageError
from lazyfs.transport.address import Address
from lazyfs.transport.mirror_files import find_addresses, registries_conf_files
from lazyfs.transport.tls import TlsConfig


class Machine:
    """A root with an /etc, and a home."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.home = directory / "home"
        self.environ = {"HOME": str(self.home)}

    def write(self, path: str, text: str) -> Path:
        """Write a file below the root, or below ~."""
        file = self.home / path[2:] if path.startswith("~/") else self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def conf(self, path: str, mirror: str, prefix: str = "a.b") -> Path:
        text = f"[[registry]]\nlocation='{prefix}'\n[[registry.mirror]]\nlocation='{mirror}'\n"
        return self.write(path, text)

    def hosts(self, host: str, mirror: str) -> Path:
        return self.write(
            f"/etc/containerd/certs.d/{host}/hosts.toml", f"[host.'https://{mirror}']"
        )

    def asks(self, mirrors: str = "auto", name: str = "a.b/r", *, by_digest: bool = False) -> str:
        """Return the hosts to ask, in order."""
        host, _, repository = name.partition("/")
        found = find_addresses(
            host,
            repository,
            by_digest=by_digest,
            mirrors=mirrors,
            environ=self.environ,
            root=self.root,
        )
        return " ".join(address.host for address in found)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_that_says_nothing(machine: Machine) -> None:
    found = find_addresses(
        "a.b", "r", by_digest=False, mirrors="auto", environ={}, root=machine.root
    )
    assert found == [Address("a.b", "r")]
    for word in ("containers", "containerd", "none"):
        assert machine.asks(word) == "a.b"


def test_the_system_s_file_and_what_is_dropped_in(machine: Machine) -> None:
    main = machine.conf("/etc/containers/registries.conf", "main")
    assert machine.asks() == "main a.b"
    second = machine.conf("/etc/containers/registries.conf.d/20-x.conf", "second")
    first = machine.conf("/etc/containers/registries.conf.d/100-x.conf", "first")
    machine.conf("/etc/containers/registries.conf.d/99.conf.bak", "never")
    machine.conf("/etc/containers/registries.conf.d/30.conf/x.conf", "never")
    assert machine.asks() == "second a.b", "by name, not by number"
    own = machine.conf("~/.config/containers/registries.conf.d/00.conf", "own")
    assert machine.asks() == "own a.b"
    machine.conf("~/.config/containers/registries.conf.d/00.conf", "other", prefix="other")
    assert machine.asks() == "second a.b"
    files = registries_conf_files(machine.environ, machine.root)
    assert files == [main, first, second, own]


def test_a_user_s_file_puts_the_system_s_out_of_force(machine: Machine) -> None:
    machine.conf("/etc/containers/registries.conf", "main")
    machine.conf("/etc/containers/registries.conf.d/10.conf", "dropped")
    machine.conf("~/.config/containers/registries.conf", "user")
    assert machine.asks() == "user a.b"
    machine.conf("~/.config/containers/registries.conf.d/10.conf", "own")
    assert machine.asks() == "own a.b"


def test_a_file_that_the_environment_names(machine: Machine) -> None:
    machine.conf("~/.config/containers/registries.conf", "user")
    machine.environ["CONTAINERS_REGISTRIES_CONF"] = str(machine.conf("/x.conf", "named"))
    assert machine.asks() == "named a.b"
    machine.conf("/etc/containers/registries.conf.d/10.conf", "dropped")
    assert machine.asks() == "dropped a.b"
    machine.environ["CONTAINERS_REGISTRIES_CONF"] = "/nowhere/x.conf"
    with pytest.raises(UsageError, match=r"/nowhere/x\.conf.*does not exist"):
        machine.asks()


def test_which_family_counts(machine: Machine) -> None:
    machine.conf("/etc/containers/registries.conf", "podman", prefix="a.b/team")
    machine.hosts("a.b", "containerd")
    assert machine.asks("auto", "a.b/team/r") == "podman a.b"
    assert machine.asks("auto", "a.b/other/r") == "containerd a.b"
    assert machine.asks("containers", "a.b/other/r") == "a.b"
    assert machine.asks("containerd", "a.b/team/r") == "containerd a.b"
    assert machine.asks("none", "a.b/team/r") == "a.b"


def test_which_hosts_toml_it_is(machine: Machine) -> None:
    machine.hosts("_default", "any")
    assert machine.asks("auto", "a.b:5000/r") == "any a.b:5000"
    machine.hosts("a.b", "without-port")
    assert machine.asks("auto", "a.b:5000/r") == "any a.b:5000"
    machine.hosts("a.b:5000", "colon")
    assert machine.asks("auto", "a.b:5000/r") == "colon a.b:5000"
    machine.hosts("a.b_5000_", "underscore")
    assert machine.asks("auto", "a.b:5000/r") == "underscore a.b:5000"
    assert machine.asks("auto", "c.d/r") == "any c.d"
    authority = machine.write("/etc/containerd/certs.d/c.d/ca.crt", "")
    (address,) = find_addresses(
        "c.d", "r", by_digest=False, mirrors="auto", environ={}, root=machine.root
    )
    tls = TlsConfig(authorities=(authority,))
    assert address == Address("c.d", "r", tls=tls), "the first directory that there is decides"


def test_paths_instead_of_words(machine: Machine) -> None:
    conf = machine.conf("/opt/registries.conf", "mine")
    machine.conf("/etc/containers/registries.conf", "main")
    assert machine.asks(str(conf)) == "mine a.b"
    hosts = machine.hosts("a.b", "theirs")
    assert machine.asks(str(hosts.parent.parent)) == "theirs a.b"
    with pytest.raises(UsageError, match="does not exist"):
        machine.asks("/nowhere/registries.conf")
    with pytest.raises(UsageError, match="not 'podman'"):
        machine.asks("podman")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[registry]", "is not TOML"),
        ("[registries.search]\nregistries=['x']", "version 1"),
        ("#" * (1024 * 1024 + 1), "more than 1048576 bytes"),
    ],
)
def test_a_registries_conf_that_makes_no_sense_is_an_error(
    machine: Machine, text: str, message: str
) -> None:
    path = machine.write("/etc/containers/registries.conf", text)
    with pytest.raises(LazyfsError, match=message) as caught:
        machine.asks()
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("--mirrors=none")
    assert machine.asks("none") == "a.b"


def test_files_that_are_not_text_or_cannot_be_read(machine: Machine) -> None:
    path = machine.conf("/etc/containers/registries.conf", "x")
    path.write_bytes(b"\xff")
    with pytest.raises(SourceError, match="is not UTF-8"):
        machine.asks()
    path.unlink()
    path.mkdir()
    with pytest.raises(SourceError, match="cannot be read"):
        machine.asks()


def test_a_hosts_toml_that_makes_no_sense_is_warned_of(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.hosts("a.b", "m").write_text("server = 3")
    with caplog.at_level(logging.WARNING, "lazyfs"):
        assert machine.asks() == "a.b"
    assert "asked without mirrors" in caplog.text
    assert "server is not a string" in caplog.text
    machine.hosts("a.b", "m").write_text("")
    assert machine.asks() == "a.b"

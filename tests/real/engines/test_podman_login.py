"""The real image's registry wants a password: it is the one that `podman login` has stored."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Registry

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, machine
from tests.real.engines.origins import Origin
from tests.real.engines.places import FORM
from tests.real.test_logins import HASH, PASSWORD

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def locked(store: Store, shelf: Path) -> Iterator[Registry]:
    """The store's images, behind a password."""
    home = shelf / "locked"
    home.mkdir()
    (home / "data").symlink_to(store.data)
    (home / "htpasswd").write_text(f"user:{HASH}\n")
    auth = {"htpasswd": {"realm": "here", "path": str(home / "htpasswd")}}
    with Registry(store.testbed, home, config={"auth": auth}) as registry:
        yield registry


@pytest.fixture(scope="module")
def stub(store: Store, made: Origin, locked: Registry) -> str:
    name = f"{made.repository}:locked-stub"
    real = made.real(FORM).replace(store.address, locked.address)
    with machine(store.testbed, [], [store.address, locked.address], name=made.cgroup) as here:
        _log_in(here, locked)
        here.stub(made.real(FORM), name, "--real", real)
    return name


def test_who_has_logged_in_restores(
    store: Store, made: Origin, locked: Registry, stub: str
) -> None:
    with machine(store.testbed, [], [store.address, locked.address], name=made.cgroup) as here:
        _log_in(here, locked)
        here.restore(stub).assert_goes_on(made.hashes)


def test_who_has_not_is_told_to(store: Store, made: Origin, locked: Registry, stub: str) -> None:
    registries = [store.address, locked.address]
    with machine(
        store.testbed, [], registries, name=made.cgroup, forgiven=["cannot be restored"]
    ) as here:
        here.podman("pull", "--quiet", stub)
        said = here.fail_to_restore(stub)
        assert locked.address in said
        assert "log in" in said


def _log_in(here: Machine, registry: Registry) -> None:
    here.podman("login", "--username", "user", "--password", PASSWORD, registry.address)

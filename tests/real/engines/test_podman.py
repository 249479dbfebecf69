"""Unmodified Podman restores from stubs: containers go on, with their memory as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, machine
from tests.real.engines.origins import FORMATS, Origin, origin

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def made(store: Store, shelf: Path) -> Origin:
    return origin(store, shelf)


@pytest.fixture
def here(store: Store, made: Origin) -> Iterator[Machine]:
    with machine(store.testbed, [], [store.address], name=made.cgroup) as found:
        yield found


@pytest.mark.parametrize("form", FORMATS)
def test_a_stub_goes_on_where_its_container_was(made: Origin, here: Machine, form: str) -> None:
    here.restore(made.stub(form)).assert_goes_on(made.hashes)


def test_without_lazyfs_a_stub_is_refused(store: Store, made: Origin) -> None:
    """CRIU misses the pages: no container comes up without its memory."""
    with machine(store.testbed, [], [store.address], name=made.cgroup, wrapped=False) as plain:
        plain.podman("pull", "--quiet", made.stub("gzip"))
        said = plain.fail_to_restore(made.stub("gzip"))
        print(said)
        assert "criu failed" in said
        assert plain.podman("ps", "--quiet") == ""

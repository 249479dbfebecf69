"""Podman with crun, which has no lazy pages: it restores from stubs as well."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.conftest import Store
from tests.real.engines.machines import LOG, Machine, machine
from tests.real.engines.origins import Origin, origin

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_FORM = "zstd:chunked"
_EAGERLY = "crun has no --lazy-pages"
"""Of the warning that there will be none."""


@pytest.fixture(scope="module")
def made(store: Store, shelf: Path) -> Origin:
    return origin(store, shelf, "crun", [_FORM])


@pytest.fixture
def here(store: Store, made: Origin) -> Iterator[Machine]:
    with machine(
        store.testbed, [], [store.address], name=made.cgroup, runtime="crun", forgiven=[_EAGERLY]
    ) as found:
        yield found


def test_a_stub_goes_on_where_its_container_was(made: Origin, here: Machine) -> None:
    here.restore(made.stub(_FORM)).assert_goes_on(made.hashes)
    assert here.podman.inspect("workload")["OCIRuntime"] == "crun"
    assert here.alarms() == []


def test_asked_for_lazy_pages_it_restores_eagerly_and_says_so(made: Origin, here: Machine) -> None:
    here.policy('lazy-pages = "always"')
    here.restore(made.stub(_FORM)).assert_goes_on(made.hashes)
    assert [line for line in here.alarms() if _EAGERLY in line]


def test_the_real_image_restores_as_without_lazyfs(made: Origin, here: Machine) -> None:
    """The testbed's crun is a whole one, so that what is seen above is lazyfs's doing."""
    here.restore(made.real(_FORM)).assert_goes_on(made.hashes)
    assert not here.session.path(LOG).exists()

"""The container that most tests here restore, checkpointed once."""

import shutil
from collections.abc import Iterator

import pytest

from tests.real.conftest import Store
from tests.real.engines.origins import Origin, origin


@pytest.fixture(scope="session")
def made(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """A container of Podman and runc, pushed in all formats, and its stubs."""
    shelf = tmp_path_factory.mktemp("origin")
    yield origin(store, shelf)
    shutil.rmtree(shelf, ignore_errors=True)

"""One small checkpoint, in every form, for the whole suite; and what the faults are drawn by."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Testbed

from tests.real.checkpoints import checkpoint
from tests.real.conftest import Store
from tests.real.corpus import Corpus, corpus


@pytest.fixture(scope="package")
def forms(
    testbed: Testbed, store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Corpus]:
    folder: Path = tmp_path_factory.mktemp("faults")
    process = checkpoint(testbed, folder / "process", size_mib=24)
    with corpus(store, process, folder / "corpus") as made:
        yield made


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    chosen: int = request.config.getoption("--faults-seed")
    return chosen

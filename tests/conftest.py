"""For all tests: hypothesis judges values, never speed (machines are noisy)."""

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lazyfs", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lazyfs")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo what a command in this process has made of the log."""
    logger = logging.getLogger("lazyfs")
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers[:]
    yield
    logger.setLevel(level)  # which also forgets what was computed from it
    logger.propagate, logger.handlers = propagate, handlers


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "the fault suite (tests/real)")
    group.addoption("--kills", type=int, default=20, help="how often to kill a reader's daemon")
    group.addoption("--criu-kills", type=int, default=2, help="how often in a real restore, beside")
    group.addoption("--faults-seed", type=int, default=1, help="what the faults are drawn by")
    group.addoption("--faults-json", metavar="FILE", help="where the suite's table is written")

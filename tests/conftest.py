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

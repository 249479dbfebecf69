"""What a daemon logs to."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.background import log_to


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Leave no handler behind."""
    logger = logging.getLogger("lazyfs")
    level = logger.level
    yield
    logger.setLevel(level)
    for handler in logger.handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()


def test_a_log_is_gone_on_with(tmp_path: Path) -> None:
    log = tmp_path / "mount.log"
    log.write_text("before\n")
    log_to(log)
    logging.getLogger("lazyfs").warning("after")
    assert log.read_text().startswith("before\n")
    assert "after" in log.read_text()


def test_one_that_has_grown_large_makes_way(tmp_path: Path) -> None:
    log = tmp_path / "mount.log"
    with log.open("wb") as file:
        file.truncate((16 << 20) + 1)
    log_to(log)
    logging.getLogger("lazyfs").warning("after")
    assert "after" in log.read_text()
    assert log.stat().st_size < 1000
    assert (tmp_path / "mount.log.old").stat().st_size == (16 << 20) + 1

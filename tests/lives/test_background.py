"""What a daemon logs to, and what is told of waiting."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.background import Waiting, log_to


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Leave no handler behind."""
    logger = logging.getLogger("lazyfs")
    level = logger.level
    patience = logging.getLogger("lazyfs.transport.patience")
    its_handlers, its_level = patience.handlers[:], patience.level
    yield
    patience.handlers[:] = its_handlers
    patience.setLevel(its_level)
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


def test_a_long_pause_is_told_as_it_begins() -> None:
    said: list[str] = []
    Waiting(said.append)
    logger = logging.getLogger("lazyfs.transport.patience")
    logger.info("a short one", extra={"pause_s": 0.1})
    assert said == []
    logger.info("a long one", extra={"pause_s": 2.0})
    logger.info("the next", extra={"pause_s": 0.1})
    assert said == ["a long one"]

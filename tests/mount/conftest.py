"""Every test here mounts, in a process of its own, and leaves nothing behind."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import FaultServer
from tests.mount.mounting import Mounts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = None
    if not Path("/dev/fuse").exists():
        reason = "there is no /dev/fuse (modprobe fuse; docker run --device /dev/fuse)"
    elif os.geteuid() != 0:
        reason = "mounting as the tests do needs root"
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mount)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def mounts(server: FaultServer, tmp_path: Path) -> Iterator[Mounts]:
    """Mounts; they go before the server does."""
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()

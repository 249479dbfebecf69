"""The testbed and a registry, for all tests here; without a testbed they say why they are skipped.

Where CI is set in the environment they fail instead: what cannot run there would never be seen.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Layer, Registry, Testbed, TestbedMissing, Wan, push_oci_image

from lazyfs.ground.errors import LazyfsError
from lazyfs.mountpoint import check_fuse
from tests.real.checkpoints import Checkpoint
from tests.real.faults.ledger import Ledger, ledger_of, report
from tests.real.movers import Mover

_PR_SET_CHILD_SUBREAPER = 36
_SWEEP = """
read -r _
while read -r _ _ _ _ where _; do
    case $where in "$1"/*) umount -l "$where" ;; esac
done < /proc/self/mountinfo
"""


@pytest.fixture(scope="session")
def testbed() -> Testbed:
    try:
        found = Testbed.locate()
        check_fuse()
    except (TestbedMissing, LazyfsError) as missing:
        if os.environ.get("CI"):
            pytest.fail(f"these tests must not be skipped in CI: {missing}")
        pytest.skip(str(missing))
    return found


@pytest.fixture(scope="session", autouse=True)
def _sweeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unmount what is left when this process ends, even if it is killed."""
    base = str(tmp_path_factory.getbasetemp().resolve())
    sweeper = subprocess.Popen(
        ["/bin/sh", "-c", _SWEEP, "sweeper", base],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield
    sweeper.communicate(timeout=30)


@dataclass(frozen=True)
class Store:
    """A registry on loopback, into which images are pushed; served by others too."""

    testbed: Testbed
    registry: Registry
    data: Path

    @property
    def address(self) -> str:
        """Its `host:port`."""
        return self.registry.address

    def push(self, repository: str, checkpoint: "Checkpoint | Mover") -> str:
        """Push a checkpoint's layer as it is, uncompressed; return `repository:tag`."""
        layer = Layer(checkpoint.layer)
        push_oci_image(self.address, repository, "1", [layer])
        return f"{repository}:1"

    def served_at(self, work: Path, wan: Wan | None = None) -> Registry:
        """Return another registry with the same contents, not started: the test's own to kill.

        It listens beyond `wan`, or on loopback.
        """
        work.mkdir(parents=True)
        (work / "data").symlink_to(self.data)
        if wan is None:
            return Registry(self.testbed, work)
        return Registry(self.testbed, work, ip=wan.far_ip, enter=wan.enter)


@pytest.fixture(scope="session")
def store(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    home = tmp_path_factory.mktemp("store")
    with Registry(testbed, home) as registry:
        yield Store(testbed, registry, home / "data")
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what the tests of a module have in common; it goes with them."""
    folder = tmp_path_factory.mktemp("shelf")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def adopting() -> Iterator[None]:
    """What was restored, and whose parents have ended, becomes our child, and is reaped."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder that goes with the test: caches are as large as checkpoints."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Ledger:
    """The run's account of faults; its sum is printed at the end."""
    return ledger_of(request.config)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    report(config, terminalreporter)

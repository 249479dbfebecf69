"""Registries that go and come back, and a daemon that is killed, in the middle of a real restore.

The link is slow enough that a fifth of the image is seconds away from the rest; what happens to
the registry happens when a fifth has come.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from testbed import Registry, Restored, Testbed, Wan

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.mounts import Mount, mounted

T = TypeVar("T")

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def process(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "process", size_mib=64)


@dataclass(frozen=True)
class Far:
    """An image in a registry of the test's own, beyond a slow link."""

    registry: Registry
    reference: str


@pytest.fixture
def far(store: Store, process: Checkpoint, work: Path) -> Iterator[Far]:
    image = store.push("weather", process)
    with (
        Wan(store.testbed, one_way_ms=5, rate_mbit=100) as wan,
        store.served_at(work / "far", wan) as registry,
    ):
        yield Far(registry, f"{registry.address}/{image}")


@dataclass(frozen=True)
class Outage:
    """How a registry goes, how one sees that it is gone, and how it comes back."""

    begin: Callable[[Registry], None]
    wait_felt: Callable[[Mount], None]
    end: Callable[[Registry], None]


_DEATH = Outage(Registry.kill, lambda mount: mount.wait_retries(3), Registry.start)
_HICCUP = Outage(Registry.freeze, Mount.wait_quiet, Registry.thaw)
_STUPOR = Outage(Registry.freeze, lambda mount: mount.wait_retries(1), Registry.thaw)
"""Until lazyfs holds the connections for dead and asks on others."""


@pytest.mark.parametrize(
    "outage", [_DEATH, _HICCUP, _STUPOR], ids=["killed", "frozen-briefly", "frozen-for-long"]
)
def test_an_eager_restore_outlasts_an_outage(
    far: Far, process: Checkpoint, work: Path, outage: Outage
) -> None:
    with mounted(far.reference, work) as mount:
        with _begun(mount, lambda: process.restore(mount.directory, work / "criu")) as restoring:
            mount.wait_fetched(process.layer_bytes // 5)
            outage.begin(far.registry)
            outage.wait_felt(mount)
            assert not restoring.done()
            assert mount.status()["bytes_fetched"] < process.layer_bytes
            outage.end(far.registry)
            with restoring.result() as restored:
                process.before.assert_goes_on(restored)
        assert mount.status()["failed_reads"] == 0


def test_a_process_with_lazy_pages_outlasts_an_outage(
    far: Far, process: Checkpoint, work: Path
) -> None:
    with mounted(far.reference, work) as mount:
        with process.restore(mount.directory, work / "criu", lazy_pages=True) as restored:
            mount.wait_fetched(process.layer_bytes // 5)
            _DEATH.begin(far.registry)
            _DEATH.wait_felt(mount)
            assert mount.status()["bytes_fetched"] < process.layer_bytes
            _DEATH.end(far.registry)
            process.before.assert_goes_on(restored)
            restored.wait_lazy_pages()
        assert mount.status()["failed_reads"] == 0


def test_without_a_registry_criu_fails_and_the_mount_lives_on(
    far: Far, process: Checkpoint, work: Path
) -> None:
    criu = work / "failed"
    gave_up = ("gave up", "read answered with an error")
    with mounted(far.reference, work, "--deadline=2", forgiven=gave_up) as mount:
        with _begun(mount, lambda: process.fail_to_restore(mount.directory, criu)) as failing:
            mount.wait_fetched(process.layer_bytes // 5)
            far.registry.kill()
            assert "Error" in failing.result()
        assert mount.status()["failed_reads"] > 0
        assert "inventory.img" in {path.name for path in mount.directory.iterdir()}

        far.registry.start()
        with process.restore(mount.directory, work / "criu") as restored:
            process.before.assert_goes_on(restored)


def test_a_killed_daemon_costs_one_restore_and_no_byte(
    far: Far, process: Checkpoint, work: Path
) -> None:
    criu = work / "failed"
    with mounted(far.reference, work) as mount:
        with _begun(mount, lambda: process.fail_to_restore(mount.directory, criu)) as failing:
            mount.wait_fetched(process.layer_bytes // 5)
            mount.kill()
            assert "Error" in failing.result()
        mount.umount()

        mount.start()
        with process.restore(mount.directory, work / "criu") as restored:
            process.before.assert_goes_on(restored)
        state = mount.status()
        assert state["chunks_from_cache"] > 0
        assert state["cache_refused"] == 0
        assert state["failed_reads"] == 0


@contextmanager
def _begun(mount: Mount, restore: Callable[[], T]) -> Iterator[Future[T]]:
    """Restore in the background; at the end it is over, and what was restored is gone."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(restore)
        try:
            yield future
        except BaseException:
            mount.clear()  # so that it ends now, whatever it waits for
            raise
        finally:
            restored = None if future.exception() else future.result()
            if isinstance(restored, Restored):
                restored.kill()

"""What `lazyfs restore` brings up must not live where its memory is lost, or proves to be wrong."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Fault, Forecast, Testbed, Weather
from testbed.process import children, wait_until

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.restoring import Restorer

pytestmark = [pytest.mark.real, pytest.mark.timeout(180), pytest.mark.usefixtures("adopting")]

MIB = 1 << 20
SLOW_BYTES_S = 12 * MIB
lazily = pytest.mark.parametrize(
    "lazy",
    [(), ("--lazy-pages",), ("--lazy-pages", "--pages-by=criu")],
    ids=["eager", "lazy-pages", "criu lazy-pages"],
)


@pytest.fixture(scope="module")
def dumped(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "dumped", size_mib=24, shared_mib=4, children=1)


@pytest.fixture(scope="module")
def image(store: Store, dumped: Checkpoint) -> str:
    """Its `repository:tag`."""
    return store.push("lost", dumped)


@pytest.fixture
def restorer(testbed: Testbed, work: Path, dumped: Checkpoint) -> Iterator[Restorer]:
    dumped.rewind()
    restorer = Restorer(testbed, work)
    yield restorer
    restorer.assert_nothing_is_left()


@lazily
def test_a_registry_that_dies_takes_the_tasks_with_it_before_they_see_a_wrong_byte(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer, lazy: tuple[str, ...]
) -> None:
    """Of shared memory: CRIU would go on with zeros. With lazy pages: the kernel would."""
    with Weather(store.address, rate_bytes_s=SLOW_BYTES_S) as weather:
        words = restorer.words(f"{weather.address}/{image}", "--deadline=1", "--json", *lazy)
        process = restorer.start(words)
        weather.wait_sent(8 * MIB)
        weather.turn(Forecast.of(Fault.STORM, chance=1.0))
        weather.drop_connections()
        ended = restorer.wait(process)
    assert ended.code == 3, ended
    assert "killed" in ended.err
    assert ended.told["restored"] is False
    _assert_no_other_memory_was_seen(dumped)


def test_wrong_bytes_are_found_before_the_command_ends(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    """Of an uncompressed layer they are given out before its proof: the tasks are killed then."""
    with Weather(store.address) as weather:
        weather.turn(Forecast.of(Fault.FLIPPED_BITS))
        ended = restorer.run(f"{weather.address}/{image}", "--deadline=1")
    assert ended.code in (3, 5, 6), ended
    assert restorer.left() == []


def test_a_lazy_pages_daemon_that_is_killed_leaves_no_task_with_pages_of_zeros(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    with Weather(store.address, rate_bytes_s=SLOW_BYTES_S) as weather:
        words = restorer.words(
            f"{weather.address}/{image}", "--lazy-pages", "--pages-by=criu", "--json"
        )
        process = restorer.start(words)
        weather.wait_sent(12 * MIB)
        (daemon,) = wait_until(
            lambda: (
                [int(each.split(":")[0]) for each in restorer.left() if " lazy-pages -v1" in each]
                or None
            ),
            f"the lazy-pages daemon among {restorer.left()}",
            20,
        )
        os.kill(daemon, signal.SIGKILL)
        ended = restorer.wait(process)
    assert ended.code == 6, ended
    assert "pages are lost" in ended.err
    _assert_no_other_memory_was_seen(dumped)


def test_a_mounts_daemon_that_is_killed_leaves_no_task_with_pages_of_zeros(
    store: Store, image: str, dumped: Checkpoint, restorer: Restorer
) -> None:
    """It brings the pages itself, and its guard outlives it."""
    with Weather(store.address, rate_bytes_s=SLOW_BYTES_S) as weather:
        process = restorer.start(restorer.words(f"{weather.address}/{image}", "--lazy-pages"))
        weather.wait_sent(12 * MIB)
        (keeper,) = children(process.pid)
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(keeper)}
        daemon = next(pid for pid, words in commands.items() if b"-m\0lazyfs" in words)
        os.kill(daemon, signal.SIGKILL)
        ended = restorer.wait(process)
    assert ended.code == 1, ended
    assert "what had been restored is killed" in ended.err
    _assert_no_other_memory_was_seen(dumped)


def _assert_no_other_memory_was_seen(dumped: Checkpoint) -> None:
    """Each loop writes a hash of what it has read: as before the dump, or there was none."""
    known = {event.member: event.value for event in dumped.before.last.values()}
    for event in dumped.status.events("loop"):
        assert event.value == known[event.member]

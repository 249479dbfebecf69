"""Memory that comes over a slow link, is still coming when somebody goes, or never comes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Testbed, Weather
from testbed.process import wait_until

from lazyfs.lazypages.protocol import SOCKET_NAME
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.lazily import is_alive, lazily, restored, served, wait_home
from tests.real.movers import Mover, dumped_lazily, mover

pytestmark = pytest.mark.real

SLOW_BYTES_S = 48 << 20
"""Of a link on which a process runs for seconds before all of its memory has come."""
KILLED = ("the tasks of a restore are killed", "a restore has failed")


@pytest.fixture(scope="module")
def single(testbed: Testbed, shelf: Path) -> Checkpoint:
    return dumped_lazily(lambda name: checkpoint(testbed, shelf / "single" / name, size_mib=64))


@pytest.fixture(scope="module")
def moving(testbed: Testbed, shelf: Path) -> Mover:
    return mover(testbed, shelf / "mover", "--size", "96", "--steps", "4000", "--zombie")


@pytest.fixture
def far(store: Store) -> Iterator[Weather]:
    """The registry behind a slow link."""
    with Weather(store.address, rate_bytes_s=SLOW_BYTES_S) as weather:
        yield weather


@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_memory_is_right_whatever_a_process_does_with_it_while_it_comes(
    store: Store, moving: Mover, far: Weather, work: Path, kept: str
) -> None:
    image = store.push("mover", moving)
    with (
        served(f"{far.address}/{image}", work, "--cache", kept) as (mount, criu),
        moving.restore(mount.directory, criu, criu / SOCKET_NAME) as process,
    ):
        assert moving.work(process).value == "0"
        assert wait_home(mount)["faults_fetched"] > 0


def test_a_process_that_exits_needs_its_memory_no_more(
    store: Store, testbed: Testbed, far: Weather, work: Path
) -> None:
    dumped = mover(testbed, work / "dump", "--size", "96", "--exit")
    image = store.push("exits", dumped)
    with (
        served(f"{far.address}/{image}", work) as (mount, criu),
        dumped.restore(mount.directory, criu, criu / SOCKET_NAME) as process,
    ):
        os.kill(process.pid, signal.SIGUSR1)
        told = wait_home(mount)
        assert told["bytes_faulted"] + told["bytes_background"] < 90 << 20


def test_unmounting_waits_until_all_memory_has_come(
    store: Store, single: Checkpoint, far: Weather, work: Path
) -> None:
    image = store.push("unmounted", single)
    with served(f"{far.address}/{image}", work) as (mount, criu):
        process = restored(single, mount, criu)
    with process:
        single.before.assert_goes_on(process)


def test_whoever_misses_memory_dies_with_the_daemon(
    store: Store, single: Checkpoint, far: Weather, work: Path
) -> None:
    image = store.push("killed", single)
    with served(f"{far.address}/{image}", work) as (mount, criu):
        with restored(single, mount, criu) as process:
            process.wait_first_loop()
            assert lazily(mount)["missing_bytes"] > 0
            mount.kill()
            wait_until(lambda: not is_alive(process.pid), "the process has been killed", 20)
            loops = process.status.events("loop")
            assert {event.value for event in loops} == {single.before.last[0].value}
        mount.start()


def test_all_children_die_with_the_daemon(
    store: Store, moving: Mover, far: Weather, work: Path
) -> None:
    image = store.push("children", moving)
    program = str(moving.testbed.program("mover"))
    mine = str(moving.status.path)

    def lives() -> list[str]:
        found = []
        for each in Path("/proc").glob("[0-9]*"):
            try:
                words = (each / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if words[0] == program and mine in words:
                found.append(each.name)
        return [pid for pid in found if is_alive(int(pid))]

    with served(f"{far.address}/{image}", work) as (mount, criu):
        with moving.restore(mount.directory, criu, criu / SOCKET_NAME) as process:
            os.kill(process.pid, signal.SIGUSR1)
            wait_until(lambda: len(lives()) > 1, "it has a child", 30)
            assert lazily(mount)["missing_bytes"] > 0
            mount.kill()
            wait_until(lambda: not lives(), "all have been killed", 20)
            assert not moving.status.events("done")
        mount.start()


def test_whoever_misses_memory_dies_when_the_daemon_is_stopped(
    store: Store, single: Checkpoint, far: Weather, work: Path
) -> None:
    image = store.push("stopped", single)
    with served(f"{far.address}/{image}", work, forgiven=KILLED) as (mount, criu):
        with restored(single, mount, criu) as process:
            os.kill(mount.status()["pid"], signal.SIGTERM)
            wait_until(lambda: not is_alive(process.pid), "the process has been killed", 20)
            assert not process.status.events("hash", process.started_s)
        wait_until(lambda: not os.path.ismount(mount.directory), "it is unmounted", 20)
        mount.start()


def test_whoever_misses_memory_that_cannot_be_had_is_killed(
    store: Store, single: Checkpoint, work: Path
) -> None:
    image = store.push("lost", single)
    options = ("--deadline", "1")
    excuses = (*KILLED, "gave up", "waiting to go on", "could not be fetched", "not proven yet")
    with (
        store.served_at(work / "far") as far,
        Weather(far.address, rate_bytes_s=16 << 20) as slow,
        served(f"{slow.address}/{image}", work, *options, forgiven=excuses) as (
            mount,
            criu,
        ),
        restored(single, mount, criu) as process,
    ):
        far.stop()
        wait_until(lambda: not is_alive(process.pid), "the process has been killed", 60)
        assert not process.status.events("hash", process.started_s)
        wait_until(lambda: lazily(mount)["state"] == "failed", "that it is told", 10)
        assert lazily(mount)["failed"]

"""lazyfs in the place of `criu lazy-pages`: real processes, restored by real CRIU."""

from pathlib import Path
from typing import Any

import pytest
from testbed import CriuError, Testbed

from lazyfs.lazypages.protocol import SOCKET_NAME
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.lazily import lazily, restored, served, wait_home
from tests.real.movers import dumped_lazily, mover

pytestmark = pytest.mark.real

KILLED = ("the tasks of a restore are killed", "a restore has failed")


@pytest.fixture(scope="module")
def single(testbed: Testbed, shelf: Path) -> Checkpoint:
    return dumped_lazily(lambda name: checkpoint(testbed, shelf / "single" / name, size_mib=64))


def test_a_process_goes_on_and_its_memory_comes(single: Checkpoint, work: Path) -> None:
    with served(str(single.layer), work) as (mount, criu):
        assert lazily(mount)["state"] == "waiting"
        with restored(single, mount, criu) as process:
            single.before.assert_goes_on(process)
            told = wait_home(mount)
            assert told["bytes_faulted"] + told["bytes_background"] > 64 << 20
            assert told["faults"] < 2000
            assert single.before.hashes == process.memory_hash()


@pytest.mark.parametrize(
    "options",
    [
        {"children": 2, "size_mib": 24, "shared_mib": 24},
        {"children": 2, "size_mib": 32, "cow": True},
        {"size_mib": 32, "pattern": "scattered", "percent": 30},
    ],
    ids=["shared-memory", "copy-on-write", "scattered"],
)
def test_a_family_goes_on(testbed: Testbed, work: Path, options: dict[str, Any]) -> None:
    family = checkpoint(testbed, work / "dump", **options)
    with (
        served(str(family.layer), work) as (mount, criu),
        restored(family, mount, criu) as processes,
    ):
        family.before.assert_goes_on(processes)
        wait_home(mount)
        assert family.before.hashes == processes.memory_hash()


@pytest.mark.parametrize("seed", [1, 2])
def test_memory_is_right_whatever_a_process_does_with_it_while_it_comes_quickly(
    testbed: Testbed, work: Path, seed: int
) -> None:
    dumped = mover(testbed, work / "dump", "--size", "64", "--seed", str(seed))
    with (
        served(str(dumped.layer), work) as (mount, criu),
        dumped.restore(mount.directory, criu, criu / SOCKET_NAME) as process,
    ):
        assert dumped.work(process).value == "0"
        wait_home(mount)


def test_one_mount_serves_one_restore_after_the_other(single: Checkpoint, work: Path) -> None:
    with served(str(single.layer), work) as (mount, criu):
        for count in (1, 2):
            with restored(single, mount, criu) as process:
                single.before.assert_goes_on(process)
                wait_home(mount)
            assert lazily(mount)["restores"] == count


def test_what_cannot_be_served_fails_the_restore(
    testbed: Testbed, single: Checkpoint, work: Path
) -> None:
    with served(str(single.layer), work, forgiven=KILLED) as (mount, criu):
        (criu / SOCKET_NAME).rename(criu / "aside")
        with pytest.raises(CriuError):
            restored(single, mount, criu)
        (criu / "aside").rename(criu / SOCKET_NAME)
        with restored(single, mount, criu) as process:
            single.before.assert_goes_on(process)
            wait_home(mount)

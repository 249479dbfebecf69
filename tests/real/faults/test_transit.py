"""Every fault that networks, servers and disks have, under real mounts and real restores.

In each case: several processes read random places of mounts of a plain tar, zstd:chunked, gzip and
SOCI layer while the faults come, and each byte that they get is compared with the extracted truth;
then it clears up, and each mount must recover: everything readable and right. What a fault may
cost is errors, never a wrong byte. After the last test the terminal has the sum of it.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import (
    PASSING,
    REFUSING,
    Fault,
    Forecast,
    Readers,
    TestbedError,
)
from testbed.process import wait_until

from tests.real.corpus import Corpus
from tests.real.faults.ledger import Ledger
from tests.real.faults.skies import (
    Sky,
    is_here,
    recover,
    weather_over,
)
from tests.real.mounts import Mount

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

READERS = 3
ENOUGH = 8
"""Faults in a case, if there is still anything to be fetched."""


@dataclass(frozen=True)
class Case:
    """A kind of fault, and how it is brought about."""

    fault: Fault
    options: tuple[str, ...] = ()
    chance: float = 0.5
    stall_s: float = 1.0
    early: bool = True
    """From before the mount on; else once there is one."""
    errors: bool = False
    """Whether readers may hear of it: it lasts longer than the deadline, or says itself that it
    is not what was asked for."""
    token_life_s: float | None = None
    url_life_s: float | None = None


CASES = (
    Case(Fault.RESET_BEFORE),
    Case(Fault.RESET_MIDWAY),
    Case(Fault.TRUNCATED),
    Case(Fault.GARBAGE, early=False, errors=True),
    Case(Fault.STORM, chance=0.3),
    Case(Fault.BUSY, chance=0.3),
    Case(Fault.DRIP),
    Case(Fault.STALL_BEFORE, ("--deadline=3",), chance=0.4, stall_s=4, early=False, errors=True),
    Case(Fault.STALL_MIDWAY, ("--deadline=3",), chance=0.4, stall_s=4, early=False, errors=True),
    Case(Fault.TOKEN_EXPIRED, token_life_s=1),
    Case(Fault.URL_EXPIRED, url_life_s=0.5),
    Case(Fault.SHIFTED_RANGE, early=False, errors=True),
    Case(Fault.WHOLE_BODY, early=False, errors=True),
)
assert {case.fault for case in CASES} == PASSING | REFUSING


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.name.lower())
def test_reads_are_right_or_errors_and_the_mounts_recover(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, case: Case
) -> None:
    entry = ledger[case.fault.value]
    forecast = Forecast.of(case.fault, chance=case.chance, stall_s=case.stall_s)
    lives = {"token_life_s": case.token_life_s, "url_life_s": case.url_life_s}
    with weather_over(forms, work, seed, **lives) as sky:
        if case.early:
            sky.weather.turn(forecast)
        with sky.mounts(*case.options) as mounts, Readers(READERS, seed=seed) as readers:
            sky.weather.turn(forecast)
            _read_until(
                readers,
                mounts.values(),
                sky,
                lambda: sky.weather.counts[case.fault] >= ENOUGH,
            )
            sky.weather.clear()
            weathered = readers.tally()
            entry.tally.add(weathered)
            assert not weathered.wrong, weathered.wrong
            with Readers(1, seed=seed) as sweeper:
                for mount in mounts.values():
                    entry.cases += 1
                    entry.tally.add(recover(sweeper, mount, sky.truth))
                    assert mount.status()["failed"] is None
                    entry.survived += 1
        ledger.note_weather(sky.weather.counts)
        assert sky.weather.counts[case.fault] > 0
    assert case.errors or not weathered.errors


def _read_until(
    readers: Readers,
    mounts: Collection[Mount],
    sky: Sky,
    enough: Callable[[], bool],
    most_s: float = 5,
) -> None:
    """Read at random until there were faults enough, or nothing is left to be fetched."""
    for mount in mounts:
        readers.add(mount.directory, sky.truth)
    with suppress(TestbedError):
        wait_until(lambda: enough() or all(map(is_here, mounts)), "enough", most_s)
    for mount in mounts:
        readers.drop(mount.directory)

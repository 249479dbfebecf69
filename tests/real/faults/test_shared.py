"""Several daemons on one cache, in bad weather: killed in mid-fetch, and short of room."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from testbed import PASSING, Fault, Forecast, Readers
from testbed.process import wait_until

from tests.real.corpus import Corpus
from tests.real.faults.ledger import Ledger
from tests.real.faults.skies import FORMS, WEATHERED, is_here, recover, weather_over
from tests.real.mounts import Mount, mounted

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

MIB = 1 << 20
DAEMONS = 4
BOUND_BYTES = 40 * MIB
OVERSHOOT_BYTES = 64 * MIB
"""What daemons may write before they look at the bound again: a credit each, and what is in use."""
_ROUGH = dict.fromkeys(PASSING - {Fault.TOKEN_EXPIRED, Fault.URL_EXPIRED, Fault.GARBAGE}, 1.0)


@pytest.mark.parametrize("name", list(FORMS))
def test_one_of_several_daemons_is_killed_in_mid_fetch(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, name: str
) -> None:
    """The others go on, and what it had fetched is not fetched again, but for what it held."""
    entry = ledger["kill -9 of one of several daemons"]
    with weather_over(forms, work, seed) as sky, ExitStack() as stack:
        cache = work / "cache"
        victim = Mount(sky.reference(name), work / "victim", (), cache)
        stack.callback(victim.clear)
        victim.start()
        others = [
            stack.enter_context(
                mounted(sky.reference(name), work / f"{number}", cache=cache, forgiven=WEATHERED)
            )
            for number in range(DAEMONS - 1)
        ]
        readers = stack.enter_context(Readers(2, seed=seed))
        for mount in (victim, *others):
            readers.add(mount.directory, sky.truth)
        sky.weather.wait_sent(4 * MIB)
        victim.kill()
        entry.faults += 1
        readers.drop(victim.directory)
        wait_until(lambda: all(map(is_here, others)), "that the others have it all", 60)
        for mount in others:
            readers.drop(mount.directory)
        for mount in others:
            entry.cases += 1
            entry.tally.add(recover(readers, mount, sky.truth))
            entry.survived += 1
        tally = readers.tally()
        assert not tally.wrong, tally.wrong
        assert set(tally.errors) <= {"ENOTCONN", "ECONNABORTED"}


def test_layers_are_evicted_in_bad_weather(
    forms: Corpus, work: Path, ledger: Ledger, seed: int
) -> None:
    """A cache that has room for less than two of four layers, which come and go."""
    entry = ledger["eviction"]
    cache = work / "cache"
    with weather_over(forms, work, seed) as sky, Readers(2, seed=seed) as readers:
        sky.weather.turn(Forecast(_ROUGH, chance=0.3, stall_s=0.5))
        there: set[str] = set()
        for number, name in enumerate(list(FORMS) * 2):
            reference, here = sky.reference(name), work / f"{number}"
            bound = f"--cache-size={BOUND_BYTES}"
            with mounted(reference, here, bound, cache=cache, forgiven=WEATHERED) as mount:
                entry.cases += 1
                entry.tally.add(recover(readers, mount, sky.truth))
                entry.survived += 1
            now = {path.name for path in (cache / "layers").iterdir()}
            entry.faults += len(there - now)
            there = now
            used = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
            assert used <= BOUND_BYTES + OVERSHOOT_BYTES
        assert entry.faults > 0
        tally = readers.tally()
        assert not tally.wrong, tally.wrong
        ledger.note_weather(sky.weather.counts)

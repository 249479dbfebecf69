"""Real CRIU through the weather: what comes up has its memory, or the mount's status says no.

CRIU <= 4.2 ignores some read errors, so `failed` and `failed_reads` are the last word: while they
are clean, a restore must succeed and its memory be intact; where they are not, what came up is
killed unseen, as README tells whoever drives a restore.
"""

from pathlib import Path

import pytest
from testbed import PASSING, CriuError, Fault, Forecast, Restored
from testbed.process import wait_until

from tests.real.checkpoints import Checkpoint
from tests.real.corpus import Corpus
from tests.real.faults.ledger import Ledger
from tests.real.faults.skies import FORMS, weather_over
from tests.real.faults.test_altered import LIED_TO
from tests.real.mounts import Mount

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

lazily = pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy-pages"])
_ROUGH = dict.fromkeys(PASSING - {Fault.TOKEN_EXPIRED, Fault.URL_EXPIRED, Fault.GARBAGE}, 1.0)
_LYING = dict.fromkeys(Fault, 1.0) | {Fault.FLIPPED_BITS: 3.0, Fault.WRONG_BYTES: 3.0}


@pytest.mark.parametrize(
    ("name", "lazy"),
    [*((name, False) for name in FORMS), ("tar", True), ("zstd:chunked", True)],
    ids=lambda value: {True: "lazy-pages", False: "eager"}.get(value, value),
)
def test_a_restore_through_rough_weather_has_its_memory(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, name: str, lazy: bool
) -> None:
    """Faults that pass within the deadline: nobody hears of them."""
    entry = ledger[f"CRIU {'lazy-pages' if lazy else 'restore'}, rough weather"]
    entry.cases += 1
    with weather_over(forms, work, seed) as sky:
        sky.weather.turn(Forecast(_ROUGH, chance=0.5, stall_s=1.0))
        with sky.mounts(formats=(name,)) as mounts:
            mount = mounts[name]
            process = forms.checkpoint
            with process.restore(mount.directory, work / "criu", lazy_pages=lazy) as restored:
                process.before.assert_goes_on(restored)
                restored.wait_lazy_pages()
            state = mount.status()
            assert (state["failed"], state["failed_reads"]) == (None, 0)
        ledger.note_weather(sky.weather.counts)
        assert sky.weather.counts.total() > 0
    entry.survived += 1


@lazily
@pytest.mark.parametrize(("name", "draw"), [("zstd:chunked", 0), ("soci", 1)])
def test_a_restore_through_lies_is_whole_or_known_to_have_failed(
    forms: Corpus, work: Path, ledger: Ledger, seed: int, name: str, lazy: bool, draw: int
) -> None:
    entry = ledger[f"CRIU {'lazy-pages' if lazy else 'restore'}, lies"]
    entry.cases += 1
    with weather_over(forms, work, seed + draw) as sky:
        with sky.mounts("--deadline=3", formats=(name,), forgiven=LIED_TO) as mounts:
            mount = mounts[name]
            sky.weather.turn(Forecast(_LYING, chance=0.5, stall_s=1.0))
            process = forms.checkpoint
            problem = "it does not go on, or with another memory"
            try:
                with process.restore(mount.directory, work / "criu", lazy_pages=lazy) as restored:
                    if _goes_on(process, restored, mount):
                        problem = ""
            except CriuError as error:
                problem = str(error)
            assert not problem or not _is_clean(mount), f"{problem}\n{mount.log_text()}"
            entry.faults += not _is_clean(mount)
            sky.weather.clear()
        ledger.note_weather(sky.weather.counts)
    entry.survived += 1


def _is_clean(mount: Mount) -> bool:
    state = mount.status()
    return state["failed"] is None and state["failed_reads"] == 0


def _goes_on(process: Checkpoint, restored: Restored, mount: Mount) -> bool:
    """Whether a process does its next loop with its memory, as far as the mount is clean."""

    def has(kind: str) -> bool:
        return bool(restored.status.events(kind, restored.started_s)) or not _is_clean(mount)

    wait_until(lambda: has("loop"), "a loop, or the mount's word that there will be none", 60)
    restored.ask_hash()
    wait_until(lambda: has("hash"), "a hash, or the mount's word that there will be none", 60)
    if not _is_clean(mount):
        return False
    process.before.assert_goes_on(restored)
    return True

"""`lazyfs restore` killed at random moments, its parts too: nothing of it is left.

And what is left of a restore that had ended well by then is intact.
"""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from testbed import Testbed, Weather
from testbed.process import children, wait_until

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.restoring import Restorer, alive

pytestmark = [pytest.mark.real, pytest.mark.timeout(600), pytest.mark.usefixtures("adopting")]

MIB = 1 << 20
RATE_BYTES_S = 24 * MIB
_KILLS = 21
_WAYS = ([], ["--lazy-pages"], ["--lazy-pages", "--pages-by=criu"])
_EARLY_SHARE = 0.4
"""Of the kills: at any time; the others while bytes arrive."""


@pytest.fixture(scope="module")
def dumped(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "dumped", size_mib=16, shared_mib=2, children=1)


def test_no_kill_leaves_anything_behind(
    testbed: Testbed, store: Store, dumped: Checkpoint, work: Path, seed: int
) -> None:
    chance = random.Random(seed)
    image = store.push("killed", dumped)
    outcomes: Counter[str] = Counter()
    with Weather(store.address, rate_bytes_s=RATE_BYTES_S) as weather:
        reference = f"{weather.address}/{image}"
        whole_s = _live(Restorer(testbed, work / "whole"), reference, dumped)
        for number in range(_KILLS):
            lazy = _WAYS[number % len(_WAYS)]
            restorer = Restorer(testbed, work / str(number))
            dumped.rewind()
            sent = weather.sent_bytes.total()
            process = restorer.start(restorer.words(reference, "--deadline=2", *lazy))
            if chance.random() < _EARLY_SHARE:
                time.sleep(chance.uniform(0, whole_s / 2))
            else:
                _wait_sent(weather, sent + chance.randrange(dumped.layer_bytes), process)
            struck = _strike(process.pid, dumped, chance)
            outcomes[struck] += 1
            started_s = time.time()
            ended = restorer.wait(process)
            print(number, struck, ended.code, ended.err.splitlines()[-2:], flush=True)
            is_blind = ended.code == -signal.SIGKILL  # nobody is there to say that it is whole
            if ended.code == 0 or (is_blind and _is_restored(dumped, restorer)):
                outcomes["was whole before"] += 1
                with alive(dumped.root_pid, dumped, started_s) as restored:
                    assert restored.memory_hash() == dumped.before.hashes
            restorer.assert_nothing_is_left()
            known = {event.value for event in dumped.before.last.values()}
            assert {event.value for event in dumped.status.events("loop")} <= known
    print(outcomes)
    assert outcomes["was whole before"] < _KILLS / 2


def _is_restored(dumped: Checkpoint, restorer: Restorer) -> bool:
    """Whether the tasks are there, and stay when all who might kill them are gone."""
    wait_until(
        lambda: all("/workload " in line for line in restorer.left()),
        f"the end of all that restores in {restorer.work}",
        20,
    )
    return any("/workload " in line for line in restorer.left())


def _live(restorer: Restorer, reference: str, dumped: Checkpoint) -> float:
    """Let one live; return its seconds."""
    dumped.rewind()
    began_s, started_s = time.monotonic(), time.time()
    ended = restorer.run(reference, "--lazy-pages")
    took_s = time.monotonic() - began_s
    assert ended.code == 0, ended
    with alive(dumped.root_pid, dumped, started_s):
        pass
    restorer.assert_nothing_is_left()
    return took_s


def _wait_sent(weather: Weather, count: int, process: "subprocess.Popen[str]") -> None:
    wait_until(
        lambda: weather.sent_bytes.total() >= count or process.poll() is not None, "bytes sent", 60
    )


def _strike(front: int, dumped: Checkpoint, chance: random.Random) -> str:
    """Send a signal to the front, the keeper, or something else that takes part; name it."""
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    whom = chance.choice(["front", "keeper", "keeper", "part"])
    pids = [front]
    if whom != "front":
        pids = children(front) or [front]
    if whom == "part" and pids != [front]:
        number = signal.SIGKILL
        pids = [pid for pid in children(pids[0]) if pid not in dumped.pids] or pids
    with suppress(ProcessLookupError):
        os.kill(chance.choice(pids), number)
    return f"{number.name} of the {whom}"

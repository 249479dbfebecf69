"""`lazyfs restore` with real CRIU, as a standby's child: whose the tasks are, when none is left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Testbed
from testbed.process import children, wait_until

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.restoring import Restorer, alive

pytestmark = [pytest.mark.real, pytest.mark.timeout(180), pytest.mark.usefixtures("adopting")]


@pytest.fixture(scope="module")
def dumped(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "dumped", size_mib=16, shared_mib=1, children=1)


@pytest.fixture(scope="module")
def image(store: Store, dumped: Checkpoint) -> str:
    """Its reference."""
    return f"{store.address}/{store.push('standby', dumped)}"


@pytest.fixture
def restorer(testbed: Testbed, work: Path, dumped: Checkpoint) -> Iterator[Restorer]:
    """Restores by a standby that is here."""
    dumped.rewind()
    restorer = Restorer(testbed, work)
    words = [sys.executable, "-m", "lazyfs", "standby"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=restorer.environment) as standby:
        assert standby.stdout is not None
        assert standby.stdout.readline().startswith(b"standing by")
        restorer.environment["LAZYFS_STANDBY"] = "must"
        yield restorer
        standby.terminate()
    restorer.assert_nothing_is_left()


@pytest.mark.parametrize("lazy", [(), ("--lazy-pages",)], ids=["eager", "lazy-pages"])
def test_what_is_restored_is_whole_and_has_the_parent_that_it_had_without(
    image: str, dumped: Checkpoint, restorer: Restorer, lazy: tuple[str, ...]
) -> None:
    started_s = time.time()
    ended = restorer.run(image, "--json", *lazy)
    assert (ended.code, ended.err) == (0, ""), ended
    with alive(ended.told["pid"], dumped, started_s) as restored:
        assert ended.told["pid"] in children(os.getpid())
        assert [line for line in restorer.left() if "workload" not in line] == []
        dumped.before.assert_goes_on(restored)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_ends_the_command_ends_the_restore(
    image: str, restorer: Restorer, number: signal.Signals
) -> None:
    """Killed, it tells nobody; nothing of the restore is left all the same (see the fixture)."""
    slow = restorer.work / "slow"
    criu = restorer.words(image)[restorer.words(image).index("--criu") + 1]
    slow.write_text(f'#!/bin/sh\necho > "{restorer.work}/begun"\nsleep 60\nexec {criu} "$@"\n')
    slow.chmod(0o755)
    process = restorer.start(restorer.words(image, f"--criu={slow}"))
    wait_until((restorer.work / "begun").exists, "CRIU is under way", 60)
    process.send_signal(number)
    ended = restorer.wait(process)
    assert ended.code == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not restorer.left(), "nothing is left", 20)


def test_a_caller_who_adopts_what_a_standby_cannot_give_him_is_declined(
    image: str, restorer: Restorer
) -> None:
    program = """
import ctypes, json, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
print(json.dumps([done.returncode, done.stderr]))
"""
    words = [sys.executable, "-c", program, *restorer.words(image)]
    ended = restorer.wait(restorer.start(words))
    code, said = json.loads(ended.out)
    assert code == 1
    assert "become children of who is to have them" in said

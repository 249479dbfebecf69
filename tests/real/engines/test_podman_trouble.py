"""When a restore of a stub goes wrong, Podman says why, and nothing of it is left."""

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
from testbed import Fault, Forecast, Weather
from testbed.process import children, tree, wait_until

from tests.real.conftest import Store
from tests.real.engines.machines import Machine
from tests.real.engines.origins import Origin
from tests.real.engines.places import enter, place, workloads

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_SLOW_BYTES_S = 8 << 20
_LAZILY = 'lazy-pages = "always"'
_EXPECTED = (
    " ERROR ",
    "a restore has failed",
    "cannot be restored",
    "whoever asked for the restore is gone",
)
"""What is logged of restores that fail."""


def test_of_a_dead_registry_podman_says_so(store: Store, made: Origin) -> None:
    """And when it is back, the same stub restores."""
    with place(store, made, forgiven=_EXPECTED) as there:
        there.here.policy("deadline = 1")
        there.weather.turn(Forecast.of(Fault.RESET_BEFORE, chance=1))
        said = there.here.fail_to_restore(there.stub)
        assert "lazyfs: " in said
        assert "cannot be restored" in said
        assert there.weather.address in said
        there.assert_nothing_is_left()
        there.weather.clear()
        there.here.policy()
        there.here.restore(there.stub).assert_goes_on(made.hashes)


def test_a_registry_that_is_not_there_is_named(store: Store, made: Origin) -> None:
    with ExitStack() as stack:
        weather = stack.enter_context(Weather(store.address))
        there = enter(stack, store, made, weather, _EXPECTED)
        weather.__exit__(None, None, None)
        there.here.policy("deadline = 1")
        assert weather.address in there.here.fail_to_restore(there.stub)
        there.assert_nothing_is_left()


@pytest.mark.parametrize("policy", ["", _LAZILY], ids=["eager", "lazy-pages"])
def test_no_container_runs_with_wrong_bytes(store: Store, made: Origin, policy: str) -> None:
    with place(store, made, forgiven=_EXPECTED) as there:
        there.here.policy(policy)
        there.weather.turn(Forecast.of(Fault.FLIPPED_BITS, chance=1))
        restore = there.start()
        said, _ = restore.communicate(timeout=120)
        if not policy:
            assert restore.returncode != 0
            assert "digest" in said
        there.assert_nothing_is_left()


def test_pages_come_while_the_container_runs(store: Store, made: Origin) -> None:
    """With lazy pages it runs long before the last of them is here."""
    with place(store, made, rate_bytes_s=_SLOW_BYTES_S, forgiven=_EXPECTED) as there:
        there.here.policy(_LAZILY)
        resumed = there.here.restore(there.stub)
        assert there.crossed_bytes < there.layer_bytes / 2
        resumed.assert_goes_on(made.hashes)
        assert there.crossed_bytes > there.layer_bytes / 2


def test_a_container_is_removed_while_its_pages_come(store: Store, made: Origin) -> None:
    with place(store, made, rate_bytes_s=_SLOW_BYTES_S, forgiven=_EXPECTED) as there:
        there.here.policy(_LAZILY)
        there.here.restore(there.stub)
        assert there.crossed_bytes < there.layer_bytes / 2
        there.here.podman("rm", "--force", "--time", "0", "workload")
        there.assert_nothing_is_left()
        assert there.crossed_bytes < there.layer_bytes


def test_a_container_whose_pages_cannot_be_had_is_killed(store: Store, made: Origin) -> None:
    """Its registry dies for good while it runs; it must not live on with zeros for memory."""
    with place(store, made, rate_bytes_s=_SLOW_BYTES_S, forgiven=_EXPECTED) as there:
        there.here.policy(f"{_LAZILY}\ndeadline = 2")
        resumed = there.here.restore(there.stub)
        assert resumed.container.state() == "running"
        there.weather.turn(Forecast.of(Fault.RESET_BEFORE, chance=1))
        there.weather.drop_connections()
        wait_until(lambda: not workloads(there.here), "the container is killed", 60)
        wait_until(lambda: resumed.container.state() == "exited", "Podman has seen it", 30)
        there.assert_nothing_is_left()


@pytest.mark.parametrize("victim", ["podman", "conmon", "front", "keeper", "mount", "runc", "criu"])
def test_whoever_is_killed_during_a_restore_nothing_is_left(
    store: Store, made: Origin, victim: str
) -> None:
    """Podman's own death does not end a restore: conmon brings it to its end."""
    with place(store, made, rate_bytes_s=_SLOW_BYTES_S, forgiven=_EXPECTED) as there:
        restore = there.start()
        wait_until(lambda: there.crossed_bytes > 1 << 20, "the restore is under way", 60)
        for pid in wait_until(lambda: _of(there.here, restore, victim) or None, f"a {victim}", 60):
            os.kill(pid, signal.SIGKILL)
        restore.communicate(timeout=120)
        if victim == "podman":
            wait_until(lambda: workloads(there.here), "conmon's restore is under way", 60)
            there.here.podman("rm", "--force", "--time", "0", "workload")
        there.assert_nothing_is_left()


def _of(here: Machine, restore: subprocess.Popen[str], name: str) -> list[int]:
    """Return a machine's processes by their parts in a restore; none if it has not begun."""
    everybody = tree(here.session.pid) + tree(restore.pid)  # Podman itself is nobody's child there
    if name not in ("front", "keeper", "mount"):
        return [pid for pid in everybody if _program(pid) == name]
    runtimes = {pid for pid in everybody if _program(pid) == "runc"}
    fronts = [pid for pid in everybody if set(children(pid)) & runtimes - {pid}]
    keepers = [pid for front in fronts for pid in children(front) if pid not in runtimes]
    mounts = [pid for keeper in keepers for pid in children(keeper)]
    if not len(fronts) == len(keepers) == len(mounts) == 1:
        return []  # they are just being started
    return {"front": fronts, "keeper": keepers, "mount": mounts}[name]


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""

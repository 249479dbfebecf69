"""When a restore of a stub goes wrong, Podman says why, and nothing of it is left."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from testbed import Fault, Forecast, Weather
from testbed.process import children, tree, wait_until

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, machine
from tests.real.engines.origins import Origin, layer_of, origin

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_FORM = "zstd:chunked"
_SLOW_BYTES_S = 8 << 20
_LAZILY = 'lazy-pages = "always"'
_EXPECTED = (" ERROR ", "cannot be restored", "whoever asked for the restore is gone")
"""What is logged of restores that fail."""


@pytest.fixture(scope="module")
def made(store: Store, shelf: Path) -> Origin:
    return origin(store, shelf, formats=[_FORM])


class Place:
    """A machine, and the weather before the registry that the stub's real image comes from."""

    def __init__(self, here: Machine, weather: Weather, made: Origin) -> None:
        self.here, self.weather, self.made = here, weather, made
        self.stub = f"{made.repository}:through-{weather.address.rpartition(':')[2]}"
        real = made.real(_FORM).replace(made.repository.partition("/")[0], weather.address)
        here.stub(made.real(_FORM), self.stub, "--real", real)
        here.podman("pull", "--quiet", self.stub)
        self.layer, self.layer_bytes = layer_of(made.real(_FORM))

    @property
    def crossed_bytes(self) -> int:
        """How much of the real layer has been sent."""
        return self.weather.sent_bytes[self.layer]

    def start(self) -> subprocess.Popen[str]:
        """Start a `podman container restore`."""
        return subprocess.Popen(
            self.here.podman.command("container", "restore", self.stub),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def assert_nothing_is_left(self) -> None:
        """See that no process of the container or of lazyfs is left, and `podman rm` removes it."""
        wait_until(lambda: not workloads(self.here), "the container's processes are gone", 30)
        self.here.wait_alone()
        self.here.podman("rm", "--force", "--time", "0", "--ignore", "workload")
        assert self.here.podman("ps", "--all", "--quiet") == ""


@contextmanager
def _place(store: Store, made: Origin, rate_bytes_s: float | None = None) -> Iterator[Place]:
    with ExitStack() as stack:
        weather = stack.enter_context(Weather(store.address, rate_bytes_s=rate_bytes_s))
        yield _enter(stack, store, made, weather)


def _enter(stack: ExitStack, store: Store, made: Origin, weather: Weather) -> Place:
    addresses = [store.address]
    here = machine(store.testbed, [], addresses, name=made.cgroup, forgiven=_EXPECTED)
    return Place(stack.enter_context(here), weather, made)


def workloads(here: Machine) -> list[int]:
    """Return the container's processes."""
    found = []
    for pid in tree(here.session.pid):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "workload":
                found.append(pid)
        except OSError:
            continue
    return found


def test_of_a_dead_registry_podman_says_so(store: Store, made: Origin) -> None:
    """And when it is back, the same stub restores."""
    with _place(store, made) as place:
        place.here.policy("deadline = 1")
        place.weather.turn(Forecast.of(Fault.RESET_BEFORE, chance=1))
        said = place.here.fail_to_restore(place.stub)
        assert "lazyfs: " in said
        assert "cannot be restored" in said
        assert place.weather.address in said
        place.assert_nothing_is_left()
        place.weather.clear()
        place.here.policy()
        place.here.restore(place.stub).assert_goes_on(made.hashes)


def test_a_registry_that_is_not_there_is_named(store: Store, made: Origin) -> None:
    with ExitStack() as stack:
        weather = stack.enter_context(Weather(store.address))
        place = _enter(stack, store, made, weather)
        weather.__exit__(None, None, None)
        place.here.policy("deadline = 1")
        assert weather.address in place.here.fail_to_restore(place.stub)
        place.assert_nothing_is_left()


@pytest.mark.parametrize("policy", ["", _LAZILY], ids=["eager", "lazy-pages"])
def test_no_container_runs_with_wrong_bytes(store: Store, made: Origin, policy: str) -> None:
    with _place(store, made) as place:
        place.here.policy(policy)
        place.weather.turn(Forecast.of(Fault.FLIPPED_BITS, chance=1))
        restore = place.start()
        said, _ = restore.communicate(timeout=120)
        if not policy:
            assert restore.returncode != 0
            assert "digest" in said
        place.assert_nothing_is_left()


def test_pages_come_while_the_container_runs(store: Store, made: Origin) -> None:
    """With lazy pages it runs long before the last of them is here."""
    with _place(store, made, rate_bytes_s=_SLOW_BYTES_S) as place:
        place.here.policy(_LAZILY)
        resumed = place.here.restore(place.stub)
        assert place.crossed_bytes < place.layer_bytes / 2
        resumed.assert_goes_on(made.hashes)
        assert place.crossed_bytes > place.layer_bytes / 2


def test_a_container_is_removed_while_its_pages_come(store: Store, made: Origin) -> None:
    with _place(store, made, rate_bytes_s=_SLOW_BYTES_S) as place:
        place.here.policy(_LAZILY)
        place.here.restore(place.stub)
        assert place.crossed_bytes < place.layer_bytes / 2
        place.here.podman("rm", "--force", "--time", "0", "workload")
        place.assert_nothing_is_left()
        assert place.crossed_bytes < place.layer_bytes


def test_a_container_whose_pages_cannot_be_had_is_killed(store: Store, made: Origin) -> None:
    """Its registry dies for good while it runs; it must not live on with zeros for memory."""
    with _place(store, made, rate_bytes_s=_SLOW_BYTES_S) as place:
        place.here.policy(f"{_LAZILY}\ndeadline = 2")
        resumed = place.here.restore(place.stub)
        assert resumed.container.state() == "running"
        place.weather.turn(Forecast.of(Fault.RESET_BEFORE, chance=1))
        place.weather.drop_connections()
        wait_until(lambda: not workloads(place.here), "the container is killed", 60)
        wait_until(lambda: resumed.container.state() == "exited", "Podman has seen it", 30)
        place.assert_nothing_is_left()


@pytest.mark.parametrize("victim", ["podman", "conmon", "front", "keeper", "mount", "runc", "criu"])
def test_whoever_is_killed_during_a_restore_nothing_is_left(
    store: Store, made: Origin, victim: str
) -> None:
    """Podman's own death does not end a restore: conmon brings it to its end."""
    with _place(store, made, rate_bytes_s=_SLOW_BYTES_S) as place:
        restore = place.start()
        wait_until(lambda: place.crossed_bytes > 1 << 20, "the restore is under way", 60)
        for pid in _of(place.here, victim):
            os.kill(pid, signal.SIGKILL)
        restore.communicate(timeout=120)
        if victim == "podman":
            wait_until(lambda: workloads(place.here), "conmon's restore is under way", 60)
            place.here.podman("rm", "--force", "--time", "0", "workload")
        place.assert_nothing_is_left()


def _of(here: Machine, name: str) -> list[int]:
    """Return a machine's processes by their parts in a restore."""
    everybody = tree(here.session.pid)
    if name not in ("front", "keeper", "mount"):
        return [pid for pid in everybody if _program(pid) == name]
    runtimes = {pid for pid in everybody if _program(pid) == "runc"}
    (front,) = (pid for pid in everybody if set(children(pid)) & runtimes - {pid})
    keeper = next(pid for pid in children(front) if pid not in runtimes)
    (mount,) = children(keeper)
    return [{"front": front, "keeper": keeper, "mount": mount}[name]]


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""

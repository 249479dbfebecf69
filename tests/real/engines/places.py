"""A machine, and the weather before the registry that a stub's real image comes from."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from testbed import Weather
from testbed.process import tree, wait_until

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, machine
from tests.real.engines.origins import Origin, layer_of

FORM = "zstd:chunked"


class Place:
    """A machine, and the weather before the registry that the stub's real image comes from."""

    def __init__(self, here: Machine, weather: Weather, made: Origin) -> None:
        self.here, self.weather, self.made = here, weather, made
        self.stub = f"{made.repository}:through-{weather.address.rpartition(':')[2]}"
        real = made.real(FORM).replace(made.repository.partition("/")[0], weather.address)
        here.stub(made.real(FORM), self.stub, "--real", real)
        here.podman("pull", "--quiet", self.stub)
        self._layer, self.layer_bytes = layer_of(made.real(FORM))
        self._before = weather.sent_bytes[self._layer]

    @property
    def crossed_bytes(self) -> int:
        """How much of the real layer has been sent since the stub was made."""
        return self.weather.sent_bytes[self._layer] - self._before

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start a `podman container restore`."""
        return subprocess.Popen(
            self.here.podman.command("container", "restore", *options, self.stub),
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
def place(
    store: Store,
    made: Origin,
    *,
    rate_bytes_s: float | None = None,
    forgiven: Sequence[str] = (),
) -> Iterator[Place]:
    """Give a place for the length of a block; its options are `Weather`'s and `machine`'s."""
    with ExitStack() as stack:
        weather = stack.enter_context(Weather(store.address, rate_bytes_s=rate_bytes_s))
        yield enter(stack, store, made, weather, forgiven)


def enter(
    stack: ExitStack, store: Store, made: Origin, weather: Weather, forgiven: Sequence[str]
) -> Place:
    """Put a machine behind weather that has begun, until the stack is left."""
    addresses = [store.address]
    here = machine(store.testbed, [], addresses, name=made.cgroup, forgiven=forgiven)
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

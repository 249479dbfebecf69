"""Unmodified Podman restores from stubs: containers go on, with their memory as it was."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Status, TestbedError
from testbed.process import wait_until

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, Resumed, machine
from tests.real.engines.origins import FORMATS, Origin, checkpoint_and_push
from tests.real.engines.places import place

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_LAZILY = 'lazy-pages = "always"'
_MANY = 5

every_format = pytest.mark.parametrize("form", FORMATS)
either_way = pytest.mark.parametrize("policy", ["", _LAZILY], ids=["eager", "lazy-pages"])


@pytest.fixture
def here(store: Store, made: Origin, work: Path) -> Iterator[Machine]:
    with machine(store.testbed, [work], [store.address], name=made.cgroup) as found:
        yield found


@every_format
@either_way
def test_a_stub_goes_on_where_its_container_was(
    made: Origin, here: Machine, form: str, policy: str
) -> None:
    here.policy(policy)
    resumed = here.restore(made.stub(form))
    resumed.assert_goes_on(made.hashes)
    assert resumed.container.state() == "running"


def test_run_restores_a_stub_too(made: Origin, here: Machine) -> None:
    """As it does any checkpoint image: it pulls and restores by one command."""
    began_s = time.time()
    here.podman("run", "--quiet", "--name", "again", made.stub("zstd:chunked"))
    Resumed(here.podman.container("again"), began_s).assert_goes_on(made.hashes)


@either_way
def test_five_at_once_from_one_stub(store: Store, made: Origin, policy: str) -> None:
    """Their memory is fetched once."""
    with place(store, made) as there:
        there.here.policy(policy)
        names = [f"workload-{number}" for number in range(_MANY)]
        began_s = time.time()
        restores = [there.start("--name", name) for name in names]
        for restore in restores:
            said, _ = restore.communicate(timeout=120)
            assert restore.returncode == 0, said
        for name in names:
            Resumed(there.here.podman.container(name), began_s).assert_goes_on(made.hashes)
        assert there.crossed_bytes < 1.5 * there.layer_bytes


def test_what_was_restored_is_a_container_like_any_other(made: Origin, here: Machine) -> None:
    """It is entered, stopped, and started anew from its image."""
    resumed = here.restore(made.stub("zstd:chunked"))
    resumed.assert_goes_on(made.hashes)
    podman = here.podman
    assert podman("exec", "workload", "/bin/busybox", "echo", "inside") == "inside"
    podman("stop", "--time", "1", "workload")
    assert resumed.container.state() == "exited"
    here.wait_alone()
    began_s = time.time()
    podman("start", "workload")
    resumed.container.status.wait_loop(began_s)
    assert here.lazyfs_processes() == []


@either_way
def test_it_is_checkpointed_and_restored_again(
    store: Store, made: Origin, here: Machine, work: Path, policy: str
) -> None:
    """Each checkpoint is a whole one, of which there is a stub again."""
    here.policy(policy)
    resumed = here.restore(made.stub("zstd:chunked"))
    resumed.assert_goes_on(made.hashes)
    here.wait_alone()
    again = Origin(made.cgroup, made.runtime, f"{made.repository}/{work.name}", made.hashes)
    checkpoint_and_push(here, "workload", again, work, ["gzip"])
    with machine(store.testbed, [], [store.address], name=made.cgroup) as there:
        there.policy(policy)
        there.restore(again.stub("gzip")).assert_goes_on(made.hashes)


def test_no_checkpoint_is_written_over_a_kept_stub(made: Origin, here: Machine) -> None:
    """`restore --keep` leaves it where the next checkpoint goes; new pages never mix with it."""
    here.restore(made.stub("zstd:chunked"), "--keep").assert_goes_on(made.hashes)
    with pytest.raises(TestbedError, match="criu failed"):
        here.podman("container", "checkpoint", "workload")
    kept = here.podman.container("workload")
    assert kept.state() == "running"
    assert Status(kept.status.path, len(made.hashes)).wait_hashes(kept.ask_hash) == made.hashes


def test_its_output_goes_on_and_ends_with_it(here: Machine, made: Origin) -> None:
    """Nothing of lazyfs holds the pipes that conmon reads to their end."""
    podman, image = here.podman, f"{made.repository}/talking:1"
    script = "n=0; while :; do echo $n; n=$((n+1)); /bin/busybox usleep 20000; done"
    base, parent = f"{made.repository}/base:1", f"/{made.cgroup}"
    run = ["run", "--quiet", "--detach", "--name", "talking", "--cgroup-parent", parent]
    podman(*run, base, "/bin/sh", "-c", script)
    _wait_output(here, "3")
    podman("container", "checkpoint", "--create-image", image, "talking")
    said = podman("logs", "talking").splitlines()
    podman("push", "--quiet", image)
    here.stub(image, f"{image}-stub")
    podman("rm", "talking")
    podman("pull", "--quiet", f"{image}-stub")
    podman("container", "restore", f"{image}-stub")
    following = str(int(said[-1]) + 1)
    _wait_output(here, following)
    podman("stop", "--time", "0", "talking", timeout_s=20)
    lines = podman("logs", "talking").splitlines()
    numbers = [int(line) for line in lines if int(line) > int(said[-1])]
    assert numbers == list(range(int(following), int(following) + len(numbers)))
    here.wait_alone()


def _wait_output(here: Machine, line: str) -> None:
    wait_until(
        lambda: line in here.podman("logs", "talking").splitlines(), f"{line!r} in the output", 30
    )


def test_without_lazyfs_a_stub_is_refused(store: Store, made: Origin) -> None:
    """CRIU misses the pages: no container comes up without its memory."""
    with machine(store.testbed, [], [store.address], name=made.cgroup, wrapped=False) as plain:
        plain.podman("pull", "--quiet", made.stub("gzip"))
        assert "criu failed" in plain.fail_to_restore(made.stub("gzip"))
        (log,) = plain.session.path("/var/lib/containers/storage/overlay-containers").glob(
            "*/userdata/restore.log"
        )
        assert re.search("Error.*Unable to open pages-", log.read_text(errors="replace"))
        assert plain.podman("ps", "--quiet") == ""

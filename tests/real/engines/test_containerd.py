"""Unmodified containerd restores from stubs: containers go on, with their memory as it was."""

import json
import os
import signal
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Layer, Testbed, Weather, push_oci_image
from testbed.engines import STATUS, write_base
from testbed.process import wait_until
from testbed.workload import workload_options

from tests.real.conftest import Store
from tests.real.engines.containerd_calls import record
from tests.real.engines.machines import assert_goes_on
from tests.real.engines.nodes import WRAPPER, Node, install_wrapper, node

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_RECORDED = Path(__file__).parents[2] / "data/engines/containerd.json"
_SIZE_MIB, _CHILDREN = 32, 1
_CONTRIB = Path(__file__).parents[3] / "contrib/containerd"
_SLOW_BYTES_S = 4 << 20
_OPT_RUNC = "/opt/containerd/bin/runc"
_WORK = "/var/lib/containers/containerd/io.containerd.runtime.v2.task/default"
_CHECKPOINTS = "/tmp"  # where containerd unpacks them


@dataclass(frozen=True)
class _Made:
    """Checkpoints of one container in a registry: one that names the wrapper, one that does not."""

    cgroup: str
    repository: str
    """In the registry, wherever that is reached."""
    hashes: dict[str, tuple[str, ...]]
    """By tag: of its processes' memory."""


@pytest.fixture(scope="module")
def made(store: Store, shelf: Path) -> _Made:
    made = _Made(f"lazyfs-{shelf.name}-containerd", f"{shelf.name}/containerd", {})
    for tag, options in {"wrapped": ["--runc-binary", WRAPPER], "plain": []}.items():
        with node(store.testbed, shelf, store.address, name=made.cgroup) as here:
            reference = f"{store.address}/{made.repository}:{tag}"
            running = here.containerd.run_workload(
                options=options, size_mib=_SIZE_MIB, children=_CHILDREN
            )
            made.hashes[tag] = running.memory_hash()
            running.checkpoint(reference)
            here.here.stub(reference, f"{reference}-stub")
    return made


@pytest.fixture
def here(store: Store, shelf: Path, made: _Made) -> Iterator[Node]:
    with node(store.testbed, shelf, store.address, name=made.cgroup) as found:
        yield found


@pytest.fixture
def stub(store: Store, made: _Made) -> str:
    return f"{store.address}/{made.repository}:wrapped-stub"


def _commands(readme: str) -> list[str]:
    """Return the commands of a README's section about ctr."""
    section = readme.partition("## ctr")[2].partition("\n## ")[0]
    return [line.strip()[2:] for line in section.splitlines() if line.strip()[:2] in ("$ ", "# ")]


def test_containerd_calls_its_runtime_as_was_recorded(testbed: Testbed, work: Path) -> None:
    assert record(testbed, work) == json.loads(_RECORDED.read_text())


@pytest.mark.parametrize("lazy_pages", ["never", "always"])
def test_a_stub_goes_on_where_its_container_was(
    made: _Made, here: Node, stub: str, lazy_pages: str
) -> None:
    here.here.policy(f'lazy-pages = "{lazy_pages}"')
    began_s = time.time()
    running = here.restore(stub, members=1 + _CHILDREN)
    assert_goes_on(running, began_s, made.hashes["wrapped"])
    unpacked = list(here.here.session.path(_CHECKPOINTS).glob("ctrd-checkpoint*/*"))
    assert unpacked
    assert sum(path.lstat().st_size for path in unpacked) < 1 << 20
    log = here.here.session.path(f"{_WORK}/workload/restore.log").read_text(errors="replace")
    assert ("uffd" in log) == (lazy_pages == "always")


def test_the_readme_does_what_it_says(store: Store, shelf: Path, made: _Made, here: Node) -> None:
    """The lines are run as they stand, but for the registry, and what keeps the testbed tidy."""
    commands = _commands((_CONTRIB / "README.md").read_text())
    assert len(commands) == 9
    place = f"{store.address}/{made.repository}-readme"
    write_base(store.testbed, shelf / "readme.tar")
    push_oci_image(
        store.address, f"{made.repository}-readme/web", "1", [Layer(shelf / "readme.tar")]
    )
    here.containerd.ctr("image", "pull", "--plain-http", f"{place}/web:1")
    words = workload_options(Path(STATUS), size_mib=8)
    changes = {
        "registry.example": place,
        "ctr run": f"ctr run --null-io --cgroup /{made.cgroup}/web",
        "web:1 web": "web:1 web /workload " + " ".join(words),
        "ctr image push": "ctr image push --plain-http",
        "ctr image pull": "ctr image pull --plain-http",
        "ctr content fetch": "ctr content fetch --plain-http",
        "lazyfs stub": f"{here.here.bin}/lazyfs stub --plain-http",
    }
    for command in commands:
        changed = command
        for written, run in changes.items():
            if not (written == "web:1 web" and "ctr run" not in command):
                changed = changed.replace(written, run)
        if "container restore" in command:
            here.containerd.task("web").remove()
            began_s = time.time()
        here.here.session.run(["sh", "-ec", changed])
        if "ctr run" in command:
            here.containerd.task("web").status.wait_loop()
    here.containerd.task("web").status.wait_loop(began_s)


def test_the_drop_in_is_understood(store: Store, here: Node) -> None:
    folder = here.here.session.path("/etc/containerd/conf.d")
    folder.mkdir(parents=True)
    (folder / "lazyfs.toml").write_text((_CONTRIB / "lazyfs.toml").read_text())
    main = 'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n'
    (folder.parent / "config.toml").write_text(main)
    dumped = tomllib.loads(here.here.session.run(["containerd", "config", "dump"]))
    cri = dumped["plugins"]["io.containerd.grpc.v1.cri"]
    handler = cri["containerd"]["runtimes"]["lazyfs"]
    assert handler["options"]["BinaryName"] == WRAPPER
    assert handler["runtime_type"] == "io.containerd.runc.v2"
    assert handler["pod_annotations"] == ["io.lazyfs.*"]
    newer = tomllib.loads((_CONTRIB / "lazyfs-2.toml").read_text())
    newer_cri = newer["plugins"]["io.containerd.cri.v1.runtime"]
    newer_handler = newer_cri["containerd"]["runtimes"]["lazyfs"]
    assert newer_handler["options"]["BinaryName"] == WRAPPER


def test_a_runc_before_all_others_restores_what_names_no_runtime(
    store: Store, made: _Made, here: Node
) -> None:
    install_wrapper(here.here, _OPT_RUNC)
    began_s = time.time()
    running = here.restore(f"{store.address}/{made.repository}:plain-stub", members=1 + _CHILDREN)
    assert_goes_on(running, began_s, made.hashes["plain"])
    again = here.containerd.run_workload("fresh", size_mib=4)
    assert again.state() == "RUNNING"


def test_without_lazyfs_a_stub_is_refused(store: Store, made: _Made, here: Node) -> None:
    """CRIU misses the pages: no container comes up without its memory."""
    stub = f"{store.address}/{made.repository}:plain-stub"
    here.fetch(stub)
    said = here.fail_to_restore(stub)
    assert said.startswith("OCI runtime restore failed: criu failed: type NOTIFY errno 0"), said
    assert not here.workloads()


def test_five_are_restored_at_once(made: _Made, here: Node, stub: str) -> None:
    here.fetch(stub)
    names = [f"copy-{number}" for number in range(5)]
    began_s = time.time()
    begun = [here.begin_restore(stub, name) for name in names]
    said = [process.communicate(timeout=120)[1] for process in begun]
    assert said == [b""] * len(names)
    for name in names:
        running = here.containerd.task(name, members=1 + _CHILDREN)
        assert_goes_on(running, began_s, made.hashes["wrapped"])


def test_what_was_restored_is_checkpointed_and_restored_again(
    store: Store, shelf: Path, made: _Made, stub: str
) -> None:
    again = f"{store.address}/{made.repository}:again"
    with node(store.testbed, shelf, store.address, name=made.cgroup) as first:
        running = first.restore(stub, members=1 + _CHILDREN)
        hashes = running.memory_hash()
        first.containerd.ctr("image", "rm", "--sync", stub)  # contrib/containerd says why
        running.checkpoint(again)
        first.here.stub(again, f"{again}-stub")
    with node(store.testbed, shelf, store.address, name=made.cgroup) as second:
        began_s = time.time()
        running = second.restore(f"{again}-stub", members=1 + _CHILDREN)
        assert_goes_on(running, began_s, hashes)


def test_a_registry_that_is_gone_is_what_ctr_tells(
    store: Store, shelf: Path, work: Path, made: _Made
) -> None:
    gone = ["cannot be restored", "connection"]
    with store.served_at(work / "own") as own:
        reference = f"{own.address}/{made.repository}:wrapped"
        with node(store.testbed, shelf, own.address, name=made.cgroup, forgiven=gone) as here:
            here.here.policy("deadline = 2.0")
            here.here.stub(reference, f"{reference}-own")
            here.fetch(f"{reference}-own")
            own.kill()
            said = here.fail_to_restore(f"{reference}-own")
            assert said.startswith(
                "OCI runtime restore failed: lazyfs: workload cannot be restored"
            )
            assert own.address in said
            here.here.wait_alone()
            assert not here.workloads()
            here.containerd.task("workload").remove()
            own.start()
            began_s = time.time()
            running = here.restore(f"{reference}-own", members=1 + _CHILDREN)
            assert_goes_on(running, began_s, made.hashes["wrapped"])


def test_a_restore_that_fails_midway_takes_no_other_with_it(
    store: Store, shelf: Path, work: Path, made: _Made
) -> None:
    """`ctr` restores all copies of a container into the cgroup that the first one had."""
    with (
        store.served_at(work / "own") as own,
        Weather(own.address, seed=1, rate_bytes_s=_SLOW_BYTES_S) as slow,
    ):
        quick = f"{store.address}/{made.repository}:wrapped"
        reference = f"{slow.address}/{made.repository}:wrapped"
        with node(store.testbed, shelf, slow.address, name=made.cgroup, forgiven=[""]) as here:
            here.here.policy('deadline = 2.0\ncache = "memory"')
            here.here.stub(quick, f"{quick}-slow", "--real", reference)
            here.fetch(f"{quick}-slow")
            began_s = time.time()
            other = here.restore(f"{quick}-stub", "other", members=1 + _CHILDREN)
            assert_goes_on(other, began_s, made.hashes["wrapped"])
            here.here.wait_alone()
            begun = here.begin_restore(f"{quick}-slow", "workload")
            mounted = f"mounted {slow.address}"
            wait_until(lambda: mounted in here.here.log(), "the mount", 60)
            own.kill()
            _, said = begun.communicate(timeout=120)
            assert b"OCI runtime restore failed: lazyfs: workload cannot be restored" in said
            here.here.wait_alone()
            other.status.wait_loop(time.time())
            assert other.state() == "RUNNING"


@pytest.mark.parametrize(
    ("lazy_pages", "moment"), [("never", "mounting"), ("never", "reading"), ("always", "reading")]
)
def test_a_shim_that_is_killed_takes_its_restore_with_it_and_no_other(
    store: Store, shelf: Path, work: Path, made: _Made, lazy_pages: str, moment: str
) -> None:
    """`ctr` restores all copies of a container into the cgroup that the first one had."""
    quick = f"{store.address}/{made.repository}:wrapped"
    with (
        store.served_at(work / "own") as own,
        Weather(own.address, seed=1, rate_bytes_s=_SLOW_BYTES_S) as slow,
        node(store.testbed, shelf, slow.address, name=made.cgroup, forgiven=[""]) as here,
    ):
        here.here.policy(f'lazy-pages = "{lazy_pages}"\ncache = "memory"')
        real = f"{slow.address}/{made.repository}:wrapped"
        here.here.stub(quick, f"{quick}-slow", "--real", real)
        here.fetch(f"{quick}-slow")
        other = here.restore(f"{quick}-stub", "other", members=1 + _CHILDREN)
        here.here.wait_alone()
        shims, running = here.shims(), sorted(here.workloads())
        assert len(running) == 1 + _CHILDREN
        if moment == "mounting":
            own.freeze()
        begun = here.begin_restore(f"{quick}-slow")
        awaited = "lazyfs" if moment == "mounting" else "criu swrk"
        wait_until(lambda: awaited in "".join(here.here.lazyfs_processes()), awaited, 60)
        (shim,) = wait_until(lambda: here.shims() - shims or None, "the shim", 30)
        os.kill(shim, signal.SIGKILL)
        _, said = begun.communicate(timeout=60)
        assert begun.returncode != 0, said
        own.thaw()
        here.here.wait_alone()
        assert sorted(here.workloads()) == running
        if other.state() == "PAUSED":  # seen at times: they share a freezer, too
            here.containerd.ctr("task", "resume", "other")
        other.status.wait_loop(time.time())

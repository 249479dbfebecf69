"""Stubs restored through conmon, called as CRI-O calls it."""

import json
import os
import signal
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Recorder, Testbed, TestbedError
from testbed.crio import CrioPod
from testbed.process import wait_until

from tests.real.conftest import Store
from tests.real.engines.crio_calls import push_checkpoint, record
from tests.real.engines.machines import Machine, assert_goes_on, machine
from tests.real.engines.nodes import install_wrapper

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_HANDLER = tomllib.loads((Path(__file__).parents[3] / "contrib/cri-o/10-lazyfs.conf").read_text())[
    "crio"
]["runtime"]["runtimes"]["lazyfs"]
_RECORDED = Path(__file__).parents[2] / "data/engines/crio.json"
_RECORDER = "/opt/recorder/runc"
_SIZE_MIB, _CHILDREN = 32, 1


@dataclass(frozen=True)
class _Made:
    """A checkpoint image as Kubernetes has them, in a registry, and its stub."""

    cgroup: str
    repository: str
    hashes: tuple[str, ...]

    def stub(self, store: Store) -> str:
        """Return the stub's name."""
        return f"{store.address}/{self.repository}:1-stub"


@pytest.fixture(scope="module")
def made(store: Store, shelf: Path) -> _Made:
    cgroup, repository = f"lazyfs-{shelf.name}-crio", f"{shelf.name}/crio"
    base, checkpoint = f"{store.address}/{repository}-base:1", f"{store.address}/{repository}:1"
    with machine(store.testbed, [shelf], [store.address], name=cgroup) as here:
        here.podman.push_base(shelf, base)
        pod = CrioPod(here.podman)
        running = pod.run(base, size_mib=_SIZE_MIB, children=_CHILDREN)
        hashes = pod.checkpoint(running, shelf / "tree", base)
        push_checkpoint(here.session, shelf / "tree", checkpoint)
        here.stub(checkpoint, f"{checkpoint}-stub")
        running.remove()
    return _Made(cgroup, repository, hashes)


@contextmanager
def _pod(
    store: Store,
    made: _Made,
    *,
    annotations: Mapping[str, str] | None = None,
    runtime: str = _HANDLER["runtime_path"],
    real: str = "",
    forgiven: Sequence[str] = (),
) -> Iterator[tuple[Machine, CrioPod]]:
    """Give a pod on an empty machine, with the runtime handler of contrib/cri-o.

    `real`: stands for the real runtime, by the handler's `monitor_env`.
    """
    with machine(store.testbed, [], [store.address], name=made.cgroup, forgiven=forgiven) as here:
        install_wrapper(here)
        environ = dict(each.split("=", 1) for each in _HANDLER["monitor_env"])
        if real:
            environ["LAZYFS_REAL_RUNTIME"] = real
        pod = CrioPod(here.podman, annotations=annotations or {}, runtime=runtime)
        pod.monitor_env = environ
        yield here, pod


def test_conmon_calls_its_runtime_as_was_recorded(testbed: Testbed, work: Path) -> None:
    assert record(testbed, work) == json.loads(_RECORDED.read_text())


@pytest.mark.parametrize("lazy_pages", ["false", "true"])
def test_a_stub_goes_on_where_its_container_was(store: Store, made: _Made, lazy_pages: str) -> None:
    annotations = {"io.lazyfs.lazy-pages": lazy_pages}
    with _pod(store, made, annotations=annotations, real=_RECORDER) as (here, pod):
        recorder = Recorder(here.session, _RECORDER)
        began_s = time.time()
        running = pod.restore(made.stub(store), members=1 + _CHILDREN)
        assert_goes_on(running, began_s, made.hashes)
        assert running.state() == "running"
        call = recorder.calls("restore")[-1]
        assert ("--lazy-pages" in call["argv"]) == (lazy_pages == "true")
        running.remove()


def test_a_pod_of_three_stubs(store: Store, made: _Made) -> None:
    with _pod(store, made) as (_, pod):
        for name in ("first", "second", "third"):
            began_s = time.time()
            running = pod.restore(made.stub(store), name, members=1 + _CHILDREN)
            assert_goes_on(running, began_s, made.hashes)


def test_what_is_no_stub_goes_through(store: Store, made: _Made) -> None:
    real = made.stub(store).removesuffix("-stub")
    with _pod(store, made) as (_, pod):
        began_s = time.time()
        running = pod.restore(real, members=1 + _CHILDREN)
        assert_goes_on(running, began_s, made.hashes)
        running.remove()


def test_without_lazyfs_a_stub_is_refused(store: Store, made: _Made) -> None:
    with _pod(store, made, runtime="/usr/sbin/runc") as (here, pod):
        with pytest.raises(TestbedError, match=r"(?s)container restore failed: .*criu failed"):
            pod.restore(made.stub(store))
        assert not _workloads(here)


def test_a_registry_that_is_gone_is_what_the_kubelet_hears(
    store: Store, work: Path, made: _Made
) -> None:
    gone = ["cannot be restored", "connection"]
    with store.served_at(work / "own") as own:
        real = f"{own.address}/{made.repository}:1"
        stub = f"{store.address}/{made.repository}:1-gone"
        with _pod(store, made, forgiven=gone) as (here, pod):
            here.policy("deadline = 2.0")
            here.stub(real, stub, "--real", real)
            own.kill()
            with pytest.raises(TestbedError, match="container restore failed: lazyfs: ") as failed:
                pod.restore(stub)
            assert own.address in str(failed.value)
            here.wait_alone()
            assert not _workloads(here)


@pytest.mark.parametrize("lazy_pages", ["false", "true"])
def test_a_conmon_that_is_killed_takes_the_restore_with_it(
    store: Store, work: Path, made: _Made, lazy_pages: str
) -> None:
    annotations = {"io.lazyfs.lazy-pages": lazy_pages}
    with store.served_at(work / "own") as own:
        real = f"{own.address}/{made.repository}:1"
        stub = f"{store.address}/{made.repository}:1-killed"
        with _pod(store, made, annotations=annotations, forgiven=[""]) as (here, pod):
            here.stub(real, stub, "--real", real)
            own.freeze()
            restoring = pod.begin_restore(stub)
            wait_until(lambda: here.lazyfs_processes() or None, "the restore's beginning", 60)
            os.kill(_conmon(here), signal.SIGKILL)
            said, _ = restoring.communicate(timeout=60)
            assert said == ""
            own.thaw()
            here.wait_alone()
            assert not _workloads(here)


def _workloads(here: Machine) -> list[str]:
    listed = here.session.run(["ps", "-e", "-o", "args="]).splitlines()
    return [line for line in listed if line.startswith("/workload")]


def _conmon(here: Machine) -> int:
    """Return the pid of the machine's only conmon, as the host knows it."""
    inside = here.session.run(["pidof", "conmon"]).split()
    assert len(inside) == 1
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if "\nNSpid:" in text and text.startswith("Name:\tconmon\n"):
            pids = text.partition("\nNSpid:")[2].partition("\n")[0].split()
            if pids[-1:] == inside and _root(int(pids[0])) == _root(here.session.pid):
                return int(pids[0])
    raise AssertionError("no conmon runs")


def _root(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")

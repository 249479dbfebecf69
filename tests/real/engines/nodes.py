"""Nodes with containerd that restore stubs, and what is asked of whatever was restored."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed import Containerd, Task, Testbed, TestbedError
from testbed.process import children

from tests.real.engines.machines import Machine, machine

WRAPPER = "/opt/lazyfs/bin/lazyfs-runc"
"""As in contrib/containerd and contrib/cri-o."""


def install_wrapper(here: Machine, path: str = WRAPPER) -> None:
    """Link lazyfs's runtime to a place that engines are configured with."""
    link = here.session.path(path)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(here.bin / "lazyfs-runc")


@dataclass(frozen=True)
class Node:
    """A machine with an empty containerd, on which the container's image is."""

    here: Machine
    containerd: Containerd

    def restore(self, reference: str, name: str = "workload", members: int = 1) -> Task:
        """Fetch a checkpoint's index and restore it."""
        self.fetch(reference)
        self.containerd.ctr("container", "restore", "--live", "--rw", name, reference)
        return self.containerd.task(name, members=members)

    def fetch(self, reference: str) -> None:
        """Fetch a checkpoint's index and all that it names."""
        self.containerd.ctr("content", "fetch", "--plain-http", reference)

    def fail_to_restore(self, reference: str, name: str = "workload") -> str:
        """Restore what has been fetched and cannot be restored; return what `ctr` says."""
        try:
            self.containerd.ctr("container", "restore", "--live", "--rw", name, reference)
        except TestbedError as error:
            return str(error).partition("ctr: ")[2]
        raise AssertionError(f"{reference} was restored")

    def begin_restore(self, reference: str, name: str = "workload") -> "subprocess.Popen[bytes]":
        """Begin to restore what has been fetched."""
        words = ["ctr", "container", "restore", "--live", "--rw", name, reference]
        return subprocess.Popen(
            self.here.session.command(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def shims(self) -> set[int]:
        """Return the pids, as the host knows them, of the shims that run here."""
        return {pid for pid in children(self.here.session.pid) if b"shim-runc" in _cmdline(pid)}

    def workloads(self) -> list[int]:
        """Return the pids of all that a container here runs, or is about to."""
        found = []
        below = [self.here.session.pid]
        while below:
            pid = below.pop()
            below += children(pid)
            if _cmdline(pid).startswith(b"/workload"):
                found.append(pid)
        return found


@contextmanager
def node(
    testbed: Testbed,
    work: Path,
    registry: str,
    *,
    name: str,
    forgiven: Sequence[str] = (),
    config: str = "",
) -> Iterator[Node]:
    """Give a node for the length of a block, at whose end nothing of lazyfs may be left.

    Args:
        testbed: where the programs are.
        work: a folder for the container's image and the log.
        registry: `host:port`, spoken to over plain HTTP.
        name: of the cgroup that containers are in, wherever they run.
        forgiven: words of warnings that may be in the runtime's log.
        config: added to containerd's configuration.
    """
    log = work / f"containerd-{time.monotonic_ns()}.log"
    with (
        machine(testbed, [work], [registry], name=name, forgiven=forgiven) as here,
        Containerd(here.session, log, config) as containerd,
    ):
        install_wrapper(here)
        containerd.import_base(work)
        found = Node(here, containerd)
        yield found
        for line in containerd.ctr("container", "ls", "--quiet").split():
            containerd.task(line).remove()


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

"""Machines on which Podman restores: an empty storage, lazyfs, and its runtime before the real one.

A machine is a session of the testbed's root, whose configuration is what contrib/podman says.
"""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from testbed import Event, Session, Status, Testbed
from testbed.podman import Container, Podman
from testbed.portable import portable_lazyfs
from testbed.process import last_lines, tree, wait_until

LOG = "/var/log/lazyfs-runtime.log"
_RUNTIME = """\
{policy}
[log]
file = "{log}"
level = "debug"
"""
_ALARMING = (" WARNING ", " ERROR ", " CRITICAL ")
_END_S = 30


class Machine:
    """A session with Podman and lazyfs; end it with the block of `machine`."""

    def __init__(
        self, session: Session, registries: Sequence[str], runtime: str, *, wrapped: bool
    ) -> None:
        self.session = session
        self.bin = portable_lazyfs(session.testbed) / "bin"
        """Where `lazyfs` and `lazyfs-runtime` are, inside as well."""
        self.runtime = runtime
        self.podman = Podman(session, registries=registries, runtime=runtime)
        if wrapped:
            self.policy()

    def policy(self, text: str = "") -> None:
        """Write /etc/lazyfs/runtime.toml: these keys, and a log that is asserted to be quiet."""
        self.podman.put_lazyfs_before(self.bin, _RUNTIME.format(policy=text, log=LOG))

    def restore(self, image: str, *options: str, timeout_s: float = 120) -> "Resumed":
        """Pull a checkpoint and restore it, as people do."""
        began_s = time.time()
        self.podman("pull", "--quiet", image)
        self.podman("container", "restore", *options, image, timeout_s=timeout_s)
        name = options[options.index("--name") + 1] if "--name" in options else "workload"
        return Resumed(self.podman.container(name), began_s)

    def fail_to_restore(self, image: str, *options: str, timeout_s: float = 120) -> str:
        """Run a `podman container restore` that has to fail; return what it says."""
        words = self.podman.command("container", "restore", *options, image)
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def stub(self, image: str, name: str, *options: str) -> None:
        """Run `lazyfs stub` here; what it fetches, all of the image, is not kept for restores."""
        words = ["stub", "--plain-http", "--cache=memory", *options, image, name]
        self.session.run([self.bin / "lazyfs", *words])

    def lazyfs_processes(self) -> list[str]:
        """Return the command lines of what runs here of lazyfs and CRIU."""
        found = []
        for pid in tree(self.session.pid):
            with contextlib.suppress(OSError):
                program = Path(f"/proc/{pid}/exe").readlink()
                if program.is_relative_to(self.bin.parent) or program.name == "criu":
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    found.append(b" ".join(words).decode(errors="replace"))
        return found

    def wait_alone(self, timeout_s: float = _END_S) -> None:
        """Wait until nothing of lazyfs or CRIU runs here any more."""
        wait_until(lambda: not self.lazyfs_processes(), "lazyfs is gone", timeout_s)

    def log(self, lines: int = 60) -> str:
        """Return the end of what the runtime has logged."""
        return last_lines(self.session.path(LOG), lines)

    def alarms(self) -> list[str]:
        """Return the warnings and errors of the runtime's log."""
        log = self.session.path(LOG)
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if any(word in line for word in _ALARMING)]


class Running(Protocol):
    """A container of the workload, in whatever engine."""

    @property
    def status(self) -> Status: ...

    def ask_hash(self) -> None: ...


def assert_goes_on(running: Running, began_s: float, hashes: Sequence[str]) -> None:
    """Check that each process does its next loop, with the memory that it had.

    Args:
        running: the container.
        began_s: `time.time()` before its restore.
        hashes: of its processes' memory before the checkpoint.
    """
    status = Status(running.status.path, len(hashes))
    status.wait_loop(began_s)
    last: dict[int, Event] = {}
    first: dict[int, Event] = {}
    for event in status.events("loop"):
        if event.at_s < began_s:
            last[event.member] = event
        else:
            first.setdefault(event.member, event)
    assert len(last) == len(hashes)
    for member, event in last.items():
        went_on = first[member]
        assert (went_on.number, went_on.value) == (event.number + 1, event.value)
    assert status.wait_hashes(running.ask_hash) == tuple(hashes)


@dataclass(frozen=True)
class Resumed:
    """A container that Podman has restored."""

    container: Container
    began_s: float
    """`time.time()` before the pull."""

    def assert_goes_on(self, hashes: tuple[str, ...]) -> None:
        """Check that each process does its next loop, with the memory that it had.

        Args:
            hashes: of their memory before the checkpoint.
        """
        assert_goes_on(self.container, self.began_s, hashes)


@contextmanager
def machine(
    testbed: Testbed,
    folders: Sequence[Path],
    registries: Sequence[str],
    *,
    name: str,
    runtime: str = "runc",
    wrapped: bool = True,
    forgiven: Sequence[str] = (),
) -> Iterator[Machine]:
    """Give a machine for the length of a block, at whose end nothing may be left but containers.

    Args:
        testbed: where the programs are.
        folders: of the host, that are seen inside.
        registries: each `host:port`, spoken to over plain HTTP.
        name: of the containers' cgroup: the same where a container was checkpointed and where
            it is restored.
        runtime: runc or crun.
        wrapped: whether lazyfs's runtime stands before it.
        forgiven: words of warnings that may be in the runtime's log.
    """
    portable = portable_lazyfs(testbed)
    with Session(testbed, [*folders, portable], name=name) as session:
        here = Machine(session, registries, runtime, wrapped=wrapped)
        try:
            yield here
            here.podman("rm", "--all", "--force", "--time", "0")
            here.wait_alone()
            alarms = [
                line for line in here.alarms() if not any(excuse in line for excuse in forgiven)
            ]
            assert not alarms, "\n".join(alarms)
        finally:
            print(f"the runtime's log:\n{here.log(200)}")

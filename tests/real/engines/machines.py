"""Machines on which Podman restores: an empty storage, lazyfs, and its runtime before the real one.

A machine is a session of the testbed's root, whose configuration is what contrib/podman says.
"""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed import Event, Session, Status, Testbed
from testbed.podman import Container, Podman
from testbed.portable import portable_lazyfs
from testbed.process import last_lines, tree, wait_until

CONFIGURED = """\
[engine.runtimes]
runc = ["{bin}/lazyfs-runc"]
crun = ["{bin}/lazyfs-crun"]
"""
"""As in contrib/podman."""
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
            conf = CONFIGURED.format(bin=self.bin)
            self.podman.configure("containers.conf.d/50-lazyfs.conf", conf)
        self.policy()

    def policy(self, text: str = "") -> None:
        """Write /etc/lazyfs/runtime.toml: these keys, and a log that is asserted to be quiet."""
        path = self.session.path("/etc/lazyfs/runtime.toml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(_RUNTIME.format(policy=text, log=LOG))

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
        """Run `lazyfs stub` here."""
        self.session.run([self.bin / "lazyfs", "stub", "--plain-http", *options, image, name])

    def lazyfs_processes(self) -> list[str]:
        """Return the command lines of all that runs here and is lazyfs or CRIU."""
        found = []
        for pid in tree(self.session.pid):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "lazyfs" in line or "criu" in line:
                found.append(line)
        return found

    def wait_alone(self, timeout_s: float = _END_S) -> None:
        """Wait until nothing of lazyfs or CRIU runs here any more."""
        wait_until(
            lambda: not self.lazyfs_processes(),
            f"the end of {self.lazyfs_processes()}\n{self.log()}",
            timeout_s,
        )

    def log(self, lines: int = 60) -> str:
        """Return the end of what the runtime has logged."""
        return last_lines(self.session.path(LOG), lines)

    def alarms(self) -> list[str]:
        """Return the warnings and errors of the runtime's log."""
        log = self.session.path(LOG)
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if any(word in line for word in _ALARMING)]


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
        status = Status(self.container.status.path, len(hashes))
        status.wait_loop(self.began_s)
        last: dict[int, Event] = {}
        first: dict[int, Event] = {}
        for event in status.events("loop"):
            if event.at_s < self.began_s:
                last[event.member] = event
            else:
                first.setdefault(event.member, event)
        assert len(last) == len(hashes)
        for member, event in last.items():
            goes_on = first[member]
            assert (goes_on.number, goes_on.value) == (event.number + 1, event.value)
        assert status.wait_hashes(self.container.ask_hash) == hashes


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

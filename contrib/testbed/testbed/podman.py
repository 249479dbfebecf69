"""Podman in a `Session`, as an administrator sets it up: a machine with an empty storage.

Its configuration is in /etc/containers of the session, where the session's end forgets it:
`Podman.configure` adds files, and whatever is under test can add its own beside them. Nothing of
it is on the command line, so tests run the commands that people type.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engines import CHANGES, STATUS, write_base
from .errors import TestbedError
from .session import Session
from .workload import Pattern, Status, workload_options

_CONTAINERS_CONF = """\
[containers]
apparmor_profile = "unconfined"
netns = "none"
pids_limit = 0
seccomp_profile = "unconfined"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
image_copy_tmp_dir = "{folder}/tmp"
runtime = "{runtime}"
"""
_STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "/run/containers/storage"
"""
_DEFAULT_STORAGE = Path("/var/lib/containers")
_LAZYFS_CONF = """\
[engine.runtimes]
runc = ["{programs}/lazyfs-runc"]
crun = ["{programs}/lazyfs-crun"]
"""
CONFIGURATION = "/etc/containers"
"""Of Podman and all its kin, in a session."""


@dataclass(frozen=True)
class Container:
    """A container of the workload that runs in a `Podman`."""

    podman: Podman
    name: str
    status: Status

    def memory_hash(self, timeout_s: float = 60) -> tuple[str, ...]:
        """Return a hash of the memory of each process, the parent's first; reads all of it."""
        return self.status.wait_hashes(self.ask_hash, timeout_s)

    def ask_hash(self) -> None:
        """Send SIGUSR1 to the parent process."""
        self.podman("kill", "--signal", "USR1", self.name)

    def state(self) -> str:
        """Return Podman's word for its state: running, exited, created, …; empty if it is gone."""
        listed = self.podman("ps", "--all", "--format", "{{.Names}} {{.State}}").splitlines()
        found = dict(line.split(" ", 1) for line in listed)
        return found.get(self.name, "")

    def pid(self) -> int:
        """Return the pid of its first process, as the host knows it.

        Raises:
            TestbedError: the container is not running.
        """
        inner = int(self.podman("container", "inspect", "--format", "{{.State.Pid}}", self.name))
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = status.read_text().splitlines()
            except OSError:
                continue  # it has just ended
            pids = next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
            if pids[1:2] == [str(inner)] and _within(int(pids[0]), self.podman.session):
                return int(pids[0])
        raise TestbedError(f"{self.name} has no process")

    def remove(self) -> None:
        """Kill it and remove it."""
        self.podman("rm", "--force", "--time", "0", self.name)


class Podman:
    """Podman in a session; call it with the words of a command.

    Args:
        session: where it runs; its name is the parent of the containers' cgroups.
        registries: each `host:port`, spoken to over plain HTTP.
        storage: a folder of the host, bound into the session, for images and containers; by
            default they are in memory. Not on an overlay filesystem.
        runtime: the OCI runtime that containers get: a name of its configuration.
    """

    def __init__(
        self,
        session: Session,
        *,
        registries: Sequence[str] = (),
        storage: Path | None = None,
        runtime: str = "runc",
    ) -> None:
        self.session = session
        folder = storage.absolute() if storage else _DEFAULT_STORAGE
        session.path(f"{folder}/tmp").mkdir(parents=True, exist_ok=True)
        engine = _CONTAINERS_CONF.format(runtime=runtime, folder=folder)
        self.configure("containers.conf.d/10-testbed.conf", engine)
        self.configure("storage.conf", _STORAGE_CONF.format(folder=folder))
        if runtime == "crun":
            allow_crun(session)
        for registry in registries:
            self.configure(
                f"registries.conf.d/{registry.replace(':', '-')}.conf",
                f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n',
            )

    def configure(self, name: str, text: str) -> None:
        """Write a file below /etc/containers, such as `containers.conf.d/NAME.conf`."""
        path = self.session.path(f"{CONFIGURATION}/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def put_lazyfs_before(self, programs: str | Path, policy: str = "") -> None:
        """Have lazyfs's runtime stand before the real one, as contrib/podman says.

        Args:
            programs: where `lazyfs-runc` and `lazyfs-crun` are, inside.
            policy: what /etc/lazyfs/runtime.toml says.
        """
        self.configure("containers.conf.d/50-lazyfs.conf", _LAZYFS_CONF.format(programs=programs))
        path = self.session.path("/etc/lazyfs/runtime.toml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(policy)

    def command(self, *words: str | Path) -> list[str]:
        """Return the words, for the host, that run a command of Podman."""
        return self.session.command(["podman", *words])

    def __call__(self, *words: str | Path, timeout_s: float = 120) -> str:
        """Run a command of Podman; return what it printed, without surrounding space.

        Raises:
            TestbedError: it failed or took longer than `timeout_s`; the message has its words.
        """
        return self.session.run(["podman", *words], timeout_s=timeout_s).strip()

    def push_base(self, work_dir: Path, reference: str) -> None:
        """Make the image that containers of the workload are run from, and push it.

        Args:
            work_dir: a folder that the session sees; gets `base.tar`.
            reference: `host:port/repository:tag`, of one of the registries.
        """
        base_tar = work_dir.absolute() / "base.tar"
        write_base(self.session.testbed, base_tar)
        self("import", "--quiet", base_tar, reference)
        base_tar.unlink()
        self("push", "--quiet", reference)

    def run_workload(
        self,
        base: str,
        name: str = "workload",
        *,
        options: Sequence[str] = (),
        changed: bool = True,
        size_mib: int = 64,
        percent: float = 5,
        pattern: Pattern = "regions",
        shared_mib: int = 0,
        children: int = 0,
    ) -> Container:
        """Run the workload in a container; return when every process has done a loop.

        Args:
            base: the image, as pushed by `push_base`; pulled if it is not here.
            name: of the container.
            options: more options of `podman run`.
            changed: whether files are changed and deleted in it, besides the status file.
            size_mib: this and the others as for `Workload`.
            percent: as for `Workload`.
            pattern: as for `Workload`.
            shared_mib: as for `Workload`.
            children: as for `Workload`.
        """
        words = workload_options(
            Path(STATUS),
            size_mib=size_mib,
            percent=percent,
            pattern=pattern,
            shared_mib=shared_mib,
            children=children,
        )
        container = ["--name", name, "--cgroup-parent", f"/{self.session.name}", *options]
        self("run", "--quiet", "--detach", *container, base, "/workload", *words)
        if changed:
            self("exec", name, *CHANGES)
        running = self.container(name, members=1 + children)
        running.status.wait_loop(timeout_s=60 + size_mib * (1 + children) / 50)
        return running

    def container(self, name: str, *, members: int = 1) -> Container:
        """Return a container of the workload that is there, whoever has made it."""
        merged = self("container", "inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", name)
        return Container(self, name, Status(self.session.path(merged + STATUS), members))

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what `podman container inspect` tells."""
        (told,) = json.loads(self("container", "inspect", name))
        return dict(told)


def allow_crun(session: Session) -> None:
    """Make crun run, checkpoint and restore in a session on a machine of mixed cgroup hierarchies.

    crun refuses them where the second version has a controller (`libcrun_cgroup_enter` and
    `detect_cgroup_mode`, src/libcrun/cgroup*.c). So the second version is not seen in the session.
    CRIU, which finds it all the same, would copy the root's `cgroup.subtree_control` to where the
    container is, which fails below a cgroup that has no controllers; so it is told to keep to those
    of the first version.
    """
    mixed = "/sys/fs/cgroup/unified"
    if session.path(mixed).is_mount():
        session.run(["umount", mixed])
        cgroups = (line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines())
        names = [name for _, controllers, _ in cgroups for name in controllers.split(",") if name]
        config = session.path("/etc/criu/default.conf")
        config.parent.mkdir(exist_ok=True)
        config.write_text("".join(f"cgroup-dump-controller {name}\n" for name in names))


def _within(pid: int, session: Session) -> bool:
    """Whether a process descends from a session's first."""
    while pid > 1:
        if pid == session.pid:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False

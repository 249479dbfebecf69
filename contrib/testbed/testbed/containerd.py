"""containerd in a session: its `ctr`, and a container that it checkpoints.

containerd's CRI plugin is off (it wants a CNI and a sandbox image), so what only that plugin makes
is put together elsewhere from the pieces.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .engines import CHANGES, STATUS, write_base
from .errors import TestbedError
from .images import Layer, write_oci_layout
from .process import last_lines, run, stop, wait_until
from .roots import Testbed
from .session import Session
from .workload import Status, workload_options

_CONFIG = """version = 2
root = "/var/lib/containers/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
"""
_TASKS = "/run/containerd/io.containerd.runtime.v2.task/default"
_CONTENT = "/var/lib/containers/containerd/io.containerd.content.v1.content/blobs/"
_BASE = "docker.io/testbed/base"

CRIU_TAR = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
"""The media type of the layer with the CRIU images (containerd, core/images/mediatypes.go)."""

RW_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class ContainerdCheckpoint:
    """A container of the workload, checkpointed by `ctr containers checkpoint`."""

    reference: str
    """`host:port/repository:tag` of the index that `ctr` made."""
    index: dict[str, Any]
    tree: Path
    """As the CRI plugin's archive has them: checkpoint/, spec.dump, rootfs-diff.tar, …"""
    archive: Path
    """A tar of `tree`: `tree` itself is put together from what `ctr` and runc wrote."""
    base_tar: Path
    """The root filesystem of the container's own image."""
    hashes: tuple[str, ...]
    """Of the memory of its processes, just before the checkpoint."""


@dataclass(frozen=True)
class Task:
    """A container of the workload that runs in a `Containerd`."""

    containerd: Containerd
    name: str
    status: Status

    def memory_hash(self, timeout_s: float = 60) -> tuple[str, ...]:
        """Return a hash of the memory of each process, the parent's first; reads all of it."""
        return self.status.wait_hashes(self.ask_hash, timeout_s)

    def ask_hash(self) -> None:
        """Send SIGUSR1 to the parent process."""
        self.containerd.ctr("task", "kill", "--signal", "SIGUSR1", self.name)

    def state(self) -> str:
        """Return `ctr`'s word for its state: RUNNING, STOPPED, CREATED; empty if it is gone."""
        lines = self.containerd.ctr("task", "ls").splitlines()[1:]
        return {line.split()[0]: line.split()[2] for line in lines}.get(self.name, "")

    def checkpoint(self, reference: str) -> None:
        """Make an index of it, with its memory and its files, and push that; it runs on."""
        made = ["--image", "--rw", "--task", self.name, reference]
        self.containerd.ctr("container", "checkpoint", *made)
        self.containerd.ctr("image", "push", "--plain-http", reference)

    def remove(self) -> None:
        """Kill it, and remove it and its container and its files; also where it is paused."""
        ctr = self.containerd.ctr
        state = self.state()
        if state == "PAUSED":
            ctr("task", "resume", self.name)
        if state:
            ctr("task", "rm", "--force", self.name)
        ctr("container", "rm", self.name)


class Containerd:
    """A containerd in a session; a context manager that ends it, and all its containers.

    Its storage is in memory. `config` is added to its configuration file.
    """

    def __init__(self, session: Session, log: Path, config: str = "") -> None:
        self.session, self._log, self._config = session, log, config
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Containerd:
        folder = self.session.path("/run/containerd-testbed")
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(_CONFIG + self._config)
        words = ["containerd", "--log-level", "warn"]
        words += ["--config", "/run/containerd-testbed/config.toml"]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                self.session.command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

        def answers() -> bool:
            if process.poll() is not None:
                raise TestbedError(f"containerd ended; its log:\n{last_lines(self._log)}")
            try:
                self.ctr("version")
            except TestbedError:
                return False
            return True

        try:
            wait_until(answers, f"containerd; its log: {self._log}", 30)
        except BaseException:
            stop(process)
            raise
        self._process = process
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None

    def ctr(self, *words: str | Path, timeout_s: float = 300) -> str:
        """Run a command of `ctr`; return what it says."""
        return self.session.run(["ctr", *words], timeout_s=timeout_s)

    def import_base(self, work_dir: Path) -> None:
        """Make the image that containers of the workload are run from.

        Args:
            work_dir: a folder that the session sees; gets the image, once.
        """
        archive = work_dir.absolute() / "base-image.tar"
        if not archive.exists():
            write_base(self.session.testbed, work_dir / "base.tar")
            write_oci_layout(work_dir / "base", "latest", [Layer(work_dir / "base.tar")])
            run(["tar", "-C", work_dir / "base", "-cf", archive, "."])
        self.ctr("image", "import", "--base-name", _BASE, archive)

    def run_workload(
        self,
        name: str = "workload",
        *,
        options: Sequence[str] = (),
        changed: bool = True,
        size_mib: int = 32,
        percent: float = 5,
        shared_mib: int = 0,
        children: int = 0,
    ) -> Task:
        """Run the workload in a container; return when every process has done a loop.

        Args:
            name: of the container.
            options: more options of `ctr run`.
            changed: whether files are changed and deleted in it, besides the status file.
            size_mib: this and the others as for `Workload`.
            percent: as for `Workload`.
            shared_mib: as for `Workload`.
            children: as for `Workload`.
        """
        words = workload_options(
            Path(STATUS),
            size_mib=size_mib,
            percent=percent,
            shared_mib=shared_mib,
            children=children,
        )
        container = ["--null-io", "--cgroup", f"/{self.session.name}/{name}", *options]
        self.ctr("run", "--detach", *container, f"{_BASE}:latest", name, "/workload", *words)
        if changed:
            self.ctr("task", "exec", "--exec-id", "changes", name, *CHANGES)
        task = self.task(name, members=1 + children)
        task.status.wait_loop(timeout_s=60 + size_mib * (1 + children) / 50)
        return task

    def task(self, name: str, *, members: int = 1) -> Task:
        """Return a container of the workload that is there, whoever has made it."""
        rootfs = self.session.path(f"{_TASKS}/{name}/rootfs")
        return Task(self, name, Status(Path(f"{rootfs}{STATUS}"), members))

    def index(self, reference: str) -> dict[str, Any]:
        """Return the index, or the manifest, that a name stands for here."""
        target = next(row for row in self.ctr("image", "ls").splitlines() if reference in row)
        return dict(json.loads(self.blob(target.split()[2])))

    def blob(self, digest: str) -> bytes:
        """Return a blob of its content store."""
        return self.session.path(_CONTENT + digest.replace(":", "/")).read_bytes()


def containerd_checkpoint(
    testbed: Testbed, work_dir: Path, registry: str, repository: str, *, size_mib: int = 32
) -> ContainerdCheckpoint:
    """Run the workload with containerd, checkpoint it, and push that as `repository`:1.

    Args:
        testbed: where the programs are.
        work_dir: gets the files of the result, and the log.
        registry: `host:port`, over plain HTTP.
        repository: where the index and all that it names go.
        size_mib: as for `Workload`.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    base_tar, tree = work_dir / "base.tar", work_dir / "tree"
    reference = f"{registry}/{repository}:1"
    log = work_dir / "containerd.log"
    with Session(testbed, [work_dir]) as session, Containerd(session, log) as containerd:
        containerd.import_base(work_dir)
        task = containerd.run_workload(size_mib=size_mib)
        hashes = task.memory_hash()
        task.checkpoint(reference)
        index = containerd.index(reference)
        spec = session.path(f"{_TASKS}/{task.name}/config.json").read_bytes()
        _write_tree(tree, containerd, index, spec)
    names = sorted(path.name for path in tree.iterdir())
    run(["tar", "-C", tree, "-cf", work_dir / "archive.tar", *names])
    return ContainerdCheckpoint(reference, index, tree, work_dir / "archive.tar", base_tar, hashes)


def _write_tree(tree: Path, containerd: Containerd, index: dict[str, Any], spec: bytes) -> None:
    """Write what CheckpointContainer of the CRI plugin writes (container_checkpoint_linux.go).

    The images and the rw layer are from the index, which that plugin makes just so; the log is
    empty, and what the plugin knows of its own is what it would say of this container.
    """
    (tree / "checkpoint").mkdir(parents=True)
    blobs = {each["mediaType"]: each["digest"] for each in index["manifests"]}
    with tarfile.open(fileobj=io.BytesIO(containerd.blob(blobs[CRIU_TAR]))) as images:
        images.extractall(tree / "checkpoint", filter="data")
    (tree / "rootfs-diff.tar").write_bytes(containerd.blob(blobs[RW_LAYER]))  # gzip, so named
    (tree / "spec.dump").write_bytes(spec)
    moment = "2026-01-02T03:04:05Z"
    config: dict[str, object] = {
        "id": "workload",
        "name": "workload",
        "rootfsImage": f"{_BASE}:latest",
    }
    config |= {"rootfsImageName": f"{_BASE}:latest", "runtime": "io.containerd.runc.v2"}
    config |= {"createdTime": moment, "checkpointedTime": moment, "restored": False}
    (tree / "config.dump").write_text(json.dumps(config))
    labels = {"io.kubernetes.pod.name": "pod", "io.kubernetes.pod.namespace": "default"}
    state = {"id": "workload", "metadata": {"name": "workload"}, "state": 1, "labels": labels}
    (tree / "status.dump").write_text(json.dumps(state))
    started = {"CreatedAt": 1767323045000000000, "StartedAt": 1767323045000000000, "Pid": 1}
    (tree / "status").write_text(json.dumps(started))
    (tree / "container.log").touch()

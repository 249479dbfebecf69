"""containerd in a session: its `ctr`, and a container that it checkpoints.

containerd's CRI plugin is off (it wants a CNI and a sandbox image), so what only that plugin makes
is put together elsewhere from the pieces.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
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


class Containerd:
    """A containerd in a session; a context manager that ends it, and all its containers.

    Its storage is in memory. `config` is added to its configuration file.
    """

    def __init__(self, session: Session, log: Path, config: str = "") -> None:
        self._session, self._log, self._config = session, log, config
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Containerd:
        folder = self._session.path("/run/containerd-testbed")
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(_CONFIG + self._config)
        words = ["containerd", "--log-level", "warn"]
        words += ["--config", "/run/containerd-testbed/config.toml"]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                self._session.command(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log
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
        return self._session.run(["ctr", *words], timeout_s=timeout_s)

    def blob(self, digest: str) -> bytes:
        """Return a blob of its content store."""
        return self._session.path(_CONTENT + digest.replace(":", "/")).read_bytes()


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
    write_base(testbed, base_tar)
    write_oci_layout(work_dir / "base", "latest", [Layer(base_tar)])
    run(["tar", "-C", work_dir / "base", "-cf", work_dir / "base-image.tar", "."])
    reference = f"{registry}/{repository}:1"
    log = work_dir / "containerd.log"
    with Session(testbed, [work_dir]) as session, Containerd(session, log) as containerd:
        ctr = containerd.ctr
        ctr("image", "import", "--base-name", _BASE, (work_dir / "base-image.tar").absolute())
        options = workload_options(Path(STATUS), size_mib=size_mib)
        container = ["--null-io", "--cgroup", f"/{session.name}/workload", f"{_BASE}:latest"]
        ctr("run", "--detach", *container, "workload", "/workload", *options)
        ctr("task", "exec", "--exec-id", "changes", "workload", *CHANGES)
        bundle = session.path(f"{_TASKS}/workload")
        status = Status(bundle / f"rootfs{STATUS}")
        status.wait_loop(timeout_s=60 + size_mib / 50)
        hashes = status.wait_hashes(lambda: ctr("task", "kill", "--signal", "SIGUSR1", "workload"))
        ctr("container", "checkpoint", "--image", "--rw", "--task", "workload", reference)
        ctr("image", "push", "--plain-http", reference)
        target = next(line for line in ctr("image", "ls").splitlines() if reference in line)
        index = json.loads(containerd.blob(target.split()[2]))
        _write_tree(tree, containerd, index, (bundle / "config.json").read_bytes())
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

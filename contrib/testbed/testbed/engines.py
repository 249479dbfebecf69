"""Real checkpoints of containers made by Podman, and their restore by runc.

All of it happens in a `Session`, with runc: crun refuses mixed cgroup hierarchies.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .criu import CriuError, Restored, start_lazy_pages
from .images import get_manifest
from .process import last_lines, stop
from .roots import Testbed
from .session import Session
from .workload import Pattern, Status, workload_options

PODMAN = [
    "podman",
    *("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--storage-driver", "overlay"),
]
_IMAGE = "localhost/testbed-base:latest"
_SUFFIXES = {"none": "", "gzip": ".gz", "zstd": ".zst"}
STATUS = "/status"
"""Where the workload of a container reports, in its root filesystem."""
_CHANGED = "$B rm -r /tmp /bin/sh; $B mkdir /tmp; $B touch /tmp/new"
CHANGES = ["/bin/busybox", "sh", "-ec", f"B=/bin/busybox; {_CHANGED}"]
"""What is run in a container besides: a file is gone, and a directory is another one."""
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True)
class PushedCheckpoint:
    """A checkpoint image in a registry."""

    reference: str
    """`host:port/repository:tag`."""
    digest: str
    """Of its manifest."""
    manifest: dict[str, Any]

    @property
    def annotations(self) -> dict[str, str]:
        """Podman's annotations, `io.podman.annotations.checkpoint.*`, on the manifest."""
        found: dict[str, str] = self.manifest.get("annotations", {})
        return found


@dataclass(frozen=True)
class PodmanCheckpoint:
    """A container of the workload, checkpointed by Podman."""

    images: dict[str, PushedCheckpoint]
    """By compression format."""
    tree: Path
    """The files of the image's one layer: checkpoint/, spec.dump, rootfs-diff.tar, …"""
    base_tar: Path
    """The root filesystem of the container's own image."""
    hashes: tuple[str, ...]
    """Of the memory of its processes, just before the checkpoint."""
    archives: dict[str, Path]
    """Of `checkpoint --export`, by compression. Each is a dump of its own, at another loop."""

    @property
    def members(self) -> int:
        """How many processes the container has."""
        return len(self.hashes)


def podman_checkpoint(
    testbed: Testbed,
    work_dir: Path,
    registry: str,
    repository: str,
    *,
    formats: Sequence[str] = ("gzip",),
    archives: Sequence[str] = (),
    size_mib: int = 64,
    percent: float = 5,
    pattern: Pattern = "regions",
    shared_mib: int = 0,
    children: int = 0,
    timeout_s: float = 600,
) -> PodmanCheckpoint:
    """Run the workload in a Podman container, checkpoint it to an image, and push that.

    Podman's storage is in memory meanwhile: about three times the workload's own.

    Args:
        testbed: where the programs are.
        work_dir: gets `tree` and `base.tar`.
        registry: `host:port`, over plain HTTP.
        repository: where the images go, each with its format as tag (`zstd-chunked` for
            `zstd:chunked`).
        formats: of Podman's `--compression-format`: gzip, zstd, zstd:chunked.
        archives: of `checkpoint --export --compress`: none, gzip, zstd. They go to `work_dir`
            with the suffixes .tar, .tar.gz, .tar.zst; the container is restored after each.
        size_mib: as for `Workload`.
        percent: as for `Workload`.
        pattern: as for `Workload`.
        shared_mib: as for `Workload`.
        children: as for `Workload`.
        timeout_s: for each of Podman's commands.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    base_tar, tree = work_dir / "base.tar", work_dir / "tree"
    write_base(testbed, base_tar)
    options = workload_options(
        Path(STATUS),
        size_mib=size_mib,
        percent=percent,
        pattern=pattern,
        shared_mib=shared_mib,
        children=children,
    )
    with Session(testbed, [work_dir]) as session:

        def podman(*words: str | Path) -> str:
            return session.run([*PODMAN, *words], timeout_s=timeout_s).strip()

        podman("import", "--quiet", base_tar.absolute(), _IMAGE)
        container = ["--name", "workload", "--network", "none", "--pids-limit", "0"]
        container += ["--cgroup-parent", f"/{session.name}"]
        container += [
            "--security-opt",
            "seccomp=unconfined",
            "--security-opt",
            "apparmor=unconfined",
        ]
        podman("run", "--detach", *container, _IMAGE, "/workload", *options)
        podman("exec", "workload", *CHANGES)
        rootfs = podman("container", "mount", "workload")
        status = Status(session.path(rootfs + STATUS), members=1 + children)
        status.wait_loop(timeout_s=60 + size_mib * (1 + children) / 50)
        hashes = status.wait_hashes(lambda: podman("kill", "--signal", "USR1", "workload"))
        podman("container", "unmount", "workload")

        exported = {}
        for form in archives:
            exported[form] = work_dir / f"{form}.tar{_SUFFIXES[form]}"
            export = ["--keep", "--compress", form, "--export", str(exported[form].absolute())]
            podman("container", "checkpoint", *export, "workload")
            podman("container", "restore", "--keep", "workload")

        image = "localhost/checkpoint:latest"
        podman("container", "checkpoint", "--create-image", image, "workload")
        shutil.rmtree(tree, ignore_errors=True)
        session.run(["cp", "-a", podman("image", "mount", image), tree.absolute()])
        podman("image", "unmount", image)
        images = {}
        for form in formats:
            tag = form.replace(":", "-")
            reference = f"{registry}/{repository}:{tag}"
            push = ["push", "--quiet", "--tls-verify=false", "--remove-signatures"]
            push += ["--compression-format", form, "--force-compression"]
            podman(*push, image, f"docker://{reference}")
            images[form] = _pushed(registry, repository, tag)
    return PodmanCheckpoint(images, tree, base_tar, hashes, exported)


def make_bundle(tree: Path, base_tar: Path, bundle: Path, *, root_mode: int = 0o555) -> Path:
    """Make an OCI bundle into which runc can restore an engine's checkpoint; return `bundle`.

    The root filesystem is the base image with `rootfs-diff.tar` on top, and has the workload's
    status file as `rootfs/status`. Each restore needs a bundle of its own.

    Args:
        tree: where spec.dump, rootfs-diff.tar and devshm-checkpoint.tar are; nothing else is read.
        base_tar: the container's own image.
        bundle: the folder to make; it must not be there.
        root_mode: of the root directory when it was dumped, which CRIU compares: Podman's 0555,
            containerd's 0755.
    """
    bundle = bundle.absolute()
    rootfs = bundle / "rootfs"
    rootfs.mkdir(parents=True)
    with tarfile.open(base_tar) as opened:
        opened.extractall(rootfs, filter="fully_trusted")
    with tarfile.open(tree / "rootfs-diff.tar") as opened:
        _apply(rootfs, opened, tree / "deleted.files")
    rootfs.chmod(root_mode)

    spec = json.loads((tree / "spec.dump").read_text())
    spec["root"] = {"path": "rootfs"}
    spec["linux"]["cgroupsPath"] = ""  # for runc_restore to choose
    (bundle / "binds").mkdir()
    for mount in spec["mounts"]:
        if mount["type"] != "bind":
            continue  # what Podman bound there is gone: the same, empty
        source = bundle / "binds" / mount["destination"].strip("/").replace("/", "-")
        if mount["destination"] == "/dev/shm":
            source.mkdir()
            with tarfile.open(tree / "devshm-checkpoint.tar") as opened:
                opened.extractall(source, filter="fully_trusted")
        else:
            source.touch()
        mount["source"] = str(source)
    (bundle / "config.json").write_text(json.dumps(spec, indent=1))
    return bundle


def runc_restore(
    session: Session,
    images_dir: Path,
    bundle: Path,
    work_dir: Path,
    *,
    members: int = 1,
    lazy_pages: bool | Sequence[str] | Path = False,
    program: str | Path = "runc",
    timeout_s: float = 300,
) -> Restored:
    """Restore a container with plain runc, which reads the checkpoint from `images_dir`.

    Args:
        session: in which bundle, work_dir and images_dir are seen at the same paths as here.
        images_dir: the CRIU images; may be read-only, such as a lazyfs mount.
        bundle: made by `make_bundle`, not used before.
        work_dir: for CRIU's log and socket.
        members: how many processes report in the status file.
        lazy_pages: True to restore with CRIU's lazy-pages daemon (inside); or the command of
            another server for `work_dir`/lazy-pages.socket (here); or that path, where one listens.
        program: what is run for runc.
        timeout_s: for `runc restore` to return.

    Raises:
        CriuError: the restore failed; nothing of it is left.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    name = f"{session.name}-{bundle.name}"
    _set_cgroup(bundle, f"/{session.name}/{bundle.name}")
    paths = ["--image-path", str(images_dir.absolute()), "--work-path", str(work_dir.absolute())]
    started_s = time.time()
    with ExitStack() as on_failure:
        daemon = None
        words = [str(program), "restore", "--detach", *paths, "--bundle", str(bundle.absolute())]
        if isinstance(lazy_pages, Path):
            words.append("--lazy-pages")
        elif lazy_pages:
            if isinstance(lazy_pages, bool):
                server = ["criu", "lazy-pages", "-D", paths[1], "-W", paths[3]]
                command = session.command([*server, "-v1", "-o", "lazy-pages.log"])
            else:
                command = list(lazy_pages)
            daemon = start_lazy_pages(session.testbed, images_dir, work_dir, command)
            on_failure.callback(stop, daemon)
            words.append("--lazy-pages")

        def end() -> None:
            session.run(["runc", "delete", "--force", name])

        on_failure.callback(end)
        _run_logged(session.command([*words, name]), work_dir, timeout_s)
        seconds = time.time() - started_s
        on_failure.pop_all()

    def ask_hash() -> None:
        session.run(["runc", "kill", name, "USR1"])

    status = Status(bundle.absolute() / "rootfs" / STATUS.lstrip("/"), members)
    return Restored(started_s, seconds, status, daemon, ask_hash, end)


def _run_logged(words: Sequence[str], work_dir: Path, timeout_s: float) -> None:
    """Run runc with its output, which the container inherits, in a file."""
    said = work_dir / "runc.out"
    with said.open("wb") as out:
        try:
            code = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CriuError(f"runc restore took longer than {timeout_s:g} s") from error
    if code != 0:
        log = last_lines(work_dir / "restore.log")
        raise CriuError(f"runc restore failed with code {code}: {last_lines(said)}\n{log}")


def _apply(rootfs: Path, diff: tarfile.TarFile, deleted: Path) -> None:
    """Change a root filesystem as the container had.

    What it deleted, Podman lists and containerd marks with whiteouts. A directory that it deleted
    and made anew is as it was (Podman's own restore leaves it out, deleting last).
    """
    gone = []
    if deleted.exists():
        gone = [rootfs / name.lstrip("/") for name in json.loads(deleted.read_text())]
    kept = []
    for entry in diff:
        folder, _, name = entry.name.rpartition("/")
        if name == _OPAQUE:
            gone += (rootfs / folder).iterdir()
        elif name.startswith(_WHITEOUT):
            gone.append(rootfs / folder / name.removeprefix(_WHITEOUT))
        else:
            kept.append(entry)
    for path in gone:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    diff.extractall(rootfs, members=kept, filter="fully_trusted")


def _set_cgroup(bundle: Path, cgroup: str) -> None:
    spec = json.loads((bundle / "config.json").read_text())
    spec["linux"]["cgroupsPath"] = cgroup
    (bundle / "config.json").write_text(json.dumps(spec, indent=1))


def write_base(testbed: Testbed, base_tar: Path) -> None:
    """Write the root filesystem of a container's image: the workload and busybox.

    And in /tmp a file that is there no more when the container is checkpointed.
    """
    with tarfile.open(base_tar, "w") as archive:
        for folder in ("bin", "tmp"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        archive.add(testbed.program("workload"), "workload")
        archive.add(testbed.root / "bin/busybox", "bin/busybox")
        archive.addfile(tarfile.TarInfo("tmp/old"))
        shell = tarfile.TarInfo("bin/sh")
        shell.type, shell.linkname, shell.mode = tarfile.SYMTYPE, "busybox", 0o777
        archive.addfile(shell)


def _pushed(registry: str, repository: str, tag: str) -> PushedCheckpoint:
    digest, manifest = get_manifest(registry, repository, tag)
    return PushedCheckpoint(f"{registry}/{repository}:{tag}", digest, manifest)

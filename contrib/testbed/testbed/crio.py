"""What CRI-O does between an image and conmon, done here with the real conmon and runtime.

CRI-O is no package of Debian's, and wants a kubelet's requests. Storage (containers/storage, here
by podman and buildah), conmon and the OCI runtime are the real ones; a `CrioPod` takes CRI-O's
part: it makes a sandbox's namespaces, a bundle and a config.json, and calls conmon and the runtime
with the words, the environment, the descriptors and the cgroup that CRI-O would.

Source: CRI-O v1.36.3: internal/oci/runtime_oci.go (CreateContainer, CheckpointContainer,
RestoreContainer, runtimeCmd, prepareEnv), internal/lib/checkpoint.go and restore.go,
server/container_restore.go, internal/factory/container/container.go (annotations),
internal/config/cgmgr/cgroupfs_linux.go (conmon's cgroup); of others only what a runtime can see.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .engines import STATUS
from .errors import TestbedError
from .podman import Podman
from .session import Session
from .workload import Status, workload_options

CRIO_LOG = "io.kubernetes.cri-o.LogPath"
_PERSISTENT = "/var/lib/containers/storage/overlay-containers/{}/userdata"
_BUNDLES = "/run/containers/storage/overlay-containers/{}/userdata"
_EXITS, _SOCKETS, _ROOT = "/run/crio/exits", "/run/crio", "/run/runc"
_ENVIRONMENT = {"CRI_O_EXTERNAL": "1", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"}
_IMPORTED = (
    "checkpoint",
    "rootfs-diff.tar",
    "deleted.files",
    "stats-dump",
    "bind.mounts",
    CRIO_LOG,
)
"""What ContainerRestore copies out of the checkpoint image, of what is there."""
_NAMESPACES = {"network": "net", "ipc": "ipc", "uts": "uts"}

_CALL = """#!/usr/bin/python3 -IS
# CreateContainer of CRI-O: its words are those of conmon; environment, cwd, cgroup come before.
import fcntl, json, os, select, signal, socket, sys

asked = json.loads(sys.argv[1])
ours, theirs = socket.socketpair()
start, started = socket.socketpair()
pid = os.fork()
if pid == 0:
    for each in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(each, signal.SIG_DFL)  # Python ignores them; Go leaves them to its children
    os.setpgid(0, 0)
    os.chdir(asked["cwd"])
    sync = fcntl.fcntl(theirs, fcntl.F_DUPFD, 10)
    begin = fcntl.fcntl(started, fcntl.F_DUPFD, 10)
    os.dup2(sync, 3)
    os.dup2(begin, 4)
    os.closerange(5, 64)
    os.execve(asked["argv"][0], asked["argv"], asked["environ"])
theirs.close()
started.close()
with open(f"/proc/{pid}/cgroup") as file:
    lines = [line.rstrip().split(":", 2) for line in file]
for _, controllers, _ in lines:
    name = controllers.removeprefix("name=")
    places = [f"/sys/fs/cgroup/{name}", "/sys/fs/cgroup"] if name else ["/sys/fs/cgroup/unified"]
    for place in places:
        if os.path.exists(f"{place}/cgroup.procs"):
            folder = place + asked["cgroup"]
            os.makedirs(folder, exist_ok=True)
            if name == "cpuset":
                for each in ("cpuset.cpus", "cpuset.mems"):
                    path = place
                    for part in asked["cgroup"].strip("/").split("/"):
                        with open(f"{path}/{each}") as file:
                            value = file.read()
                        path += "/" + part
                        with open(f"{path}/{each}", "w") as file:
                            file.write(value)
            with open(f"{folder}/cgroup.procs", "w") as file:
                file.write(str(pid))
            break
start.sendall(b"\\0")
os.waitpid(pid, 0)
told = b""
while not told.endswith(b"\\n"):
    if not select.select([ours], [], [], asked["timeout_s"])[0]:
        sys.exit("create container timeout")
    piece = ours.recv(65536)
    if not piece:
        break
    told += piece
sys.stdout.write(told.decode())
"""


@dataclass(frozen=True)
class CrioContainer:
    """A container of the workload in a `CrioPod`."""

    pod: CrioPod
    name: str
    id: str
    status: Status

    @property
    def folder(self) -> Path:
        """CRI-O's persistent directory of it; its `checkpoint` is what a restore starts from."""
        return self.pod.session.path(_PERSISTENT.format(self.id))

    @property
    def bundle(self) -> Path:
        """Its bundle: config.json, conmon's files, and restore.log if a restore has failed."""
        return self.pod.session.path(_BUNDLES.format(self.id))

    def memory_hash(self, timeout_s: float = 60) -> tuple[str, ...]:
        """Return a hash of the memory of each process, the parent's first; reads all of it."""
        return self.status.wait_hashes(self.ask_hash, timeout_s)

    def ask_hash(self) -> None:
        """Send SIGUSR1 to the parent process."""
        self.pod.runtime_command("kill", self.id, "USR1")

    def state(self) -> str:
        """Return the runtime's word for its state; empty if the runtime knows nothing of it."""
        try:
            told = json.loads(self.pod.runtime_command("state", self.id))
        except TestbedError:
            return ""
        return str(told["status"])

    def remove(self) -> None:
        """Kill it and remove it, as the kubelet has it done."""
        self.pod.runtime_command("delete", "--force", self.id)


@dataclass
class CrioPod:
    """A pod's sandbox, and CRI-O's part in what happens in it.

    Args:
        podman: for the storage, with the registries; its session is where all runs.
        name: of the pod.
        annotations: of the pod; each container's config.json has them too.
        runtime: `runtime_path` of the handler.
        monitor_env: `monitor_env` of the handler: all of the environment but three variables.
    """

    podman: Podman
    name: str = "pod"
    annotations: Mapping[str, str] = field(default_factory=dict)
    runtime: str = "/usr/sbin/runc"
    monitor_env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session: Session = self.podman.session
        self.uid = secrets.token_hex(8)
        self.cgroup = f"/{self.session.name}/pod{self.uid}"
        self._sandbox = f"/run/crio-testbed/{self.uid}"
        make = ['mkdir -p "$1/shm" "$2" "$3" /run/netns /run/ipcns /run/utsns']
        make += ['mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size=64m shm "$1/shm"']
        make += ["for kind in net ipc uts; do : > /run/${kind}ns/$4; done"]
        make += ['unshare --net="/run/netns/$4" --ipc="/run/ipcns/$4" --uts="/run/utsns/$4"']
        make[-1] += ' sh -c "hostname $5; ip link set lo up"'
        make += ['echo "$5" > "$1/hostname"; echo "nameserver 127.0.0.1" > "$1/resolv.conf"']
        make += ['echo "127.0.0.1 localhost" > "$1/hosts"; : > "$1/containerenv"']
        words = [self._sandbox, _EXITS, f"/var/log/pods/{self.uid}", self.uid, self.name]
        self.session.run(["sh", "-ec", "\n".join(make), "sandbox", *words])
        caller = self.session.path("/run/crio-testbed/call")
        caller.write_text(_CALL)

    def run(self, base: str, name: str = "workload", **options: Any) -> CrioContainer:
        """Create and start a container of the workload, from an image of `Podman.push_base`.

        Args:
            base: the image; pulled if it is not here.
            name: of the container, in its pod.
            options: those of `workload_options`.
        """
        words = ["/workload", *workload_options(Path(STATUS), **options)]
        container = self._prepare(base, name, words, 1 + options.get("children", 0))
        self._conmon(container, [], "container create failed")
        self.runtime_command("start", container.id)
        container.status.wait_loop(timeout_s=120)
        return container

    def checkpoint(self, container: CrioContainer, tree: Path, base: str) -> tuple[str, ...]:
        """Checkpoint it as the kubelet's request does, and let it run on; return its hashes.

        Args:
            container: one of this pod's.
            tree: a new folder that the session sees: what CRI-O's archive would have in it.
            base: the image that it was made from.
        """
        hashes = container.memory_hash()
        folder, bundle = container.folder, container.bundle
        inside = _PERSISTENT.format(container.id)
        self.runtime_command("pause", container.id)
        shutil.copy(bundle / "config.json", folder / "spec.dump")
        spec = json.loads((folder / "spec.dump").read_text())
        config: dict[str, Any] = {"id": container.id, "name": container.name, "rootfsImage": base}
        config |= {"rootfsImageName": base, "runtime": "runc", "restored": False}
        config |= {
            "createdTime": "2026-01-02T03:04:05Z",
            "checkpointedTime": "2026-01-02T03:04:06Z",
        }
        (folder / "config.dump").write_text(json.dumps(config))
        binds = [each for each in spec["mounts"] if each["type"] == "bind"]
        (folder / "bind.mounts").write_text(json.dumps([self._external(each) for each in binds]))
        made = ["--image-path", f"{inside}/checkpoint", "--work-path", inside, "--leave-running"]
        self.runtime_command("checkpoint", "--file-locks", *made, container.id)
        changed = ["tar", "-C", spec["root"]["path"], "-cf", f"{inside}/rootfs-diff.tar", "status"]
        self.session.run(changed)
        shutil.copy(self.session.path(spec["annotations"][CRIO_LOG]), folder / CRIO_LOG)
        self.runtime_command("resume", container.id)
        shutil.copytree(folder, tree, ignore=lambda _, names: {"config.json"} & set(names))
        return hashes

    def restore(self, image: str, name: str = "workload", *, members: int = 1) -> CrioContainer:
        """Restore a container from a checkpoint image: CreateContainer and StartContainer of CRI.

        Raises:
            TestbedError: it failed; the message has what CRI-O would report of it. Nothing of it
                is left but its files.
        """
        container = self._import(image, name, members)
        try:
            self._conmon(container, self._restored(container), "container restore failed")
        except TestbedError:
            container.remove()
            raise
        shutil.rmtree(container.folder / "checkpoint")
        for each in ("rootfs-diff.tar", "stats-dump"):
            (container.folder / each).unlink(missing_ok=True)
        for each in ("restore.log", "stats-restore"):
            (container.bundle / each).unlink(missing_ok=True)
        return container

    def begin_restore(self, image: str, name: str = "workload") -> subprocess.Popen[str]:
        """Begin to restore a container; the process prints what conmon answers, if it does."""
        container = self._import(image, name, 1)
        words = self.session.command(self._call(container, self._restored(container)))
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(words, stdin=null, stdout=pipe, stderr=null, text=True)

    def _restored(self, container: CrioContainer) -> list[str]:
        return ["--restore", f"{_PERSISTENT.format(container.id)}/checkpoint"]

    def _import(self, image: str, name: str, members: int) -> CrioContainer:
        """Do all of a restore but to call conmon."""
        self.podman("pull", "--quiet", image)
        mounted = self.session.path(self.podman("image", "mount", image))
        spec = json.loads((mounted / "spec.dump").read_text())
        config = json.loads((mounted / "config.dump").read_text())
        args = spec["process"]["args"]
        container = self._prepare(config["rootfsImageName"], name, args, members)
        for each in _IMPORTED:
            source, target = mounted / each, container.folder / each
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            elif source.exists():
                shutil.copy(source, target)
        self.podman("image", "unmount", image)
        rootfs = json.loads((container.bundle / "config.json").read_text())["root"]["path"]
        inside = _PERSISTENT.format(container.id)
        self.session.run(["tar", "-C", rootfs, "-xf", f"{inside}/rootfs-diff.tar"])
        self.runtime_command("checkpoint", "--help")
        if not (container.folder / "checkpoint/inventory.img").exists():
            raise TestbedError("a complete checkpoint for this container cannot be found")
        (container.bundle / "restore.log").touch()
        return container

    def runtime_command(self, *words: str, timeout_s: float = 120) -> str:
        """Call the runtime as CRI-O does but for `create` and `restore`; return what it prints."""
        called = [self.runtime, "--root", _ROOT, *words]
        return self.session.run(["env", "-i", *self._environ(), *called], timeout_s=timeout_s)

    def conmon_words(self, container: CrioContainer, more: Sequence[str]) -> list[str]:
        """Return conmon's words for a container."""
        bundle, folder = _BUNDLES.format(container.id), _PERSISTENT.format(container.id)
        log = f"/var/log/pods/{self.uid}/{container.id}.log"
        words = ["/usr/bin/conmon", "-b", bundle, "-c", container.id, "--exit-dir", _EXITS]
        words += ["-l", log, "--log-level", "info", "-n", self._full_name(container.name)]
        words += ["-P", f"{bundle}/conmon-pidfile", "-p", f"{bundle}/pidfile"]
        words += ["--persist-dir", folder, "-r", self.runtime, "--runtime-arg", f"--root={_ROOT}"]
        words += ["--socket-dir-path", _SOCKETS, "--syslog", "-u", container.id]
        return [*words, *more]

    def _conmon(self, container: CrioContainer, more: Sequence[str], failure: str) -> None:
        told = self.session.run(self._call(container, more), timeout_s=300)
        if not told.strip():
            raise TestbedError(f"{failure}: conmon said nothing")
        answer = json.loads(told)
        if answer.get("pid", -1) == -1:
            raise TestbedError(f"{failure}: {answer.get('message', '')}")

    def _call(self, container: CrioContainer, more: Sequence[str]) -> list[str]:
        """Return the words that call conmon as CRI-O does, and print its answer."""
        pipes = {"_OCI_SYNCPIPE": "3", "_OCI_STARTPIPE": "4"}
        asked = {
            "argv": self.conmon_words(container, more),
            "environ": {**self.monitor_env, **_ENVIRONMENT, **pipes},
            "cwd": _BUNDLES.format(container.id),
            "cgroup": f"{self.cgroup}/crio-conmon-{container.id}",
            "timeout_s": 240,
        }
        return ["python3", "-IS", "/run/crio-testbed/call", json.dumps(asked)]

    def _environ(self) -> list[str]:
        return [f"{key}={value}" for key, value in {**self.monitor_env, **_ENVIRONMENT}.items()]

    def _full_name(self, name: str) -> str:
        return f"k8s_{name}_{self.name}_default_{self.uid}_0"

    def _external(self, mount: Mapping[str, Any]) -> dict[str, object]:
        source = self.session.path(mount["source"])
        kind = "directory" if source.is_dir() else "file"
        told = {"source": mount["source"], "destination": mount["destination"]}
        return {**told, "file_type": kind, "permissions": source.stat().st_mode & 0o777}

    def _prepare(self, base: str, name: str, args: Sequence[str], members: int) -> CrioContainer:
        """Make a container's root filesystem, its directories and its config.json."""
        ident = secrets.token_hex(32)
        self.session.run(["buildah", "from", "--quiet", "--name", ident, base])
        rootfs = self.session.run(["buildah", "mount", ident]).strip()
        status = Status(self.session.path(rootfs + STATUS), members)
        container = CrioContainer(self, name, ident, status)
        spec = json.dumps(self._spec(container, rootfs, args), indent=1)
        for folder in (container.folder, container.bundle):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(spec)
        return container

    def _spec(self, container: CrioContainer, rootfs: str, args: Sequence[str]) -> dict[str, Any]:
        namespaces = [{"type": "pid"}, {"type": "mount"}]
        for kind, short in _NAMESPACES.items():
            namespaces.append({"type": kind, "path": f"/run/{short}ns/{self.uid}"})
        capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_SETGID"]
        capabilities += ["CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_KILL"]
        sets = ("bounding", "effective", "permitted")
        process = {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/bin", "TERM=xterm", f"HOSTNAME={self.name}"],
            "cwd": "/",
            "capabilities": dict.fromkeys(sets, capabilities),
            "oomScoreAdj": 1000,
        }
        return {
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": rootfs},
            "hostname": self.name,
            "mounts": self._mounts(),
            "annotations": self._annotations(container),
            "linux": {
                "resources": {"devices": [{"allow": False, "access": "rwm"}]},
                "cgroupsPath": f"{self.cgroup}/crio-{container.id}",
                "namespaces": namespaces,
                "maskedPaths": ["/proc/kcore", "/proc/keys"],
                "readonlyPaths": ["/proc/bus", "/proc/sys"],
            },
        }

    def _mounts(self) -> list[dict[str, Any]]:
        def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
            told = {"destination": destination, "type": kind, "source": source}
            return {**told, "options": list(options)}

        safe, sandbox = ("nosuid", "noexec", "nodev"), self._sandbox
        device = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
        return [
            mount("/proc", "proc", "proc", *safe),
            mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            mount("/dev/pts", "devpts", "devpts", *device),
            mount("/dev/mqueue", "mqueue", "mqueue", *safe),
            mount("/sys", "sysfs", "sysfs", *safe, "ro"),
            mount("/dev/shm", "bind", f"{sandbox}/shm", "rw", "bind"),
            mount("/etc/resolv.conf", "bind", f"{sandbox}/resolv.conf", "ro", "bind", *safe),
            mount("/etc/hostname", "bind", f"{sandbox}/hostname", "ro", "bind"),
            mount("/etc/hosts", "bind", f"{sandbox}/hosts", "rw", "rbind", "rprivate", "bind"),
            mount("/run/.containerenv", "bind", f"{sandbox}/containerenv", "rw", "bind"),
        ]

    def _annotations(self, container: CrioContainer) -> dict[str, str]:
        crio = "io.kubernetes.cri-o."
        return {
            **self.annotations,
            "io.container.manager": "cri-o",
            f"{crio}Annotations": json.dumps({"io.kubernetes.container.hash": "0"}),
            f"{crio}ContainerID": container.id,
            f"{crio}ContainerType": "container",
            CRIO_LOG: f"/var/log/pods/{self.uid}/{container.id}.log",
            f"{crio}Metadata": json.dumps({"name": container.name}),
            f"{crio}Name": self._full_name(container.name),
            f"{crio}SandboxID": self.uid,
            f"{crio}SandboxName": self.name,
            "io.kubernetes.container.name": container.name,
            "io.kubernetes.pod.name": self.name,
            "io.kubernetes.pod.namespace": "default",
            "io.kubernetes.pod.uid": self.uid,
        }

"""What this machine is, as far as restoring a checkpoint depends on it.

Every probe tolerates whatever it finds and answers None where it cannot tell. They read /proc and
/sys and start programs, so they block: call `collect_host` in a thread.

Source: proc(5), cgroups(7), userfaultfd(2); CRIU, criu/lsm.c (kerndat_lsm), criu/plugin.c
(cr_plugin_init); uname's machine names as the OCI image-spec has them (GOARCH).
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

_PROGRAM_TIMEOUT_S = 5
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where CRIU and runc lie on some systems, and which is not on everybody's PATH."""

_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "mips64": "mips64le",
    "loongarch64": "loong64",
    "riscv64": "riscv64",
}
_PLUGIN_DIRECTORIES = (
    "/usr/lib/criu",
    "/usr/lib64/criu",
    "/usr/local/lib/criu",
    f"/usr/lib/{platform.machine()}-linux-gnu/criu",
)
_VERSION = re.compile(r"[vV]?([0-9]+(?:\.[0-9]+)+[-+.~0-9A-Za-z]*)")


class CriuProgram(msgspec.Struct, frozen=True):
    """A CRIU that can be run."""

    path: str
    version: str | None
    reads_compressed: bool
    """It knows the option --compress, and so images version 3."""


class Host(msgspec.Struct, frozen=True):
    """This machine; None where it could not be found out."""

    architecture: str
    """In OCI's words: "amd64", "arm64", …"""
    kernel: str
    criu: CriuProgram | None = None
    """None: there is none."""
    cgroup_version: str | None = None
    """"v1", "v2", or "hybrid": v1 controllers beside a v2 tree without any."""
    lsm: str | None = None
    """"none", "selinux" or "apparmor", as CRIU sees it."""
    cpu_flags: frozenset[str] | None = None
    """As in /proc/cpuinfo."""
    programs: Mapping[str, str | None] = msgspec.field(default_factory=dict)
    """Engines and runtimes that were asked for and are here, and their versions."""
    plugins: frozenset[str] = frozenset()
    """CRIU's plugins, without their .so."""
    userfaultfd: bool | None = None
    """Whether the kernel has it: `criu lazy-pages` works, for root."""
    memory_bytes: int | None = None
    """Of the machine, with swap."""
    available_bytes: int | None = None
    """Of `memory_bytes`, what programs may have without anything being evicted."""
    tasks: frozenset[int] = frozenset()
    """Of the task ids that were asked for, those that exist."""


def collect_host(
    *, criu: str = "criu", programs: Iterable[str] = (), task_ids: Iterable[int] = ()
) -> Host:
    """Find out what this machine is. Blocks, for some 20 ms, and never fails.

    `criu`: a program, by name or path, with arguments if it needs some; `programs`: names to
    look for; `task_ids`: to look which exist.
    """
    machine = platform.machine()
    return Host(
        architecture=_ARCHITECTURES.get(machine, machine),
        kernel=platform.release(),
        criu=_criu(criu),
        cgroup_version=_cgroup_version(Path("/proc/self/mountinfo")),
        lsm=_lsm(),
        cpu_flags=_cpu_flags(),
        programs=_programs(programs),
        plugins=frozenset(_plugins()),
        userfaultfd=_userfaultfd(),
        tasks=_tasks(task_ids),
        **_memory(),
    )


def look_again(host: Host, *, programs: Iterable[str], task_ids: Iterable[int]) -> Host:
    """Find out what else is wanted of this machine, and what may have changed since. Blocks.

    The source may have been waited for meanwhile: other programs have taken memory. CRIU is not
    asked again.
    """
    return msgspec.structs.replace(
        host, programs=_programs(programs), tasks=_tasks(task_ids), **_memory()
    )


def _memory() -> dict[str, int | None]:
    """Return how much of it there is, by the fields of `Host`."""
    memory = _meminfo()
    return {
        "memory_bytes": _sum(memory, "MemTotal", "SwapTotal"),
        "available_bytes": _sum(memory, "MemAvailable", "SwapFree"),
    }


def _programs(names: Iterable[str]) -> dict[str, str | None]:
    return {name: version for name in names for version in _found(name)}


def _tasks(ids: Iterable[int]) -> frozenset[int]:
    return frozenset(number for number in ids if Path(f"/proc/{number:d}").exists())


def version_in(text: str) -> str | None:
    """Find the first version number in what a program says of itself."""
    match = _VERSION.search(text)
    return match[1] if match else None


def _criu(command: str) -> CriuProgram | None:
    try:
        first, *arguments = shlex.split(command)
    except ValueError:
        return None
    path = _which(first)
    if path is None:
        return None
    said = _output([path, *arguments, "--version"])
    if said is None:
        return None
    usage = _output([path, *arguments, "--help"]) or ""
    return CriuProgram(path, version_in(said), "--compress" in usage)


def _found(name: str) -> list[str | None]:
    """Return a program's version (None if it tells none) in a list; an empty one if not there."""
    path = _which(name)
    if path is None:
        return []
    said = _output([path, "--version"])
    return [version_in(said) if said is not None else None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))


def _output(command: list[str]) -> str | None:
    """Return what a program prints; None if it cannot be run. CRIU prints its help and exits 1."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PROGRAM_TIMEOUT_S,
            check=False,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return None


def _cgroup_version(mountinfo: Path) -> str | None:
    """Tell by what is mounted below /sys/fs/cgroup, as engines do."""
    kinds = set()
    for line in (_text(mountinfo) or "").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 4 and fields[4].startswith("/sys/fs/cgroup"):
            kinds.add(after.partition(" ")[0])
    if "cgroup" in kinds:
        return "hybrid" if "cgroup2" in kinds else "v1"
    return "v2" if "cgroup2" in kinds else None


def _lsm() -> str:
    if Path("/sys/kernel/security/apparmor").exists():
        return "apparmor"
    # Without a label of its own, CRIU takes SELinux for absent even where it is mounted.
    label = _text("/proc/self/attr/current") or ""
    return "selinux" if Path("/sys/fs/selinux/enforce").exists() and ":" in label else "none"


def _cpu_flags() -> frozenset[str] | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        label, colon, value = line.partition(":")
        if colon and label.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def _plugins() -> list[str]:
    own = os.environ.get("CRIU_LIBS_DIR")
    directories = (own,) if own else _PLUGIN_DIRECTORIES
    found: list[str] = []
    for directory in directories:
        try:
            found += [item.stem for item in Path(directory).iterdir() if item.suffix == ".so"]
        except OSError:
            continue
    return found


def _userfaultfd() -> bool | None:
    if not Path("/proc/sys/vm").is_dir():
        return None
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    return switch.exists() or Path("/dev/userfaultfd").exists()


def _meminfo() -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    found = {}
    for line in (_text("/proc/meminfo") or "").splitlines():
        label, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if number.isdecimal() and unit == "kB":
            found[label] = int(number) * 1024
    return found


def _sum(memory: Mapping[str, int], *labels: str) -> int | None:
    known = [memory[label] for label in labels if label in memory]
    return sum(known) if known else None

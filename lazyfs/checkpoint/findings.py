"""Which differences between a checkpoint and a machine matter for restoring it.

Pure: compares what `inspect` found with what `host.py` found. It knows what CRIU refuses (level
"blocks"), and what usually goes wrong ("warns"); what an annotation says is anybody's word.

Source: CRIU, criu/image.c (check_img_inventory: versions, --tcp-close, --allow-uprobes, plugins),
criu/plugin.c, criu/lsm.c (validate_lsm), criu/arch/x86/cpu.c and crtools.c, criu/sk-inet.c
(--tcp-established), criu/mount.c (external mounts), criu/cr-restore.c (pids, by clone3),
criu/kerndat.c (userfaultfd), criu/pagemap.c; CRIU issue 2847 (page counts since 4.2).
"""

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from lazyfs.checkpoint.engines import Origin
from lazyfs.checkpoint.host import Host

if TYPE_CHECKING:
    from lazyfs.checkpoint.report import Report

CRIU, ENGINE = "CRIU", "engine"
"""Subjects about programs: whether they are here, and their versions."""

_NEWEST_IMAGES = 2
"""Images version that every CRIU since 2.0 reads; 3 takes one that knows --compress."""
_WIDE_COUNTS = (4, 2)
"""The CRIU that began to write page counts where older ones do not look."""

_ENGINES = {"Podman": "podman", "CRI-O": "crio", "containerd": "containerd", "Docker": "dockerd"}
_RUNTIMES = frozenset({"runc", "crun", "youki", "runsc"})
_NAMED_MOST = 5
_NUMBER = re.compile(r"[0-9]{1,9}")


class Level(StrEnum):
    """How bad a finding is."""

    BLOCKS = "blocks"
    """CRIU refuses, or restores something else than what was dumped."""
    WARNS = "warns"
    """It may fail, or takes an option."""
    UNKNOWN = "unknown"
    """It could not be compared."""
    OK = "ok"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was compared."""

    level: Level
    subject: str
    message: str
    """What was found, what is needed, and what to do; may hold anybody's text."""


class HasOrigin(Protocol):
    """What some comparisons are content with."""

    @property
    def origin(self) -> Origin:
        """Where a checkpoint comes from."""


class Words(msgspec.Struct, frozen=True):
    """What is known of a checkpoint before anything of it is read: its annotations' words."""

    origin: Origin


def programs_wanted(report: "Report") -> tuple[str, ...]:
    """Return the engine and the runtime to look for: known names only, whatever the image says."""
    engine, runtime = _ENGINES.get(report.origin.engine or ""), report.origin.runtime_name
    return tuple(name for name in (engine, runtime) if name in (*_ENGINES.values(), *_RUNTIMES))


def task_ids(report: "Report") -> tuple[int, ...]:
    """Return the ids of all processes and threads of a checkpoint."""
    pids = [process.pid for process in report.processes]
    tids = [thread.tid for process in report.processes for thread in process.threads]
    return tuple(dict.fromkeys([*pids, *tids]))


Compared = Iterator[Finding]
_blocks = partial(Finding, Level.BLOCKS)
_warns = partial(Finding, Level.WARNS)
_unknown = partial(Finding, Level.UNKNOWN)
_ok = partial(Finding, Level.OK)


def _criu_program(report: HasOrigin, host: Host) -> Compared:
    dumped = report.origin.criu_version
    if host.criu is None:
        yield _blocks(
            CRIU,
            "there is no criu on this machine"
            + (f"; the checkpoint was made by {dumped}" if dumped else "")
            + ": install it, or say where it is with --criu",
        )
        return
    here = host.criu.version
    if here is None or dumped is None:
        yield _unknown(
            CRIU,
            f"dumped by CRIU {dumped or 'of a version nobody wrote down'}; "
            f"here is {here or host.criu.path}",
        )
    elif _numbers(here) < _numbers(dumped):
        yield _warns(
            CRIU,
            f"dumped by CRIU {dumped}, and here is {here}: CRIU reads what older versions "
            "wrote, not what newer ones did. Update it",
        )
    else:
        yield _ok(CRIU, f"dumped by {dumped}, here is {here}")


def _images(report: "Report", host: Host) -> Compared:
    if report.criu is None:
        yield _unknown("images", "inventory.img could not be read")
        return
    version = report.criu.images_version
    compressed = report.memory.compressed
    knows = host.criu is not None and host.criu.reads_compressed
    if version > 3 or version < 1:
        yield _blocks(
            "images",
            f"images version {version}, which lazyfs does not know: take the CRIU that wrote it",
        )
    elif (version > _NEWEST_IMAGES or compressed) and not knows:
        words = f"images version {version}" + (" with compressed pages" if compressed else "")
        words += ": it takes a CRIU that knows --compress"
        if host.criu is None:
            yield _unknown("images", words)
        else:
            words += ", unlike the one here. Take the one that wrote it, or `crit decompress`"
            yield _blocks("images", words)
    else:
        yield _ok("images", f"images version {version}")
    here = _numbers(host.criu.version or "") if host.criu is not None else ()
    if report.needs.wide_page_counts and here and here < _WIDE_COUNTS:
        yield _blocks(
            "images",
            "CRIU 4.2 or later wrote the page counts; an older one, as here, takes all memory "
            "for empty and resumes processes with zeros. Update CRIU",
        )


def _architecture(report: HasOrigin, host: Host) -> Compared:
    dumped = report.origin.host_architecture
    if dumped is None:
        yield _unknown("architecture", "nothing says where it was dumped")
    elif dumped == host.architecture:
        yield _ok("architecture", dumped)
    else:
        yield _blocks(
            "architecture",
            f"dumped on {dumped}, and this is {host.architecture}: only a machine of the same "
            "architecture can go on with it",
        )


def _cpu(report: "Report", host: Host) -> Compared:
    if report.origin.host_architecture != "amd64" or host.architecture != "amd64":
        return
    needs = report.needs
    if host.cpu_flags is None:
        yield _unknown("CPU", "/proc/cpuinfo does not say what this CPU can do")
        return
    in_use = sorted(set(needs.cpu_features) - host.cpu_flags)
    if in_use:
        yield _blocks(
            "CPU",
            f"registers of {_list(in_use)} were in use, and this CPU lacks them: CRIU would "
            "leave them out silently. Restore on a CPU that has them",
        )
    if needs.cpu is None:
        if not in_use:
            yield _unknown(
                "CPU",
                "the dump has no cpuinfo.img (criu dump --cpu-cap): a program that has chosen "
                "instructions which this CPU lacks would be killed by SIGILL",
            )
        return
    missing = sorted(set(needs.cpu.instructions) - host.cpu_flags)
    if missing:
        yield _warns(
            "CPU",
            f"dumped on {needs.cpu.model or 'a CPU'}, which has {_list(missing)}, unlike this "
            "one: a program that uses them is killed by SIGILL. Restore on a like CPU",
        )
    elif not in_use:
        yield _ok("CPU", "this CPU has all instructions that the dump's had")


def _kernel(report: HasOrigin, host: Host) -> Compared:
    dumped = report.origin.host_kernel
    if dumped is None or not _numbers(dumped):
        yield _unknown("kernel", f"nothing says on which it was dumped; {host.kernel}")
    elif _numbers(host.kernel)[:2] < _numbers(dumped)[:2]:
        yield _warns(
            "kernel",
            f"dumped on Linux {dumped}, and this is {host.kernel}: what the processes use of the "
            "newer one may be missing here",
        )
    else:
        yield _ok("kernel", f"dumped on Linux {dumped}, this is {host.kernel}")


def _cgroups(report: HasOrigin, host: Host) -> Compared:
    dumped, here = report.origin.cgroup_version, host.cgroup_version
    if dumped is None:
        return
    if here is None:
        yield _unknown("cgroups", f"dumped on cgroup {dumped}; none is mounted here")
    elif dumped.removeprefix("v") == ("v1" if here == "hybrid" else here).removeprefix("v"):
        yield _ok("cgroups", f"cgroup {dumped}")
    else:
        yield _warns(
            "cgroups",
            f"dumped on cgroup {dumped}, and this machine has cgroup {here}: CRIU cannot put "
            "back groups of the other version. Boot with "
            f"systemd.unified_cgroup_hierarchy={int(dumped.endswith('2'))}, or leave groups to "
            "the engine (--manage-cgroups=ignore)",
        )


def _programs(report: "Report", host: Host) -> Compared:
    origin = report.origin
    engine = _ENGINES.get(origin.engine or "")
    for name, version, label in (
        (engine, origin.engine_version, origin.engine),
        (origin.runtime_name, origin.runtime_version, origin.runtime_name),
    ):
        if name is None:
            continue
        made = " ".join(filter(None, (label, version)))
        if name in host.programs:
            here = host.programs[name] or "of a version it does not tell"
            yield _ok(ENGINE, f"made with {made}; here is {name} {here}")
        elif name in programs_wanted(report):
            yield _warns(
                ENGINE,
                f"made with {made}, and there is no {name} here: another one may not "
                "understand the checkpoint. Install it, or restore with CRIU alone",
            )
        else:
            yield _unknown(ENGINE, f"made with {made}, which lazyfs does not know")


def _labels(report: "Report", host: Host) -> Compared:
    lsm = report.criu.lsm if report.criu is not None else "none"
    if lsm == "none":
        return
    labels = _list(report.needs.security_labels)
    if lsm == host.lsm:
        yield _ok("security labels", f"of {lsm}" + (f": {labels}" if labels else ""))
    elif labels:
        yield _blocks(
            "security labels",
            f"processes carry labels of {lsm} ({labels}), and this machine has "
            f"{_lsm_here(host)}: restore with --lsm-profile, or on a machine with {lsm}",
        )
    else:
        yield _warns(
            "security labels",
            f"dumped under {lsm}, and this machine has {_lsm_here(host)}: a process with a "
            "label would not restore",
        )


def _plugins(report: "Report", host: Host) -> Compared:
    needed = (report.criu.plugins or ()) if report.criu is not None else ()
    missing = sorted(set(needed) - host.plugins)
    if missing:
        yield _blocks(
            "plugins",
            f"CRIU's {_list(missing)} took part in the dump and is not installed here: install it "
            "in /usr/lib/criu, or where CRIU_LIBS_DIR points to",
        )
    elif needed:
        yield _ok("plugins", f"{_list(needed)} installed")


def _options(report: "Report", _: Host) -> Compared:
    needs = report.needs
    for option in ("tcp_close", "allow_uprobes"):
        if getattr(report.criu, option, False):
            words = f"restore with --{option.replace('_', '-')}, as it was dumped"
            yield _warns("options", words)
    if needs.tcp_connections:
        yield _warns(
            "options",
            f"{needs.tcp_connections} established TCP connection(s): restore with "
            "--tcp-established, with the same addresses here, or with --tcp-close to drop them",
        )
    if needs.external_mounts and report.origin.engine not in _ENGINES:
        keys = _list([mount.key for mount in needs.external_mounts])
        yield _warns(
            "options",
            f"{len(needs.external_mounts)} mount(s) come from outside ({keys}): give criu "
            "restore --external mnt[KEY]:PATH for each",
        )


def _lazy_pages(_: "Report", host: Host) -> Compared:
    if host.userfaultfd is False:
        yield _warns(
            "lazy pages",
            "this kernel has no userfaultfd: criu lazy-pages does not work, criu restore does",
        )
    elif host.userfaultfd:
        yield _ok("lazy pages", "this kernel has userfaultfd")


def _memory(report: "Report", host: Host) -> Compared:
    memory = report.memory
    needed = memory.total_bytes
    if needed is None:
        needed = 0 if memory.compressed else report.sizes.pages_bytes
    needed += memory.parent_bytes or 0
    if host.memory_bytes is None or host.available_bytes is None or not needed:
        return
    words = f"{_mib(needed)} to be restored, {_mib(host.available_bytes)} available"
    if needed > host.memory_bytes:
        yield _blocks("memory", f"{words} of {_mib(host.memory_bytes)} in all")
    elif needed > host.available_bytes:
        yield _warns("memory", f"{words}: free some, or add swap")
    else:
        yield _ok("memory", words)


def _process_ids(report: "Report", host: Host) -> Compared:
    if not report.processes or (report.own_namespaces and "pid" in report.own_namespaces):
        return
    taken = sorted(set(task_ids(report)) & host.tasks)
    if not taken:
        yield _ok("process ids", "free here")
        return
    numbers = _list([str(number) for number in taken])
    they = f"process {numbers} is" if len(taken) == 1 else f"processes {numbers} are"
    if report.own_namespaces is None:
        yield _unknown(
            "process ids",
            f"{they} here already, and nothing says whether the checkpoint has a PID "
            "namespace of its own",
        )
        return
    yield _blocks(
        "process ids",
        f"{they} here already, and the checkpoint has no PID namespace of its own: end what has "
        "the number, or restore in a new one (criu-ns, unshare -p)",
    )


def _parents(report: "Report", _: Host) -> Compared:
    if report.parents:
        yield _ok("parents", f"all {len(report.parents)} are there: {_list(report.parents)}")
    elif report.memory.parent_bytes:
        yield _blocks(
            "parents",
            f"{_mib(report.memory.parent_bytes)} of memory is in an earlier checkpoint, and no "
            "`parent` says where: put it into the same image",
        )


_COMPARISONS: "tuple[Callable[[Report, Host], Compared], ...]" = (
    _criu_program,
    _images,
    _parents,
    _architecture,
    _cpu,
    _kernel,
    _cgroups,
    _programs,
    _labels,
    _plugins,
    _options,
    _memory,
    _process_ids,
    _lazy_pages,
)


def check(report: "Report", host: Host) -> tuple[Finding, ...]:
    """Compare a checkpoint with a machine; the worst comes first."""
    found = [finding for compare in _COMPARISONS for finding in compare(report, host)]
    return tuple(sorted(found, key=lambda finding: list(Level).index(finding.level)))


def check_words(words: HasOrigin, host: Host) -> tuple[Finding, ...]:
    """Compare what annotations say with a machine; only what keeps it from being restored."""
    compared = (_architecture, _kernel, _cgroups, *((_criu_program,) if host.criu else ()))
    found = [finding for compare in compared for finding in compare(words, host)]
    return tuple(each for each in found if each.level in (Level.BLOCKS, Level.WARNS))


def _numbers(version: str) -> tuple[int, ...]:
    """Read "4.1.1-rc2" as (4, 1, 1): what stands between dots, up to what is no number."""
    found: list[int] = []
    for part in version.removeprefix("v").split(".")[:4]:
        match = _NUMBER.match(part)
        if match is None:
            break
        found.append(int(match[0]))
        if match[0] != part:
            break
    return tuple(found)


def _lsm_here(host: Host) -> str:
    return host.lsm if host.lsm not in (None, "none") else "no security module that CRIU knows"


def _list(names: "tuple[str, ...] | list[str]") -> str:
    more = f" and {len(names) - _NAMED_MOST} more" if len(names) > _NAMED_MOST else ""
    return ", ".join(names[:_NAMED_MOST]) + more


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.{1 if count < 10 << 20 else 0}f} MiB"

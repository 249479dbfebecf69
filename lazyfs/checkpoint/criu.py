"""What CRIU writes: file names, and the few messages that lazyfs looks into.

Bytes in, frozen values or `MalformedError` out; callers bound the size of what they hand in.
Only names are needed to show and serve an image; the messages are for `lazyfs inspect`, and
protobuf is imported with the first of them.

Memory is in `criu_memory.py`, the order of a restore in `criu_order.py`, CPUs in `criu_cpu.py`.

Source: CRIU, criu/image-desc.c, criu/include/magic.h, images/*.proto; for `compression`
enum compress_mode of criu/include/compression.h (criu pull request 2895).
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from lazyfs.checkpoint import criu_wire as wire
from lazyfs.ground.errors import MalformedError

INVENTORY = "inventory.img"
PSTREE = "pstree.img"
PARENT = "parent"
"""A symbolic link to the images directory of the checkpoint that this one builds on."""

_INVENTORY_MAGIC = 0x58313116
_PSTREE_MAGIC = 0x50273030
_CORE_MAGIC = 0x55053847
_IDS_MAGIC = 0x54432030
_MNTS_MAGIC = 0x55563928

# ---- names ----

_PAGES_PREFIXES = ("pages-", "amdgpu-pages-")
_PER_TASK = re.compile(r"(core|ids|mm|pagemap)-(0|[1-9][0-9]{0,9})\.img")
_MOUNTS = re.compile(r"mountpoints-[0-9]{1,10}\.img")
_TCP_STREAM = re.compile(r"tcp-stream-[0-9a-f]{1,16}\.img")


def is_pages(name: str) -> bool:
    """Whether a file of an images directory holds memory, which is to say nearly all bytes."""
    return name.startswith(_PAGES_PREFIXES) and name.endswith(".img")


def link_for_left_out(name: str) -> str:
    """Return the target of the link that stands for a pages file in a stub: it leads to itself.

    So nobody can open it (ELOOP), whoever tries: see `stub_layer.py`.
    """
    return f"{name}/not-in-this-stub"


def is_left_out(name: str, target: str) -> bool:
    """Whether a symbolic link is one that stands for a pages file in a stub."""
    return is_pages(name) and target == link_for_left_out(name)


def task_image(kind: str, task_id: int) -> str:
    """Return the name of a task's image: kind is "core", "ids", "mm" or "pagemap"."""
    return f"{kind}-{task_id}.img"


def task_of(name: str) -> tuple[str, int] | None:
    """Read a name that `task_image` would give; None for any other."""
    match = _PER_TASK.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def is_mounts(name: str) -> bool:
    """Whether a file lists the mount points of a mount namespace."""
    return _MOUNTS.fullmatch(name) is not None


def is_tcp_stream(name: str) -> bool:
    """Whether a file holds an established TCP connection."""
    return _TCP_STREAM.fullmatch(name) is not None


def pages_image(pages_id: int) -> str:
    """Return the name of the pages file that a pagemap points to."""
    return f"pages-{pages_id}.img"


# ---- what is read ----


class KernelIds(msgspec.Struct, frozen=True):
    """Which kernel objects a task has, by CRIU's numbers; 0 where the image does not say."""

    pid_ns: int = 0
    net_ns: int = 0
    ipc_ns: int = 0
    uts_ns: int = 0
    mnt_ns: int = 0
    user_ns: int = 0
    cgroup_ns: int = 0
    time_ns: int = 0

    def namespaces_unlike(self, other: "KernelIds") -> tuple[str, ...]:
        """Names of the namespaces ("mnt", "pid", …) that both know and do not share."""
        pairs = (
            (name, getattr(self, name), getattr(other, name)) for name in self.__struct_fields__
        )
        return tuple(
            sorted(name.removesuffix("_ns") for name, mine, its in pairs if 0 != mine != its != 0)
        )


class Inventory(msgspec.Struct, frozen=True):
    """inventory.img: how the dump as a whole was made."""

    images_version: int
    """1 before CRIU 2.0, 2 since; 3 where pages may be compressed (criu-dev, mid 2026)."""
    root_ids: KernelIds | None
    """The kernel objects of CRIU itself: a task with others is in namespaces of its own."""
    lsm: str
    """The Linux security module whose labels the tasks carry: "none", "selinux", "apparmor"."""
    dump_uptime_us: int | None
    """Microseconds from the host's boot to the dump."""
    run_id: str | None
    pre_dump_mode: str | None
    """"splice" or "read"; None for a dump that goes with no pre-dump."""
    network_lock: str | None
    tcp_close: bool
    """Restoring wants `--tcp-close`."""
    allow_uprobes: bool
    """Restoring wants `--allow-uprobes`."""
    plugins: tuple[str, ...] | None
    """CRIU's plugins that took part; None where the dump is too old to say."""
    compression: str | None = None
    """How pages are compressed: "page", each by itself, or "region"; None if they are not."""


class Process(msgspec.Struct, frozen=True):
    """One entry of pstree.img."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    thread_ids: tuple[int, ...]
    """Of all its threads; the first is the pid. Empty for a zombie."""


class Core(msgspec.Struct, frozen=True):
    """core-ID.img of a process or a thread."""

    architecture: str
    """In OCI's words: "amd64", "arm64", …"""
    command: str
    """What the task calls itself (comm)."""
    state: str | None
    """"alive", "stopped" or "zombie"; None for a thread."""
    lsm_label: str = ""
    """Its SELinux context or AppArmor profile; "" for none, or where the image does not say."""
    x86_state: int = 0
    """Bits of XSTATE_BV: which register sets were in use, on x86."""


class Mount(msgspec.Struct, frozen=True):
    """A mount point of mountpoints-ID.img that comes from outside of what was dumped."""

    mountpoint: str
    key: str
    """What `criu restore --external mnt[KEY]:PATH` calls it."""


def parse_inventory(data: bytes) -> Inventory:
    """Read inventory.img.

    Raises:
        MalformedError: it is not one, or no images version is in it.
    """
    what = INVENTORY
    record = wire.first(data, _INVENTORY_MAGIC, what)
    message = wire.parse("inventory_entry", record, what, "img_version")
    return Inventory(
        images_version=message.img_version,
        root_ids=_ids(message.root_ids) if message.HasField("root_ids") else None,
        lsm=_named({0: "none", 1: "selinux", 2: "apparmor"}, message.lsmtype),
        dump_uptime_us=message.dump_uptime if message.HasField("dump_uptime") else None,
        run_id=_text(message.dump_criu_run_id) or None,
        pre_dump_mode=_optional({1: "splice", 2: "read"}, message, "pre_dump_mode"),
        network_lock=_optional(
            {0: "iptables", 1: "nftables", 2: "skip"}, message, "network_lock_method"
        ),
        tcp_close=message.tcp_close,
        allow_uprobes=message.allow_uprobes,
        plugins=tuple(_text(name) for name in message.plugins_entry.plugins)
        if message.HasField("plugins_entry")
        else None,
        compression=_COMPRESSION.get(message.compress, f"unknown ({message.compress})"),
    )


def parse_pstree(data: bytes) -> tuple[Process, ...]:
    """Read pstree.img: the processes, parents before their children.

    Raises:
        MalformedError: it is not one, a process has no pid, or two tasks have the same.
    """
    found: list[Process] = []
    seen: set[int] = set()
    for record in wire.records(data, _PSTREE_MAGIC, PSTREE):
        message = wire.parse("pstree_entry", record, PSTREE, "pid", "ppid")
        process = Process(
            message.pid, message.ppid, message.pgid, message.sid, tuple(message.threads)
        )
        for task_id in process.thread_ids or (process.pid,):
            if task_id in seen:
                raise MalformedError(f"{PSTREE} has two tasks {task_id}")
            seen.add(task_id)
        found.append(process)
    return tuple(found)


def parse_core(data: bytes, what: str = "core image") -> Core:
    """Read core-ID.img.

    Raises:
        MalformedError: it is not one, or says neither for which machine nor of what task.
    """
    message = wire.parse("core_entry", wire.first(data, _CORE_MAGIC, what), what, "mtype")
    process = message.tc if message.HasField("tc") else None
    return Core(
        architecture=_named(_ARCHITECTURES, message.mtype),
        command=_text(process.comm if process else message.thread_core.comm),
        state=_named(_STATES, process.task_state) if process else None,
        lsm_label=_text(message.thread_core.creds.lsm_profile),
        x86_state=message.thread_info.fpregs.xsave.xstate_bv,
    )


def parse_ids(data: bytes, what: str = "ids image") -> KernelIds:
    """Read ids-PID.img.

    Raises:
        MalformedError: it is not one.
    """
    return _ids(wire.parse("task_kobj_ids_entry", wire.first(data, _IDS_MAGIC, what), what))


def parse_external_mounts(data: bytes, what: str = "mountpoints image") -> tuple[Mount, ...]:
    """Read the external mounts of mountpoints-ID.img.

    Raises:
        MalformedError: it is not one.
    """
    messages = [
        wire.parse("mnt_entry", record, what) for record in wire.records(data, _MNTS_MAGIC, what)
    ]
    return tuple(
        Mount(_text(message.mountpoint), _text(message.ext_key or message.mountpoint))
        for message in messages
        if message.ext_key or message.ext_mount
    )


_ARCHITECTURES = {
    1: "amd64",
    2: "arm",
    3: "arm64",
    4: "ppc64le",
    5: "s390x",
    6: "mips64le",
    7: "loong64",
    8: "riscv64",
}
_COMPRESSION: Mapping[int, str | None] = {0: None, 1: "page", 2: "region"}
_STATES = {1: "alive", 2: "zombie", 3: "stopped", 6: "zombie"}


def _ids(message: Any) -> KernelIds:
    return KernelIds(*(getattr(message, f"{name}_id") for name in KernelIds.__struct_fields__))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _named(names: Mapping[int, str], number: int) -> str:
    return names.get(number, f"unknown ({number})")


def _optional(names: Mapping[int, str], message: Any, field: str) -> str | None:
    return _named(names, getattr(message, field)) if message.HasField(field) else None

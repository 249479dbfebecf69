"""What CRIU writes: file names, and the few messages that lazyfs looks into.

Bytes in, frozen values or `MalformedError` out; callers bound the size of what they hand in.
Only names are needed to show and serve an image; the messages are for `lazyfs inspect`, and
protobuf is imported with the first of them.

Source: CRIU, criu/image-desc.c, criu/include/magic.h, images/*.proto.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, NamedTuple

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
_PAGEMAP_MAGIC = 0x56084025

# ---- names ----

_PAGES_PREFIXES = ("pages-", "amdgpu-pages-")
_PER_TASK = re.compile(r"(core|ids|mm|pagemap)-(0|[1-9][0-9]{0,9})\.img")


def is_pages(name: str) -> bool:
    """Whether a file of an images directory holds memory, which is to say nearly all bytes."""
    return name.startswith(_PAGES_PREFIXES) and name.endswith(".img")


def task_image(kind: str, task_id: int) -> str:
    """Return the name of a task's image: kind is "core", "ids", "mm" or "pagemap"."""
    return f"{kind}-{task_id}.img"


def task_of(name: str) -> tuple[str, int] | None:
    """Read a name that `task_image` would give; None for any other."""
    match = _PER_TASK.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def pages_image(pages_id: int) -> str:
    """Return the name of the pages file that a pagemap points to."""
    return f"pages-{pages_id}.img"


# ---- what is read ----


@dataclass(frozen=True, slots=True)
class KernelIds:
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
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__slots__)
        return tuple(
            sorted(name.removesuffix("_ns") for name, mine, its in pairs if 0 != mine != its != 0)
        )


@dataclass(frozen=True, slots=True)
class Inventory:
    """inventory.img: how the dump as a whole was made."""

    images_version: int
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


@dataclass(frozen=True, slots=True)
class Process:
    """One entry of pstree.img."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    thread_ids: tuple[int, ...]
    """Of all its threads; the first is the pid. Empty for a zombie."""


@dataclass(frozen=True, slots=True)
class Core:
    """core-ID.img of a process or a thread."""

    architecture: str
    """In OCI's words: "amd64", "arm64", …"""
    command: str
    """What the task calls itself (comm)."""
    state: str | None
    """"alive", "stopped" or "zombie"; None for a thread."""


class PageFlags(IntFlag):
    """Where the pages of an extent are."""

    IN_PARENT = 1
    LAZY = 2
    PRESENT = 4


class PageExtent(NamedTuple):
    """Pages that follow one another in memory, and, if present, in the pages file."""

    vaddr: int
    page_count: int
    flags: PageFlags


@dataclass(frozen=True, slots=True)
class Pagemap:
    """pagemap-PID.img: what memory is in which pages file, in file order."""

    pages_id: int
    extents: tuple[PageExtent, ...]

    def pages_with(self, flags: PageFlags) -> int:
        """How many pages have all of these flags."""
        return sum(item.page_count for item in self.extents if flags & ~item.flags == 0)


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
    )


def parse_ids(data: bytes, what: str = "ids image") -> KernelIds:
    """Read ids-PID.img.

    Raises:
        MalformedError: it is not one.
    """
    return _ids(wire.parse("task_kobj_ids_entry", wire.first(data, _IDS_MAGIC, what), what))


def parse_pagemap(data: bytes, what: str = "pagemap") -> Pagemap:
    """Read pagemap-PID.img (CRIU, criu/pagemap.c, init_compat_pagemap_entry, for old ones).

    Raises:
        MalformedError: it is not one, or an extent ends beyond the address space.
    """
    first, *others = wire.records(data, _PAGEMAP_MAGIC, what)
    head = wire.parse("pagemap_head", first, what, "pages_id")
    return Pagemap(head.pages_id, tuple(_extent(record, what) for record in others))


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
_STATES = {1: "alive", 2: "zombie", 3: "stopped", 6: "zombie"}


def _extent(record: bytes, what: str) -> PageExtent:
    message = wire.parse("pagemap_entry", record, what, "vaddr")
    page_count = message.nr_pages if message.HasField("nr_pages") else message.compat_nr_pages
    if message.vaddr + page_count * 4096 > 1 << 64:
        raise MalformedError(f"{what}: {page_count} pages from {message.vaddr:#x} on")
    flags = PageFlags(message.flags & 7)
    if message.in_parent:
        flags |= PageFlags.IN_PARENT
    elif not message.HasField("flags"):
        flags = PageFlags.PRESENT
    return PageExtent(message.vaddr, page_count, flags)


def _ids(message: Any) -> KernelIds:
    return KernelIds(*(getattr(message, f"{name}_id") for name in KernelIds.__slots__))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")


def _named(names: Mapping[int, str], number: int) -> str:
    return names.get(number, f"unknown ({number})")


def _optional(names: Mapping[int, str], message: Any, field: str) -> str | None:
    return _named(names, getattr(message, field)) if message.HasField(field) else None

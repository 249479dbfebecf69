"""In which order `criu restore` asks for the files of an images directory.

An order to fetch by, no promise: tasks are restored in parallel, and CRIU skips what it does not
need. Names that are not known here come last among the metadata.

Source: CRIU, criu/cr-restore.c: cr_restore_tasks, crtools_prepare_shared, root_prepare_shared,
restore_task_with_children; criu/shmem.c and criu/memfd.c (shared memory is filled while the
mappings are made, before any private page); criu/pie/restorer.c (private pages come last).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from lazyfs.checkpoint.criu import Process, is_pages, pages_image, task_image
from lazyfs.checkpoint.criu_memory import MemoryKind, Pagemap, Vma

_STAGES = (
    r"inventory\.img",
    r"cpuinfo\.img",
    r"pstree\.img|ids-.*",
    r"memfd\.img",
    r"files\.img|reg-files\.img|remap-fpath\.img|ghost-file-.*",
    r"inetsk\.img|binfmt-misc.*|tty\.img|apparmor\.img",
    r"cgroup\.img",
    r"userns-.*",
    r"mountpoints-.*",
    r"netns-.*",
    r"pidns-.*",
    r"timens-.*|tty-.*|utsns-.*|ipcns-.*",
    r"netdev-.*|ifaddr-.*|route6?-.*|rule-.*|ip6?tables-.*|nftables-.*",
    r"tmpfs-.*",
    r"seccomp\.img|filelocks\.img|pipes.*|fifo.*|sk-queues\.img|bpfmap-.*",
    r"(mm|fdinfo|fs)-.*",
    r"(core|creds|sigacts|itimers|posix-timers|rlimit|signal-.)-.*",
    r"pagemap-.*",
    r"tcp-stream-.*",
)
_STAGE = re.compile("|".join(f"(?P<s{index}>{stage})" for index, stage in enumerate(_STAGES)))
_NUMBER = re.compile(r"-([0-9]{1,10})\.")
_PAGEMAP_SHMEM = re.compile(r"pagemap-shmem-([0-9]{1,20})\.img")


class PagesUse(NamedTuple):
    """A pages file, and whose memory it holds."""

    name: str
    owner: str
    """"shmem", "device" (amdgpu's plugin) or "task"."""
    owner_id: int
    """The shared memory's id, 0 for a device's, or the pid."""


def shmem_of(name: str) -> int | None:
    """Read the id of shared memory in the name of its pagemap; None for another name."""
    match = _PAGEMAP_SHMEM.fullmatch(name)
    return int(match[1]) if match else None


def metadata_in_read_order(
    names: Iterable[str], processes: Sequence[Process] = ()
) -> tuple[str, ...]:
    """Return the files that hold no pages, first read first; tasks in the order of the tree."""
    ranks = {process.pid: rank for rank, process in enumerate(processes)}

    def key(name: str) -> tuple[int, int, str]:
        match = _STAGE.fullmatch(name)
        stage = int(str(match.lastgroup)[1:]) if match else len(_STAGES)
        number = _NUMBER.search(name)
        return stage, ranks.get(int(number[1]), len(ranks)) if number else -1, name

    return tuple(sorted((name for name in names if not is_pages(name)), key=key))


def pages_in_read_order(
    names: Collection[str],
    processes: Sequence[Process],
    pagemaps: Mapping[str, Pagemap],
    mappings: Mapping[int, Sequence[Vma]],
) -> tuple[PagesUse, ...]:
    """Return the pages files among `names` that a restore reads, first read first.

    Shared memory first, in the order in which tasks map it, then memfds; then a device's; then the
    tasks' own, in the order of the tree.

    `pagemaps`: by name; `mappings`: of the tasks, by pid. What is missing of them only costs
    order: a pages file whose pagemap is not given is left out.
    """
    mapped = [
        vma.shmid
        for process in processes
        for vma in mappings.get(process.pid, ())
        if vma.kind is MemoryKind.SHARED and not vma.maps_memfd
    ]
    known = sorted(found for name in pagemaps if (found := shmem_of(name)) is not None)
    shmem = [
        PagesUse(pages_image(pagemaps[name].pages_id), "shmem", shmid)
        for shmid in dict.fromkeys([*mapped, *known])
        if (name := f"pagemap-shmem-{shmid}.img") in pagemaps
    ]
    devices = [PagesUse(name, "device", 0) for name in sorted(names) if name.startswith("amdgpu-")]
    tasks = [
        PagesUse(pages_image(pagemaps[name].pages_id), "task", process.pid)
        for process in processes
        if (name := task_image("pagemap", process.pid)) in pagemaps
    ]
    first_use: dict[str, PagesUse] = {}
    for use in (*shmem, *devices, *tasks):
        if use.name in names and is_pages(use.name):
            first_use.setdefault(use.name, use)
    return tuple(first_use.values())

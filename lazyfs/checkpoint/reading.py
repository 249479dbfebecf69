"""The small files of an images directory, read and parsed once, with notes of what makes no sense.

What is there but makes no sense is a note, not an error; what cannot be fetched or proven is one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from lazyfs.checkpoint import criu, criu_cpu, criu_memory
from lazyfs.checkpoint.criu_memory import PAGE_BYTES, MemoryKind, PageFlags, Pagemap, Vma
from lazyfs.checkpoint.criu_order import shmem_of
from lazyfs.checkpoint.report import ProcessReport, ThreadReport
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.model import EntryType

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node

_FILE_LIMIT_BYTES = 16 * MIB
_PSTREE_LIMIT_BYTES = 1 * MIB
"""Some 50,000 processes. Each may cost a thousand times its entry to report."""
_MEMORY_LIMIT_BYTES = 32 * MIB
"""Of all pagemaps and mappings together; beyond it, memory is not told."""
_PAGE_SIZES = (PAGE_BYTES, 64 * KIB, 16 * KIB)
_LABELS_MOST = 20

_Parsed = TypeVar("_Parsed")


class Reading:
    """Files of one checkpoint, read and parsed, and what they say together."""

    def __init__(
        self,
        checkpoint: "OpenedCheckpoint",
        directory: str,
        images: "Mapping[str, Node]",
        *,
        brief: bool,
    ) -> None:
        """`brief`: memory is not looked at, and of tasks only the first."""
        self.notes: list[str] = []
        self.architecture: str | None = None
        self.labels: dict[str, None] = {}
        self.x86_state = 0
        self.kinds: dict[MemoryKind, int] | None = {}
        """Bytes of the tasks' own memory; None once a task's mappings are not known."""
        self.shared_bytes = 0
        self.compressed = self.wide_counts = False
        self._checkpoint = checkpoint
        self._directory = directory
        self._images = images
        self._brief = brief
        self.tells_memory = not brief

    def path(self, name: str) -> str:
        """Return the path in the checkpoint of a file of the images directory."""
        return f"{self._directory}/{name}" if self._directory else name

    def names_wanted(self) -> list[str]:
        """Return the names in the images directory that a full report is made from."""
        files = [name for name, node in self._images.items() if is_file(node)]
        tasks = [(task[0], name) for name in files if (task := criu.task_of(name))]
        memory = [name for kind, name in tasks if kind in ("pagemap", "mm")]
        memory += [name for name in files if shmem_of(name) is not None]
        if self.tells_memory and sum_bytes(self._images, memory) > _MEMORY_LIMIT_BYTES:
            self.tells_memory = False
            self.notes.append("the pagemaps are too large to be read for this: memory not told")
        others = [criu.INVENTORY, criu.PSTREE, criu_cpu.CPUINFO]
        return [
            *(name for name in files if name in others or criu.is_mounts(name)),
            *(name for kind, name in tasks if kind in ("core", "ids")),
            *(memory if self.tells_memory else ()),
        ]

    async def parse(
        self,
        path: str,
        parse: Callable[[bytes, str], _Parsed],
        limit_bytes: int = _FILE_LIMIT_BYTES,
    ) -> _Parsed | None:
        """Read a file of the checkpoint; None, and a note, if it makes no sense."""
        try:
            return parse(await self._checkpoint.read_file(path, limit_bytes), path)
        except MalformedError as error:
            self.notes.append(str(error))
            return None

    async def parse_image(
        self,
        name: str,
        parse: Callable[[bytes, str], _Parsed],
        limit_bytes: int = _FILE_LIMIT_BYTES,
    ) -> _Parsed | None:
        """Read a file of the images directory; None as well if it is not there."""
        if not is_file(self._images.get(name)):
            return None
        return await self.parse(self.path(name), parse, limit_bytes)

    async def inventory(self) -> criu.Inventory | None:
        """Read the inventory."""
        return await self.parse_image(criu.INVENTORY, lambda data, _: criu.parse_inventory(data))

    async def processes(self) -> tuple[ProcessReport, ...]:
        """Read the process tree and what its tasks' own files add to it."""
        found = await self.parse_image(
            criu.PSTREE, lambda data, _: criu.parse_pstree(data), _PSTREE_LIMIT_BYTES
        )
        return tuple(
            [
                await self._process(process, named=not self._brief or rank == 0)
                for rank, process in enumerate(found or ())
            ]
        )

    async def own_namespaces(
        self, inventory: criu.Inventory | None, processes: tuple[ProcessReport, ...]
    ) -> tuple[str, ...] | None:
        """Compare the root process's namespaces with those that CRIU itself ran in."""
        if inventory is None or inventory.root_ids is None or not processes:
            return None
        ids = await self.parse_image(criu.task_image("ids", processes[0].pid), criu.parse_ids)
        return ids.namespaces_unlike(inventory.root_ids) if ids is not None else None

    async def external_mounts(self) -> tuple[criu.Mount, ...]:
        """Read the mounts that a restore must be given, of all mount namespaces."""
        found: dict[criu.Mount, None] = {}
        for name in filter(criu.is_mounts, sorted(self._images)):
            mounts = await self.parse_image(name, criu.parse_external_mounts)
            found |= dict.fromkeys(mounts or ())
        return tuple(found)

    async def cpu(self) -> criu_cpu.DumpedCpu | None:
        """Read what CPU the dump was made on."""
        return await self.parse_image(criu_cpu.CPUINFO, criu_cpu.parse_cpuinfo)

    async def shared_memory(self) -> None:
        """Read the pagemaps of shared memory; adds to `shared_bytes`."""
        for name in self._images if self.tells_memory else ():
            if shmem_of(name) is None:
                continue
            pagemap = await self._pagemap(name)
            if pagemap is not None:
                present = pagemap.pages_with(PageFlags.PRESENT)
                self.shared_bytes += present * self._page_bytes(pagemap)

    async def look_at_one_pagemap(self) -> None:
        """Find out, of one pagemap, what holds for all: who can read it."""
        sizes = {
            name: node.size_bytes
            for name, node in self._images.items()
            if is_file(node) and (criu.task_of(name) or ("",))[0] == "pagemap"
        }
        if sizes:
            await self._pagemap(min(sizes, key=sizes.__getitem__))

    async def _process(self, process: criu.Process, *, named: bool) -> ProcessReport:
        cores: dict[int, criu.Core | None] = {}
        for task_id in (process.pid, *(() if self._brief else process.thread_ids)):
            if named and task_id not in cores:
                cores[task_id] = await self._core(task_id)
        core = cores.get(process.pid)
        threads = [
            ThreadReport(tid, thread.command if thread is not None else None)
            for tid in process.thread_ids
            for thread in [cores.get(tid)]
        ]
        present, lazy, in_parent = await self._memory_bytes(process.pid)
        return ProcessReport(
            pid=process.pid,
            ppid=process.ppid,
            pgid=process.pgid,
            sid=process.sid,
            command=core.command if core is not None else None,
            state=core.state if core is not None else None,
            threads=tuple(threads),
            memory_bytes=present,
            lazy_memory_bytes=lazy,
            parent_memory_bytes=in_parent,
        )

    async def _core(self, task_id: int) -> criu.Core | None:
        core = await self.parse_image(criu.task_image("core", task_id), criu.parse_core)
        if core is None:
            return None
        self.architecture = self.architecture or core.architecture
        self.x86_state |= core.x86_state if core.architecture == "amd64" else 0
        if core.lsm_label and len(self.labels) < _LABELS_MOST:
            self.labels[core.lsm_label] = None
        return core

    async def _memory_bytes(self, pid: int) -> tuple[int | None, int | None, int | None]:
        """Tell the bytes of a process that are present, present and lazy, and in the parent."""
        name = criu.task_image("pagemap", pid)
        pagemap = await self._pagemap(name) if self.tells_memory else None
        if pagemap is None:
            return None, None, None
        page_bytes = self._page_bytes(pagemap)
        await self._add_kinds(pid, pagemap, page_bytes)
        present, lazy, in_parent = (
            pagemap.pages_with(flags) * page_bytes
            for flags in (
                PageFlags.PRESENT,
                PageFlags.PRESENT | PageFlags.LAZY,
                PageFlags.IN_PARENT,
            )
        )
        return present, lazy, in_parent

    async def _add_kinds(self, pid: int, pagemap: Pagemap, page_bytes: int) -> None:
        if self.kinds is None:
            return
        vmas: tuple[Vma, ...] | None = await self.parse_image(
            criu.task_image("mm", pid), criu_memory.parse_mm
        )
        if vmas is None:
            self.kinds = None
            return
        for kind, pages in criu_memory.pages_by_kind(vmas, pagemap, page_bytes).items():
            self.kinds[kind] = self.kinds.get(kind, 0) + pages * page_bytes

    async def _pagemap(self, name: str) -> Pagemap | None:
        pagemap = await self.parse_image(name, criu_memory.parse_pagemap)
        if pagemap is not None:
            self.compressed |= pagemap.compressed
            self.wide_counts |= pagemap.wide_counts
        return pagemap

    def _page_bytes(self, pagemap: Pagemap) -> int:
        """Infer a page's size, which no image names, from how large the pages file is."""
        node = self._images.get(criu.pages_image(pagemap.pages_id))
        size_bytes = node.size_bytes if node is not None else 0
        fitting: Iterator[int] = (
            size for size in _PAGE_SIZES if pagemap.pages_size_bytes(size) == size_bytes
        )
        return next(fitting, PAGE_BYTES)


def is_file(node: "Node | None") -> bool:
    """Whether there is a file."""
    return node is not None and node.type is EntryType.FILE


def sum_bytes(nodes: "Mapping[str, Node]", names: list[str]) -> int:
    """Return how large some files are together."""
    return sum(nodes[name].size_bytes for name in names)

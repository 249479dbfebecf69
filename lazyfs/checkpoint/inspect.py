"""What a checkpoint is, from what little has to be read to say it.

Reads the dumps beside the images directory, the inventory, the process tree, and each task's
core, ids and pagemap: all of it prefetched at once, and never a page. What is there but makes no
sense is a note in the report, not its end; what cannot be fetched or proven ends it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from lazyfs.checkpoint import criu, engines
from lazyfs.ground.errors import MalformedError, NotACheckpoint
from lazyfs.ground.settings import KIB, MIB
from lazyfs.layers.model import EntryType

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node

_FILE_LIMIT_BYTES = 16 * MIB
_PSTREE_LIMIT_BYTES = 1 * MIB
"""Some 50,000 processes. Each may cost a thousand times its entry to report."""
_PAGEMAPS_LIMIT_BYTES = 32 * MIB
"""Of all pagemaps together; beyond it, memory is not told per process."""

_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True, slots=True)
class ThreadReport:
    """A thread, the main one too."""

    tid: int
    command: str | None


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """A process of the checkpoint; None where its images do not say."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    command: str | None
    state: str | None
    """"alive", "stopped" or "zombie"."""
    threads: tuple[ThreadReport, ...]
    memory_bytes: int | None
    """In its pages file."""
    lazy_memory_bytes: int | None
    """Part of `memory_bytes` that `criu lazy-pages` may bring after the process has resumed."""
    parent_memory_bytes: int | None
    """Beside `memory_bytes`: left in the parent checkpoint."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """The layer that holds the checkpoint."""

    media_type: str
    digest: str | None
    size_bytes: int
    format: str
    proof: str
    """"chunk": each chunk by its digest before a byte of it is served; "layer": the whole by the
    layer's digest, in the background or before the first byte with --verify full; "none"."""


@dataclass(frozen=True, slots=True)
class SizesReport:
    """Files of the layer, as they are when unpacked."""

    files: int
    files_bytes: int
    pages_files: int
    pages_bytes: int
    """Fetched as they are read."""
    metadata_files: int
    metadata_bytes: int
    """The other files of the images directory: fetched while a mount comes up."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `lazyfs inspect` tells; `as_json` gives its stable form."""

    reference: str
    manifest_digest: str | None
    manifest_media_type: str
    image_size_bytes: int
    """Of the layers, as stored."""
    origin: engines.Origin
    images_directory: str
    """Its path in the layer; "" where it is the layer itself."""
    criu: criu.Inventory | None
    own_namespaces: tuple[str, ...]
    """Namespaces that the root process does not share with the host that it was dumped on."""
    has_parent: bool
    """Part of the memory is in an earlier checkpoint, which `parent` in it points to."""
    processes: tuple[ProcessReport, ...]
    layer: LayerReport
    sizes: SizesReport
    inspection_requests: int
    """What this inspection cost."""
    inspection_fetched_bytes: int
    notes: tuple[str, ...]
    """What was found odd."""

    def as_json(self) -> dict[str, Any]:
        """The report as plain values. Keys are documented in docs/json.md, and stay."""
        return asdict(self)


async def inspect(checkpoint: "OpenedCheckpoint") -> Report:
    """Read what needs to be read and put the report together.

    Raises:
        NotACheckpoint: there is no images directory in it.
        SourceError, IntegrityError: something to read cannot be had, or is not what the manifest
            promised.
    """
    directory = checkpoint.images_directory
    if directory is None:
        raise NotACheckpoint(
            f"{checkpoint.reference} is no checkpoint: no {criu.INVENTORY} is in it; "
            f"it is {checkpoint.image.describe()}"
        )
    top = checkpoint.tree.root.children
    images_node = checkpoint.tree.find(directory)
    images = images_node.children if images_node is not None else {}
    reading = _Reading(checkpoint, directory, images)
    dumps = [name for name in engines.DUMPS if _is_file(top.get(name))]
    await checkpoint.prefetch([*dumps, *map(reading.path, reading.names_wanted())])

    parsed_dumps: dict[str, engines.Dump] = {}
    for name in dumps:
        dump = await reading.parse(name, engines.parse_dump)
        if dump is not None:
            parsed_dumps[name] = dump
    inventory = await reading.parse_image(
        criu.INVENTORY, lambda data, _: criu.parse_inventory(data)
    )
    processes = await reading.processes()
    origin = engines.origin_of(
        checkpoint.image.annotations,
        parsed_dumps,
        [checkpoint.image.media_type, *(layer.media_type for layer in checkpoint.image.layers)],
        top.keys(),
    )
    if origin.engine is None and inventory is not None:
        origin = replace(origin, engine="CRIU", recognised_by="inventory.img and no engine's mark")
    return Report(
        reference=checkpoint.reference,
        manifest_digest=str(checkpoint.image.digest) if checkpoint.image.digest else None,
        manifest_media_type=checkpoint.image.media_type,
        image_size_bytes=sum(layer.size_bytes for layer in checkpoint.image.layers),
        origin=_completed(origin, images.get(criu.INVENTORY), reading.architecture),
        images_directory=directory,
        criu=inventory,
        own_namespaces=await reading.own_namespaces(inventory, processes),
        has_parent=criu.PARENT in images,
        processes=processes,
        layer=_layer(checkpoint),
        sizes=_sizes(checkpoint, images),
        inspection_requests=checkpoint.counters.requests,
        inspection_fetched_bytes=checkpoint.counters.bytes_fetched,
        notes=tuple(reading.notes),
    )


class _Reading:
    """Files of one checkpoint, read and parsed, with notes of what could not be."""

    def __init__(
        self, checkpoint: "OpenedCheckpoint", directory: str, images: "Mapping[str, Node]"
    ) -> None:
        self.notes: list[str] = []
        self.architecture: str | None = None
        self._checkpoint = checkpoint
        self._directory = directory
        self._images = images
        self._pagemaps = True

    def path(self, name: str) -> str:
        """Return the path in the layer of a file of the images directory."""
        return f"{self._directory}/{name}" if self._directory else name

    def names_wanted(self) -> list[str]:
        """Return the names in the images directory that a report is made from."""
        tasks = [(task[0], name) for name in self._images if (task := criu.task_of(name))]
        pagemaps = [name for kind, name in tasks if kind == "pagemap"]
        self._pagemaps = _sum_bytes(self._images, pagemaps) <= _PAGEMAPS_LIMIT_BYTES
        if not self._pagemaps:
            self.notes.append("the pagemaps are too large to be read for this: memory not told")
        kinds = ("core", "ids", "pagemap") if self._pagemaps else ("core", "ids")
        others = [name for name in (criu.INVENTORY, criu.PSTREE) if name in self._images]
        return others + [name for kind, name in tasks if kind in kinds]

    async def parse(
        self,
        path: str,
        parse: Callable[[bytes, str], _Parsed],
        limit_bytes: int = _FILE_LIMIT_BYTES,
    ) -> _Parsed | None:
        """Read a file of the layer; None, and a note, if it makes no sense."""
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
        if not _is_file(self._images.get(name)):
            return None
        return await self.parse(self.path(name), parse, limit_bytes)

    async def processes(self) -> tuple[ProcessReport, ...]:
        """Read the process tree and what its tasks' own files add to it."""
        found = await self.parse_image(
            criu.PSTREE, lambda data, _: criu.parse_pstree(data), _PSTREE_LIMIT_BYTES
        )
        return tuple([await self._process(process) for process in found or ()])

    async def own_namespaces(
        self, inventory: criu.Inventory | None, processes: tuple[ProcessReport, ...]
    ) -> tuple[str, ...]:
        """Compare the root process's namespaces with those that CRIU itself ran in."""
        if inventory is None or inventory.root_ids is None or not processes:
            return ()
        ids = await self.parse_image(criu.task_image("ids", processes[0].pid), criu.parse_ids)
        return ids.namespaces_unlike(inventory.root_ids) if ids is not None else ()

    async def _process(self, process: criu.Process) -> ProcessReport:
        core = await self._core(process.pid)
        threads = [
            ThreadReport(tid, thread.command if thread is not None else None)
            for tid in process.thread_ids
            for thread in [core if tid == process.pid else await self._core(tid)]
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
        if core is not None and self.architecture is None:
            self.architecture = core.architecture
        return core

    async def _memory_bytes(self, pid: int) -> tuple[int | None, int | None, int | None]:
        """Tell the bytes of a process that are present, present and lazy, and in the parent."""
        name = criu.task_image("pagemap", pid)
        pagemap = await self.parse_image(name, criu.parse_pagemap) if self._pagemaps else None
        if pagemap is None:
            return None, None, None
        present = pagemap.pages_with(criu.PageFlags.PRESENT)
        lazy = pagemap.pages_with(criu.PageFlags.PRESENT | criu.PageFlags.LAZY)
        in_parent = pagemap.pages_with(criu.PageFlags.IN_PARENT)
        pages_file = self._images.get(criu.pages_image(pagemap.pages_id))
        page_bytes = _page_bytes(present, pages_file.size_bytes if pages_file else 0)
        return present * page_bytes, lazy * page_bytes, in_parent * page_bytes


def _page_bytes(page_count: int, file_bytes: int) -> int:
    """Infer a page's size, which no image names: 64 KiB on some arm64 and most ppc64le."""
    if page_count and file_bytes == page_count * 64 * KIB:
        return 64 * KIB
    if page_count and file_bytes == page_count * 16 * KIB:
        return 16 * KIB
    return 4 * KIB


def _completed(
    origin: engines.Origin, inventory: "Node | None", architecture: str | None
) -> engines.Origin:
    """Fill in what nobody wrote down but CRIU's files show."""
    if origin.host_architecture is None:
        origin = replace(origin, host_architecture=architecture)
    if origin.checkpointed_at is None and inventory is not None and inventory.mtime_ns > 0:
        origin = replace(origin, checkpointed_at=iso_time(inventory.mtime_ns))
    return origin


def iso_time(time_ns: int) -> str | None:
    """Write a time of a file as ISO 8601, in UTC; None for one beyond any calendar."""
    seconds, nanoseconds = divmod(time_ns, 10**9)
    try:
        whole = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (OverflowError, OSError, ValueError):
        return None
    return whole + (f".{nanoseconds:09}".rstrip("0") if nanoseconds else "") + "Z"


def _layer(checkpoint: "OpenedCheckpoint") -> LayerReport:
    layer = checkpoint.layer
    proof = "none" if layer.digest is None else "layer"
    return LayerReport(
        media_type=layer.media_type,
        digest=str(layer.digest) if layer.digest is not None else None,
        size_bytes=layer.size_bytes,
        format=checkpoint.index.format_name,
        proof="chunk" if checkpoint.index.chunks.proven else proof,
    )


def _sizes(checkpoint: "OpenedCheckpoint", images: "Mapping[str, Node]") -> SizesReport:
    everything = [node for _, node in checkpoint.tree.walk(checkpoint.tree.root)]
    pages = [name for name in images if _is_file(images[name]) and criu.is_pages(name)]
    metadata = [name for name in images if _is_file(images[name]) and not criu.is_pages(name)]
    return SizesReport(
        files=sum(_is_file(node) for node in everything),
        files_bytes=sum(node.size_bytes for node in everything if _is_file(node)),
        pages_files=len(pages),
        pages_bytes=_sum_bytes(images, pages),
        metadata_files=len(metadata),
        metadata_bytes=_sum_bytes(images, metadata),
    )


def _is_file(node: "Node | None") -> bool:
    return node is not None and node.type is EntryType.FILE


def _sum_bytes(nodes: "Mapping[str, Node]", names: list[str]) -> int:
    return sum(nodes[name].size_bytes for name in names)

"""What a checkpoint is, from what little has to be read to say it.

Reads the dumps beside the images directory, the inventory, the process tree, mounts, and each
task's core, ids, mappings and pagemap: all of it prefetched at once, and never a page.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import trio
from msgspec.structs import replace

from lazyfs.checkpoint import criu, engines
from lazyfs.checkpoint.criu_cpu import features_in_use
from lazyfs.checkpoint.criu_memory import MemoryKind
from lazyfs.checkpoint.reading import Reading, is_file, sum_bytes
from lazyfs.checkpoint.report import (
    LayerReport,
    MemoryReport,
    NeedsReport,
    ProcessReport,
    Report,
    SizesReport,
    StandsFor,
)
from lazyfs.checkpoint.stub import LARGEST_MARKER_BYTES, MARKER, read_stub
from lazyfs.checkpoint.trust import trust_of
from lazyfs.ground.errors import MalformedError, NotACheckpoint

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node


async def inspect(checkpoint: "OpenedCheckpoint", *, brief: bool = False) -> Report:
    """Read what needs to be read and put the report together.

    `brief`: for a mount that is coming up. Nothing is prefetched, memory is not looked at, and of
    the tasks' files only the first one's are read; sizes are of the names that are there so far.

    Raises:
        NotACheckpoint: there is no images directory in it.
        SourceError, IntegrityError: something to read cannot be had, or is not what the manifest
            promised.
    """
    if not brief:
        await checkpoint.complete()
    directory = checkpoint.images_directory
    if directory is None:
        raise NotACheckpoint(
            f"{checkpoint.reference} is no checkpoint: no {criu.INVENTORY} is in it; "
            f"it is {checkpoint.image.describe()}"
        )
    top = checkpoint.tree.root.children
    images_node = checkpoint.tree.find(directory)
    images = images_node.children if images_node is not None else {}
    reading = Reading(checkpoint, directory, images, brief=brief)
    dumps = [name for name in engines.DUMPS if is_file(top.get(name))]
    if not brief:
        await checkpoint.prefetch([*dumps, *map(reading.path, reading.names_wanted())])

    origin = await _origin(checkpoint, reading, dumps)
    inventory = await reading.inventory()
    if origin.engine is None and inventory is not None:
        origin = replace(origin, engine="CRIU", recognised_by="inventory.img and no engine's mark")
    processes = await reading.processes()
    if brief:
        await reading.look_at_one_pagemap()
    await reading.shared_memory()
    stands_for = await _stands_for(checkpoint, reading, images)
    return Report(
        reference=checkpoint.reference,
        manifest_digest=str(checkpoint.image.digest) if checkpoint.image.digest else None,
        manifest_media_type=checkpoint.image.media_type,
        image_size_bytes=sum(layer.size_bytes for layer in checkpoint.image.layers),
        origin=_completed(origin, images.get(criu.INVENTORY), reading.architecture),
        images_directory=directory,
        criu=inventory,
        own_namespaces=await reading.own_namespaces(inventory, processes),
        parents=checkpoint.parents,
        processes=processes,
        memory=_memory(reading, processes, images, inventory),
        needs=NeedsReport(
            tcp_connections=sum(map(criu.is_tcp_stream, images)),
            external_mounts=await reading.external_mounts(),
            security_labels=tuple(reading.labels),
            cpu=await reading.cpu(),
            cpu_features=features_in_use(reading.x86_state),
            wide_page_counts=reading.wide_counts,
        ),
        layers=_layers(checkpoint),
        trust=tuple(trust_of(checkpoint)),
        sizes=_sizes(checkpoint, images),
        inspection_requests=checkpoint.counters.requests,
        inspection_fetched_bytes=checkpoint.counters.bytes_fetched,
        notes=tuple(reading.notes),
        stub=checkpoint.stub,
        stands_for=stands_for,
    )


async def _stands_for(
    checkpoint: "OpenedCheckpoint", reading: Reading, images: Mapping[str, "Node"]
) -> StandsFor | None:
    """Return what a stub stands for; None if it is none, or does not say it as stubs do."""
    if not is_file(images.get(MARKER)):
        return None
    try:
        data = await checkpoint.read_file(reading.path(MARKER), LARGEST_MARKER_BYTES)
        stub = read_stub(data)
    except MalformedError as error:
        reading.notes.append(str(error))
        return None
    return StandsFor(
        stub.reference,
        stub.image_bytes,
        len(stub.pages),
        stub.pages_bytes,
        stub.lazy_pages,
        stub.made_by,
    )


async def _origin(
    checkpoint: "OpenedCheckpoint", reading: Reading, dumps: list[str]
) -> engines.Origin:
    parsed: dict[str, engines.Dump] = {}
    for name in dumps:
        dump = await reading.parse(name, engines.parse_dump)
        if dump is not None:
            parsed[name] = dump
    try:
        dumped = await trio.to_thread.run_sync(checkpoint.image.dumps)
    except MalformedError as error:
        reading.notes.append(str(error))
        dumped = {}
    return engines.origin_of(
        checkpoint.image.annotations,
        {**dumped, **parsed},
        [checkpoint.image.media_type, *(layer.media_type for layer in checkpoint.image.layers)],
        checkpoint.tree.root.children.keys(),
    )


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


def _memory(
    reading: Reading,
    processes: tuple[ProcessReport, ...],
    images: "Mapping[str, Node]",
    inventory: criu.Inventory | None,
) -> MemoryReport:
    devices = [
        name
        for name in images
        if is_file(images[name]) and criu.is_pages(name) and not name.startswith("pages-")
    ]
    own = [process.memory_bytes for process in processes if process.memory_bytes is not None]
    told = reading.tells_memory and bool(own)
    kinds = reading.kinds if told else None
    return MemoryReport(
        total_bytes=sum(own) + reading.shared_bytes if told else None,
        anonymous_bytes=kinds.get(MemoryKind.ANONYMOUS, 0) if kinds is not None else None,
        file_bytes=kinds.get(MemoryKind.FILE, 0) if kinds is not None else None,
        shared_bytes=reading.shared_bytes if told else None,
        lazy_bytes=sum(item.lazy_memory_bytes or 0 for item in processes) if told else None,
        parent_bytes=sum(item.parent_memory_bytes or 0 for item in processes) if told else None,
        device_bytes=sum_bytes(images, devices),
        compressed=reading.compressed
        or (inventory is not None and inventory.compression is not None),
    )


def _layers(checkpoint: "OpenedCheckpoint") -> tuple[LayerReport, ...]:
    return tuple(
        LayerReport(
            media_type=layer.descriptor.media_type,
            digest=str(layer.descriptor.digest) if layer.descriptor.digest is not None else None,
            size_bytes=layer.descriptor.size_bytes,
            format=layer.format_name,
            mislabelled=layer.mislabelled,
            streamed=layer.is_stream,
            proof=layer.proof,
        )
        for layer in checkpoint.layers
    )


def _sizes(checkpoint: "OpenedCheckpoint", images: "Mapping[str, Node]") -> SizesReport:
    # A container's files, shown as a directory, lie in a file that is counted already.
    walk = checkpoint.tree.walk(checkpoint.tree.root)
    everything = [node for _, node in walk if not node.exact]
    pages = [name for name in images if is_file(images[name]) and criu.is_pages(name)]
    metadata = [name for name in images if is_file(images[name]) and not criu.is_pages(name)]
    return SizesReport(
        files=sum(is_file(node) for node in everything),
        files_bytes=sum(node.size_bytes for node in everything if is_file(node)),
        pages_files=len(pages),
        pages_bytes=sum_bytes(images, pages),
        metadata_files=len(metadata),
        metadata_bytes=sum_bytes(images, metadata),
    )

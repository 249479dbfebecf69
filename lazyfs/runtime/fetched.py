"""All files of a checkpoint's images directory on a disk, proven, where there can be no mount.

Decides where they go (a new directory, so that what the stub brought along is neither mixed with
them nor believed), and that there is room for them before the first is fetched. A file has its name
once it is complete; whoever calls removes the directory after a failure.
"""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from lazyfs.ground.errors import LazyfsError, NotACheckpoint, raise_sole_error
from lazyfs.restore.served import Abandoned

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node

_STEP_BYTES = 4 << 20
_SPARE_BYTES = 16 << 20
"""For directories, and for what CRIU writes beside."""
_DEPTH_MOST = 1000


def fetch_images(
    opening: "Callable[[], OpenConfig]", reference: str, directory: Path, abandon: int
) -> None:
    """Fetch the images directory of a checkpoint, and those that it builds on.

    `abandon`: given up when this descriptor can be read.

    Raises:
        Abandoned: it could be.
        LazyfsError: they cannot be had or proven, or there is no room.
    """
    config = opening()
    import trio

    if config.content.verify == "background":
        config = replace(config, content=replace(config.content, verify="full"))
    try:
        trio.run(_fetch, config, reference, directory, abandon)
    except OSError as error:
        raise LazyfsError(f"{directory}: {error.strerror}") from None


async def _fetch(config: "OpenConfig", reference: str, directory: Path, abandon: int) -> None:
    import trio

    from lazyfs.checkpoint.opened import open_checkpoint

    is_abandoned = False

    async def watch(scope: trio.CancelScope) -> None:
        nonlocal is_abandoned
        await trio.lowlevel.wait_readable(abandon)
        is_abandoned = True
        scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            async with open_checkpoint(reference, config) as checkpoint:
                await checkpoint.complete()
                await _write_all(checkpoint, directory)
                checkpoint.raise_if_condemned()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise_sole_error(group)
    if is_abandoned:
        raise Abandoned("nobody waits for the restore any more")


async def _write_all(checkpoint: "OpenedCheckpoint", directory: Path) -> None:
    if checkpoint.images is None:
        raise NotACheckpoint(f"{checkpoint.reference} has no directory that holds inventory.img")
    grafts = checkpoint.grafts_of("criu")
    files: list[tuple[Path, Node]] = []
    directories = [directory]
    _collect(checkpoint.images.node, grafts, directory, files, directories)
    check_room(directory.parent, sum(node.size_bytes for _, node in files))
    for each in directories:
        each.mkdir(mode=0o700)
    await _in_order(checkpoint, files)


async def _in_order(checkpoint: "OpenedCheckpoint", files: "list[tuple[Path, Node]]") -> None:
    import trio

    for path, node in sorted(files, key=lambda item: (item[1].layer, item[1].content_start)):
        reader = checkpoint.reader(node)
        partial = path.with_name(path.name + ".partial")
        async with await trio.open_file(partial, "xb") as file:
            for offset in range(0, node.size_bytes, _STEP_BYTES):
                await file.write(await reader.read(offset, _STEP_BYTES))
        partial.rename(path)


def _collect(
    node: "Node",
    grafts: "Mapping[Node, Node]",
    into: Path,
    files: "list[tuple[Path, Node]]",
    directories: list[Path],
    depth: int = 0,
) -> None:
    """List what is below a directory; a `parent` link is the directory that it stands for."""
    from lazyfs.layers.model import EntryType

    if depth > _DEPTH_MOST:
        raise NotACheckpoint(f"{into.name}: nested too deeply")
    for name, child in node.children.items():
        shown = grafts.get(child, child)
        if shown.type is EntryType.FILE:
            files.append((into / name, shown.file))
        elif shown.type is EntryType.DIRECTORY:
            directories.append(into / name)
            _collect(shown, grafts, into / name, files, directories, depth + 1)


def check_room(directory: Path, needed_bytes: int) -> None:
    """See that a filesystem has room.

    Raises:
        LazyfsError: it has not.
    """
    state = os.statvfs(directory)
    free_bytes = state.f_bavail * state.f_frsize
    if free_bytes < needed_bytes + _SPARE_BYTES:
        raise LazyfsError(
            f"{os.strerror(errno.ENOSPC)}: {directory} has {free_bytes >> 20} MiB free, and the "
            f"checkpoint takes {needed_bytes >> 20} MiB"
        )

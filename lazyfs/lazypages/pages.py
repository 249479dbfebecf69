"""The pages files of a checkpoint, and which of their bytes belong to a task's memory.

What is parsed is kept: several restores may be made from one mount.
"""

import logging
import mmap
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol, TypeAlias

import trio

from lazyfs.checkpoint import criu
from lazyfs.checkpoint.criu_memory import PageFlags, parse_mm, parse_pagemap
from lazyfs.checkpoint.images import ImagesDirectory
from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.checkpoint.opened_layer import OpenedLayer
from lazyfs.checkpoint.tree import Node, path_of
from lazyfs.content.lanes import Lane
from lazyfs.content.layer_content import LayerContent
from lazyfs.content.model import Content, Reader
from lazyfs.ground.data import Data
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import EntryType
from lazyfs.lazypages.memory import Level, TaskMemory
from lazyfs.lazypages.order import Part, in_order

log = logging.getLogger(__name__)

_IMAGE_LIMIT_BYTES = 512 << 20
"""Of a pagemap: some ten million pages that do not follow each other."""
_WALK_BYTES = MIB // 2
"""Who has so much fetched at a time goes from fault to fault."""
_LAZY_IN_PARENT = PageFlags.LAZY | PageFlags.IN_PARENT


Job: TypeAlias = Callable[[], Awaitable[None]]


class PagesFile(Protocol):
    """A pages file: bytes by offset."""

    path: str
    """In the image's tree."""

    def peek(self, offset: int, size_bytes: int) -> Data | None:
        """Return bytes if they are here; never waits."""

    def is_foreseen(self, offset: int) -> bool:
        """Whether whatever will be wanted with the page there comes without being begun."""

    def begin(self, offset: int, size_bytes: int) -> Sequence[Job]:
        """Reserve what is neither here nor on its way; who calls has to run what is returned.

        It may be more than there is of the file. Jobs raise as `read`.
        """

    async def read(self, offset: int, size_bytes: int, lane: Lane) -> Data:
        """Return bytes, fetched if need be.

        For a fault (`Lane.DEMAND`) just these; beside them, what follows is fetched ahead.
        """

    async def wait(self, offset: int, size_bytes: int) -> None:
        """Come back when more of it may be here; fetches nothing. Raises as `read`."""


class _StoredPages:
    """A pages file of a checkpoint that is open."""

    def __init__(self, path: str, layer: OpenedLayer, node: Node, reader: Reader) -> None:
        self.path = path
        self._layer = layer
        self._content: Content = layer.content
        self._start = node.content_start
        self._stop = node.content_start + node.size_bytes
        self._reader = reader

    def peek(self, offset: int, size_bytes: int) -> Data | None:
        start = self._start + offset
        return self._content.peek(ByteRange(start, start + size_bytes))

    def is_foreseen(self, offset: int) -> bool:
        """Whether a trace names it that is being replayed, or has been."""
        page = self._range(offset, mmap.PAGESIZE)
        prefetch = self._layer.prefetched
        if prefetch is None or not isinstance(self._content, LayerContent):
            return False
        if not prefetch.foresees(page):
            return False
        return prefetch.is_replaying or self._content.is_coming(page)

    def begin(self, offset: int, size_bytes: int) -> Sequence[Job]:
        if not isinstance(self._content, LayerContent):
            return ()  # all of it is on its way
        content, wanted = self._content, self._range(offset, size_bytes)
        if not content.holdings.keeps_all:  # it would have to go before it is wanted
            return ()
        if size_bytes >= _WALK_BYTES:
            content.lanes.note_walk()
        most_bytes = content.settings.readahead_request_bytes
        jobs: list[Job] = []
        while content.poison is None and (run := content.next_run(wanted, most_bytes)) is not None:
            jobs.append(partial(content.conduct, content.take_off(run, Lane.DEMAND)))
        return jobs

    async def read(self, offset: int, size_bytes: int, lane: Lane) -> Data:
        wanted = self._range(offset, size_bytes)
        if lane is not Lane.DEMAND:
            await self._layer.wait_replayed(wanted)
            if isinstance(self._content, LayerContent):
                await self._content.lanes.wait_walked()
            return await self._reader.read(offset, size_bytes, lane)
        prefetch = self._layer.prefetched
        foreseen = False
        if prefetch is not None and self._content.peek(wanted) is None:
            prefetch.note_wait(wanted)
            foreseen = prefetch.foresees(wanted)
        return await self._content.read(wanted, lane, out_of_the_blue=not foreseen)

    async def wait(self, offset: int, size_bytes: int) -> None:
        wanted = self._range(offset, size_bytes)
        if isinstance(self._content, LayerContent):
            await self._content.wait_change(wanted)
            self._content.raise_if_condemned()
        else:
            await self._content.ensure(wanted, Lane.READAHEAD)

    def _range(self, offset: int, size_bytes: int) -> ByteRange:
        start = min(self._start + offset, self._stop)
        return ByteRange(start, min(start + size_bytes, self._stop))


class LazyMemory:
    """A task's lazy memory, and the pages files of the images directories that it is in."""

    def __init__(self, memory: TaskMemory, files: Sequence[PagesFile]) -> None:
        """`files`: by `Place.level`."""
        self.memory = memory
        self.files = files


class Images:
    """The images directory of a checkpoint, and its parents, as far as memory goes."""

    def __init__(self, checkpoint: OpenedCheckpoint) -> None:
        """Read nothing yet."""
        self._checkpoint = checkpoint
        self._known: dict[int, LazyMemory] = {}
        self._reading = trio.Lock()

    async def prepare(self) -> int:
        """Read what is known of all tasks; return how many there are, zombies included.

        Raises:
            LazyfsError: it cannot be read.
        """
        data = await self._image(self._images().node, criu.PSTREE)
        processes = criu.parse_pstree(data)
        for process in processes:
            try:
                await self.memory_of(process.pid)
            except MalformedError as error:  # a zombie; else CRIU will hear of it
                log.debug("%s", error)
        return len(processes)

    async def foreseen(self) -> list[Part]:
        """Return what a trace says will be wanted, first wanted first, once that is known."""
        await self._checkpoint.plan_known.wait()
        plan = self._checkpoint.plan
        if plan is None or not plan.traced:
            return []
        await self.prepare()
        memories = [
            (lazy.memory, [file.path for file in lazy.files]) for lazy in self._known.values()
        ]
        return await trio.to_thread.run_sync(in_order, plan.traced, memories, mmap.PAGESIZE)

    def expect_faults(self) -> None:
        """Have the background make room: tasks are about to run whose memory is not here."""
        self._checkpoint.desk.lanes.expect_faults()

    async def memory_of(self, pid: int) -> LazyMemory:
        """Return the lazy memory of a task, by its pid in the images.

        Raises:
            MalformedError: it cannot be told for sure where each lazy page is.
            LazyfsError: its images cannot be read.
        """
        async with self._reading:
            known = self._known.get(pid)
            if known is None:
                known = self._known[pid] = await self._read(pid)
            return known

    async def _read(self, pid: int) -> LazyMemory:
        mm = await self._image(self._images().node, criu.task_image("mm", pid))
        found = [await self._level(self._images().node, pid)]
        if any(
            item.flags & _LAZY_IN_PARENT == _LAZY_IN_PARENT for item in found[0][0].pagemap.extents
        ):
            await self._checkpoint.complete()  # before that the parents are not known
            for parent in self._images().parents:
                if criu.task_image("pagemap", pid) not in parent.children:
                    break  # the task began after that one was made
                found.append(await self._level(parent, pid))
        levels = [level for level, _ in found]
        memory = await trio.to_thread.run_sync(
            TaskMemory, parse_mm(mm), levels, mmap.PAGESIZE, f"process {pid}"
        )
        return LazyMemory(memory, [file for _, file in found])

    async def _level(self, directory: Node, pid: int) -> tuple[Level, PagesFile]:
        pagemap_name = criu.task_image("pagemap", pid)
        data = await self._image(directory, pagemap_name)
        pagemap = await trio.to_thread.run_sync(parse_pagemap, data, pagemap_name)
        if pagemap.pages_size_bytes(mmap.PAGESIZE) == 0:
            return Level(pagemap, 0), _NoPages()
        node = await self._file(directory, criu.pages_image(pagemap.pages_id))
        reader = self._checkpoint.reader(node)
        layer = self._checkpoint.layers[node.layer]
        return Level(pagemap, node.size_bytes), _StoredPages(path_of(node), layer, node, reader)

    def _images(self) -> ImagesDirectory:
        images = self._checkpoint.images
        if images is None:
            raise AssertionError("a mount's checkpoint has an images directory")
        return images

    async def _image(self, directory: Node, name: str) -> bytes:
        node = await self._file(directory, name)
        if node.size_bytes > _IMAGE_LIMIT_BYTES:
            raise MalformedError(f"{name} is larger than is believed")
        return bytes(await self._checkpoint.reader(node).read(0, node.size_bytes))

    async def _file(self, directory: Node, name: str) -> Node:
        while (node := directory.children.get(name)) is None:
            filling = directory.filling
            if filling is None or filling.ended:
                raise MalformedError(f"there is no {name} in the checkpoint")
            await filling.wait()
        if node.type is not EntryType.FILE:
            raise MalformedError(f"{name} in the checkpoint is no file")
        return node


class _NoPages:
    path = ""

    def peek(self, offset: int, size_bytes: int) -> Data | None:
        raise AssertionError("there is nothing in it")

    def is_foreseen(self, offset: int) -> bool:
        raise AssertionError("there is nothing in it")

    def begin(self, offset: int, size_bytes: int) -> Sequence[Job]:
        raise AssertionError("there is nothing in it")

    async def read(self, offset: int, size_bytes: int, lane: Lane) -> Data:
        raise AssertionError("there is nothing in it")

    async def wait(self, offset: int, size_bytes: int) -> None:
        raise AssertionError("there is nothing in it")

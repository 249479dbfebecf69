"""The pages files of an open checkpoint: what is fetched for a fault, and what ahead of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
import trio.testing

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from lazyfs.checkpoint.plan import Plan, Stretch
from lazyfs.content.cache import Cache
from lazyfs.content.lanes import Lane
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB, ContentSettings
from lazyfs.lazypages.order import Part
from lazyfs.lazypages.pages import Images, PagesFile
from tests.checkpoint.test_criu import PAGEMAP, PSTREE, image, message
from tests.checkpoint.test_criu_memory import mm, vma
from tests.images import Member, tar_layer
from tests.mount.published import some_bytes, write_layout
from tests.transport.gather import QUICK

PAGE = 4096
FIRST = 1 << 30
SIZE = 8 * MIB
DATA = some_bytes(SIZE, 7)
LAZY = 6


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[tuple[OpenedCheckpoint, Images]]:
    """Open a checkpoint of one task, uncompressed and in chunks of 256 KiB."""
    files = {
        "checkpoint/inventory.img": b"x",
        "checkpoint/pstree.img": image(PSTREE, message(f1=7, f2=0, f3=7, f4=7, f5=7)),
        "checkpoint/mm-7.img": mm(vma(FIRST, FIRST + SIZE)),
        "checkpoint/pagemap-7.img": image(
            PAGEMAP, message(f1=1), message(f1=FIRST, f2=SIZE // PAGE, f4=LAZY)
        ),
        "checkpoint/pages-1.img": DATA,
    }
    layer = tar_layer([Member(name, data) for name, data in files.items()])
    reference = write_layout(directory / "layout", layer)
    config = OpenConfig(Cache(directory / "cache"), QUICK, ContentSettings())
    async with open_checkpoint(reference, config) as checkpoint:
        yield checkpoint, Images(checkpoint)


def here(file: PagesFile) -> set[int]:
    """Return which pieces of 256 KiB can be read at once."""
    return {
        number
        for number in range(SIZE // (256 * KIB))
        if file.peek(number * 256 * KIB + 128 * KIB, PAGE) is not None
    }


async def test_a_fault_fetches_what_it_needs_and_nothing_far_ahead(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, images):
        lazy = await images.memory_of(7)
        (file,) = lazy.files
        assert file.path == "checkpoint/pages-1.img"
        before = here(file)
        data = await file.read(4 * MIB, PAGE, Lane.DEMAND)
        assert bytes(data) == DATA[4 * MIB : 4 * MIB + PAGE]
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(here(file) - before) <= 2


async def test_what_is_begun_comes_whole_and_is_reserved_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, images):
        (file,) = (await images.memory_of(7)).files
        jobs = file.begin(MIB, 2 * MIB)
        assert jobs
        assert not file.begin(MIB, 2 * MIB), "it is on its way"
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
            with trio.fail_after(10):
                while file.peek(MIB, 2 * MIB) is None:
                    await file.wait(MIB, 2 * MIB)
        assert bytes(file.peek(MIB, 2 * MIB) or b"") == DATA[MIB : 3 * MIB]
        assert not file.begin(MIB, 2 * MIB), "it is here"
        jobs = file.begin(SIZE - PAGE, 16 * MIB)
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
        assert bytes(file.peek(SIZE - PAGE, PAGE) or b"") == DATA[-PAGE:]


async def test_what_a_trace_is_about_to_bring_is_not_fetched_ahead_of_a_fault(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as (checkpoint, images):
        (file,) = (await images.memory_of(7)).files
        layer = checkpoint.layers[0]
        node = await checkpoint.find("checkpoint/pages-1.img")
        assert node is not None
        start = node.content_start + 4 * MIB
        await layer.expect([ByteRange(start, start + 3 * MIB)])
        assert file.is_foreseen(4 * MIB)
        assert not file.is_foreseen(8 * MIB - PAGE)
        jobs = file.begin(0, MIB)
        assert jobs, "of this it says nothing"
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(job)
        assert bytes(await file.read(5 * MIB, PAGE, Lane.DEMAND)) == DATA[5 * MIB : 5 * MIB + PAGE]
        assert bytes(await file.read(0, PAGE, Lane.DEMAND)) == DATA[:PAGE]


async def test_what_a_trace_names_is_memory_in_its_order(tmp_path: Path) -> None:
    async with opened(tmp_path) as (checkpoint, images):
        path = "checkpoint/pages-1.img"
        stretches = (Stretch(path, MIB, PAGE), Stretch(path, 10, 10), Stretch("other", 0, PAGE))
        checkpoint.plan = Plan(stretches)
        checkpoint.plan_known.set()
        memory = (await images.memory_of(7)).memory
        assert await images.foreseen() == [
            Part(memory, FIRST + MIB, FIRST + MIB + PAGE),
            Part(memory, FIRST, FIRST + PAGE),
        ]
        checkpoint.plan = None
        assert await images.foreseen() == []

"""What is to be fetched first: of a trace what fits, of all the rest CRIU's order."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.foresight import Foresight
from lazyfs.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from lazyfs.checkpoint.plan import Stretch, plan_of
from lazyfs.checkpoint.trace import Need, Trace, TracedFile, TracedLayer
from lazyfs.content.cache import Cache
from lazyfs.ground.counters import Counters
from lazyfs.ground.journal import Journal
from lazyfs.ground.settings import ContentSettings
from tests.images import Member, zstd_chunked
from tests.mount.published import STREAMS, some_bytes, write_layout
from tests.transport.gather import QUICK

from . import sample
from .test_criu import PAGEMAP, PSTREE, image, message

PAGE = 4096
IN_PARENT, PRESENT = 1, 4


def config() -> OpenConfig:
    return OpenConfig(Cache.memory(), QUICK, ContentSettings())


def in_directory(files: Mapping[str, bytes], directory: str = "checkpoint") -> dict[str, bytes]:
    return {f"{directory}/{name}": data for name, data in files.items()}


def layout(directory: Path, files: Mapping[str, bytes], *more: Member) -> str:
    members = [*(Member(name, data) for name, data in files.items()), *more]
    return write_layout(directory, zstd_chunked(members))


def pagemap(pages_id: int, *extents: tuple[int, int, int]) -> bytes:
    """Of (first page, how many pages, flags)."""
    entries = [message(f1=first * PAGE, f2=count, f4=flags) for first, count, flags in extents]
    return image(PAGEMAP, message(f1=pages_id), *entries)


def tree_of(*pids: int) -> bytes:
    return image(PSTREE, *(message(f1=pid, f2=0, f3=pid, f4=pid, f5=pid) for pid in pids))


def trace_of(checkpoint: OpenedCheckpoint, *needs: tuple[str, int, int]) -> Trace:
    """Return a trace of (path, offset, size)."""
    paths = list(dict.fromkeys(path for path, _, _ in needs))
    files = []
    for path in paths:
        node = checkpoint.tree.find(path)
        files.append(TracedFile(path, 0, node.size_bytes if node is not None else 10 * PAGE))
    layer = checkpoint.layers[0].descriptor
    return Trace(
        layers=[TracedLayer(str(layer.digest), layer.size_bytes)],
        files=files,
        needs=[
            Need(paths.index(path), offset, size, float(at))
            for at, (path, offset, size) in enumerate(needs)
        ],
    )


# -- the order of a restore -----------------------------------------------------------------------


async def test_small_files_come_first_then_the_memory_of_tasks_in_their_order(
    tmp_path: Path,
) -> None:
    reference = layout(tmp_path / "layout", in_directory(sample.images()))
    async with open_checkpoint(reference, config()) as checkpoint:
        plan = await plan_of(None, checkpoint, everything=True)
        nothing = await plan_of(None, checkpoint, everything=False)
    assert (nothing.traced, nothing.rest, plan.traced) == ((), (), ())
    names = [stretch.path.removeprefix("checkpoint/") for stretch in plan.rest]
    assert names[:2] == ["inventory.img", "pstree.img"]
    assert names[-2:] == ["pages-1.img", "pages-2.img"]
    assert sorted(names) == sorted(sample.images())
    assert all(
        (stretch.offset, stretch.size_bytes) == (0, len(sample.images()[name]))
        for stretch, name in zip(plan.rest, names, strict=True)
    )


async def test_shared_memory_is_read_before_that_of_tasks(tmp_path: Path) -> None:
    files = {
        "inventory.img": b"x",
        "pstree.img": tree_of(7, 9),
        "pagemap-7.img": pagemap(3, (0, 2, PRESENT)),
        "pagemap-9.img": pagemap(1, (0, 2, PRESENT)),
        "pagemap-shmem-5.img": pagemap(4, (0, 2, PRESENT)),
        **{f"pages-{number}.img": some_bytes(2 * PAGE, number) for number in (1, 2, 3, 4)},
    }
    reference = layout(tmp_path / "layout", in_directory(files))
    async with open_checkpoint(reference, config()) as checkpoint:
        plan = await plan_of(None, checkpoint, everything=True)
    names = [stretch.path.removeprefix("checkpoint/") for stretch in plan.rest]
    assert names[-4:] == ["pages-4.img", "pages-3.img", "pages-1.img", "pages-2.img"]


async def test_of_a_parent_only_that_is_fetched_which_the_child_left_there(
    tmp_path: Path,
) -> None:
    far = 1000
    files = {
        "new/inventory.img": b"x",
        "new/pstree.img": tree_of(7),
        "new/pagemap-7.img": pagemap(
            1, (0, 1, PRESENT), (1, 3, IN_PARENT), (4, 1, PRESENT), (far, 40, IN_PARENT)
        ),
        "new/pages-1.img": some_bytes(2 * PAGE, 1),
        "old/inventory.img": b"x",
        "old/pstree.img": tree_of(7),
        "old/pagemap-7.img": pagemap(1, (0, 100, PRESENT), (far, 30, PRESENT), (far + 30, 10, 1)),
        "old/pages-1.img": some_bytes(130 * PAGE, 2),
        "oldest/inventory.img": b"x",
        "oldest/pagemap-7.img": pagemap(1, (far, 100, PRESENT)),
        "oldest/pages-1.img": some_bytes(100 * PAGE, 3),
    }
    links = [
        Member("new/parent", type=tarfile.SYMTYPE, link="../old"),
        Member("old/parent", type=tarfile.SYMTYPE, link="../oldest"),
    ]
    reference = layout(tmp_path / "layout", files, *links)
    async with open_checkpoint(reference, config()) as checkpoint:
        assert checkpoint.parents == ("old", "oldest")
        plan = await plan_of(None, checkpoint, everything=True)
    pages = [stretch for stretch in plan.rest if "pages-1" in stretch.path]
    assert pages == [
        Stretch("new/pages-1.img", 0, 2 * PAGE),
        Stretch("old/pages-1.img", PAGE, 3 * PAGE),
        Stretch("old/pages-1.img", 100 * PAGE, 30 * PAGE),
        Stretch("oldest/pages-1.img", 30 * PAGE, 10 * PAGE),
    ]


async def test_what_makes_no_sense_costs_only_the_order(tmp_path: Path) -> None:
    files = {
        "inventory.img": b"x",
        "pstree.img": b"no tree",
        "pagemap-7.img": b"no pagemap",
        **{f"pages-{number}.img": some_bytes(PAGE, number) for number in (10, 2, 1)},
    }
    reference = layout(tmp_path / "layout", in_directory(files))
    async with open_checkpoint(reference, config()) as checkpoint:
        plan = await plan_of(None, checkpoint, everything=True)
    names = [stretch.path.removeprefix("checkpoint/") for stretch in plan.rest]
    assert names[-3:] == ["pages-1.img", "pages-2.img", "pages-10.img"]


# -- a trace --------------------------------------------------------------------------------------


async def test_a_trace_is_followed_where_it_is_of_these_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = in_directory({"inventory.img": b"x" * 10, "pages-1.img": some_bytes(10 * PAGE)})
    reference = layout(tmp_path / "layout", files)
    async with open_checkpoint(reference, config()) as checkpoint:
        good = trace_of(
            checkpoint, ("checkpoint/pages-1.img", 4096, 10), ("checkpoint/inventory.img", 0, 10)
        )
        plan = await plan_of(good, checkpoint, everything=False)
        assert plan.traced == (
            Stretch("checkpoint/pages-1.img", 4096, 10),
            Stretch("checkpoint/inventory.img", 0, 10),
        )
        assert not caplog.records
        absent = trace_of(checkpoint, ("checkpoint/pages-9.img", 0, 1), ("checkpoint", 0, 1))
        assert (await plan_of(absent, checkpoint, everything=False)).traced == ()
        other = Trace(
            layers=[TracedLayer("sha256:" + "0" * 64, good.layers[0].size_bytes)],
            files=good.files,
            needs=good.needs,
        )
        assert (await plan_of(other, checkpoint, everything=False)).traced == ()
        sizes = Trace(
            layers=good.layers,
            files=[TracedFile(each.path, 0, each.size_bytes + 1) for each in good.files],
            needs=good.needs,
        )
        assert (await plan_of(sizes, checkpoint, everything=False)).traced == ()
        assert len(caplog.records) == 3


async def test_what_a_trace_names_again_and_again_is_foreseen_once(tmp_path: Path) -> None:
    pages = "checkpoint/pages-1.img"
    files = in_directory({"inventory.img": b"x" * 10, "pages-1.img": some_bytes(10 * PAGE)})
    reference = layout(tmp_path / "layout", files)
    async with open_checkpoint(reference, config()) as checkpoint:
        trace = trace_of(
            checkpoint, (pages, 4096, 4096), *[(pages, 0, 10 * PAGE)] * 1000, (pages, 100, 9000)
        )
        trace.files.append(trace.files[0])  # by another name, as it were
        trace.needs.append(Need(1, 0, 4096, 2000.0))
        plan = await plan_of(trace, checkpoint, everything=False)
        assert plan.traced == (
            Stretch(pages, 4096, 4096),
            Stretch(pages, 0, 4096),
            Stretch(pages, 8192, 10 * PAGE - 8192),
        )


async def test_while_somebody_records_nothing_is_foreseen(tmp_path: Path) -> None:
    counters = Counters()
    counters.journal = Journal()
    reference = layout(tmp_path / "layout", in_directory(sample.images()))
    async with open_checkpoint(reference, config(), counters) as checkpoint:
        await Foresight(checkpoint, everything=True).run()
        assert checkpoint.plan_known.is_set()
        assert checkpoint.plan is None


@pytest.mark.parametrize("kind", STREAMS)
async def test_of_a_stream_there_is_no_plan(tmp_path: Path, kind: str) -> None:
    files = in_directory(sample.images())
    layer = STREAMS[kind]([Member(name, data) for name, data in files.items()])
    reference = write_layout(tmp_path / "layout", layer)
    async with open_checkpoint(reference, config()) as checkpoint:
        with trio.fail_after(30):
            await Foresight(checkpoint, everything=True).run()
        assert checkpoint.plan_known.is_set()
        assert checkpoint.plan is None

"""CRIU's own files as the real CRIU writes them, and what a check says before it restores them."""

import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from testbed import CriuError, Testbed, Workload, dump, restore

from lazyfs.checkpoint import criu
from lazyfs.checkpoint.criu_memory import (
    MemoryKind,
    PageFlags,
    pages_by_kind,
    parse_mm,
    parse_pagemap,
)
from lazyfs.checkpoint.criu_order import metadata_in_read_order, pages_in_read_order
from lazyfs.checkpoint.findings import Finding, Level
from lazyfs.checkpoint.inspect import inspect
from lazyfs.checkpoint.preflight import check_here
from tests.checkpoint.test_inspect import Inspected

pytestmark = pytest.mark.real

MIB = 1 << 20


async def findings(testbed: Testbed, images: dict[str, bytes]) -> dict[str, Finding]:
    report = await inspect(cast(Any, Inspected(images, images_directory="")))
    found = await check_here(report, shlex.join(testbed.host_command("criu")))
    return {item.subject: item for item in reversed(found)}


async def test_a_dump_of_shared_and_private_memory(testbed: Testbed, work: Path) -> None:
    directory = work / "images"
    with Workload(testbed, work / "status", size_mib=8, shared_mib=4, children=2) as workload:
        dump(testbed, workload.pid, directory, work / "dump", leave_running=True)
        images = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        running = await findings(testbed, images)
        with pytest.raises(CriuError):
            restore(testbed, directory, work / "refused", workload.status)
        status = workload.status
    assert running["process ids"].level is Level.BLOCKS
    assert str(workload.pid) in running["process ids"].message

    tree = criu.parse_pstree(images["pstree.img"])
    assert tree[0].pid == workload.pid
    pagemaps = {n: parse_pagemap(data) for n, data in images.items() if n.startswith("pagemap-")}
    mappings = {item.pid: parse_mm(images[criu.task_image("mm", item.pid)]) for item in tree}
    for pagemap in pagemaps.values():
        assert pagemap.pages_size_bytes() == len(images[criu.pages_image(pagemap.pages_id)])
    for process in tree:
        pagemap = pagemaps[criu.task_image("pagemap", process.pid)]
        counts = pages_by_kind(mappings[process.pid], pagemap)
        assert sum(counts.values()) == pagemap.pages_with(PageFlags.PRESENT)
        assert counts[MemoryKind.ANONYMOUS] * 4096 >= 8 * MIB
        for extent in pagemap.extents:
            if extent.flags & PageFlags.LAZY:
                inside = [
                    vma for vma in mappings[process.pid] if vma.start <= extent.vaddr < vma.stop
                ]
                assert [vma.may_be_lazy for vma in inside] == [True]
    uses = pages_in_read_order(images, tree, pagemaps, mappings)
    assert [use.owner for use in uses] == ["shmem", "task", "task", "task"]
    assert metadata_in_read_order(images, tree)[:2] == ("inventory.img", "pstree.img")

    free = await findings(testbed, images)
    assert free["process ids"].level is Level.OK
    assert Level.BLOCKS not in {item.level for item in free.values()}
    with restore(testbed, directory, work / "restore", status) as restored:
        restored.wait_first_loop()

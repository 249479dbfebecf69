from dataclasses import replace
from typing import Any, cast

from lazyfs.checkpoint.criu import Inventory
from lazyfs.checkpoint.inspect import ProcessReport, Report, ThreadReport, inspect
from lazyfs.cli.inspect import facts, process_tree
from tests.checkpoint import sample
from tests.checkpoint.sample import FakeCheckpoint


def process(pid: int, ppid: int, **others: Any) -> ProcessReport:
    known: dict[str, Any] = {
        "pgid": pid,
        "sid": pid,
        "command": f"p{pid}",
        "state": "alive",
        "threads": (ThreadReport(pid, f"p{pid}"),),
        "memory_bytes": None,
        "lazy_memory_bytes": None,
        "parent_memory_bytes": None,
    }
    return ProcessReport(pid, ppid, **{**known, **others})


async def sample_report() -> Report:
    annotations = sample.manifest()["annotations"]
    return await inspect(cast(Any, FakeCheckpoint(sample.files(), annotations=annotations)))


async def test_the_facts_of_the_sample() -> None:
    told = dict(facts(await sample_report()))
    assert told["Engine"] == "Podman 5.4.2 (annotations io.podman.annotations.checkpoint.*)"
    assert told["Container"].startswith("sample (")
    assert told["Made with"].startswith("CRIU 4.1.1, runc 1.1.15+ds1, Linux ")
    assert told["Made with"].endswith("amd64, debian 13, cgroup v1")
    assert told["Namespaces"] == "its own ipc, mnt, net, pid, uts"
    assert "Restoring needs" not in told
    assert told["Layer"] == "313 KiB as tar (application/vnd.oci.image.layer.v1.tar)"
    assert "2 pages files" in told["CRIU images"]
    assert "Note" not in told
    assert "Pod" not in told


async def test_what_restoring_needs() -> None:
    report = await sample_report()
    inventory = Inventory(3, None, "selinux", None, None, None, None, True, True, ("cuda",))
    told = dict(facts(replace(report, criu=inventory, own_namespaces=(), has_parent=True)))
    assert told["Restoring needs"] == (
        "the parent checkpoint, a CRIU that reads images version 3, criu --tcp-close, "
        "criu --allow-uprobes, the security labels of selinux, CRIU's plugins cuda"
    )


def test_children_are_below_their_parents() -> None:
    tree = (process(1, 0), process(2, 1), process(3, 1, state="stopped"), process(4, 2))
    assert list(process_tree(tree)) == ["1 p1", "  2 p2", "    4 p4", "  3 p3: stopped"]


def test_memory_and_threads() -> None:
    threads = (ThreadReport(1, "p1"), ThreadReport(5, "io"), ThreadReport(6, None))
    one = process(
        1,
        0,
        threads=threads,
        memory_bytes=1 << 20,
        lazy_memory_bytes=1 << 19,
        parent_memory_bytes=4096,
    )
    assert list(process_tree((one,))) == [
        "1 p1: 3 threads (io), 1.0 MiB of memory (512 KiB lazy), 4.0 KiB in the parent checkpoint"
    ]


def test_a_tree_that_is_none() -> None:
    told = list(process_tree((process(1, 2), process(2, 1), process(3, 3), process(4, 99))))
    assert sorted(line.split()[0] for line in told) == ["1", "2", "3", "4"]


def test_a_tree_too_deep_to_draw() -> None:
    told = list(process_tree(tuple(process(pid, pid - 1) for pid in range(1, 5000))))
    assert len(told) == 4999
    assert max(map(len, told)) < 60


def test_a_name_that_does_things_to_terminals() -> None:
    assert list(process_tree((process(1, 0, command="\x1b[2J"),))) == ["1 \\x1b[2J"]

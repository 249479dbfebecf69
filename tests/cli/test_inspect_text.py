import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from lazyfs.checkpoint.criu import Inventory
from lazyfs.checkpoint.findings import Finding, Level
from lazyfs.checkpoint.inspect import inspect
from lazyfs.checkpoint.report import ProcessReport, Report, ThreadReport
from lazyfs.checkpoint.trust import Trust
from lazyfs.cli.inspect import facts, print_rich, process_tree
from tests.checkpoint import sample
from tests.checkpoint.test_inspect import Inspected


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
    return await inspect(cast(Any, Inspected(sample.files(), annotations=annotations)))


async def test_the_facts_of_the_sample() -> None:
    told = dict(facts(await sample_report()))
    assert told["Engine"] == "Podman 5.4.2 (annotations io.podman.annotations.checkpoint.*)"
    assert told["Container"].startswith("sample (")
    assert told["Made with"].startswith("CRIU 4.1.1, runc 1.1.15+ds1, Linux ")
    assert told["Made with"].endswith("amd64, debian 13, cgroup v1")
    assert told["Namespaces"] == "its own ipc, mnt, net, pid, uts"
    assert "Restoring needs" not in told
    assert told["Layer"] == "313 KiB as tar (application/vnd.oci.image.layer.v1.tar)"
    assert told["Proof of manifest"] == "the digest asked for; before it is parsed"
    assert told["Proof of layer"].startswith("its digest in the manifest; when all of it is here")
    assert "2 pages files" in told["CRIU images"]
    assert (
        told["Memory"]
        == "184 KiB anonymous, 48.0 KiB of mapped files, 184 KiB of it may come lazily"
    )
    assert "Builds on" not in told
    assert "Note" not in told
    assert "Pod" not in told


async def test_what_restoring_needs() -> None:
    report = await sample_report()
    inventory = Inventory(3, None, "selinux", None, None, None, None, True, True, ("cuda",))
    needs = replace(report.needs, tcp_connections=1, wide_page_counts=True)
    parents = ("pre/2", "")
    changed = replace(report, criu=inventory, own_namespaces=(), needs=needs, parents=parents)
    told = dict(facts(changed))
    assert told["Restoring needs"] == (
        "CRIU 4.2 or later, criu --tcp-established for 1 connection, a CRIU that reads images "
        "version 3, criu --tcp-close, criu --allow-uprobes, the security labels of selinux, "
        "CRIU's plugins cuda"
    )
    assert told["Builds on"] == "pre/2, the top of the checkpoint"


async def test_memory_of_every_kind() -> None:
    report = await sample_report()
    memory = replace(
        report.memory,
        anonymous_bytes=None,
        file_bytes=None,
        shared_bytes=4096,
        device_bytes=1 << 20,
        lazy_bytes=0,
        parent_bytes=8192,
        compressed=True,
    )
    assert dict(facts(replace(report, memory=memory)))["Memory"] == (
        "248 KiB, 4.0 KiB shared, 1.0 MiB of GPUs, 8.0 KiB in parent checkpoints, "
        "compressed by CRIU"
    )
    memory = replace(memory, total_bytes=None)
    assert "Memory" not in dict(facts(replace(report, memory=memory)))


async def test_several_layers() -> None:
    report = await sample_report()
    (layer,) = report.layers
    first = replace(layer, format="zstd", mislabelled=True, streamed=True)
    trust = (Trust("layer 1", "nothing: it has no digest", "never"), Trust("layer 2", "x", "soon"))
    others = (first, replace(layer, format="tar+x", proof="chunk"))
    report = replace(report, layers=others, trust=trust)
    told = list(facts(report))
    assert [label for label, _ in told if label.startswith(("Layer", "Proof"))] == [
        "Layer 1",
        "Layer 1",
        "Layer 1",
        "Layer 2",
        "Proof of layer 1",
        "Proof of layer 2",
    ]
    assert ("Proof of layer 1", "nothing: it has no digest") in told
    assert ("Proof of layer 2", "x; soon") in told
    assert ("Layer 1", "its media type says otherwise, but its bytes are zstd: they decide") in told


BLOCKED = Finding(Level.BLOCKS, "CPU", "not \x1b[2J this one")
FINE = Finding(Level.OK, "kernel", "newer")


def run(cache_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lazyfs", "inspect", f"oci:{sample.LAYOUT}", "--check"]
    command += [f"--cache-dir={cache_dir}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_check_that_blocks_exits_with_4(tmp_path: Path) -> None:
    done = run(tmp_path, "--criu", "no-such-criu")
    assert (done.returncode, done.stderr) == (4, "")
    _, _, check = done.stdout.partition("\nOn this machine:\n")
    assert check.startswith("  blocks ")
    assert "  blocks CRIU: there is no criu on this machine" in check
    assert "Engine: Podman" in done.stdout


def test_a_check_as_json(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text("#!/bin/sh\necho Version: 9.0\n")
    criu.chmod(0o755)
    done = run(tmp_path, "--criu", str(criu), "--json")
    check = json.loads(done.stdout)["check"]
    assert {"level": "ok", "subject": "CRIU", "message": "dumped by 4.1.1, here is 9.0"} in check
    assert done.returncode == (4 if "blocks" in [item["level"] for item in check] else 0)


async def test_a_person_sees_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_rich(await sample_report(), (BLOCKED, FINE))
    told = capsys.readouterr().out
    assert "On this machine" in told
    assert "blocks  CPU" in told
    assert "\x1b" not in told


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

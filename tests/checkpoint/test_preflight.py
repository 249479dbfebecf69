import os
import stat
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from lazyfs.checkpoint.criu import Inventory, Mount
from lazyfs.checkpoint.criu_cpu import DumpedCpu
from lazyfs.checkpoint.engines import Origin
from lazyfs.checkpoint.findings import Finding, Level, check, programs_wanted, task_ids
from lazyfs.checkpoint.host import CriuProgram, Host, collect_host, look_again, version_in
from lazyfs.checkpoint.inspect import inspect
from lazyfs.checkpoint.preflight import quick_check
from lazyfs.checkpoint.report import Report

from . import sample
from .test_inspect import Inspected

HOST = Host(
    architecture="amd64",
    kernel="6.18.44-fc-v669",
    criu=CriuProgram("/usr/sbin/criu", "4.1.1", reads_compressed=False),
    cgroup_version="hybrid",
    lsm="none",
    cpu_flags=frozenset({"sse2", "avx2", "avx512f"}),
    programs={"podman": "5.4.2", "runc": "1.1.15"},
    userfaultfd=True,
    memory_bytes=8 << 30,
    available_bytes=4 << 30,
)


@pytest.fixture
async def report() -> Report:
    annotations = sample.manifest()["annotations"]
    return await inspect(cast(Any, Inspected(sample.files(), annotations=annotations)))


def levels(report: Report, host: Host = HOST) -> dict[str, Level]:
    """The worst level of each subject."""
    found: dict[str, Level] = {}
    for finding in check(report, host):
        found.setdefault(finding.subject, finding.level)
    return found


def finding_of(subject: str, report: Report, host: Host = HOST) -> Finding:
    return next(item for item in check(report, host) if item.subject == subject)


async def test_the_sample_restores_here(report: Report) -> None:
    found = levels(report)
    assert set(found.values()) == {Level.OK, Level.UNKNOWN}
    assert [subject for subject, level in found.items() if level is Level.UNKNOWN] == ["CPU"]
    assert found.keys() == {
        "CRIU",
        "images",
        "architecture",
        "CPU",
        "kernel",
        "cgroups",
        "engine",
        "memory",
        "lazy pages",
    }


async def test_the_worst_comes_first(report: Report) -> None:
    other = replace(HOST, architecture="arm64", programs={}, userfaultfd=False)
    order = [list(Level).index(item.level) for item in check(report, other)]
    assert order == sorted(order)
    assert order[0] == 0


@pytest.mark.parametrize(
    ("dumped", "here", "level"),
    [
        ("4.1.1", "4.1.1", Level.OK),
        ("4.1", "4.1.1", Level.OK),
        ("3.19", "4.1", Level.OK),
        ("4.2", "4.1.1", Level.WARNS),
        ("4.10", "4.9", Level.WARNS),
        (None, "4.1", Level.UNKNOWN),
        ("4.1", None, Level.UNKNOWN),
    ],
)
async def test_versions_of_criu(
    report: Report, dumped: str | None, here: str | None, level: Level
) -> None:
    report = replace(report, origin=replace(report.origin, criu_version=dumped))
    host = replace(HOST, criu=CriuProgram("criu", here, reads_compressed=False))
    assert levels(report, host)["CRIU"] is level


async def test_no_criu(report: Report) -> None:
    found = finding_of("CRIU", report, replace(HOST, criu=None))
    assert found.level is Level.BLOCKS
    assert "install it" in found.message
    assert report.criu is not None
    newer = replace(report, criu=replace(report.criu, images_version=3))
    assert levels(newer, replace(HOST, criu=None))["images"] is Level.UNKNOWN


@pytest.mark.parametrize(
    ("version", "compressed", "knows", "level"),
    [
        (1, False, False, Level.OK),
        (2, False, False, Level.OK),
        (3, True, False, Level.BLOCKS),
        (3, False, False, Level.BLOCKS),
        (3, True, True, Level.OK),
        (2, True, False, Level.BLOCKS),
        (4, False, True, Level.BLOCKS),
        (0, False, True, Level.BLOCKS),
    ],
)
async def test_versions_of_images(
    report: Report, version: int, compressed: bool, knows: bool, level: Level
) -> None:
    assert report.criu is not None
    report = replace(
        report,
        criu=replace(report.criu, images_version=version),
        memory=replace(report.memory, compressed=compressed),
    )
    host = replace(HOST, criu=CriuProgram("criu", "5.0", reads_compressed=knows))
    assert levels(report, host)["images"] is level


async def test_counts_that_this_criu_does_not_see(report: Report) -> None:
    report = replace(report, needs=replace(report.needs, wide_page_counts=True))
    found = finding_of("images", report)
    assert found.level is Level.BLOCKS
    assert "zeros" in found.message
    newer = replace(HOST, criu=CriuProgram("criu", "4.2", reads_compressed=False))
    assert levels(report, newer)["images"] is Level.OK


async def test_another_machine(report: Report) -> None:
    other = replace(HOST, architecture="arm64", kernel="5.10.0", cgroup_version="v2", programs={})
    found = levels(report, other)
    assert found["architecture"] is Level.BLOCKS
    assert found["kernel"] is Level.WARNS
    assert found["cgroups"] is Level.WARNS
    assert found["engine"] is Level.WARNS
    assert "CPU" not in found


async def test_a_lesser_cpu(report: Report) -> None:
    cpu = DumpedCpu("Big CPU", ("avx2", "avx512f", "sse2"))
    known = replace(report, needs=replace(report.needs, cpu=cpu))
    assert levels(known)["CPU"] is Level.OK
    lesser = replace(HOST, cpu_flags=frozenset({"sse2", "avx512f"}))
    found = finding_of("CPU", known, lesser)
    assert found.level is Level.WARNS
    assert "avx2" in found.message
    least = replace(HOST, cpu_flags=frozenset({"sse2"}))
    assert levels(report, least)["CPU"] is Level.BLOCKS  # the sample has AVX-512 registers
    assert levels(known, replace(HOST, cpu_flags=None))["CPU"] is Level.UNKNOWN


async def test_security_labels(report: Report) -> None:
    inventory = Inventory(2, None, "selinux", None, None, None, None, False, False, ())
    report = replace(report, criu=inventory)
    assert levels(report)["security labels"] is Level.WARNS
    needs = replace(report.needs, security_labels=("system_u:system_r:container_t:s0",))
    labelled = replace(report, needs=needs)
    found = finding_of("security labels", labelled)
    assert found.level is Level.BLOCKS
    assert "container_t" in found.message
    assert levels(labelled, replace(HOST, lsm="selinux"))["security labels"] is Level.OK


async def test_plugins_and_options(report: Report) -> None:
    inventory = Inventory(2, None, "none", None, None, None, None, True, True, ("cuda_plugin",))
    report = replace(report, criu=inventory, needs=replace(report.needs, tcp_connections=2))
    assert levels(report)["plugins"] is Level.BLOCKS
    here = replace(HOST, plugins=frozenset({"cuda_plugin"}))
    assert levels(report, here)["plugins"] is Level.OK
    said = " ".join(item.message for item in check(report, here) if item.subject == "options")
    for option in ("--tcp-close", "--allow-uprobes", "--tcp-established"):
        assert option in said


async def test_external_mounts_are_the_engine_s_business(report: Report) -> None:
    assert "options" not in levels(report)
    needs = replace(report.needs, external_mounts=(Mount("/etc/hosts", "hosts"),))
    alone = replace(report, origin=Origin(engine="CRIU"), needs=needs)
    assert "(hosts)" in finding_of("options", alone).message


async def test_memory(report: Report) -> None:
    small = replace(HOST, available_bytes=1000)
    assert levels(report, small)["memory"] is Level.WARNS
    assert levels(report, replace(small, memory_bytes=2000))["memory"] is Level.BLOCKS
    assert "memory" not in levels(report, replace(HOST, memory_bytes=None))


async def test_process_ids(report: Report) -> None:
    assert task_ids(report) == (1, 6, 7)
    taken = replace(HOST, tasks=frozenset({1, 7}))
    assert "process ids" not in levels(report, taken)  # its own PID namespace
    shared = replace(report, own_namespaces=("mnt",))
    found = finding_of("process ids", shared, taken)
    assert found.level is Level.BLOCKS
    assert found.message.startswith("processes 1, 7 are here already")
    assert levels(shared)["process ids"] is Level.OK
    unknown = replace(report, own_namespaces=None)
    assert levels(unknown, taken)["process ids"] is Level.UNKNOWN


async def test_parents(report: Report) -> None:
    memory = replace(report.memory, parent_bytes=5 << 20)
    assert levels(replace(report, memory=memory))["parents"] is Level.BLOCKS
    both = replace(report, memory=memory, parents=("pre/1",))
    assert levels(both)["parents"] is Level.OK


async def test_what_nobody_wrote_down(report: Report) -> None:
    found = levels(replace(report, origin=Origin(), criu=None))
    assert {"CRIU", "images", "architecture", "kernel"} <= found.keys()
    assert Level.BLOCKS not in found.values()


async def test_an_image_starts_no_program_of_its_own(report: Report) -> None:
    assert programs_wanted(report) == ("podman", "runc")
    hostile = replace(report.origin, engine="/tmp/evil", runtime_name="reboot")
    assert programs_wanted(replace(report, origin=hostile)) == ()
    assert levels(replace(report, origin=hostile))["engine"] is Level.UNKNOWN


async def test_hostile_versions(report: Report) -> None:
    origin = replace(report.origin, criu_version="9" * 999, host_kernel="...", cgroup_version="")
    found = levels(replace(report, origin=origin))
    assert found["CRIU"] is Level.WARNS
    assert found["kernel"] is Level.UNKNOWN


# ---- this machine ----


def program(directory: Path, name: str, script: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "runc", "echo runc version 1.1.15+ds1; echo commit: 1.2.3")
    criu = program(tmp_path, "my criu", 'test "$1" = -x && shift; echo "Version: 4.2 $1"')
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "cuda_plugin.so").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CRIU_LIBS_DIR", str(plugins))
    host = collect_host(
        criu=f"'{criu}' -x", programs=["runc", "no-such-thing"], task_ids=[os.getpid(), 1 << 30]
    )
    assert host.criu == CriuProgram(str(criu), "4.2", reads_compressed=False)
    assert host.programs == {"runc": "1.1.15+ds1"}
    assert host.plugins == {"cuda_plugin"}
    assert host.tasks == {os.getpid()}
    assert host.kernel == os.uname().release
    assert host.memory_bytes is not None
    assert host.available_bytes is not None
    assert host.memory_bytes >= host.available_bytes > 0


def test_what_may_have_changed_is_looked_at_again_and_criu_is_not_asked(tmp_path: Path) -> None:
    runc = program(tmp_path, "runc", "echo runc version 1.1.15")
    before = replace(HOST, memory_bytes=1, available_bytes=1, tasks=frozenset({1 << 30}))
    host = look_again(before, programs=[str(runc)], task_ids=[os.getpid()])
    assert host.criu == before.criu
    assert host.programs == {str(runc): "1.1.15"}
    assert host.tasks == {os.getpid()}
    assert host.memory_bytes is not None
    assert host.available_bytes is not None
    assert host.memory_bytes >= host.available_bytes > 1


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo Usage: --compress; exit 1", (None, True)),
        ("echo -n", (None, False)),
        ("printf 'Version: 3.17.1 (gitid v3.17)\\377'", ("3.17.1", False)),
    ],
)
def test_programs_that_say_odd_things(
    tmp_path: Path, script: str, expected: tuple[str | None, bool]
) -> None:
    found = collect_host(criu=str(program(tmp_path, "criu", script))).criu
    assert found is not None
    assert (found.version, found.reads_compressed) == expected


@pytest.mark.parametrize("command", ["", "'", "no-such-criu", "/etc/passwd", "/"])
def test_a_criu_that_is_none(command: str) -> None:
    assert collect_host(criu=command).criu is None


def test_versions_in_what_programs_say() -> None:
    assert version_in("podman version 5.4.2") == "5.4.2"
    assert version_in("crun version 1.21\ncommit: 10269840") == "1.21"
    assert version_in("containerd github.com/containerd/containerd 1.7.24~ds1 x") == "1.7.24~ds1"
    assert version_in("none at all") is None


async def test_a_quick_check_of_a_mount(tmp_path: Path) -> None:
    criu = str(program(tmp_path, "criu", "echo Version: 3.0"))
    checkpoint = Inspected(sample.files(), annotations=sample.manifest()["annotations"])
    found = await quick_check(cast(Any, checkpoint), criu)
    assert checkpoint.prefetched == []
    assert "CRIU" in [item.subject for item in found]
    assert {item.level for item in found} <= {Level.BLOCKS, Level.WARNS}
    missing = await quick_check(cast(Any, checkpoint), "no-such-criu")
    assert not {"CRIU", "engine", "images"} & {item.subject for item in missing}

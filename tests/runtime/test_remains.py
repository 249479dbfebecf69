"""What is killed after a failed restore, and above all what is not."""

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lazyfs.runtime.remains import kill_cgroup, kill_init, started_ticks

_CGROUPS = Path("/sys/fs/cgroup")

Start = Callable[[str], "subprocess.Popen[bytes]"]
"""Starts a process in a cgroup of a name, below one that is this test's."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="cgroups are made by root")


def _hierarchy() -> Path:
    if (_CGROUPS / "cgroup.procs").exists():
        return _CGROUPS
    return _CGROUPS / "pids" if (_CGROUPS / "pids").exists() else _CGROUPS / "cpu"


@pytest.fixture
def above() -> Iterator[str]:
    name = f"lazyfs-test-{uuid.uuid4().hex}"
    yield name
    place = _hierarchy() / name
    with suppress(FileNotFoundError):
        for each in [*place.iterdir(), place]:
            if each.is_dir():
                each.rmdir()


@pytest.fixture
def start(above: str) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(["sleep", "600"])
        started.append(process)
        place = _hierarchy() / above / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "cgroup.procs").write_text(str(process.pid))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@needs_root
@pytest.mark.parametrize("name", ["web", "crio-web", "libpod-web"])
def test_what_has_begun_in_the_container_s_own_cgroup_is_killed(
    above: str, start: Start, name: str
) -> None:
    process = start(name)
    kill_cgroup(f"/{above}/{name}", "web", started_ticks(process.pid))
    assert process.wait(20) == -9


@needs_root
@pytest.mark.parametrize("name", ["web2", "myweb", "first"])
def test_a_cgroup_that_is_called_after_another_container_is_left_alone(
    above: str, start: Start, name: str
) -> None:
    """`ctr` restores a copy of a container into the cgroup that the first one had."""
    process = start(name)
    assert kill_cgroup(f"/{above}/{name}", "web", 0) == 0
    assert process.poll() is None


@needs_root
def test_what_was_there_before_is_left_alone(above: str, start: Start) -> None:
    process = start("web")
    assert kill_cgroup(f"/{above}/web", "web", started_ticks(process.pid) + 1) == 0
    assert process.poll() is None


def test_a_pid_that_is_another_process_by_now_is_left_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    pid_file = tmp_path / "pid"
    pid_file.write_text(str(process.pid))
    assert not kill_init(pid_file, started_ticks(process.pid) + 1)
    assert process.poll() is None
    assert kill_init(pid_file, started_ticks(process.pid))
    assert process.wait(20) == -9

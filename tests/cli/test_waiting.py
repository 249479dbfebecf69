"""What a person hears while a registry does not answer; and that a script hears nothing."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from testbed.registry import free_port

TIMEOUT_S = 60


def begun(name: str, home: Path, stderr: int, *options: str) -> subprocess.Popen[bytes]:
    """Ask for a checkpoint of a registry that is not there, with little patience."""
    reference = f"127.0.0.1:{free_port()}/team/checkpoint:1"
    command = [sys.executable, "-m", "lazyfs", name, f"--cache-dir={home}/cache", "--deadline=3"]
    (home / "mnt").mkdir()
    words = [reference, *([str(home / "mnt")] if name == "mount" else [])]
    words += options
    return subprocess.Popen([*command, *words], stderr=stderr, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["ls", "mount"])
def test_a_person_at_a_terminal_hears_why_nothing_happens(tmp_path: Path, name: str) -> None:
    master, slave = pty.openpty()
    with begun(name, tmp_path, slave) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += os.read(master, 65536)
            except OSError:  # EIO: the other side has closed it
                break
        assert process.wait(TIMEOUT_S) == 3
    os.close(master)
    first, *_, last = seen.decode().splitlines()
    assert first.startswith("lazyfs: still waiting: 127.0.0.1:")
    assert "asking again in" in first
    assert "connection refused" in first
    assert "gave up" in last
    if name == "mount":
        (log,) = (tmp_path / "cache" / "log").iterdir()
        assert "INFO" in log.read_text()


def test_a_script_hears_of_the_end_alone(tmp_path: Path) -> None:
    with begun("ls", tmp_path, subprocess.PIPE) as process:
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    (line,) = stderr.decode().splitlines()
    assert "gave up" in line


@pytest.mark.mount
@pytest.mark.parametrize("hears", [True, False])
def test_who_restores_hears_it_unless_it_is_a_program(tmp_path: Path, hears: bool) -> None:
    words = [] if hears else ["--json"]
    with begun("restore", tmp_path, subprocess.PIPE, "--criu=true", *words) as process:
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    *waiting, last = [line for line in stderr.decode().splitlines() if "logs are in" not in line]
    assert process.returncode == 3
    assert "gave up" in last
    assert bool(waiting) is hears
    for line in waiting:
        assert line.startswith("lazyfs: still waiting: 127.0.0.1:")
    if hears:
        assert any("connection refused" in line for line in waiting)

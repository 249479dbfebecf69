"""`lazyfs restore --runtime`: which container is removed after a failure, and which is not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import FaultServer
from tests.runtime.wrapping import TIMEOUT_S, Wrapped, wait_until

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="there is no /dev/fuse"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a detached mount needs root"),
]


@pytest.fixture
def wrapped(tmp_path: Path) -> Iterator[Wrapped]:
    with FaultServer() as server:
        wrapped = Wrapped(server, tmp_path / "here")
        yield wrapped
        wrapped.close()


def _start(
    wrapped: Wrapped, mode: str, *, ignores_children: bool = False
) -> "subprocess.Popen[bytes]":
    words = ["restore", wrapped.reference, "--runtime", "../usr/runc", "--bundle", "."]
    words += ["--id", "web", "--force", "--cache-dir", str(wrapped.directory / "cache")]
    return subprocess.Popen(
        [sys.executable, "-m", "lazyfs", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=wrapped.environ(mode),
        cwd=wrapped.bundle,
        preexec_fn=_ignore_children if ignores_children else None,
    )


def _ignore_children() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def test_a_name_in_use_is_refused_and_its_container_lives(wrapped: Wrapped) -> None:
    other = subprocess.Popen(["sleep", "600"])
    (wrapped.state / "container").write_text(str(other.pid))
    try:
        with _start(wrapped, "") as process:
            _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 2
        assert b"a container web already" in said
        assert wrapped.calls("delete") == wrapped.calls("restore") == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    wrapped.wait_alone()


@pytest.mark.parametrize("killed", ["front", "keeper"])
def test_whoever_is_killed_the_container_is_removed(wrapped: Wrapped, killed: str) -> None:
    """By the runtime that was named, which is found from where the caller is."""
    with _start(wrapped, "hanging") as process:
        wait_until((wrapped.state / "hangs").exists, lambda: str(wrapped.processes()))
        keeper = int((wrapped.state / "images").read_text().split("/")[2])
        os.kill(process.pid if killed == "front" else keeper, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)
    wrapped.wait_alone()
    assert wrapped.calls("delete") == [["delete", "--force", "web"]]
    assert wrapped.container() is None


def test_a_runtime_that_fails_has_failed_also_where_the_caller_ignores_its_children(
    wrapped: Wrapped,
) -> None:
    """Then the kernel forgets how children end."""
    with _start(wrapped, "dying", ignores_children=True) as process:
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 6
    assert b"ended by signal 15" in said
    wrapped.wait_alone()

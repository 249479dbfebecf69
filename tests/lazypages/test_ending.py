"""The end of tasks: real processes, real pidfds."""

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyfs.lazypages.ending import end_tasks


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


@contextmanager
def without_descriptors() -> Iterator[None]:
    """Let nothing more be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_task_is_killed(sleeper: "subprocess.Popen[bytes]") -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    try:
        assert end_tasks([pidfd], [], 10)
        assert sleeper.wait() == -signal.SIGKILL
        assert end_tasks([pidfd], [], 10)  # once more does no harm
    finally:
        os.close(pidfd)


def test_a_task_is_killed_where_nothing_more_can_be_opened(
    sleeper: "subprocess.Popen[bytes]",
) -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    try:
        with without_descriptors():
            assert end_tasks([pidfd], [], 10)
        assert sleeper.wait() == -signal.SIGKILL
    finally:
        os.close(pidfd)

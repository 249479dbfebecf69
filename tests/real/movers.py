"""A `mover` that CRIU dumped on the host: restored, told to go to work, and asked what it saw."""

import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from testbed import Event, Restored, Status, Testbed, dump, restore, tar_checkpoint
from testbed.guard import watch
from testbed.process import kill_child, wait_until

from lazyfs.checkpoint.criu_memory import PageFlags, parse_pagemap


class _Dumped(Protocol):
    @property
    def layer(self) -> Path: ...


_D = TypeVar("_D", bound=_Dumped)


def dumped_lazily(make: Callable[[str], _D]) -> _D:
    """Make a dump, by a name; another one where nothing of it can be restored lazily.

    That is so of one in 256: CRIU takes all pages for the stack's (criu/mem.c, is_stack) where the
    stack pointer happens to be a multiple of the page size.
    """
    for attempt in range(4):
        dumped = make(f"attempt-{attempt}")
        with tarfile.open(dumped.layer) as layer:
            for member in layer:
                name = Path(member.name).name
                if name.startswith("pagemap-") and not name.startswith("pagemap-shmem"):
                    file = layer.extractfile(member)
                    assert file is not None
                    if parse_pagemap(file.read()).pages_with(PageFlags.LAZY):
                        return dumped
    raise AssertionError("no dump of several has lazy pages")


@dataclass(frozen=True)
class Mover:
    """A dump of it."""

    testbed: Testbed
    layer: Path
    """A tar of the images directory."""
    status: Status
    reports: bytes
    pid: int

    def restore(self, images_dir: Path, work: Path, socket: Path) -> Restored:
        """Restore it with the lazy pages that are served on a socket."""
        wait_until(lambda: not Path(f"/proc/{self.pid}").exists(), f"pid {self.pid} is free", 30)
        self.status.path.write_bytes(self.reports)
        return restore(self.testbed, images_dir, work, self.status, lazy_pages=socket)

    def work(self, restored: Restored, timeout_s: float = 90) -> Event:
        """Have it work, and return what it reports at the end; "0" is well."""
        os.kill(restored.pid, signal.SIGUSR1)
        done = wait_until(
            lambda: self.status.events("done") or None, "the mover's report", timeout_s
        )
        return done[0]


def mover(testbed: Testbed, work: Path, *options: str) -> Mover:
    """Start one, dump it, make a layer of the dump."""
    return dumped_lazily(lambda name: _mover(testbed, work / name, *options))


def _mover(testbed: Testbed, work: Path, *options: str) -> Mover:
    work.mkdir(parents=True, exist_ok=True)
    status = Status((work / "status").absolute())
    words = [str(testbed.program("mover")), "--status", str(status.path), *options]
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        words, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/"
    )
    watch(process.pid)
    try:
        wait_until(lambda: status.events("loop") or None, "the mover's first loop", 60)
        dump(testbed, process.pid, work / "images", work / "dump")
    finally:
        kill_child(process.pid)
        process.wait()
    tar_checkpoint(work / "images", work / "layer.tar")
    shutil.rmtree(work / "images")
    return Mover(testbed, work / "layer.tar", status, status.path.read_bytes(), process.pid)

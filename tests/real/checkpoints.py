"""A workload that CRIU dumped on the host, and whether what is restored is the same process."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import Event, Restored, Status, Testbed, Workload, dump, restore, tar_checkpoint
from testbed.process import kill_child, last_lines, wait_gone, wait_until


@dataclass(frozen=True)
class Before:
    """What a workload's processes had done, and had in memory, when they were dumped."""

    last: dict[int, Event]
    """Each member's last loop."""
    hashes: tuple[str, ...]

    def assert_goes_on(self, restored: Restored) -> None:
        """Check that each process does its next loop, with the memory that it had."""
        restored.wait_first_loop()
        loops = restored.status.events("loop", restored.started_s)
        for member, last in self.last.items():
            first = next(event for event in loops if event.member == member)
            assert (first.number, first.value) == (last.number + 1, last.value)
        assert restored.memory_hash() == self.hashes


@dataclass(frozen=True)
class Checkpoint:
    """A dump of a workload on this host."""

    testbed: Testbed
    layer: Path
    """A tar of the images directory, as Podman writes it."""
    status: Status
    reports: bytes
    """The status file at the dump."""
    pids: tuple[int, ...]
    before: Before

    @property
    def root_pid(self) -> int:
        """The first process's."""
        return self.before.last[0].pid

    @property
    def layer_bytes(self) -> int:
        """The size of the layer."""
        return self.layer.stat().st_size

    def restore(self, images_dir: Path, work: Path, *, lazy_pages: bool | Path = False) -> Restored:
        """Restore it from a mount."""
        self.rewind()
        return restore(
            self.testbed, images_dir, work, self.status, lazy_pages=lazy_pages, timeout_s=120
        )

    def fail_to_restore(self, images_dir: Path, work: Path) -> str:
        """Run a `criu restore` that has to fail, and to leave nothing alive; return its log's end.

        By itself, not by this function: that only reaps.
        """
        self.rewind()
        work.mkdir(parents=True, exist_ok=True)
        words = [*self.testbed.host_command("criu"), "restore", "-v3", "-o", "restore.log"]
        words += ["-D", str(images_dir), "-W", str(work)]
        words += ["--restore-detached", "--restore-sibling"]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=90,
                check=False,
            )
            log = last_lines(work / "restore.log")
            assert done.returncode != 0, log
            wait_until(self._none_lives, f"the end of {self.pids} by CRIU's hand\n{log}", 20)
            wait_gone(self.pids)
        finally:
            for pid in self.pids:
                kill_child(pid)
        return log

    def rewind(self) -> None:
        """Make the world what it was at the dump: pids free, files as long as CRIU saw them."""
        wait_until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.pids),
            f"that the pids {self.pids} are free",
            30,
        )
        self.status.path.write_bytes(self.reports)

    def _none_lives(self) -> bool:
        return all(_state(pid) in ("", "Z", "X") for pid in self.pids)


def checkpoint(testbed: Testbed, work: Path, **options: Any) -> Checkpoint:
    """Start a workload, dump it, make a layer of the dump; `options` are `Workload`'s."""
    work.mkdir(parents=True, exist_ok=True)
    with Workload(testbed, work / "status", **options) as workload:
        hashes = workload.memory_hash()
        dump(testbed, workload.pid, work / "images", work / "dump")
    status = workload.status
    tar_checkpoint(work / "images", work / "layer.tar")
    shutil.rmtree(work / "images")
    loops = {event.member: event for event in status.events("loop")}
    return Checkpoint(
        testbed,
        work / "layer.tar",
        status,
        status.path.read_bytes(),
        tuple(event.pid for event in loops.values()),
        Before(loops, hashes),
    )


def _state(pid: int) -> str:
    """Return a process's state as proc(5) has it; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""

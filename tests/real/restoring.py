"""`lazyfs restore` as these tests run it, and what of it must not be left."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed import Restored, Testbed
from testbed.guard import forget, watch
from testbed.process import kill_child, wait_gone, wait_until

from lazyfs.restore.processes import descendants
from tests.real.checkpoints import Checkpoint

_OURS = re.compile(r"-m lazyfs restore |/criu |/workload ")


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        """What `--json` printed."""
        told: dict[str, Any] = json.loads(self.out)
        return told


class Restorer:
    """Runs `lazyfs restore` with a cache and a run directory of its own."""

    def __init__(self, testbed: Testbed, work: Path) -> None:
        self.testbed = testbed
        self.work = work
        self.environment = {**os.environ, "LAZYFS_RUN_DIR": str(work / "run")}
        self.environment |= {"TMPDIR": str(work / "tmp")}
        self._started: list[subprocess.Popen[str]] = []
        (work / "tmp").mkdir(parents=True, exist_ok=True)

    def offer_programs(self) -> None:
        """Put the testbed's CRIU, and what it calls, where a runtime on the host finds them."""
        programs = self.work / "bin"
        programs.mkdir()
        xtables = self.testbed.host_command("xtables-nft-multi")
        words = {name: [*xtables, name] for name in ("iptables-restore", "ip6tables-restore")}
        words["criu"] = self.testbed.host_command("criu")
        for name, command in words.items():
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            (programs / name).chmod(0o755)
        (libraries,) = self.testbed.root.glob("usr/lib/*/xtables")
        self.environment["XTABLES_LIBDIR"] = str(libraries)
        self.environment["PATH"] = f"{programs}:{self.environment['PATH']}"

    def words(self, reference: str, *options: str | Path, extra: Sequence[str] = ()) -> list[str]:
        """Return the words of a command."""
        words = [sys.executable, "-m", "lazyfs", "restore", reference, "--plain-http"]
        words += ["--cache-dir", str(self.work / "cache")]
        if not any(str(each).startswith("--criu") for each in options):
            words += ["--criu", shlex.join(self.testbed.host_command("criu"))]
        return [*words, *map(str, options), *(["--", *extra] if extra else [])]

    def start(self, words: Sequence[str]) -> "subprocess.Popen[str]":
        """Start one."""
        with (self.work / "err").open("w") as err, (self.work / "out").open("w") as out:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,  # no pipe: a container that lives on has it too
                stderr=err,
                text=True,
                env=self.environment,
                cwd=self.work,
            )
        watch(process.pid)
        self._started.append(process)
        return process

    def wait(self, process: "subprocess.Popen[str]", timeout_s: float = 90) -> Ended:
        """Wait for its end."""
        try:
            process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
            forget(process.pid)
        out, err = ((self.work / name).read_text() for name in ("out", "err"))
        return Ended(process.returncode, out, err)

    def run(self, reference: str, *options: str | Path, extra: Sequence[str] = ()) -> Ended:
        """Run one to its end."""
        return self.wait(self.start(self.words(reference, *options, extra=extra)))

    def left(self) -> list[str]:
        """Return the processes that work for a restore, or were restored, and are still there."""
        found = []
        for pid in descendants(os.getpid()):
            with suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if state != "Z" and _OURS.search(line):
                    found.append(f"{pid}: {line}")
        return found

    def assert_nothing_is_left(self) -> None:
        """Check that neither a process nor a file of a restore is there; waits a while for it."""
        for process in self._started:
            if process.poll() is None:  # the test has failed
                self.wait(process)
        try:
            wait_until(lambda: not self.left(), f"that nothing is left of {self.left()}", 20)
        finally:
            left = [int(each.partition(":")[0]) for each in self.left()]
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_gone(left)
        assert [each for each in (self.work / "run").glob("*.sock") if _is_served(each)] == []
        assert list((self.work / "tmp").glob("lazyfs-gate-*")) == []


@contextmanager
def cgroup(bundle: Path, name: str) -> Iterator[None]:
    """Have a bundle's container in cgroups of its own, which go with the block."""
    spec = json.loads((bundle / "config.json").read_text())
    spec["linux"]["cgroupsPath"] = f"/{name}"
    (bundle / "config.json").write_text(json.dumps(spec))
    try:
        yield
    finally:
        for pattern in (name, f"*/{name}"):
            for folder in Path("/sys/fs/cgroup").glob(pattern):
                for inner, _, _ in os.walk(folder, topdown=False):
                    with suppress(OSError):
                        Path(inner).rmdir()


def _is_served(path: Path) -> bool:
    """Whether somebody listens: a daemon that was killed leaves its socket to the next."""
    where = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(f"/proc/self/fd/{where}/{path.name}")
    except OSError:
        return False
    finally:
        os.close(where)
    return True


@contextmanager
def alive(pid: int, checkpoint: Checkpoint, started_s: float) -> Iterator[Restored]:
    """What was restored, which is our child since we adopt orphans; killed at the block's end."""
    watch(pid)
    try:
        yield Restored(
            started_s,
            0.0,
            checkpoint.status,
            None,
            ask_hash=lambda: os.kill(pid, signal.SIGUSR1),
            end=lambda: kill_child(pid),
            pid=pid,
        )
    finally:
        kill_child(pid)

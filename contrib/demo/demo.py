#!/usr/bin/env python3
"""`make demo`: a live process, checkpointed by real CRIU, resumed from a registry through lazyfs.

Without root or CRIU it mounts (or, where even that is impossible, reads) the small checkpoint
image beside this file, and says what it left out.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "testbed"))

from testbed import (  # noqa: E402 - its place is known only now
    Layer,
    Registry,
    Testbed,
    TestbedError,
    TestbedMissing,
    Wan,
    Workload,
    dump,
    push_oci_image,
    tar_checkpoint,
)
from testbed.guard import forget, watch  # noqa: E402
from testbed.process import wait_gone  # noqa: E402

LAZYFS = str(Path(sys.executable).with_name("lazyfs"))
SAMPLE = HERE / "sample"
SIZE_MIB = 512
REPOSITORY = "demo/worker"
ANNOTATIONS = {"org.criu.checkpoint.container.name": "demo-worker"}

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a step."""
    console.print(f"[bold]{text}[/bold]")


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Show a command as a person would type it, run it, show what it prints."""
    shown = ["lazyfs" if word == LAZYFS else str(word) for word in words]
    console.print(f"  [green]$ {' '.join(shown)}[/green]")
    done = subprocess.run(
        [str(word) for word in words], text=True, capture_output=True, check=False
    )
    for line in (done.stdout + done.stderr).splitlines()[:40]:
        console.print(f"    {line}", markup=False)
    if done.returncode:
        sys.exit(f"demo: {shown[0]} ended with code {done.returncode}")
    return done


def megabytes(count: int) -> str:
    """Write a size."""
    return f"{count / 1e6:,.1f} MB"


def registry_of(testbed: Testbed, work: Path, stack: ExitStack) -> tuple[Registry, str]:
    """Start a registry behind a slow link, or here if there can be none; return where it is."""
    try:
        link = stack.enter_context(Wan(testbed))
    except TestbedError:
        return stack.enter_context(Registry(testbed, work / "registry")), "on this machine"
    far = Registry(testbed, work / "registry", ip=link.far_ip, enter=link.enter)
    return stack.enter_context(far), "1 Gbit/s and 10 ms away"


def demo(testbed: Testbed, work: Path, stack: ExitStack) -> bool:
    """Show the whole way; return whether all memory came back as it was."""
    registry, where = registry_of(testbed, work, stack)
    say(f"1. A process with {megabytes(SIZE_MIB << 20)} of memory counts; CRIU checkpoints it")
    workload = stack.enter_context(Workload(testbed, work / "status", size_mib=SIZE_MIB))
    memory = workload.memory_hash()
    seconds = dump(testbed, workload.pid, work / "images", work / "dump")
    console.print(f"    pid {workload.pid}, hash of its memory {memory[0]}")
    console.print(f"    criu dump took {seconds:.2f} s; the process is gone\n")

    say(f"2. The checkpoint becomes an image in a registry, {where}")
    layer = work / "checkpoint.tar"
    tar_checkpoint(work / "images", layer)
    push_oci_image(registry.address, REPOSITORY, "1", [Layer(layer)], annotations=ANNOTATIONS)
    layer_bytes = layer.stat().st_size
    layer.unlink()
    reference = f"{registry.address}/{REPOSITORY}:1"
    console.print(f"    pushed {reference}, {megabytes(layer_bytes)}\n")

    say("3. What is it? (less than a megabyte is fetched to tell)")
    command(LAZYFS, "inspect", "--plain-http", "--cache-dir", work / "cache-inspect", reference)
    console.print()

    ways = _Ways(testbed, work, reference, workload, memory)
    say("4. Restored: it runs when all of its memory is here")
    ways.restore("eagerly")
    say("5. With lazy pages: it runs at once, and its memory comes as it is touched")
    ways.restore("lazily", "--lazy-pages")
    say("6. What it needs until its first loop is recorded, and attached to the image")
    trace = work / "worker.trace"
    until = f"exec:grep -q loop {workload.status.path}"
    ways.restore("", "--record", trace, "--until", until)
    command(LAZYFS, "trace", "push", "--plain-http", reference, trace)
    console.print()
    say("7. With lazy pages again: what is needed comes first")
    ways.restore("lazily, with the trace", "--lazy-pages")
    console.print(ways.table)
    console.print(
        "seconds from the start of `lazyfs restore`, with nothing in the cache: to the process's "
        "first count,\nand until all of its memory was here and proven. At 1 Gbit/s the image "
        f"alone needs {layer_bytes * 8 / 1e9:.2f} s."
    )
    return ways.intact


class _Ways:
    """Restores of one image, and what they took."""

    def __init__(
        self,
        testbed: Testbed,
        work: Path,
        reference: str,
        workload: Workload,
        memory: tuple[str, ...],
    ) -> None:
        self.table = Table(title="From a registry to a running process", title_justify="left")
        for column in ("restore", "first loop", "all here", "memory"):
            self.table.add_column(column, justify="left" if column == "restore" else "right")
        self.intact = True
        self._criu = shlex.join(testbed.host_command("criu"))
        self._work = work
        self._reference = reference
        self._status, self._pid = workload.status, workload.pid
        self._memory = memory

    def restore(self, name: str, *options: str | Path) -> None:
        """Restore it from an empty cache, compare its memory, and kill it; `name`: of its row."""
        cache = self._work / "cache"
        self._status.path.write_text("")
        shown = shlex.join([str(option) for option in options])
        console.print(f"  [green]$ lazyfs restore {self._reference} {shown}[/green]")
        words = [LAZYFS, "restore", self._reference, "--plain-http", "--cache-dir", str(cache)]
        words += ["--criu", self._criu, *map(str, options)]
        began_s = time.time()
        done = subprocess.run(words, text=True, capture_output=True, check=False)
        all_s = time.time() - began_s
        for line in (done.stdout + done.stderr).splitlines():
            console.print(f"    {line}", markup=False)
        if done.returncode:
            sys.exit(f"demo: lazyfs restore ended with code {done.returncode}")
        watch(self._pid)
        try:
            first_s = self._status.wait_loop(began_s).at_s - began_s
            hashed = self._status.wait_hashes(lambda: os.kill(self._pid, signal.SIGUSR1))
        finally:
            os.kill(self._pid, signal.SIGKILL)
            wait_gone([self._pid])
            forget(self._pid)
            shutil.rmtree(cache)
        same = hashed == self._memory
        self.intact = self.intact and same
        if name:
            kept = "intact" if same else "DIFFERENT"
            self.table.add_row(name, f"{first_s:.2f} s", f"{all_s:.2f} s", kept)
        console.print()


def sample(reason: str, work: Path) -> bool:
    """Show what can be shown without root and CRIU."""
    say(f"Left out: checkpointing and restoring a live process. {reason}")
    say("Instead, the small checkpoint image that ships with lazyfs:")
    reference = f"oci:{SAMPLE}"
    cache = ("--cache-dir", work / "cache")
    command(LAZYFS, "inspect", *cache, reference)
    directory = work / "mount"
    directory.mkdir()
    console.print(f"  [green]$ lazyfs mount {reference} {directory}[/green]")
    mounted = subprocess.run(
        [LAZYFS, "mount", *map(str, cache), reference, str(directory)],
        text=True,
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        console.print(f"    {mounted.stderr.strip()}", markup=False)
        say("Left out: mounting, for the reason above. Its files are read without a mount:")
        command(LAZYFS, "ls", *cache, reference)
        return True
    try:
        command("ls", "-l", directory)
        command("sha256sum", *sorted(directory.glob("pages-*.img")))
    finally:
        command(LAZYFS, "umount", directory)
    return True


def main() -> int:
    """Run the demo; 0 if the process's memory came back as it was."""
    with tempfile.TemporaryDirectory(prefix="lazyfs-demo-") as directory, ExitStack() as stack:
        work = Path(directory)
        try:
            testbed = Testbed.locate()
        except TestbedMissing as missing:
            return 0 if sample(str(missing), work) else 1
        return 0 if demo(testbed, work, stack) else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""`make demo`: a live process, checkpointed by real CRIU, resumed from a registry through lazyfs.

Without root or CRIU it mounts (or, where even that is impossible, reads) the small checkpoint
image beside this file, and says what it left out.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "testbed"))

from testbed import (  # noqa: E402 - its place is known only now
    Layer,
    Registry,
    Testbed,
    TestbedMissing,
    Workload,
    dump,
    push_oci_image,
    restore,
    tar_checkpoint,
)

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


def status(directory: Path) -> dict[str, Any]:
    """Ask a mount for its state."""
    state: dict[str, Any] = json.loads(os.getxattr(directory, "user.lazyfs.status"))
    return state


def megabytes(count: int) -> str:
    """Write a size."""
    return f"{count / 1e6:,.1f} MB"


def demo(testbed: Testbed, work: Path, stack: ExitStack) -> bool:
    """Show the whole way; return whether all memory came back as it was."""
    registry = stack.enter_context(Registry(testbed, work / "registry"))
    say(f"1. A process with {megabytes(SIZE_MIB << 20)} of memory counts; CRIU checkpoints it")
    workload = stack.enter_context(Workload(testbed, work / "status", size_mib=SIZE_MIB))
    memory = workload.memory_hash()
    seconds = dump(testbed, workload.pid, work / "images", work / "dump")
    console.print(f"    pid {workload.pid}, hash of its memory {memory[0]}")
    console.print(f"    criu dump took {seconds:.2f} s; the process is gone\n")

    say("2. The checkpoint becomes an image in a registry")
    layer = work / "checkpoint.tar"
    tar_checkpoint(work / "images", layer)
    push_oci_image(registry.address, REPOSITORY, "1", [Layer(layer)], annotations=ANNOTATIONS)
    layer_bytes = layer.stat().st_size
    layer.unlink()
    reference = f"{registry.address}/{REPOSITORY}:1"
    console.print(f"    pushed {reference}, {megabytes(layer_bytes)}\n")

    say("3. What is it? (less than a megabyte is fetched to tell)")
    command(LAZYFS, "inspect", "--cache-dir", work / "cache-inspect", reference)
    console.print()

    table = Table(title="From a registry to a running process", title_justify="left")
    for column in ("restore", "mount", "criu restore", "first loop", "fetched by then", "memory"):
        table.add_column(column, justify="left" if column == "restore" else "right")
    intact = True
    for step, lazy in ((4, False), (5, True)):
        name = "lazy-pages" if lazy else "eager"
        say(f"{step}. Mounted and restored, {name}; nothing is in the cache before")
        directory = work / f"mount-{name}"
        directory.mkdir()
        began = time.monotonic()
        command(LAZYFS, "mount", "--cache-dir", work / f"cache-{name}", reference, directory)
        mount_s = time.monotonic() - began
        try:
            options = " --lazy-pages" if lazy else ""
            console.print(f"  [green]$ criu restore -D {directory} -W WORK{options}[/green]")
            with restore(
                testbed, directory, work / f"work-{name}", workload.status, lazy_pages=lazy
            ) as restored:
                loop_s = restored.wait_first_loop()
                state = status(directory)
                same = restored.memory_hash() == memory
                if lazy:
                    restored.wait_lazy_pages()
                    console.print("    the last page is home; lazy-pages has ended")
            intact = intact and same
        finally:
            command(LAZYFS, "umount", directory)
        share = state["bytes_fetched"] / layer_bytes
        table.add_row(
            name,
            f"{mount_s:.2f} s",
            f"{restored.seconds:.2f} s",
            f"{loop_s:.2f} s",
            f"{share:.0%} of {megabytes(layer_bytes)}",
            "intact" if same else "DIFFERENT",
        )
        console.print()
    console.print(table)
    console.print(
        "first loop: from the start of `criu restore` to the process's first count. On loopback "
        "bytes\ncost nothing; `make bench` shows the same over a link of 1 Gbit/s and 10 ms."
    )
    return intact


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

"""`lazyfs cat`: a file's bytes to standard output, fetched ahead of the writing."""

import sys
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING

import click

from lazyfs.cli.opening import locate, with_checkpoint
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, follow_option, source_options
from lazyfs.cli.text import human_bytes, printable
from lazyfs.ground.data import Data
from lazyfs.ground.errors import LazyfsError

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint

_WORTH_PROGRESS_BYTES = 4 << 20


@click.command("cat", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.argument("path")
@source_options
@follow_option
def cat_command(reference: str, path: str, source: SourceOptions) -> None:
    """Write a file of a checkpoint to standard output.

    PATH is from the root of the checkpoint, as `lazyfs ls` prints it. A PATH that is not there
    is looked for in the CRIU images directory as well, so `inventory.img` means
    `checkpoint/inventory.img`. Only the file and the index are fetched.

    A layer whose chunks have no digests of their own (a plain tar, gzip, zstd) can only be proven
    as a whole:
    with --verify full it is fetched and proven before the first byte is written; otherwise what
    is written is as the source gave it.
    """
    stdout = sys.stdout.buffer
    progress = sys.stderr.isatty() and not sys.stdout.isatty()

    async def copied(checkpoint: "OpenedCheckpoint") -> None:
        await copy(checkpoint, path, stdout, progress=progress)

    with_checkpoint(reference, source, copied)


async def copy(checkpoint: "OpenedCheckpoint", path: str, to: IO[bytes], *, progress: bool) -> None:
    """Write a file to a stream; `progress` is drawn on standard error.

    A worker thread does the writing, or a slow reader of the pipe would hold up the fetching.

    Raises:
        LazyfsError: there is no such file, or it cannot be read.
    """
    import trio

    where, node = await locate(checkpoint, path)
    if node.type.value == "symlink":
        raise LazyfsError(
            f"{printable(where)} is a symbolic link, to {printable(node.symlink_target)}: "
            "name the file itself"
        )
    if node.type.value != "file":
        name = printable(where) or "/"
        raise LazyfsError(f"{name} is a {node.type.value}: `lazyfs ls` lists it")
    with ExitStack() as stack:
        bar = None
        if progress and node.size_bytes >= _WORTH_PROGRESS_BYTES:
            label = f"{printable(where)}, {human_bytes(node.size_bytes)}"
            bar = click.progressbar(length=node.size_bytes, label=label, file=sys.stderr)
            stack.enter_context(bar)
        async for piece in checkpoint.stream_file(where):
            await trio.to_thread.run_sync(_write_all, to, piece)
            if bar is not None:
                bar.update(len(piece))
        await trio.to_thread.run_sync(to.flush)


def _write_all(to: IO[bytes], data: Data) -> None:
    """Write all of `data`: under PYTHONUNBUFFERED, standard output may write less at a time."""
    view = memoryview(data)
    while view:
        view = view[to.write(view) :]

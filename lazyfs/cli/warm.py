"""`lazyfs warm`: fill the cache ahead of time."""

import sys
import time
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from lazyfs.cli.opening import with_checkpoint
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, follow_option, source_options
from lazyfs.cli.text import human_bytes, printable
from lazyfs.ground.errors import LazyfsError

if TYPE_CHECKING:
    from types import TracebackType

    from lazyfs.checkpoint.image import ResolvedImage
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.whole import Progress

_LOOK_EVERY_S = 0.2


@click.command("warm", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@source_options
@follow_option
def warm_command(reference: str, source: SourceOptions) -> None:
    """Fetch all of a checkpoint into the cache, proven, so that mounts need no network.

    That is, mounts by digest (the line that is printed has it): what a tag names is asked for each
    time. What is there already is only checked: a second run has nothing to fetch. A checkpoint
    without digests (an archive by its path or URL) is fetched by every mount anew, if it is a
    stream.
    """
    with_checkpoint(reference, replace(source, trace="auto"), _warm)


async def _warm(checkpoint: "OpenedCheckpoint") -> None:
    import trio

    from lazyfs.whole import Progress, complete

    began_s = time.monotonic()
    fetched_before = checkpoint.counters.bytes_fetched
    progress = Progress(checkpoint)
    with _Bar(checkpoint, progress) as bar:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bar.run)
            await complete(checkpoint, progress, alone=True)
            await trio.to_thread.run_sync(_read_words, checkpoint.image)
            await checkpoint.trace_known.wait()  # which was looked for meanwhile, and is kept
            nursery.cancel_scope.cancel()
    here_bytes = sum(layer.content.here_bytes() for layer in checkpoint.image_layers)
    is_proven = all(layer.content.proven or layer.blob_proven for layer in checkpoint.image_layers)
    fetched_bytes = checkpoint.counters.bytes_fetched - fetched_before
    seconds = time.monotonic() - began_s
    what = f"{human_bytes(here_bytes)}, {'proven' if is_proven else 'without digests to prove it'}"
    if checkpoint.counters.chunks_from_cache and not fetched_bytes:
        click.echo(printable(f"{checkpoint.reference}: all there: {what}"))
    else:
        cost = f"{human_bytes(fetched_bytes)} fetched in {seconds:.1f} s"
        click.echo(printable(f"{checkpoint.reference}: {what}; {cost}"))


def _read_words(image: "ResolvedImage") -> None:
    """Have what the image says of itself kept, too: `lazyfs inspect` may be asked without network.

    No mount needs it.
    """
    with suppress(LazyfsError):
        image.read_config()
        image.dumps()


class _Bar(AbstractContextManager["_Bar"]):
    """Bytes, rate and time left, if a person looks at the terminal."""

    def __init__(self, checkpoint: "OpenedCheckpoint", progress: "Progress") -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._is_shown = sys.stderr.isatty()

    def __enter__(self) -> "_Bar":
        if self._is_shown:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=max(1, self._progress.all_bytes))
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        if self._is_shown:
            self._bar.stop()

    async def run(self) -> None:
        """Draw; for ever."""
        import trio

        while self._is_shown:
            done, whole = self._progress.done_bytes, self._progress.all_bytes
            self._bar.update(self._task, completed=done, total=max(1, whole))
            await trio.sleep(_LOOK_EVERY_S)

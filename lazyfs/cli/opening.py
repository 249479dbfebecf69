"""What the commands that read a checkpoint share: open it, and find a path in it."""

import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazyfs.cli.options import SourceOptions
from lazyfs.cli.text import human_bytes, printable
from lazyfs.ground.errors import CONDEMNED, LazyfsError

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node

_T = TypeVar("_T")


def with_checkpoint(
    reference: str, source: SourceOptions, job: "Callable[[OpenedCheckpoint], Awaitable[_T]]"
) -> _T:
    """Open a checkpoint, do a job with it, and return what the job returns.

    A command is too short for a proof in the background: it is proven before, if that is asked
    for, or chunk by chunk where the layer has digests for them, or not.
    """
    config = source.opening(reference, proof_bar())
    import trio

    from lazyfs.checkpoint.follow import open_followed

    async def main() -> _T:
        async with open_followed(reference, config) as checkpoint:
            if checkpoint.stub is not None:
                click.echo(printable(stub_line(checkpoint.stub, checkpoint.reference)), err=True)
            return await job(checkpoint)

    handlers = logging.getLogger("lazyfs").handlers[:]
    for handler in handlers:
        handler.addFilter(_is_not_the_error)
    try:
        return trio.run(main)
    finally:
        for handler in handlers:
            handler.removeFilter(_is_not_the_error)


def stub_line(stub: str, real: str) -> str:
    """Say that something else was opened than was asked for."""
    return f"lazyfs: {stub} is a stub of {real}, which is what is looked at (--no-follow: the stub)"


def _is_not_the_error(record: logging.LogRecord) -> bool:
    """Whether a record is other than what this command will end with: a layer found wrong."""
    return not str(record.msg).endswith(CONDEMNED)


def proof_bar() -> Callable[[int, int], None] | None:
    """Return a progress bar for the proof of a whole layer, if a person looks at the terminal."""
    if not sys.stderr.isatty():
        return None
    bars: list[Any] = []

    def draw(done_bytes: int, all_bytes: int) -> None:
        if not bars:
            label = f"proving {human_bytes(all_bytes)}"
            bars.append(click.progressbar(length=all_bytes, label=label, file=sys.stderr))
        bar = bars[0]
        bar.update(done_bytes - bar.pos)
        if done_bytes >= all_bytes:
            bar.render_finish()

    return draw


async def locate(checkpoint: "OpenedCheckpoint", path: str) -> "tuple[str, Node]":
    """Find what a person means by a path: its path in the layer, and its node.

    A path is from the checkpoint's root, with or without `/` or `./` before it and `/` behind;
    one that is not there is looked for in the images directory. `..` is never there.

    Raises:
        LazyfsError: it is in neither.
    """
    asked = "/".join(part for part in path.split("/") if part not in ("", "."))
    node = await checkpoint.find(asked)
    if node is not None:
        return asked, node
    if checkpoint.images_directory:
        inside = f"{checkpoint.images_directory}/{asked}"
        node = await checkpoint.find(inside)
        if node is not None:
            return inside, node
    raise LazyfsError(
        f"there is no {path!r} in {checkpoint.reference}; `lazyfs ls -R` lists what is there"
    )

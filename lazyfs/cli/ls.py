"""`lazyfs ls`: names, sizes and times, like `ls -l`."""

import json
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lazyfs.cli.opening import locate, with_checkpoint
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, follow_option, source_options
from lazyfs.cli.text import human_bytes, printable

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.tree import Node

_TYPE_BITS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}


class Line(msgspec.Struct, frozen=True):
    """What is told of one file. The fields are the keys of `--json`."""

    path: str
    """From the checkpoint's root; "" is the root itself."""
    type: str
    """"file", "directory" or "symlink"."""
    mode: str
    """Permission bits in octal, "0644"."""
    uid: int
    gid: int
    size_bytes: int
    modified_at: str | None
    """ISO 8601, UTC."""
    symlink_target: str | None

    def as_json(self) -> dict[str, Any]:
        """The line as plain values."""
        return {name: getattr(self, name) for name in self.__struct_fields__}

    @property
    def mode_text(self) -> str:
        """Type and permissions as `ls -l` writes them."""
        return stat.filemode(_TYPE_BITS.get(self.type, 0) | int(self.mode, 8))

    @property
    def name_text(self) -> str:
        """The path, marked by its type, fit for a terminal."""
        if self.type == "directory":
            return printable(f"{self.path}/")
        if self.symlink_target is not None:
            return f"{printable(self.path)} -> {printable(self.symlink_target)}"
        return printable(self.path)


async def lines(checkpoint: "OpenedCheckpoint", path: str, *, recursive: bool) -> list[Line]:
    """Return a directory's members, by name, or all that is below it; of a file the file itself.

    Raises:
        LazyfsError: there is no such path.
    """
    where, node = await locate(checkpoint, path)
    await checkpoint.complete()
    return list(_lines(checkpoint, where, node, recursive=recursive))


def _lines(
    checkpoint: "OpenedCheckpoint", where: str, node: "Node", *, recursive: bool
) -> Iterator[Line]:
    if node.type.value != "directory":
        yield _line(where, node)
    elif recursive:
        for found, below in checkpoint.tree.walk(node, where):
            yield _line(found, below)
    else:
        prefix = f"{where}/" if where else ""
        for name in sorted(node.children):
            if not node.children[name].climbs:
                yield _line(prefix + name, node.children[name])


def _line(path: str, node: "Node") -> Line:
    from lazyfs.checkpoint.inspect import iso_time

    return Line(
        path=path,
        type=node.type.value,
        mode=f"{node.mode:04o}",
        uid=node.uid,
        gid=node.gid,
        size_bytes=node.size_bytes,
        modified_at=iso_time(node.mtime_ns),
        symlink_target=node.symlink_target if node.type.value == "symlink" else None,
    )


@click.command("ls", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.argument("path", default="")
@click.option("-R", "--recursive", is_flag=True, help="List everything below PATH.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="An array of objects: path, type, mode (octal), uid, gid, size_bytes, modified_at, "
    "symlink_target.",
)
@source_options
@follow_option
def ls_command(
    reference: str, path: str, recursive: bool, as_json: bool, source: SourceOptions
) -> None:
    """List the files of a checkpoint.

    PATH is a directory or a file, from the root of the checkpoint; without it, the root is
    listed. A PATH that is not there is looked for in the CRIU images directory as well, so
    `inventory.img` means `checkpoint/inventory.img`. Names are printed as full paths, which is
    how `lazyfs cat` wants them. Only the index is fetched, never a file; a compressed layer
    without one is decoded to its end.

    In a pipe, a line is: mode, uid, gid, bytes, time, path, with tabs between them.
    """

    async def listed(checkpoint: "OpenedCheckpoint") -> list[Line]:
        return await lines(checkpoint, path, recursive=recursive)

    found = with_checkpoint(reference, source, listed)
    if as_json:
        click.echo(json.dumps([line.as_json() for line in found], indent=2))
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        for text in plain(found):
            click.echo(text)


def plain(found: Iterable[Line]) -> Iterator[str]:
    """Yield a line for a machine, or for a person with `cut` or `awk`."""
    for line in found:
        columns = (line.mode_text, line.uid, line.gid, line.size_bytes, line.modified_at or "-")
        yield "\t".join([*map(str, columns), line.name_text])


def _print_table(found: list[Line]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(overflow="fold")
    for line in found:
        table.add_row(
            Text(line.mode_text, style="dim"),
            Text(f"{line.uid}:{line.gid}", style="dim"),
            Text(human_bytes(line.size_bytes) if line.type == "file" else "-"),
            Text((line.modified_at or "-")[:19].replace("T", " "), style="dim"),
            Text(line.name_text, style="bold blue" if line.type == "directory" else ""),
        )
    Console(highlight=False).print(table)

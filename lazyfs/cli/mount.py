"""`lazyfs mount` and `lazyfs umount`."""

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from lazyfs import mountpoint
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.cli.daemon import run_detached
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, source_options, verbose_option
from lazyfs.ground.errors import LazyfsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.mount import Ready


@click.command("mount", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--view",
    type=click.Choice(["criu", "image"]),
    default="criu",
    show_default=True,
    help="What DIR shows: the CRIU images directory, for `criu restore -D DIR`; or the whole "
    "checkpoint with config.dump, spec.dump and all.",
)
@click.option(
    "--foreground", is_flag=True, help="Stay; end and unmount on Ctrl-C or `lazyfs umount DIR`."
)
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where the daemon logs.  [default: log/DIR.log in the cache directory]",
)
@source_options
def mount_command(
    reference: str,
    directory: Path,
    view: Literal["criu", "image"],
    foreground: bool,
    log_file: Path | None,
    source: SourceOptions,
) -> int:
    """Show a checkpoint as a directory, fetched as it is read.

    Returns when DIR answers; a daemon stays until DIR is unmounted. DIR must exist and be empty.
    What is fetched is kept in the cache directory, so that it is fetched once.

    State: `getfattr --only-values -n user.lazyfs.status DIR` prints it as JSON.
    """
    parse_reference(reference)
    mountpoint.prepare(directory)
    directory = directory.resolve()
    log_file = (log_file or _default_log(source.cache_dir, directory)).absolute()

    def serve(on_ready: "Callable[[str], None]") -> int:
        return _serve(reference, directory, view, source, on_ready)

    if foreground:
        return serve(click.echo)
    code, message = run_detached(serve, log_file)
    if code == 0:
        click.echo(message)
    return code


@click.command("umount")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--lazy", is_flag=True, help="Detach it now, even while files on it are open.")
@verbose_option
def umount_command(directory: Path, lazy: bool) -> None:
    """End a mount, or clear away a dead one.

    Returns when the daemon has ended and its cache is free for the next mount.
    """
    mountpoint.unmount(directory, lazy=lazy)


def _serve(
    reference: str,
    directory: Path,
    view: Literal["criu", "image"],
    source: SourceOptions,
    on_ready: "Callable[[str], None]",
) -> int:
    """Import what a mount needs (after the fork: the caller does not), and live its life."""
    import trio

    from lazyfs.checkpoint.opened import OpenConfig
    from lazyfs.cli.main import report
    from lazyfs.mount import MountConfig, serve_mount

    opening = OpenConfig(source.cache_dir.absolute(), source.transport, source.content)
    config = MountConfig(reference, directory, opening, view)

    def tell(ready: "Ready") -> None:
        try:
            on_ready(f"mounted {ready.reference} on {directory}")
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            raise LazyfsError("whoever asked for the mount is gone; unmounting") from None

    try:
        trio.run(serve_mount, config, tell)
    except BaseException as error:  # noqa: BLE001 - the daemon's end, whatever it is
        return report(error)
    return 0


def _default_log(cache_dir: Path, directory: Path) -> Path:
    return cache_dir / "log" / (str(directory).strip("/").replace("/", "-")[:200] + ".log")

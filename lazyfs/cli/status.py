"""`lazyfs status`: what mounts there are, and how they are."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazyfs.cli.options import MountPoint, verbose_option

if TYPE_CHECKING:
    from lazyfs.asking import Known

_WELL = ("serving", "detached", "restoring")


@click.command("status")
@click.argument("directory", metavar="[DIR]", required=False, type=MountPoint())
@click.option("--json", "as_json", is_flag=True, help="All that is known (docs/json.md).")
@verbose_option
def status_command(directory: Path | None, as_json: bool) -> int:
    """Show how mounts are: what is here, who waits, what failed.

    Without DIR: all mounts of this user, of all users for root. OFFLINE: nothing will be asked of
    the source any more, since all is here and proven. OPEN: files and directories that somebody
    holds; with none, DIR can be unmounted, unless it is somebody's working directory. In a pipe, a
    line is: directory, state, bytes of content here and in all, offline or -, number of files
    held, checkpoint; with tabs between.

    Exits with 0; with DIR, with 1 if that mount has failed, or its daemon is dead or gives no
    answer.
    """
    from lazyfs.asking import known_mount, known_mounts

    if directory is None:
        everything = known_mounts()
        if as_json:
            click.echo(json.dumps([known.as_json() for known in everything], indent=2))
        else:
            _list(everything)
        return 0
    known = known_mount(directory)
    if as_json:
        click.echo(json.dumps(known.as_json(), indent=2))
    else:
        _detail(known)
    return 0 if known.state in _WELL else 1


def _list(everything: "list[Known]") -> None:
    from lazyfs.cli import status_text

    if not sys.stdout.isatty():
        for line in status_text.plain(everything):
            click.echo(line)
    elif everything:
        status_text.print_list(everything)
    else:
        click.echo("Nothing is mounted.")


def _detail(known: "Known") -> None:
    from lazyfs.cli import status_text

    if sys.stdout.isatty():
        status_text.print_detail(known)
    else:
        for label, text, _ in status_text.facts(known):
            click.echo(f"{label}: {text}")

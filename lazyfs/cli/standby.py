"""`lazyfs standby`: a resident process from which commands are forked."""

import os
from collections.abc import Sequence

import click

from lazyfs.cli.options import verbose_option


@click.command("standby")
@verbose_option
def standby_command() -> None:
    """Stay, with everything imported, and fork commands of this user that are ready at once.

    `lazyfs mount`, `restore` and others look for it by themselves, and do without where there is
    none, where it is another version, or where it has not exactly their rights. One for each
    user: a Unix socket in /run/lazyfs, or in $XDG_RUNTIME_DIR/lazyfs. Ends by Ctrl-C or a signal,
    and when lazyfs is upgraded; what was forked goes on. contrib/systemd has units that start it
    when it is first wanted.

    LAZYFS_STANDBY=off does without; LAZYFS_STANDBY=must fails without, and says why.
    """
    from lazyfs.cli.main import run
    from lazyfs.standby.server import Standby, listening

    def run_helper(arguments: Sequence[str]) -> int:
        from lazyfs.cli import mount_helper

        return mount_helper.run_helper(arguments)

    with listening(os.environ) as (listener, name):
        standby = Standby(listener, {"lazyfs": run, "mount.lazyfs": run_helper})
        standby.serve(lambda: click.echo(f"standing by at {name}"))

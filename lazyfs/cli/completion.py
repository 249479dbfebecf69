"""`lazyfs completion`: click's own completion, printed."""

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    To have it in every new shell:

    \b
    bash   mkdir -p ~/.local/share/bash-completion/completions
           cd ~/.local/share/bash-completion/completions
           lazyfs completion bash > lazyfs
    zsh    lazyfs completion zsh > ~/.zfunc/_lazyfs
           and in ~/.zshrc:  fpath+=~/.zfunc; autoload -Uz compinit; compinit
    fish   lazyfs completion fish > ~/.config/fish/completions/lazyfs.fish

    To try it in this one:  eval "$(lazyfs completion bash)"
    """  # noqa: D301 - click wants the character itself
    found = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"this version of click knows nothing of {shell}")
    command = context.find_root().command
    click.echo(found(command, {}, "lazyfs", "_LAZYFS_COMPLETE").source())

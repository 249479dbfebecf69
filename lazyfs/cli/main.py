"""The group of commands, each imported when it is run, and what becomes of their errors."""

import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

import lazyfs
from lazyfs.cli.options import is_verbose, log_to_stderr, verbose_option
from lazyfs.cli.text import printable
from lazyfs.ground.errors import LazyfsError, UsageError

log = logging.getLogger(__name__)

_INTERRUPTED = 130
_PIPE_CLOSED = 141
"""As a shell reports a program that SIGPIPE ended."""
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_PRINTERS = ("click.", "rich.", "lazyfs.cli.")
"""Modules that write to standard output; all that writes to the cache is elsewhere."""


class _Lazy(NamedTuple):
    """Where a command is, and its one line of help (a test compares it with the command's own)."""

    path: str
    summary: str


COMMANDS: Mapping[str, _Lazy] = {
    "mount": _Lazy(
        "lazyfs.cli.mount:mount_command", "Show a checkpoint as a directory, fetched as it is read."
    ),
    "restore": _Lazy(
        "lazyfs.cli.restore:restore_command",
        "Restore a checkpoint with CRIU, or a container runtime, while it is fetched.",
    ),
    "umount": _Lazy("lazyfs.cli.mount:umount_command", "End a mount, or clear away a dead one."),
    "status": _Lazy(
        "lazyfs.cli.status:status_command",
        "Show how mounts are: what is here, who waits, what failed.",
    ),
    "wait": _Lazy(
        "lazyfs.cli.wait:wait_command",
        "Come back when a mount is safe to go offline, or safe to unmount.",
    ),
    "warm": _Lazy(
        "lazyfs.cli.warm:warm_command",
        "Fetch all of a checkpoint into the cache, proven, so that mounts need no network.",
    ),
    "inspect": _Lazy("lazyfs.cli.inspect:inspect_command", "Tell what a checkpoint is."),
    "stub": _Lazy(
        "lazyfs.cli.stub:stub_command",
        "Write the stub of a checkpoint image: all of it but memory.",
    ),
    "trace": _Lazy(
        "lazyfs.cli.trace:trace_command",
        "Look after traces: what a workload needs of a checkpoint, first needed first.",
    ),
    "ls": _Lazy("lazyfs.cli.ls:ls_command", "List the files of a checkpoint."),
    "cat": _Lazy("lazyfs.cli.cat:cat_command", "Write a file of a checkpoint to standard output."),
    "cache": _Lazy("lazyfs.cli.cache:cache_command", "Look after what mounts have kept."),
    "report": _Lazy(
        "lazyfs.cli.report:report_command", "Show where the seconds of a recorded restore went."
    ),
    "runtime": _Lazy(
        "lazyfs.cli.runtime:runtime_command",
        "Run an OCI runtime; a restore of a stub becomes one of its real image.",
    ),
    "standby": _Lazy(
        "lazyfs.cli.standby:standby_command",
        "Stay, with everything imported, and fork commands of this user that are ready at once.",
    ),
    "completion": _Lazy(
        "lazyfs.cli.completion:completion_command", "Print the completion script for a shell."
    ),
}


@contextlib.contextmanager
def _closed_pipe_wrapped() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ExceptionGroup("standard output was closed", [error]) from None


class LazyGroup(click.Group):
    """A group that knows its commands' names and summaries without importing them."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse, which prints what `--help` asks for; a closed pipe is wrapped as in `invoke`."""
        with _closed_pipe_wrapped():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; a closed pipe is wrapped, or click would exit by itself with 1."""
        with _closed_pipe_wrapped():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        module, _, name = lazy.path.partition(":")
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{lazy.path} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table's summaries."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a command's name from the table, and options as any command does."""
        names = [
            CompletionItem(name, help=lazy.summary)
            for name, lazy in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Exit codes:
  0  done                          3  the source cannot be had
  1  anything not named here       4  not a checkpoint that lazyfs can show
  2  the command line is wrong     5  bytes contradict their digest
                                   6  CRIU or the runtime could not restore it""",
)
@click.version_option(lazyfs.__version__, message="%(prog)s %(version)s")
@verbose_option
def cli() -> None:
    """Use a container checkpoint where it lies, before it has been downloaded.

    lazyfs shows a checkpoint image of a registry as a directory, fetches by byte range what is
    read, and proves it by its digest. It calls CRIU or runc itself:

    \b
      lazyfs inspect registry.example/checkpoints/web:1
      lazyfs restore registry.example/checkpoints/web:1

    or has Podman, containerd or CRI-O restore lazily, by lazyfs-runtime (docs/runtime.md):

    \b
      lazyfs stub registry.example/web:1 registry.example/web:1-stub
      podman run registry.example/web:1-stub

    or leaves the rest to you: the directory is what `criu restore -D` wants:

    \b
      lazyfs mount registry.example/checkpoints/web:1 /mnt/web
    """  # noqa: D301 - click wants the character itself


def run(arguments: Sequence[str]) -> int:
    """Run a command line to its end; return the exit code. The one place that reports errors."""
    log_to_stderr()
    try:
        code = cli.main(
            args=list(arguments) or ["--help"], prog_name="lazyfs", standalone_mode=False
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 0
    except BaseException as error:  # noqa: BLE001 - however a command ends, it is told here
        return report(error)
    return code if isinstance(code, int) else 0


def report(error: BaseException) -> int:
    """Say on standard error what went wrong, in one line where it can be; return the exit code.

    A nursery's group is told by its gravest member: a bug, then what has the highest exit code.
    """
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return _INTERRUPTED
    if all(isinstance(leaf, BrokenPipeError) for leaf in leaves):
        _forget_stdout()
        return _PIPE_CLOSED
    known = [leaf for leaf in leaves if isinstance(leaf, LazyfsError)]
    if known and len(known) == len(leaves):
        gravest = max(known, key=lambda leaf: leaf.exit_code)
        click.echo(f"lazyfs: {_told(gravest)}", err=True)
        log.debug("in full:", exc_info=error)
        return gravest.exit_code
    if len(leaves) == 1 and isinstance(leaves[0], OSError) and _is_of_printing(leaves[0]):
        click.echo(f"lazyfs: cannot write the output: {leaves[0].strerror}", err=True)
        _forget_stdout()
        return 1
    if is_verbose():
        traceback.print_exception(error)
    else:
        bug = next(leaf for leaf in leaves if not isinstance(leaf, LazyfsError))
        click.echo(
            f"lazyfs: this is a bug in lazyfs: {type(bug).__name__}: {bug}. "
            "Please report it with what the same command prints with -v.",
            err=True,
        )
    return 1


def _told(error: LazyfsError) -> str:
    """Return an error's text; only where all of it is the user's and ours may it have lines."""
    if isinstance(error, UsageError):
        return "\n".join(printable(line) for line in str(error).split("\n"))
    return printable(str(error))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


def _is_of_printing(error: OSError) -> bool:
    """Whether an error is that of a disk which does not take what a command prints."""
    if error.errno not in _REFUSALS or error.filename is not None:
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return module.startswith(_PRINTERS)


def _forget_stdout() -> None:
    """Let what is still in the buffer go nowhere, or the interpreter complains as it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)

"""`lazyfs report`: a recording as a page, and in words on the terminal."""

import sys
from pathlib import Path

import click

import lazyfs
from lazyfs.cli.text import human_bytes, printable
from lazyfs.ground.errors import LazyfsError, UsageError

_LOG_LIMIT_BYTES = 64 << 20


@click.command("report")
@click.argument("trace", metavar="TRACE", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the page goes; without it, beside TRACE as .html; - is standard output.",
)
@click.option(
    "--criu-log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="CRIU's log, for its phases, if a mount was recorded: of `criu restore -v3 -o FILE`, "
    "below its work directory.",
)
def report_command(trace: Path, output: Path | None, criu_log: Path | None) -> None:
    """Show where the seconds of a recorded restore went.

    TRACE is what `lazyfs restore --record` or `lazyfs mount --record` wrote. The page needs no
    network and no server: a timeline, the map of each pages file, the longest waits and why. What
    can be said in words is said here as well. The page wants plotly, beside lazyfs: pip install
    plotly.
    """
    from lazyfs.checkpoint.trace import RECORDING_LIMIT_BYTES, parse_trace
    from lazyfs.report.analysis import analyse, phases_by
    from lazyfs.report.words import told
    from lazyfs.trace_file import write_whole

    to_stdout = str(output) == "-"
    where = output or trace.parent / f"{trace.stem}.html"
    if not to_stdout and _is_same(where, trace):
        raise UsageError(f"the report would take the place of {trace}: say where it goes, by -o")
    read = parse_trace(_read(trace, RECORDING_LIMIT_BYTES), str(trace))
    phases = phases_by(_read(criu_log, _LOG_LIMIT_BYTES), read) if criu_log is not None else ()
    if criu_log is not None and not phases:
        raise UsageError(
            f"{criu_log} is no log of a restore by CRIU that tells what it was at: that takes "
            "`criu restore -v3 -o LOG`"
        )
    analysis = analyse(read, phases)
    to_stdout = str(output) == "-"
    for line in told(analysis):
        click.echo(printable(line), err=to_stdout)
    from lazyfs.report.page import page  # which wants plotly; the words do not

    text = page(analysis, version=lazyfs.__version__).encode("utf-8", "surrogateescape")
    if to_stdout:
        sys.stdout.buffer.write(text)
        return
    try:
        write_whole(where, text)
    except OSError as error:
        raise LazyfsError(f"the report {where} cannot be written: {error.strerror}") from None
    click.echo(f"\n{printable(str(where))}: {human_bytes(len(text))}")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _read(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > limit_bytes:
        raise UsageError(f"{path} is larger than {human_bytes(limit_bytes)}")
    return data

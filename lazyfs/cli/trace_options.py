"""The options of whatever follows a trace, and the reading of one that somebody names."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from msgspec.structs import replace

from lazyfs.cli.options import SourceOptions
from lazyfs.ground.errors import MalformedError, UsageError

if TYPE_CHECKING:
    from lazyfs.checkpoint.trace import Trace

_R = TypeVar("_R")


def trace_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command `--trace` and `--workload`, below `source_options`: parts of its `source`."""

    @click.option(
        "--trace",
        default="auto",
        show_default=True,
        envvar="LAZYFS_TRACE",
        show_envvar=True,
        metavar="auto|off|FILE",
        help="Fetch first what a trace says that the workload needs (--record, lazyfs trace push): "
        "the one that is attached to the image, none, or FILE.",
    )
    @click.option(
        "--workload",
        default="",
        envvar="LAZYFS_WORKLOAD",
        show_envvar=True,
        metavar="NAME",
        help="Of several traces that are attached, take that of NAME, or none.  [default: the one "
        "without a name, otherwise the newest]",
    )
    @functools.wraps(command)
    def with_trace(
        *args: Any, source: SourceOptions, trace: str, workload: str, **kwargs: Any
    ) -> _R:
        _check_workload(workload)
        where, given = _given_trace(trace)
        source = replace(source, trace=where, given_trace=given, workload=workload)
        return command(*args, source=source, **kwargs)

    return with_trace


def _check_workload(name: str) -> None:
    """See that a name is one that a trace can have.

    Raises:
        UsageError: it is none.
    """
    if not name:
        return
    from lazyfs.checkpoint.attached import WORKLOAD_MOST

    if len(name) > WORKLOAD_MOST or not name.isprintable():
        raise UsageError(f"a workload's name has at most {WORKLOAD_MOST} characters, all printable")


def _given_trace(text: str) -> "tuple[Literal['off', 'auto'] | Path, Trace | None]":
    """Read `--trace`: a word, or a file, which is understood before anything begins.

    Raises:
        UsageError: it cannot be read.
        MalformedError: it is no trace.
    """
    if text == "auto":
        return "auto", None
    if text == "off":
        return "off", None
    return Path(text), read_trace(Path(text))


def read_trace(path: Path) -> "Trace":
    """Return what a file says that a person names.

    Raises:
        UsageError: it cannot be read.
        MalformedError: it is no trace, or larger than is believed.
    """
    from lazyfs.checkpoint.trace import RECORDING_LIMIT_BYTES, parse_trace

    try:
        with path.open("rb") as file:
            data = file.read(RECORDING_LIMIT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the trace {path} cannot be read: {error.strerror}") from None
    if len(data) > RECORDING_LIMIT_BYTES:
        raise MalformedError(f"{path} is larger than is believed of a trace")
    return parse_trace(data, str(path))

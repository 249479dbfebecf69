"""`lazyfs trace`: what a workload needs of a checkpoint: attach it to the image, look at it."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from lazyfs.checkpoint.reference import LayoutReference, RegistryReference, parse_reference
from lazyfs.checkpoint.stub import ANNOTATION
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, source_options
from lazyfs.cli.text import human_bytes, plural, printable
from lazyfs.cli.trace_options import read_trace
from lazyfs.ground.errors import LazyfsError, SourceError, UsageError

if TYPE_CHECKING:
    from lazyfs.checkpoint.attached import Offer
    from lazyfs.checkpoint.attaching import AttachReport
    from lazyfs.checkpoint.image import ResolvedImage
    from lazyfs.checkpoint.trace import Trace
    from lazyfs.transport.target import Target

_FILES_SHOWN_MOST = 40
_LAYERS_SHOWN_MOST = 8
_JSON = "One object; its keys are in docs/json.md."


@click.group("trace")
def trace_command() -> None:
    """Look after traces: what a workload needs of a checkpoint, first needed first.

    One is recorded by `lazyfs restore --record FILE` or `lazyfs mount --record FILE`. Attached to
    the image, every mount and restore of it fetches first what the trace names.
    """


@trace_command.command("push", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--workload",
    metavar="NAME",
    help="Attach it as the trace of NAME, in place of one that NAME has.  [default: as the trace "
    "says, or without a name]",
)
@click.option("--json", "as_json", is_flag=True, help=_JSON)
@source_options
def trace_push_command(
    reference: str, file: Path, workload: str | None, as_json: bool, source: SourceOptions
) -> None:
    """Attach a trace to an image, for all who mount or restore it.

    REF is in a registry or an OCI layout; the trace has to be of one of its layers. Only what was
    needed is written, as an artifact that refers to the image's manifest, which stays as it is:
    not what was recorded beside it. Mounts take it as a hint of which bytes to fetch first, and
    of nothing else.
    """
    parsed = parse_reference(reference)
    if not isinstance(parsed, RegistryReference | LayoutReference):
        raise UsageError(
            f"a trace is attached to an image in a registry or in an OCI layout, and {parsed} is "
            "in neither"
        )
    trace = read_trace(file)
    from lazyfs.checkpoint.attaching import attach_trace

    with _image(reference, source) as image, closing(_target(parsed, source)) as target:
        report = attach_trace(image, target, trace, workload, datetime.now(UTC))
        _have_it_looked_for(image, source)
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else printable(_pushed(report)))


@trace_command.command("list", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.option("--json", "as_json", is_flag=True, help=_JSON)
@source_options
def trace_list_command(reference: str, as_json: bool, source: SourceOptions) -> None:
    """List the traces that are attached to an image, newest first.

    In a pipe, a line is: workload, when it was attached, bytes, digest; with tabs between.
    """
    with _image(reference, source) as image:
        offers = _offers(image)
        name = image.reference
    if as_json:
        click.echo(json.dumps({"reference": name, "traces": list(map(_plain, offers))}, indent=2))
    elif sys.stdout.isatty() and offers:
        rows = [
            (offer.workload or "-", offer.created or "-", human_bytes(offer.size_bytes))
            for offer in offers
        ]
        _print_table(("WORKLOAD", "ATTACHED", "SIZE"), rows)
    elif sys.stdout.isatty():
        click.echo(printable(f"no trace is attached to {name}"))
    else:
        for offer in offers:
            fields = offer.workload, offer.created, offer.size_bytes, offer.digest
            click.echo("\t".join(printable(str(field)) for field in fields))


@trace_command.command("show", epilog=REFERENCE_HELP)
@click.argument("what", metavar="FILE|REF")
@click.option("--workload", metavar="NAME", help="Of several that are attached, that of NAME.")
@click.option("--json", "as_json", is_flag=True, help=_JSON)
@source_options
def trace_show_command(
    what: str, workload: str | None, as_json: bool, source: SourceOptions
) -> None:
    """Tell what a trace says: how much of which file was needed, and when.

    Of an image, the trace that a mount of it would follow.
    """
    if _is_file(what):
        trace, name = read_trace(Path(what)), what
    else:
        try:
            trace, name = _attached(what, workload or "", source)
        except SourceError as error:
            if "/" in what and not what.endswith(".trace"):
                raise
            raise SourceError(f"{what} is no file here; and as an image: {error}") from None
    if as_json:
        click.echo(json.dumps(_as_json(trace, name), indent=2))
        return
    facts = list(_facts(trace, name))
    rows = [
        (
            each.path,
            human_bytes(each.needed_bytes),
            f"{each.share:.1%}",
            human_bytes(each.size_bytes),
            str(each.ranges),
            f"{each.first_ms / 1000:.3f} to {each.last_ms / 1000:.3f} s",
        )
        for each in _files(trace)
    ]
    for label, value in facts:
        click.echo(f"{label}: {printable(value)}")
    headings = ("FILE", "NEEDED", "SHARE", "OF", "RANGES", "WHEN")
    if sys.stdout.isatty():
        click.echo()
        _print_table(headings, rows[:_FILES_SHOWN_MOST])
        if len(rows) > _FILES_SHOWN_MOST:
            click.echo(f"and {plural(len(rows) - _FILES_SHOWN_MOST, 'file')} more (--json)")
    else:
        for row in rows:
            click.echo("\t".join(map(printable, row)))


class _NeededFile(msgspec.Struct, frozen=True):
    """What was needed of one file."""

    path: str
    size_bytes: int
    needed_bytes: int
    ranges: int
    first_ms: float
    last_ms: float

    @property
    def share(self) -> float:
        return self.needed_bytes / self.size_bytes if self.size_bytes else 0.0


def _files(trace: "Trace") -> list[_NeededFile]:
    """Return the files that something was needed of, in the order of the first need."""
    needs: dict[int, list[Any]] = {}
    for need in trace.needs:
        needs.setdefault(need.file, []).append(need)
    return [
        _NeededFile(
            trace.files[number].path,
            trace.files[number].size_bytes,
            sum(need.size_bytes for need in found),
            len(found),
            min(need.at_ms for need in found),
            max(need.at_ms for need in found),
        )
        for number, found in needs.items()
    ]


def _facts(trace: "Trace", name: str) -> Iterator[tuple[str, str]]:
    yield "Trace", name
    yield "Workload", trace.workload or "-"
    yield "Until", trace.until or "-"
    if trace.made_by:
        yield "Made by", trace.made_by
    for layer in trace.layers[:_LAYERS_SHOWN_MOST]:
        yield "Layer", f"{layer.digest or 'without a digest'}, {human_bytes(layer.size_bytes)}"
    if len(trace.layers) > _LAYERS_SHOWN_MOST:
        yield "Layers", f"{len(trace.layers) - _LAYERS_SHOWN_MOST} more"
    files = len({need.file for need in trace.needs})
    yield (
        "Needed",
        f"{human_bytes(trace.needed_bytes)} of {plural(files, 'file')}, in "
        f"{plural(len(trace.needs), 'range')}",
    )
    if trace.is_partial:
        yield "Partial", "more was brought than was asked for: it is not all that was needed"
    recording = trace.recording
    if recording is not None:
        when = datetime.fromtimestamp(min(max(recording.began_at_s, 0), 1e11), UTC)
        yield "Recorded", f"{when.isoformat(timespec='seconds')}, of {recording.reference or '-'}"
        if recording.dropped:
            yield "Left out", f"{plural(recording.dropped, 'event')}: more may have been needed"


def _as_json(trace: "Trace", name: str) -> dict[str, Any]:
    return {
        "trace": name,
        "workload": trace.workload,
        "until": trace.until,
        "made_by": trace.made_by,
        "layers": [
            {"digest": layer.digest, "size_bytes": layer.size_bytes} for layer in trace.layers
        ],
        "needed_bytes": trace.needed_bytes,
        "needs": len(trace.needs),
        "is_partial": trace.is_partial,
        "recorded": trace.recording is not None,
        "files": [
            {
                "path": each.path,
                "size_bytes": each.size_bytes,
                "needed_bytes": each.needed_bytes,
                "ranges": each.ranges,
                "first_ms": each.first_ms,
                "last_ms": each.last_ms,
            }
            for each in _files(trace)
        ],
    }


def _pushed(report: "AttachReport") -> str:
    whose = f" of {report.workload}" if report.workload else ""
    return (
        f"attached the trace{whose} ({human_bytes(report.trace_bytes)}; "
        f"{human_bytes(report.needed_bytes)} needed) to {report.reference}"
    )


def _plain(offer: "Offer") -> dict[str, Any]:
    return {
        "workload": offer.workload,
        "created": offer.created or None,
        "trace": offer.digest,
        "trace_bytes": offer.size_bytes,
    }


def _is_file(what: str) -> bool:
    """Whether a word is the path of a file on this machine, and not a reference."""
    try:
        return Path(what).is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def _image(reference: str, source: SourceOptions) -> "Iterator[ResolvedImage]":
    """Give the image that traces are attached to.

    Raises:
        UsageError: it is a stub, of an image that has to be named itself.
        LazyfsError: it cannot be had.
    """
    from lazyfs.checkpoint.image import resolve
    from lazyfs.ground.counters import Counters

    with closing(resolve(parse_reference(reference), source.transport, Counters())) as image:
        stands_for = image.annotations.get(ANNOTATION)
        if stands_for is not None:
            raise UsageError(
                f"{image.reference} is a stub: traces belong to the image that it stands for, "
                f"{stands_for[:1024]}"
            )
        yield image


def _offers(image: "ResolvedImage") -> "Sequence[Offer]":
    """Return what is attached, newest first.

    Raises:
        LazyfsError: nobody can say.
    """
    from lazyfs.checkpoint.attached import offers_in
    from lazyfs.checkpoint.referrals import TRACE_TYPE

    if image.digest is None or image.source is None:
        raise UsageError(f"{image.reference} is no image: nothing is attached to it")
    found = image.source.referrers(image.digest, TRACE_TYPE)
    if not found.is_known:
        raise LazyfsError(f"what refers to {image.reference} cannot be had (-v says why)")
    return offers_in(found, image.source)


def _attached(reference: str, workload: str, source: SourceOptions) -> "tuple[Trace, str]":
    from lazyfs.checkpoint.attached import take_one

    with _image(reference, source) as image:
        offers = _offers(image)
        found = take_one(offers, image, workload, None)
        if found is None:
            names = ", ".join(sorted({offer.workload or "(no name)" for offer in offers})[:20])
            having = f"those that are attached: {names}" if offers else "none is attached"
            whose = f" of {workload}" if workload else ""
            raise LazyfsError(f"{image.reference} has no trace{whose} that can be used: {having}")
        return found.trace, found.source


def _target(where: RegistryReference | LayoutReference, source: SourceOptions) -> "Target":
    if isinstance(where, LayoutReference):
        from lazyfs.transport.layout_writer import LayoutTarget

        return LayoutTarget(where.directory)
    from lazyfs.ground.counters import Counters
    from lazyfs.transport.push import RegistryTarget

    return RegistryTarget(
        where.host, where.repository, settings=source.transport, counters=Counters()
    )


def _have_it_looked_for(image: "ResolvedImage", source: SourceOptions) -> None:
    """Let mounts on this machine ask what is attached, though they know of something older."""
    from lazyfs.checkpoint.attached import TraceMemory

    if image.digest is not None and (source.cache_dir / "documents").is_dir():
        TraceMemory(source.cache().documents, image.digest, image.repository).forget()


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=number > 0)
    for row in rows:
        table.add_row(*(Text(printable(field)) for field in row))
    Console(highlight=False).print(table)

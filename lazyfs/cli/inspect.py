"""`lazyfs inspect`: a report for a person, or for a machine."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from msgspec.structs import asdict, replace

from lazyfs.cli.opening import with_checkpoint
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, follow_option, source_options
from lazyfs.cli.text import human_bytes, plural, printable

if TYPE_CHECKING:
    from lazyfs.checkpoint.findings import Finding
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.report import LayerReport, ProcessReport, Report

_BLOCKED = 4
"""Exit code of a check that something blocks: nothing here that can be restored."""
_DEEPEST_INDENT = 20
_STYLES = {"blocks": "bold red", "warns": "yellow", "unknown": "dim", "ok": "green"}


@click.command("inspect", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.option("--json", "as_json", is_flag=True, help="One object; its keys are in docs/json.md.")
@click.option(
    "--check",
    "checks",
    is_flag=True,
    help="Tell too what will not restore on this machine; exit with 4 if something blocks it.",
)
@click.option(
    "--criu",
    "criu_program",
    metavar="PROGRAM",
    default="criu",
    show_default=True,
    help="The CRIU that would restore it, for --check: a name or a path, with arguments if it "
    "needs some.",
)
@source_options
@follow_option
def inspect_command(
    reference: str, as_json: bool, checks: bool, criu_program: str, source: SourceOptions
) -> None:
    """Tell what a checkpoint is.

    Engine, container and base image, versions of CRIU and kernel, the process tree, sizes, how
    the layers are stored and proven, and how much a mount fetches before it is there. Of memory
    only that is fetched which shares a chunk with what is needed. Of a stub all that is told of
    what it stands for; if that cannot be had, of the stub, and the exit code is 3.
    """
    from lazyfs.checkpoint.follow import RealImageMissing
    from lazyfs.checkpoint.inspect import inspect
    from lazyfs.checkpoint.preflight import check_here

    missing: RealImageMissing | None = None

    async def look(checkpoint: "OpenedCheckpoint") -> "tuple[Report, tuple[Finding, ...]]":
        report = await inspect(checkpoint)
        return report, await check_here(report, criu_program) if checks else ()

    try:
        report, findings = with_checkpoint(reference, source, look)
    except RealImageMissing as error:
        click.echo(printable(f"lazyfs: {error}"), err=True)
        missing = error
        report, findings = with_checkpoint(reference, replace(source, shows_stubs=True), look)
    if as_json:
        check = {"check": [asdict(finding) for finding in findings]} if checks else {}
        click.echo(json.dumps(report.as_json() | check, indent=2))
    elif sys.stdout.isatty():
        print_rich(report, findings)
    else:
        _print_plain(report, findings)
    if missing is not None:
        sys.exit(missing.exit_code)
    if any(finding.level == "blocks" for finding in findings):
        sys.exit(_BLOCKED)


def facts(report: "Report") -> Iterator[tuple[str, str]]:
    """Yield what is known, a label and a value at a time; values may hold anybody's text."""
    origin = report.origin
    yield "Reference", report.reference
    if report.stub is not None:
        yield "By the stub", report.stub
    yield from _stands_for(report)
    yield "Engine", _engine(report)
    for label, words in (
        ("Container", (origin.container_name, _in_brackets(origin.container_id))),
        ("Pod", (origin.pod_name, _in_brackets(origin.pod_namespace, "namespace "))),
        ("Base image", (origin.base_image_name, _in_brackets(_base_id(report)))),
        ("Checkpointed", (origin.checkpointed_at,)),
        ("Made with", (_made_with(report),)),
        ("Namespaces", (_namespaces(report),)),
        ("Restoring needs", (", ".join(_needs(report)),)),
    ):
        text = " ".join(word for word in words if word)
        if text:
            yield label, text
    sizes = report.sizes
    yield from _layers(report)
    yield "Files", f"{human_bytes(sizes.files_bytes)} in {plural(sizes.files, 'file')}"
    directory = report.images_directory or "the top of the checkpoint"
    yield (
        "CRIU images",
        f"{directory}: {human_bytes(sizes.pages_bytes)} of memory in "
        f"{plural(sizes.pages_files, 'pages file')}, {human_bytes(sizes.metadata_bytes)} in "
        f"{plural(sizes.metadata_files, 'other file')}",
    )
    memory = ", ".join(_memory(report))
    if memory:
        yield "Memory", memory
    if report.parents:
        yield "Builds on", ", ".join(path or "the top of the checkpoint" for path in report.parents)
    streams = sum(layer.size_bytes for layer in report.layers if layer.streamed)
    if streams:
        yield "A mount fetches", f"all {human_bytes(streams)}, in order, from when it comes up"
    else:
        what = f"{human_bytes(sizes.metadata_bytes)} and the index at once, memory as it is read"
        yield "A mount fetches", what
    yield (
        "This fetched",
        f"{human_bytes(report.inspection_fetched_bytes)} in "
        f"{plural(report.inspection_requests, 'request')}; the image has "
        f"{human_bytes(report.image_size_bytes)}",
    )
    for note in report.notes:
        yield "Note", note


def _stands_for(report: "Report") -> Iterator[tuple[str, str]]:
    real = report.stands_for
    if real is None:
        return
    lacks = f"{human_bytes(real.pages_bytes)} in {plural(real.pages_files, 'pages file')}"
    yield "Stub of", f"{real.reference} ({human_bytes(real.image_bytes)}), which has {lacks} more"
    if real.lazy_pages is not None:
        yield "Stub of", f"to be restored {'with' if real.lazy_pages else 'without'} lazy pages"


def _layers(report: "Report") -> Iterator[tuple[str, str]]:
    several = len(report.layers) > 1
    for number, layer in enumerate(report.layers, 1):
        label = f"Layer {number}" if several else "Layer"
        yield label, _layer(layer)
        for note in _about_layer(layer):
            yield label, note
    for row in report.trust:
        when = f"; {row.when}" if row.when != "never" else ""
        yield f"Proof of {row.what}", f"{row.proven_by}{when}"


def _layer(layer: "LayerReport") -> str:
    words = (f"{human_bytes(layer.size_bytes)} as {layer.format}", _in_brackets(layer.media_type))
    return " ".join(word for word in words if word)


def _about_layer(layer: "LayerReport") -> Iterator[str]:
    if layer.mislabelled:
        yield f"its media type says otherwise, but its bytes are {layer.format}: they decide"
    if layer.streamed:
        yield "read in order: a file is there once decoding has come by it"


def _memory(report: "Report") -> Iterator[str]:
    memory = report.memory
    if memory.total_bytes is None:
        return
    if memory.anonymous_bytes is None:
        yield human_bytes(memory.total_bytes)
    for count, words in (
        (memory.anonymous_bytes, "anonymous"),
        (memory.file_bytes, "of mapped files"),
        (memory.shared_bytes, "shared"),
        (memory.device_bytes, "of GPUs"),
        (memory.lazy_bytes, "of it may come lazily"),
        (memory.parent_bytes, "in parent checkpoints"),
    ):
        if count:
            yield f"{human_bytes(count)} {words}"
    if memory.compressed:
        yield "compressed by CRIU"


def process_tree(processes: "tuple[ProcessReport, ...]") -> Iterator[str]:
    """Yield a line for each process, children below their parents. Cycles end where they close."""
    known = {process.pid for process in processes}
    children: dict[int, list[ProcessReport]] = {}
    for process in processes:
        if process.ppid in known and process.ppid != process.pid:
            children.setdefault(process.ppid, []).append(process)
    roots = [item for item in processes if item.ppid not in known or item.ppid == item.pid]
    seen: set[int] = set()
    for root in [*roots, *processes]:
        stack = [(root, 0)]
        while stack:
            process, depth = stack.pop()
            if process.pid in seen:
                continue
            seen.add(process.pid)
            yield "  " * min(depth, _DEEPEST_INDENT) + _process(process)
            stack += [(child, depth + 1) for child in reversed(children.get(process.pid, []))]


def _process(process: "ProcessReport") -> str:
    details = [process.state] if process.state not in (None, "alive") else []
    if len(process.threads) > 1:
        names = {thread.command for thread in process.threads[1:]} - {None, process.command}
        named = f" ({', '.join(sorted(map(str, names))[:5])})" if names else ""
        details.append(plural(len(process.threads), "thread") + named)
    if process.memory_bytes is not None:
        lazy = f" ({human_bytes(process.lazy_memory_bytes or 0)} lazy)"
        details.append(f"{human_bytes(process.memory_bytes)} of memory{lazy}")
    if process.parent_memory_bytes:
        details.append(f"{human_bytes(process.parent_memory_bytes)} in the parent checkpoint")
    line = f"{process.pid} {process.command or '?'}"
    return printable(f"{line}: {', '.join(map(str, details))}" if details else line)


def _engine(report: "Report") -> str:
    origin = report.origin
    if origin.engine is None:
        return "not known"
    words = (origin.engine, origin.engine_version, _in_brackets(origin.recognised_by))
    return " ".join(word for word in words if word)


def _base_id(report: "Report") -> str | None:
    name = report.origin.base_image_name or ""
    digest = report.origin.base_image_digest or report.origin.base_image_id
    return digest if digest is not None and digest not in name else None


def _made_with(report: "Report") -> str:
    origin = report.origin
    parts = (
        ("CRIU", origin.criu_version),
        ("", " ".join(filter(None, (origin.runtime_name, origin.runtime_version)))),
        ("Linux", origin.host_kernel),
        ("", origin.host_architecture),
        ("", " ".join(filter(None, (origin.distribution_name, origin.distribution_version)))),
        ("cgroup", origin.cgroup_version),
    )
    return ", ".join(f"{label} {value}".strip() for label, value in parts if value)


def _namespaces(report: "Report") -> str | None:
    return f"its own {', '.join(report.own_namespaces)}" if report.own_namespaces else None


def _needs(report: "Report") -> Iterator[str]:
    """Yield what a restore of this checkpoint cannot do without."""
    if report.needs.wide_page_counts:
        yield "CRIU 4.2 or later"
    if report.needs.tcp_connections:
        yield f"criu --tcp-established for {plural(report.needs.tcp_connections, 'connection')}"
    if report.criu is None:
        return
    if report.criu.images_version > 2:
        yield f"a CRIU that reads images version {report.criu.images_version}"
    if report.criu.tcp_close:
        yield "criu --tcp-close"
    if report.criu.allow_uprobes:
        yield "criu --allow-uprobes"
    if report.criu.lsm != "none":
        yield f"the security labels of {report.criu.lsm}"
    if report.criu.plugins:
        yield f"CRIU's plugins {', '.join(report.criu.plugins)}"


def _in_brackets(text: str | None, before: str = "") -> str | None:
    return f"({before}{text})" if text else None


def _print_plain(report: "Report", findings: "tuple[Finding, ...]") -> None:
    for label, value in facts(report):
        click.echo(f"{label}: {printable(value)}")
    for title, lines in (
        ("Processes:", process_tree(report.processes)),
        ("On this machine:", (f"{item.level} {item.subject}: {item.message}" for item in findings)),
    ):
        for number, line in enumerate(lines):
            if number == 0:
                click.echo(title)
            click.echo(f"  {printable(line)}")


def print_rich(report: "Report", findings: "tuple[Finding, ...]") -> None:
    """Print all of it as tables, for a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for label, value in facts(report):
        table.add_row(Text(label if label != before else "", style="bold"), Text(printable(value)))
        before = label
    processes = list(process_tree(report.processes))
    if processes:
        table.add_row(Text("Processes", style="bold"), Text("\n".join(processes)))
    console = Console(highlight=False)
    console.print(table)
    if not findings:
        return
    check = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(2):
        check.add_column(no_wrap=True)
    check.add_column(overflow="fold")
    for item in findings:
        level = Text(item.level, style=_STYLES[item.level])
        check.add_row(level, Text(item.subject, style="bold"), Text(printable(item.message)))
    console.print("\nOn this machine", style="bold")
    console.print(check)

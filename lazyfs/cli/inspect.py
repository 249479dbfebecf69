"""`lazyfs inspect`: a report for a person, or for a machine."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from lazyfs.cli.opening import with_checkpoint
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, source_options
from lazyfs.cli.text import human_bytes, plural, printable

if TYPE_CHECKING:
    from lazyfs.checkpoint.inspect import ProcessReport, Report

_DEEPEST_INDENT = 20
_PROOFS = {
    "chunk": "each chunk is proven by its digest before a byte of it is served",
    "layer": "the whole is proven by the layer's digest, behind what a mount serves "
    "(before it with --verify full)",
    "none": "nothing promises a digest: nothing is proven",
}


@click.command("inspect", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.option("--json", "as_json", is_flag=True, help="One object; its keys are in docs/json.md.")
@source_options
def inspect_command(reference: str, as_json: bool, source: SourceOptions) -> None:
    """Tell what a checkpoint is.

    Engine, container and base image, versions of CRIU and kernel, the process tree, sizes, how
    the layer is stored and proven, and how much a mount fetches before it is there. Of memory
    only that is fetched which shares a chunk with what is needed.
    """
    from lazyfs.checkpoint.inspect import inspect

    report = with_checkpoint(reference, source, inspect)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    rows = [(label, printable(value)) for label, value in facts(report)]
    processes = list(process_tree(report.processes))
    if sys.stdout.isatty():
        _print_rich(rows, processes)
        return
    for label, value in rows:
        click.echo(f"{label}: {value}")
    if processes:
        click.echo("Processes:")
    for line in processes:
        click.echo(f"  {line}")


def facts(report: "Report") -> Iterator[tuple[str, str]]:
    """Yield what is known, a label and a value at a time; values may hold anybody's text."""
    origin = report.origin
    yield "Reference", report.reference
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
    layer, sizes = report.layer, report.sizes
    yield "Layer", f"{human_bytes(layer.size_bytes)} as {layer.format} ({layer.media_type})"
    yield "Proof", _PROOFS[layer.proof]
    yield "Files", f"{human_bytes(sizes.files_bytes)} in {plural(sizes.files, 'file')}"
    directory = report.images_directory or "the top of the layer"
    yield (
        "CRIU images",
        f"{directory}: {human_bytes(sizes.pages_bytes)} of memory in "
        f"{plural(sizes.pages_files, 'pages file')}, {human_bytes(sizes.metadata_bytes)} in "
        f"{plural(sizes.metadata_files, 'other file')}",
    )
    yield (
        "A mount fetches",
        f"{human_bytes(sizes.metadata_bytes)} and the index at once, memory as it is read",
    )
    yield (
        "This fetched",
        f"{human_bytes(report.inspection_fetched_bytes)} in "
        f"{plural(report.inspection_requests, 'request')}; the image has "
        f"{human_bytes(report.image_size_bytes)}",
    )
    for note in report.notes:
        yield "Note", note


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
    if report.has_parent:
        yield "the parent checkpoint"
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


def _print_rich(rows: list[tuple[str, str]], processes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label, style="bold"), Text(value))
    if processes:
        table.add_row(Text("Processes", style="bold"), Text("\n".join(processes)))
    Console(highlight=False).print(table)

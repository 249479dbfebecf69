"""`lazyfs restore`: what a person sees of a restore, and how it ends."""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import click

from lazyfs.checkpoint.reference import parse_reference
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, record_options, source_options
from lazyfs.cli.text import human_bytes, printable
from lazyfs.cli.trace_options import trace_options
from lazyfs.ground.errors import LazyfsError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from lazyfs.restore.front import Event
    from lazyfs.restore.plan import Recording

_SIGNALLED = 128
_UNTIL = "10"
_SHOWN = ("reference", "images_directory", "pid", "resumed_after_s", "home_after_s")
_COUNTED = ("pages_bytes", "read_bytes", "fetched_bytes", "requests", "followed_trace")


@click.command("restore", epilog=REFERENCE_HELP, context_settings={"ignore_unknown_options": False})
@click.argument("reference", metavar="REF")
@click.argument("extra", metavar="[-- OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--lazy-pages",
    is_flag=True,
    help="Have the tasks run at once, and bring their memory as they touch it and behind that. "
    "They are killed if it cannot be brought.",
)
@click.option(
    "--pages-by",
    type=click.Choice(["lazyfs", "criu"]),
    default="lazyfs",
    show_default=True,
    help="Who brings them, with --lazy-pages: lazyfs itself, or CRIU's own daemon.",
)
@click.option(
    "--criu",
    metavar="PROGRAM",
    default="criu",
    show_default=True,
    help="CRIU: a name or a path, with arguments if it needs some.",
)
@click.option(
    "--runtime",
    metavar="PROGRAM",
    help="Have a container runtime restore it: runc, crun, or a path, with global options. Needs "
    "--bundle and --id.",
)
@click.option(
    "--bundle",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The container's OCI bundle, for --runtime: config.json and its root filesystem.",
)
@click.option(
    "--id", "name", metavar="ID", help="What the container is to be called, for --runtime."
)
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where CRIU and lazyfs put their logs.  [default: a fresh one, which is removed on "
    "success, and else is named]",
)
@click.option(
    "--force", is_flag=True, help="Try it even where `inspect --check` says it must fail."
)
@click.option("--json", "as_json", is_flag=True, help="Print one object at the end (docs/json.md).")
@record_options
@source_options
@trace_options
def restore_command(
    reference: str,
    extra: tuple[str, ...],
    lazy_pages: bool,
    pages_by: Literal["lazyfs", "criu"],
    criu: str,
    runtime: str | None,
    bundle: Path | None,
    name: str | None,
    work_dir: Path | None,
    force: bool,
    as_json: bool,
    record: Path | None,
    until: str | None,
    as_usual: bool,
    source: SourceOptions,
) -> int:
    """Restore a checkpoint with CRIU, or a container runtime, while it is fetched.

    The images are mounted where nobody else sees them, and unmounted when the last page is home
    and proven; the command returns then, and the tasks go on without it. What stands after -- is
    for `criu restore`, or for the runtime's `restore`:

    \b
      lazyfs restore registry.example/checkpoints/web:1 --lazy-pages
      lazyfs restore REF -- --tcp-established --shell-job
      lazyfs restore REF --runtime runc --bundle DIR --id web

    With --record tasks run at once too, and only what they touch is brought until the recording
    ends; then all the rest.

    No task runs before the bytes it was made of were read without an error. Ended before its own
    end, by a signal or otherwise, it kills all that it has restored; also while lazy pages are on
    their way, for without them the tasks cannot live.

    Exits with 6 if CRIU or the runtime fails (a message says why, and what helps), else as any
    command of lazyfs; with anything but 0, nothing that was restored is left.
    """  # noqa: D301 - click wants the character itself
    parse_reference(reference)
    from lazyfs.restore.front import Front
    from lazyfs.restore.plan import Container, Plan

    started_s = time.monotonic()
    container = None
    if runtime is not None:
        if bundle is None or name is None:
            raise UsageError("--runtime needs --bundle DIR and --id ID")
        container = Container(runtime=_words(runtime), bundle=bundle.resolve(), name=name)
    elif bundle is not None or name is not None:
        raise UsageError("--bundle and --id are for a container runtime: --runtime runc")

    is_allowed = os.geteuid() == 0 or force or "--unprivileged" in extra
    if container is None and not is_allowed:
        raise UsageError(
            "CRIU needs root to restore; or a criu that has CAP_CHECKPOINT_RESTORE, for what "
            "needs no more, and its option: lazyfs restore REF -- --unprivileged"
        )
    criu_words = _words(criu)
    for program in [container.runtime[0]] if container is not None else [criu_words[0]]:
        if shutil.which(program) is None:
            raise UsageError(
                f"there is no program {program}: install it, or name it by "
                + ("--runtime" if container is not None else "--criu")
            )
    recording = _recording(record, until, as_usual=as_usual)
    plan = Plan(
        reference=reference,
        opening=partial(source.opening, reference),
        criu=criu_words,
        container=container,
        lazy_pages=lazy_pages or (record is not None and not as_usual),
        pages_by_criu=pages_by == "criu",
        work_dir=work_dir,
        extra=extra,
        force=force,
        keeps_stdout_clean=as_json,
        started_s=started_s,
        recording=recording,
    )
    _check_cache(source)
    shown: _Shown = _Silent() if as_json else Bar() if sys.stderr.isatty() else _Lines()
    front = Front(plan)
    end: Event = {}
    try:
        with shown:
            for event in front.events():
                shown.tell(event)
                end = event
    except LazyfsError as error:
        end = {"exit_code": error.exit_code, "error": str(error)}
    code = int(end["exit_code"])
    if not code and (recording is None or as_usual) and end.get("followed_trace") is None:
        _say_unfollowed(source)
    if code and front.stopped_by:
        code = _SIGNALLED + front.stopped_by
    if as_json:
        click.echo(json.dumps(_object(end, code, name), indent=2))
    if code:
        _say_why(end)
    return code


def _recording(record: Path | None, until: str | None, *, as_usual: bool) -> "Recording | None":
    if record is None:
        if until is not None or as_usual:
            raise UsageError("--until and --as-usual are for --record FILE")
        return None
    from lazyfs.restore.plan import Recording
    from lazyfs.trace_file import check_recordable
    from lazyfs.until import parse_until
    from lazyfs.watcher import process_began_s

    lasting = parse_until(until if until is not None else _UNTIL)
    return Recording(check_recordable(record), lasting, process_began_s(), not as_usual)


def _words(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{text!r} is no command: {error}") from None
    if not words:
        raise UsageError("the name of a program is empty")
    return words


def _object(end: Mapping[str, Any], code: int, name: str | None) -> dict[str, Any]:
    return {
        "restored": code == 0,
        "exit_code": code,
        "error": end.get("error"),
        "container": name,
        **{key: end.get(key) for key in (*_SHOWN, *_COUNTED)},
        "program_exit_code": end.get("program_exit_code"),
        "log": end.get("log", []),
        "advice": end.get("advice", []),
        "work_dir": end.get("work_dir"),
        "trace": end.get("trace"),
        "warnings": end.get("warnings", []),
    }


def _check_cache(source: SourceOptions) -> None:
    """Say here what is wrong with the cache's directory: the daemon has only its log."""
    directory = source.cache().directory
    if directory is not None and not os.access(directory, os.W_OK | os.X_OK):
        told = f"lazyfs: no cache in {directory}: what is read is kept in memory"
        click.echo(printable(told), err=True)


def _say_unfollowed(source: SourceOptions) -> None:
    """Tell that a trace which was asked for was not followed."""
    why = None
    if source.given_trace is not None:
        why = f"the trace {source.trace} is of other layers than this image's: it was not followed"
    elif source.workload and source.trace == "auto":
        why = f"no trace of {source.workload} was found in time: none was followed"
    if why is not None:
        click.echo(printable(f"lazyfs: {why}"), err=True)


def _say_why(end: Mapping[str, Any]) -> None:
    def say(text: str) -> None:
        click.echo(printable(text), err=True)

    say(f"lazyfs: {end['error']}")
    for line in end.get("log", ()):
        say(f"  {line}")
    for advice in end.get("advice", ()):
        say(f"lazyfs: what may help: {advice}")
    if end.get("work_dir"):
        say(f"lazyfs: logs are in {end['work_dir']}")


class _Shown(Protocol):
    """How a person is told; a context manager."""

    def tell(self, event: "Event") -> None: ...

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...


class _Silent:
    """For machines."""

    def tell(self, event: "Event") -> None:
        """Say nothing."""

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Lines(_Silent):
    """A line for what happens, none for how far it is."""

    def tell(self, event: "Event") -> None:
        """Say what happened."""
        for warning in event.get("warnings", ()) if event["event"] == "mounted" else ():
            self._say(printable(f"lazyfs: it may not restore here: {warning}"))
        text = _sentence(event)
        if text:
            self._say(printable(text))

    def _say(self, line: str) -> None:
        click.echo(line, err=True)


class Bar(_Lines):
    """A line that changes, below those for what happens."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _say(self, line: str) -> None:
        """Write a line above the bar; between what rich draws it would be glued to the bar."""
        if self._progress is None:
            super()._say(line)
        else:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def tell(self, event: "Event") -> None:
        """Say what happened, and how many pages CRIU has been given."""
        if event["event"] == "end" and self._progress is not None:
            self._progress.stop()
        super().tell(event)
        if event["event"] != "progress" or not event.get("pages_bytes"):
            return
        if self._progress is None:
            self._begin()
        if self._progress is not None and self._task is not None:
            done = min(event.get("read_bytes") or 0, event["pages_bytes"])
            self._progress.update(self._task, completed=done, total=event["pages_bytes"])

    def _begin(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("pages arriving", total=None)
        self._progress.start()


def _sentence(event: "Event") -> str | None:
    kind = event["event"]
    if kind == "stub":
        return f"{event['reference']} is a stub of {event['real']}"
    if kind == "waiting":
        return f"lazyfs: still waiting: {event['why']}"
    if kind == "mounted":
        return f"restoring {event['reference']}"
    if kind == "resumed":
        process = f" as process {event['pid']}" if event.get("pid") else ""
        return f"resumed{process} after {event['after_s']:.2f} s"
    if kind == "home":
        return f"all pages home after {event['after_s']:.2f} s"
    if kind == "recording":
        return f"recording what is needed (until {event['until']})"
    if kind == "recorded":
        if event["error"] is not None:
            return f"{event['error']}"
        needed = human_bytes(event["needed_bytes"])
        return f"recorded (until {event['until']}): {needed} were needed: {event['file']}"
    if kind == "proving":
        return "proving what was read"
    if kind == "end" and not event["exit_code"]:
        fetched, trace = event.get("fetched_bytes"), event.get("followed_trace")
        if not isinstance(fetched, int):
            return "done"
        how = f"; followed a trace of {human_bytes(trace['needed_bytes'])}" if trace else ""
        return f"done: fetched {human_bytes(fetched)}{how}"
    return None

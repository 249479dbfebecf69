"""`lazyfs mount` and `lazyfs umount`."""

import errno
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import msgspec

from lazyfs import mountpoint
from lazyfs.address import Address, parse_address
from lazyfs.background import log_to
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.cli.daemon import run_detached
from lazyfs.cli.opening import proof_bar, stub_line
from lazyfs.cli.options import (
    REFERENCE_HELP,
    MountPoint,
    SourceOptions,
    follow_option,
    record_options,
    source_options,
    verbose_option,
)
from lazyfs.cli.text import printable
from lazyfs.cli.trace_options import trace_options
from lazyfs.content.private_dir import make_private
from lazyfs.ground.errors import LazyfsError, UsageError
from lazyfs.systemd import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.mount import Ready
    from lazyfs.trace_file import RecordConfig

log = logging.getLogger(__name__)

_LOG_NAME_MOST_BYTES = 200


@click.command("mount", epilog=REFERENCE_HELP)
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR", type=MountPoint())
@click.option(
    "--view",
    type=click.Choice(["criu", "image"]),
    default="criu",
    show_default=True,
    help="What DIR shows: the CRIU images directory, for `criu restore -D DIR`; or the whole "
    "checkpoint with config.dump, spec.dump and all.",
)
@click.option(
    "--foreground", is_flag=True, help="Stay; end and unmount on Ctrl-C or `lazyfs umount DIR`."
)
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where the daemon logs.  [default: log/DIR.log in the cache directory]",
)
@click.option(
    "--replace",
    is_flag=True,
    help="Take the place of a mount that is on DIR; who has files of it open keeps them, and its "
    "daemon until they are closed.",
)
@click.option(
    "--metrics",
    metavar="ADDR",
    help="Serve Prometheus metrics at HOST:PORT or unix:PATH. Anybody who reaches a port may "
    "read them: 127.0.0.1 is best.",
)
@click.option("--source-name", hidden=True, metavar="NAME", help="What mountinfo shows it as.")
@click.option("--noexec", is_flag=True, hidden=True, help="Let nobody execute files of it.")
@click.option(
    "--lazy-pages",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="WORK_DIR",
    help="Serve memory, as it is wanted, to what `criu restore --lazy-pages -W WORK_DIR` restores "
    "from DIR; in place of `criu lazy-pages`. Who misses memory when this daemon ends is killed.",
)
@record_options
@source_options
@follow_option
@trace_options
def mount_command(
    reference: str,
    directory: Path,
    view: Literal["criu", "image"],
    foreground: bool,
    log_file: Path | None,
    replace: bool,
    metrics: str | None,
    source_name: str | None,
    noexec: bool,
    lazy_pages: Path | None,
    record: Path | None,
    until: str | None,
    as_usual: bool,
    source: SourceOptions,
) -> int:
    """Show a checkpoint as a directory, fetched as it is read.

    Returns when DIR answers; a daemon stays until DIR is unmounted. DIR must exist and be empty.
    What is fetched is kept in the cache, so that it is fetched once. What the image's
    annotations let fear of a restore on this machine is told; `lazyfs inspect --check` knows more.

    DIR may be /dev/fd/N: an open /dev/fuse that the caller has mounted (mount(2) with fd=N) and
    will unmount.

    State: `lazyfs status DIR`.
    """
    parse_reference(reference)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how children end
    if log_file is not None:
        _check_writable(log_file)
    if log_file is None or source.cache_kind == "disk":
        make_private(source.cache_dir)
    served_at = parse_address(metrics) if metrics is not None else None
    descriptor = mountpoint.given_descriptor(directory)
    if descriptor is None:
        mountpoint.check(directory, replace=replace)
        directory = mountpoint.real(directory)
    if lazy_pages is not None:
        lazy_pages = lazy_pages.absolute()
    way = "lazy pages" if lazy_pages is not None else ""
    recording = _recording(record, until, way, as_usual=as_usual)
    job = _Job(
        reference=reference,
        directory=directory,
        view=view,
        descriptor=descriptor,
        replace=replace,
        metrics=served_at,
        source_name=source_name,
        noexec=noexec,
        lazy_pages=lazy_pages,
        recording=recording,
        until=until,
        source=source,
    )
    if foreground:
        notifier = Notifier(os.environ)
        if log_file is not None:
            log_to(log_file)
        return _serve(job, click.echo, notifier)
    Notifier(os.environ)  # which is the caller's, not its daemon's
    log_file = log_file or _default_log(source.cache_dir, directory)
    watcher = recording.link if recording is not None else None
    kept = [each for each in (descriptor, watcher) if each is not None]
    code, message = run_detached(partial(_serve, job), log_file.absolute(), kept)
    if code == 0:
        click.echo(message)
    return code


@click.command("umount")
@click.argument("directory", metavar="DIR", type=MountPoint())
@click.option("--lazy", is_flag=True, help="Detach it now, even while files on it are open.")
@verbose_option
def umount_command(directory: Path, lazy: bool) -> None:
    """End a mount, or clear away a dead one.

    Returns when the daemon has ended and its cache is free for the next mount.
    """
    mountpoint.unmount(directory, lazy=lazy)


class _Job(msgspec.Struct, frozen=True):
    """What was asked for."""

    reference: str
    directory: Path
    view: Literal["criu", "image"]
    descriptor: int | None
    replace: bool
    metrics: Address | None
    source_name: str | None
    noexec: bool
    lazy_pages: Path | None
    recording: "RecordConfig | None"
    until: str | None
    source: SourceOptions


def _serve(job: _Job, on_ready: "Callable[[str], None]", notifier: "Notifier | None" = None) -> int:
    """Import what a mount needs (after the fork: the caller does not), and live its life."""
    guard = None
    if job.lazy_pages is not None:
        from lazyfs.lazypages.guard import Guard

        guard = Guard.start()  # which forks: before there are threads
    opening = job.source.opening(job.reference, proof_bar())
    import trio

    from lazyfs.cli.main import report
    from lazyfs.mount import MountConfig, serve_mount

    directory = job.directory
    config = MountConfig(
        job.reference,
        directory,
        opening,
        job.view,
        job.descriptor,
        job.replace,
        job.metrics,
        job.lazy_pages,
        guard,
        source_name=job.source_name,
        noexec=job.noexec,
        recording=job.recording,
    )

    is_ready = False

    def tell(ready: "Ready") -> None:
        nonlocal is_ready
        if ready.stub is not None:
            click.echo(printable(stub_line(ready.stub, ready.reference)), err=True)
        for warning in ready.warnings:
            click.echo(f"lazyfs: it may not restore here: {printable(warning)}", err=True)
        if job.recording is not None:
            until = job.until or "it is unmounted"
            told = f"recording what is needed (until {until}): {job.recording.file}"
            click.echo(printable(told), err=True)
        try:
            on_ready(printable(f"mounted {ready.reference} on {directory}"))
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            raise LazyfsError("whoever asked for the mount is gone; unmounting") from None
        is_ready = True

    try:
        trio.run(serve_mount, config, tell, notifier)
    except BaseException as error:
        if is_ready:  # a daemon has no standard error any more
            ours = isinstance(error, LazyfsError)
            log.critical("%s ends: %s", directory, error, exc_info=None if ours else error)
        return report(error)
    return 0


def _default_log(cache_dir: Path, directory: Path) -> Path:
    name = os.fsencode(directory).strip(b"/").replace(b"/", b"-")
    return cache_dir / "log" / os.fsdecode(name[:_LOG_NAME_MOST_BYTES] + b".log")


def _recording(
    record: Path | None, until: str | None, way: str, *, as_usual: bool
) -> "RecordConfig | None":
    """Return what is to be recorded, and have somebody watch for its end; to be called last.

    Raises:
        UsageError: the file cannot be written, or `until` is nothing that is known.
    """
    if record is None:
        if until is not None or as_usual:
            raise UsageError("--until and --as-usual are for --record FILE")
        return None
    from lazyfs.trace_file import RecordConfig, check_recordable
    from lazyfs.until import parse_until
    from lazyfs.watcher import process_began_s, start_watcher

    lasting = parse_until(until) if until is not None else None
    file = check_recordable(record)
    link = start_watcher(lasting).detach() if lasting is not None else None
    return RecordConfig(file, way, process_began_s(), link, is_precise=not as_usual)


def _check_writable(log_file: Path) -> None:
    try:
        log_file.open("a").close()
    except OSError as error:
        raise UsageError(f"the log file {log_file} cannot be written: {error.strerror}") from None

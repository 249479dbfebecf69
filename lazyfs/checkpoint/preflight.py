"""What of a checkpoint will not restore on this machine, told before a page is fetched.

What an image says of itself starts no program but the few that `findings.py` names.
"""

import importlib
from typing import TYPE_CHECKING

import trio

from lazyfs.checkpoint.engines import origin_of
from lazyfs.checkpoint.findings import (
    CRIU,
    ENGINE,
    Finding,
    Level,
    Words,
    check,
    check_words,
    programs_wanted,
    task_ids,
)
from lazyfs.checkpoint.host import Host, collect_host, look_again

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.report import Report


async def check_here(
    report: "Report", criu: str = "criu", host: Host | None = None
) -> tuple[Finding, ...]:
    """Compare a checkpoint with this machine; `criu`: as for `collect_host`.

    `host`: what is known of it already, that CRIU included.
    """
    programs, tasks = programs_wanted(report), task_ids(report)

    def look() -> Host:
        if host is not None:
            return look_again(host, programs=programs, task_ids=tasks)
        return collect_host(criu=criu, programs=programs, task_ids=tasks)

    return check(report, await trio.to_thread.run_sync(look))


def check_annotations(checkpoint: "OpenedCheckpoint", host: Host) -> tuple[Finding, ...]:
    """Return what the annotations alone let fear of this machine; reads nothing."""
    image = checkpoint.image
    media_types = [layer.media_type for layer in image.layers]
    return check_words(Words(origin_of(image.annotations, {}, media_types, ())), host)


async def quick_check(checkpoint: "OpenedCheckpoint", criu: str = "criu") -> list[Finding]:
    """Return what a mount should warn of. Reads only small files that a mount fetches anyway.

    Left out is what programs are missing here: who mounts may restore with others, from elsewhere.
    Takes some 100 ms, most of it for importing protobuf and asking CRIU for its version: for
    beside the mount, not before it.

    Raises:
        NotACheckpoint, SourceError, IntegrityError: as `inspect`.
    """
    await trio.to_thread.run_sync(importlib.import_module, "lazyfs.checkpoint.inspect")
    from lazyfs.checkpoint.inspect import inspect  # imported beside the readers, not before them

    report = await inspect(checkpoint, brief=True)
    return [
        finding
        for finding in await check_here(report, criu)
        if finding.level in (Level.BLOCKS, Level.WARNS)
        and finding.subject != ENGINE
        and not (finding.subject == CRIU and finding.level is Level.BLOCKS)
    ]

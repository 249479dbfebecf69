"""One mount's life: everything that runs while a directory is mounted runs in `serve_mount`.

The order of the exit stack is the order of life: source, layer, background parts, the kernel's
mount; on the way out the mount goes first, so no reader is left with a filesystem behind which
nobody stands.
"""

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import trio

from lazyfs import fuse
from lazyfs.activity import Activity
from lazyfs.address import Address
from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.follow import open_followed
from lazyfs.checkpoint.foresight import Foresight
from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.checkpoint.tree import Node, path_of
from lazyfs.checkpoint.view import View
from lazyfs.control import Answer, Route, Server, as_json, listen
from lazyfs.ground.errors import LazyfsError, NotACheckpoint, raise_sole_error
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import EntryType
from lazyfs.mountpoint import device_of, prepare
from lazyfs.rundir import ListeningSocket, mounting
from lazyfs.status import MountState
from lazyfs.systemd import Notifier
from lazyfs.whole import Whole

if TYPE_CHECKING:
    from lazyfs.checkpoint.findings import Finding
    from lazyfs.checkpoint.host import Host
    from lazyfs.lazypages.guard import Guard
    from lazyfs.lazypages.server import LazyPages
    from lazyfs.recorder import Recorder
    from lazyfs.trace_file import RecordConfig

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005
_GARBAGE_OBJECTS = 700
"""Python's own default, from which `__main__.py` departs for as long as modules are imported."""
_METRICS = Route("GET", "/metrics")
_ENDED = "the mount ended"
"""What is said of a recording that nobody has ended before."""
_SMALL_FILE_BYTES = MIB
_SMALL_FILES_BYTES = 32 * MIB
_READAHEAD_KIB = 1024
"""What the kernel reads ahead of a reader. Ours is the wide one; the kernel's only has to keep
requests large (2,600 MB/s from the cache at 1 MiB, 1,400 at the default 128 KiB)."""
_MAX_BACKGROUND = 64
"""Requests that the kernel keeps in flight; its default of 12 leaves a WAN idle."""


class MountConfig(msgspec.Struct, frozen=True):
    """What is mounted, where and how."""

    reference: str
    directory: Path
    open: OpenConfig
    view: Literal["criu", "image"] = "criu"
    descriptor: int | None = None
    """An open /dev/fuse that somebody has mounted; `directory` is `/dev/fd/N` then."""
    replace: bool = False
    """Whether to take the place of a mount that is there."""
    metrics: Address | None = None
    """Where to serve metrics."""
    lazy_pages: Path | None = None
    """The work directory of restores whose memory is to be served as it is wanted."""
    guard: "Guard | None" = None
    """With `lazy_pages`: who sees to their tasks if this process ends; started before threads."""
    restores: str | None = None
    """What it is mounted for, if only for that: the container or the command."""
    check_with: str | None = None
    """The CRIU that will restore it: `Ready` is to tell all that would keep it from that."""
    source_name: str | None = None
    """What mountinfo shows as the mount's source; None: the reference, pinned."""
    noexec: bool = False
    """Whether nobody may execute a file of it."""
    recording: "RecordConfig | None" = None
    """Where to write what was needed of it, if that is wanted."""


class Ready(msgspec.Struct, frozen=True):
    """What can be told of a mount that answers."""

    reference: str
    """Pinned by digest where it has one."""
    images_directory: str
    warnings: tuple[str, ...]
    """What may keep it from being restored here, as far as the annotations tell."""
    findings: "tuple[Finding, ...]" = ()
    """What `inspect --check` says, if that was asked for."""
    stub: str | None = None
    """The stub that was asked for, if what is mounted is what it stands for."""


async def serve_mount(
    config: MountConfig, on_ready: Callable[[Ready], None], notifier: Notifier | None = None
) -> None:
    """Mount, call `on_ready` once the directory answers, return when it is unmounted.

    SIGTERM, SIGINT and SIGHUP unmount. `notifier`: who is told how things are, beside.

    Raises:
        LazyfsError: whatever keeps it from being mounted.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.freeze()  # what has been imported is never garbage
    gc.set_threshold(_GARBAGE_OBJECTS)
    try:
        async with trio.open_nursery() as nursery:
            doubts = _Doubts()
            nursery.start_soon(doubts.look_at_host)
            await _serve(config, doubts, on_ready, notifier or Notifier({}))
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise_sole_error(group)


async def _serve(
    config: MountConfig, doubts: "_Doubts", on_ready: Callable[[Ready], None], notifier: Notifier
) -> None:
    is_image = config.view == "image"
    opening, counters = config.open, None
    recorder = _recorder(config)
    if recorder is not None:
        opening, counters = recorder.opening(opening), recorder.counters(opening)
    async with open_followed(config.reference, opening, counters, unpack=is_image) as checkpoint:
        view = View(await _root(checkpoint, config.view), checkpoint.grafts_of(config.view))
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(_stop_on_signal, nursery.cancel_scope)
                nursery.start_soon(_warm, checkpoint, view)
                is_for_restore = config.restores is not None or config.lazy_pages is not None
                foresight = Foresight(checkpoint, everything=is_for_restore)
                nursery.start_soon(foresight.run)
                mount = _Mount(config, checkpoint, view, doubts, notifier, foresight, recorder)
                await mount.live(on_ready)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_sole_error(group)
        finally:
            if recorder is not None:
                await recorder.finish(_ENDED)


def _recorder(config: MountConfig) -> "Recorder | None":
    if config.recording is None:
        return None
    from lazyfs.recorder import Recorder

    return Recorder(config.recording)


class _Doubts:
    """What may keep a checkpoint from being restored on this machine."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._host: Host | None = None
        self._host_known = trio.Event()

    async def look_at_host(self) -> None:
        """Find out what this machine is, while the checkpoint is being opened.

        What all this needs is imported there too, while the source is being waited for.
        """
        try:
            self._host = await trio.to_thread.run_sync(_host, abandon_on_cancel=True)
        except Exception:  # a bug must not end the mount
            log.exception("this machine cannot be looked at: please report this")
        self._host_known.set()

    async def look_at_annotations(self, checkpoint: OpenedCheckpoint) -> None:
        """Note what the image's annotations let fear; fetches nothing."""
        await self._host_known.wait()
        if self._host is not None:
            from lazyfs.checkpoint.preflight import check_annotations

            self._note(check_annotations(checkpoint, self._host))

    async def look_inside(self, checkpoint: OpenedCheckpoint) -> None:
        """Note what CRIU's small files let fear; they are fetched anyway."""
        from lazyfs.checkpoint.preflight import quick_check

        try:
            self._note(await quick_check(checkpoint))
        except LazyfsError as error:
            log.info("whether it can be restored here is not known: %s", error)
        except Exception:  # a bug must not end the mount
            log.exception("whether it can be restored here is not known: please report this")

    async def check(self, checkpoint: OpenedCheckpoint, criu: str) -> "tuple[Finding, ...]":
        """Return what `inspect --check` finds; nothing where it cannot look."""
        from lazyfs.checkpoint.inspect import inspect
        from lazyfs.checkpoint.preflight import check_here

        try:
            return await check_here(await inspect(checkpoint, brief=True), criu)
        except LazyfsError as error:
            log.info("whether it can be restored here is not known: %s", error)
        except Exception:  # a bug must not end the mount
            log.exception("whether it can be restored here is not known: please report this")
        return ()

    def _note(self, findings: "Iterable[Finding]") -> None:
        for finding in findings:
            if finding.message not in self.messages:
                self.messages.append(finding.message)
                log.warning("it may not restore here: %r", finding.message)


def _host() -> "Host":
    from lazyfs.checkpoint import preflight  # noqa: F401 - wanted soon
    from lazyfs.checkpoint.host import collect_host

    return collect_host()


class _Mount:
    """One mount of an opened checkpoint, and all that runs beside it."""

    def __init__(
        self,
        config: MountConfig,
        checkpoint: OpenedCheckpoint,
        view: View,
        doubts: _Doubts,
        notifier: Notifier,
        foresight: Foresight,
        recorder: "Recorder | None" = None,
    ) -> None:
        self._recorder = recorder
        self._config = config
        self._checkpoint = checkpoint
        self._view = view
        self._doubts = doubts
        self._notifier = notifier
        self._whole = Whole(checkpoint)
        activity = Activity(checkpoint.counters.journal)
        self._state = MountState(
            config.directory,
            config.view,
            checkpoint,
            activity,
            doubts.messages,
            time.time(),
            self._whole.as_json,
            config.restores,
        )
        self._state.prefetch = foresight.as_json
        if recorder is not None:
            recorder.opened(checkpoint, self._state.figures)
        self._lazy_pages = self._pages()
        if self._lazy_pages is not None:
            self._state.lazy_pages = self._lazy_pages.as_json
        self._operations = fuse.CheckpointOperations(
            view, checkpoint.reader, checkpoint.counters, activity, self._state.as_xattr
        )
        self._operations.on_open = foresight.note_open

    def _pages(self) -> "LazyPages | None":
        if self._config.lazy_pages is None or self._config.guard is None:
            return None
        from lazyfs.lazypages.server import LazyPages

        pages = LazyPages(self._checkpoint, self._config.guard)
        if self._recorder is not None and self._recorder.is_precise:
            pages.be_precise()
            self._recorder.on_end = pages.be_whole
        return pages

    async def live(self, on_ready: Callable[[Ready], None]) -> None:
        """Mount; come back when that has ended, and nobody waits for memory any more."""
        if self._lazy_pages is None or self._config.lazy_pages is None:
            await self._live(on_ready)
            return
        with self._lazy_pages.listen(self._config.lazy_pages) as listening:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._lazy_pages.run, listening)
                    await self._live(on_ready)
                    if self._recorder is not None:
                        await self._recorder.finish(_ENDED)
                    if not self._lazy_pages.is_idle:
                        log.info("unmounted, but there are tasks that wait for their memory")
                        await self._lazy_pages.wait_idle()
                    nursery.cancel_scope.cancel()
            finally:
                if self._config.guard is not None and not self._lazy_pages.is_held:
                    self._config.guard.stop()

    async def _live(self, on_ready: Callable[[Ready], None]) -> None:
        config, checkpoint = self._config, self._checkpoint
        directory = str(config.directory)
        with ExitStack() as stack:
            listening = await listen(config.metrics) if config.metrics is not None else []
            for each in listening:
                stack.callback(each.close)
            await self._attach()
            stack.callback(log.info, "unmounted %s", directory)
            stack.callback(fuse.detach)
            stack.callback(self._notifier.tell, STOPPING="1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, on_ready, nursery)
                nursery.start_soon(_withdraw, checkpoint, self._view)
                nursery.start_soon(self._whole.run)
                for each in listening:
                    nursery.start_soon(Server({_METRICS: self._tell_metrics}).serve, each)
                for layer in checkpoint.layers:
                    if layer.completion is not None:
                        nursery.start_soon(layer.completion.run)
                await fuse.serve()
                nursery.cancel_scope.cancel()

    async def _attach(self) -> None:
        """Mount, if the directory is still free: others of this user may have been quicker."""
        config = self._config
        with mounting(config.directory):
            if config.descriptor is None:
                await trio.to_thread.run_sync(
                    partial(prepare, config.directory, replace=config.replace)
                )
            fuse.attach(
                self._operations,
                str(config.directory),
                config.source_name or self._checkpoint.reference,
                allow_other=os.geteuid() == 0,
                noexec=config.noexec,
            )

    async def _announce(self, on_ready: Callable[[Ready], None], nursery: trio.Nursery) -> None:
        """Wait until the kernel and we have agreed, then raise its limits and tell."""
        config, checkpoint, doubts = self._config, self._checkpoint, self._doubts
        if config.descriptor is not None:
            await self._operations.begun.wait()
            device = device_of(config.descriptor)
        else:
            # Abandoned on the way out: whoever stops serving would wait for an answer of his own.
            answer = await trio.to_thread.run_sync(config.directory.stat, abandon_on_cancel=True)
            device = answer.st_dev
        if device is not None:
            raise_kernel_limits(device)
        checkpoint.raise_if_condemned()  # it may have been found wrong already
        log.info("mounted %s on %s", checkpoint.reference, config.directory)
        await doubts.look_at_annotations(checkpoint)
        checkpoint.raise_if_condemned()
        await nursery.start(self._be_controlled, device)
        directory = checkpoint.images_directory or ""
        findings: tuple[Finding, ...] = ()
        if config.check_with is not None:
            findings = await doubts.check(checkpoint, config.check_with)
        messages = tuple(doubts.messages)
        on_ready(Ready(checkpoint.reference, directory, messages, findings, checkpoint.stub))
        self._notifier.tell(READY="1")
        if self._recorder is not None:
            nursery.start_soon(self._recorder.mounted)
        nursery.start_soon(self._notifier.keep_telling, self._describe)
        if config.check_with is None:
            await doubts.look_inside(checkpoint)

    async def _be_controlled(
        self, device: int | None, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer on the control socket, if there can be one."""
        try:
            listening = await trio.to_thread.run_sync(ListeningSocket, device)
        except OSError as error:
            log.warning("there is no control socket: %s", error)
            task_status.started()
            return
        handlers = {
            Route("GET", "/status"): lambda: as_json(self._state.as_json()),
            _METRICS: self._tell_metrics,
            Route("POST", "/complete"): self._complete,
        }
        try:
            task_status.started()
            await Server(handlers, only_user=os.geteuid()).serve(listening.socket)
        finally:
            listening.close()

    def _tell_metrics(self) -> Answer:
        from lazyfs import metrics

        return Answer(metrics.exposition(self._state.as_json()), metrics.CONTENT_TYPE)

    def _complete(self) -> Answer:
        self._whole.ask()
        return as_json({"completion": self._whole.as_json()}, 202)

    def _describe(self) -> str:
        state = self._state.as_json()
        if state["failed"] is not None:
            return f"failed: {state['failed']}"
        safe = ", safe to go offline" if state["safe_offline"] else ""
        return f"{state['reference']}: {state['here_bytes'] // MIB} MiB here{safe}"


async def _withdraw(checkpoint: OpenedCheckpoint, view: View) -> None:
    """Once the bytes are known to be wrong, take back those that the kernel keeps of them."""
    await checkpoint.condemned.wait()
    for inode, node in enumerate(view.nodes, 1):
        if node.type is EntryType.FILE:
            await trio.to_thread.run_sync(fuse.forget_bytes, inode, abandon_on_cancel=True)


def raise_kernel_limits(device: int) -> None:
    """Widen the kernel's readahead and its requests in flight; needs root, goes on without.

    Only after the first reply: the kernel sets its readahead when it hears what we can do.
    """
    major, minor = os.major(device), os.minor(device)
    if major != 0:  # a disk's: somebody has unmounted us meanwhile
        return
    limits = {
        f"/sys/class/bdi/{major}:{minor}/read_ahead_kb": _READAHEAD_KIB,
        f"/sys/fs/fuse/connections/{minor}/max_background": _MAX_BACKGROUND,
        f"/sys/fs/fuse/connections/{minor}/congestion_threshold": _MAX_BACKGROUND * 3 // 4,
    }
    for path, value in limits.items():
        with suppress(OSError):
            Path(path).write_text(str(value))


async def _stop_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Cancel `scope` on a signal; started before there is a mount that it could leave behind."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    with trio.open_signal_receiver(*numbers) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            scope.cancel()


async def _warm(checkpoint: OpenedCheckpoint, view: View) -> None:
    """Fetch all that is small before CRIU asks: everything but pages, neighbours at once.

    Where names still come, they come with their bytes.
    """
    root = view.node(1)
    if not root.is_complete:
        return
    paths, total_bytes = [], 0
    for path, node in checkpoint.tree.walk(root, path_of(root)):
        if node.type is EntryType.FILE and node.size_bytes <= _SMALL_FILE_BYTES:
            total_bytes += node.size_bytes
            if total_bytes > _SMALL_FILES_BYTES:
                break
            paths.append(path)
    try:
        await checkpoint.prefetch(paths)
    except LazyfsError as error:
        log.warning("small files could not be fetched ahead: %s", error)
    except Exception:  # a bug must not end the mount
        log.exception("small files could not be fetched ahead: please report this")


async def _root(checkpoint: OpenedCheckpoint, view: Literal["criu", "image"]) -> Node:
    if checkpoint.images is None:
        described = await trio.to_thread.run_sync(checkpoint.image.describe)
        raise NotACheckpoint(
            f"{checkpoint.reference} is no checkpoint: no directory in it holds inventory.img; "
            f"it is {described}"
        )
    return checkpoint.tree.root if view == "image" else checkpoint.images.node

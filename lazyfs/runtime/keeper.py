"""The keeper of a restore: holds the mount, judges what came up, ends what must not live.

A process of its own, in a session of its own, forked by the front before anything is done. The
front's death, by SIGKILL too, is the end of the link between them: then the keeper kills what is
half restored, and unmounts. It outlives the front for as long as something may still turn out to
be wrong: while the layer's digest is not proven (`lingering.py`).

The order of the restore:

1. mount (or fetch, where the policy says so and there is no mount to be had); tell the front.
2. the front runs the real runtime; its child says its pid before it is the runtime.
3. the runtime has returned, or, of a restore in the foreground, has written the pid file: judge.
   A bad verdict kills and deletes the container, and is the front's error.

Nothing of the engine's is kept open: its pipes have to close when the container's end.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lazyfs.background import close_inherited, log_to
from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.served import Abandoned, Job, Served, serve
from lazyfs.runtime import remains
from lazyfs.runtime.arguments import RestoreCall
from lazyfs.runtime.lingering import linger
from lazyfs.runtime.link import Link, link_pair

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig

log = logging.getLogger(__name__)

_RUNTIME_END_S = 10.0
_LOOK_EVERY_S = 0.02
_FUSE_EXIT_CODE = 1
"""Of errors that are neither the source's, the checkpoint's, nor the user's."""


class Fetch(Protocol):
    """What is done where there is no mount: `fetched.fetch_images`."""

    def __call__(self, reference: str, directory: Path, abandon: int) -> None:
        """Put all files of a checkpoint's images directory, proven, into a new directory.

        Raises:
            LazyfsError: they cannot be had, or there is no room.
        """
        ...


class Pages(Protocol):
    """The side of a restore that brings pages later."""

    def end(self) -> None:
        """Stop; the tasks that still lack pages are killed."""
        ...

    def has_ended(self) -> bool:
        """Whether all pages are home, or none will come any more."""
        ...

    def failure(self) -> str | None:
        """Return why pages will be missing for ever; None if all is well."""
        ...


@dataclass(frozen=True)
class Task:
    """What the keeper has to do. Paths are absolute."""

    reference: str
    opening: "Callable[[], OpenConfig]"
    call: RestoreCall
    program: str
    directory: str
    """Where the engine has started the runtime."""
    stub_directory: Path
    """The images directory that the engine has given."""
    pid_file: Path | None
    cgroups_path: str
    log_file: Path
    log_level: int = logging.INFO
    fetch: Fetch | None = None
    """What to do where no mount can be had; None: fail."""
    lazy: "Callable[[Served], Pages] | None" = None
    """Starts the side that brings pages; None for an eager restore."""
    spared: list[int] = field(default_factory=list)


def start_keeper(task: Task) -> Link:
    """Fork the keeper; return the front's end of the link.

    Raises:
        LazyfsError: there is no room for a process.
    """
    ours, theirs = link_pair()
    try:
        pid = os.fork()
    except OSError as error:
        raise LazyfsError(f"no process can be started: {error.strerror}") from None
    if pid == 0:
        _live(task, theirs)
    theirs.close()
    return ours


def _live(task: Task, link: Link) -> None:
    """Be the keeper; never returns."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        close_inherited({link.fileno()})
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # who is told to stop is the front
        log_to(task.log_file)
        logging.getLogger("lazyfs").setLevel(task.log_level)
        os.chdir("/")
        _Keeper(task, link).run()
        code = 0
    except BaseException:
        log.critical("the restore ends: please report this", exc_info=True)
    finally:
        logging.shutdown()
        os._exit(code)


class _Keeper:
    """One restore's."""

    def __init__(self, task: Task, link: Link) -> None:
        self._task = task
        self._link = link
        self._name = task.call.container[:12] or "?"
        self._served: Served | None = None
        self._pages: Pages | None = None
        self._mount: int | None = None
        self._fetched: Path | None = None
        self._private: Path | None = None
        self._pid_file = task.pid_file
        self._began_ticks = remains.started_ticks(os.getpid())

    def run(self) -> None:
        """Keep the restore, to its end."""
        try:
            more = self._prepare()
        except Abandoned:
            log.info("%s: nobody waits for the restore any more", self._name)
            return
        except LazyfsError as error:
            log.critical(
                "%s cannot be restored from %s: %s", self._name, self._task.reference, error
            )
            self._link.send(error=str(error), exit_code=error.exit_code)
            return
        try:
            if not self._link.send(path=str(self._path), more=more):
                return
            self._watch()
        finally:
            self._clean()

    @property
    def _path(self) -> Path:
        if self._fetched is not None:
            return self._fetched
        assert self._served is not None  # noqa: S101 - `_prepare` has returned
        return self._served.path

    def _prepare(self) -> list[str]:
        """Have an images directory; return options that the runtime is to be given besides.

        Raises:
            LazyfsError: there is none to be had.
        """
        task = self._task
        job = Job(task.reference, task.opening, task.log_file, task.call.container or "a container")
        try:
            self._served = serve(job, abandon=[self._link.fileno()])
        except Abandoned:
            raise
        except LazyfsError as error:
            if task.fetch is None or error.exit_code != _FUSE_EXIT_CODE:
                raise
            log.warning("%s: %s; fetching all of it first", self._name, error)
            self._fetched = task.stub_directory / f".lazyfs-fetched-{os.getpid()}"
            try:
                task.fetch(task.reference, self._fetched, self._link.fileno())
            except BaseException:
                self._clean()
                raise
        more = []
        if self._served is not None:
            self._mount = remains.mount_id(self._served.path)
            for warning in self._served.warnings:
                log.warning("%s: it may not restore here: %s", self._name, warning)
            if task.lazy is not None:
                try:
                    self._pages = task.lazy(self._served)
                except BaseException:
                    self._clean()
                    raise
                more.append("--lazy-pages")
        if not task.call.detach and self._pid_file is None:
            self._private = Path(tempfile.mkdtemp(prefix="lazyfs-runtime-"))
            self._pid_file = self._private / "pid"
            more += ["--pid-file", str(self._pid_file)]
        return more

    def _watch(self) -> None:
        """See the runtime through, and judge."""
        runtime: int | None = None
        old_pid = _stamp(self._pid_file)
        timeout_s = None if self._task.call.detach else _LOOK_EVERY_S
        try:
            while True:
                try:
                    word = self._link.receive(timeout_s)
                except TimeoutError:
                    if runtime is None or _stamp(self._pid_file) == old_pid:
                        continue
                    if remains.read_pid(self._pid_file) is not None:
                        self._settle(0)
                        return
                    continue
                if word is None:
                    log.warning("%s: whoever asked for the restore is gone", self._name)
                    self._abort(runtime)
                    return
                if "runs" in word:
                    with contextlib.suppress(OSError):
                        runtime = os.pidfd_open(int(word["runs"]))
                if "ended" in word:
                    self._settle(int(word["ended"]))
                    return
        finally:
            if runtime is not None:
                os.close(runtime)

    def _settle(self, status: int) -> None:
        """The runtime says that it is done: believe it, or end what came up."""
        reason = self._served.judge() if self._served is not None else None
        if reason is None and self._pages is not None:
            reason = self._pages.failure()
        if status != 0:
            remains.kill_holders(self._mount, self._spared())
            self._link.send(verdict=reason, failed=True)
            return
        if reason is not None:
            log.critical("%s is killed: %s", self._name, reason)
            self._destroy()
            self._link.send(verdict=reason)
            return
        init = remains.read_pid(self._pid_file)
        log.info("%s: restored", self._name)
        self._link.send(verdict=None)
        self._link.close()
        if self._served is not None and init is not None:
            reason = linger(self._served, init, self._pages, self._name)
            if reason is not None:
                log.critical("%s is killed: %s", self._name, reason)
                self._destroy()

    def _abort(self, runtime: int | None) -> None:
        """Leave nothing of a restore whose front was killed."""
        if runtime is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(runtime, signal.SIGKILL)
            poll = select.poll()
            poll.register(runtime, select.POLLIN)
            poll.poll(_RUNTIME_END_S * 1000)
            self._destroy()

    def _destroy(self) -> None:
        """Kill what is restored or half restored, and have the runtime forget it."""
        task = self._task
        remains.kill_holders(self._mount, self._spared())
        if task.call.container:
            words = task.call.control("delete", "--force", task.call.container)
            said = remains.run_quietly(task.program, words, task.directory)
            if said is not None:
                log.info("%s: %s delete: %s", self._name, Path(task.program).name, said)
        remains.kill_init(self._pid_file, self._began_ticks)
        remains.kill_cgroup(task.cgroups_path, task.call.container)
        remains.kill_holders(self._mount, self._spared())

    def _spared(self) -> Sequence[int]:
        return [os.getpid(), *([self._served.pid] if self._served is not None else [])]

    def _clean(self) -> None:
        """Unmount, and remove what was made."""
        if self._pages is not None:
            self._pages.end()
        if self._served is not None:
            self._served.end()
        for directory in (self._fetched, self._private):
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)


def _stamp(path: Path | None) -> tuple[int, int] | None:
    """Return what changes when a file is written."""
    if path is not None:
        with contextlib.suppress(OSError):
            answer = path.stat()
            return answer.st_ino, answer.st_mtime_ns
    return None

"""The keeper of a restore: holds the mount, judges what came up, ends what must not live.

A process of its own, in a session of its own, forked by the front before anything is done. The
front's death, by SIGKILL too, is the end of the link between them: then the keeper kills what is
half restored, and unmounts. It outlives the front for as long as something may still turn out to
be wrong: while the layer's digest is not proven (`lingering.py`).

The order of the restore:

1. mount, with memory to be had lazily if the policy says so; or fetch, if it says that and there is
   no mount to be had. Tell the front.
2. the front runs the real runtime; its child says its pid before it is the runtime.
3. CRIU asks at the gate (`restore/gate.py`) before any task runs: judge.
4. the runtime has returned, or, of a restore in the foreground, has written the pid file: judge
   once more, since a CRIU that was told to know no gate has not asked. A bad verdict kills and
   deletes the container, and is the front's error.
5. stay while something can still turn out to be wrong.

Nothing of the engine's is kept open: its pipes have to close when the container's end.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from lazyfs.background import close_inherited, log_to
from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.containers import Asked
from lazyfs.restore.gate import Gate
from lazyfs.restore.plan import LOG
from lazyfs.restore.served import Abandoned, Job, Served, serve
from lazyfs.restore.verdict import judge
from lazyfs.runtime import remains
from lazyfs.runtime.arguments import RestoreCall
from lazyfs.runtime.lazy import failure_of, knows_lazy_pages
from lazyfs.runtime.lingering import linger
from lazyfs.runtime.link import Link, link_pair

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig

log = logging.getLogger(__name__)

_RUNTIME_END_S = 10.0
_LOOK_EVERY_MS = 20
_LOG_MOST_BYTES = 8 << 20
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


class Task(msgspec.Struct, frozen=True):
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
    lazy_pages: bool = False
    heard: tuple[int, ...] = ()
    """Signals that Python ignores and the engine does not: as by default in the runtime."""


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
        os.umask(0o077)  # that of the engine is for its own files
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
        self._gate: Gate | None = None
        self._mount: int | None = None
        self._fetched: Path | None = None
        self._private: Path | None = None
        self._work: Path | None = None
        """Where pages are asked for, if they come lazily."""
        self._pid_file = task.pid_file
        self._old_stamp: tuple[int, int] | None = None
        """Of the pid file, before the runtime has run."""
        self._is_taken = False
        """Whether the name was a container's before: that one is not ours to touch."""
        self._denied: str | None = None
        self._began_ticks = remains.started_ticks(os.getpid())
        self._began_s = time.time()

    def run(self) -> None:
        """Keep the restore, to its end."""
        try:
            try:
                more = self._prepare()
            except Abandoned:
                log.info("%s: nobody waits for the restore any more", self._name)
                return
            except LazyfsError as error:
                reference = self._task.reference
                log.critical("%s cannot be restored from %s: %s", self._name, reference, error)
                self._link.send(error=str(error), exit_code=error.exit_code)
                return
            environment = dict(self._gate.environment) if self._gate is not None else {}
            taken = self._is_taken
            if self._link.send(
                path=str(self._path), more=more, environment=environment, taken=taken
            ):
                self._watch_and_judge()
        finally:
            self._clean()

    @property
    def _path(self) -> Path:
        if self._fetched is not None:
            return self._fetched
        assert self._served is not None  # noqa: S101 - `_prepare` has returned
        return self._served.path

    def _prepare(self) -> list[str]:
        """Find out whose the name is, while the mount is made; return what the runtime is told.

        Raises:
            LazyfsError: there are no images to be had.
        """
        task = self._task
        asked = None
        if task.call.container:
            words = task.call.control("state", task.call.container)
            asked = Asked([task.program, *words], task.directory)
        more = self._have_images()
        self._is_taken = asked is not None and asked.is_known()
        if self._is_taken:
            log.warning("%s: there is a container of that name already", self._name)
        return more

    def _have_images(self) -> list[str]:
        """Have an images directory; return options that the runtime is to be given besides.

        Raises:
            LazyfsError: there is none to be had.
        """
        task = self._task
        more = self._lazy_options()
        job = Job(
            task.reference,
            task.opening,
            task.log_file,
            task.call.container or "a container",
            lazy_pages=self._work,
        )
        try:
            self._served = serve(job, abandon=[self._link.fileno()])
        except Abandoned:
            raise
        except LazyfsError as error:
            if task.fetch is None or error.exit_code != _FUSE_EXIT_CODE:
                raise
            log.warning("%s: %s; fetching all of it first", self._name, error)
            self._fetched = task.stub_directory / f".lazyfs-fetched-{os.getpid()}"
            task.fetch(task.reference, self._fetched, self._link.fileno())
            return self._own_pid_file()  # what is here already need not come lazily
        self._gate = Gate()
        self._mount = remains.mount_id(self._served.path)
        for warning in self._served.warnings:
            log.warning("%s: it may not restore here: %s", self._name, warning)
        return [*more, *self._own_pid_file()]

    def _lazy_options(self) -> list[str]:
        """Decide where pages are to be asked for, if they are to come lazily and can."""
        task = self._task
        if not task.lazy_pages:
            return []
        if not knows_lazy_pages(task.program):
            name = Path(task.program).name
            log.warning("%s: %s has no --lazy-pages; all is read first", self._name, name)
            return []
        more = [] if task.call.lazy_pages else ["--lazy-pages"]
        if task.call.work_path is not None:
            self._work = Path(task.directory, task.call.work_path)
        else:
            self._work = self._private_directory() / "work"
            more += ["--work-path", str(self._work)]
        self._work.mkdir(mode=0o700, parents=True, exist_ok=True)
        return more

    def _own_pid_file(self) -> list[str]:
        """Without one nothing tells which process it is, nor, in the foreground, when it runs."""
        if self._pid_file is not None:
            return []
        self._pid_file = self._private_directory() / "pid"
        return ["--pid-file", str(self._pid_file)]

    def _private_directory(self) -> Path:
        if self._private is None:
            self._private = Path(tempfile.mkdtemp(prefix="lazyfs-runtime-"))
        return self._private

    def _watch_and_judge(self) -> None:
        try:
            self._watch()
        except BaseException:  # what nobody judges must not live
            self._destroy()
            raise

    def _watch(self) -> None:
        """See the runtime through, and judge."""
        runtime: int | None = None
        has_run = False
        self._old_stamp = _stamp(self._pid_file)
        timeout_ms = None if self._task.call.detach else _LOOK_EVERY_MS
        poll = select.poll()
        poll.register(self._link, select.POLLIN)
        if self._gate is not None:
            poll.register(self._gate, select.POLLIN)
        try:
            while True:
                ready = [descriptor for descriptor, _ in poll.poll(timeout_ms)]
                if self._link.fileno() in ready:
                    word = self._link.receive()
                    if word is None:
                        log.warning("%s: whoever asked for the restore is gone", self._name)
                        if has_run:
                            self._abort(runtime)
                        return
                    if "runs" in word:
                        has_run = True
                        with contextlib.suppress(OSError):
                            runtime = os.pidfd_open(int(word["runs"]))
                    if "ended" in word:
                        self._settle(int(word["ended"]))
                        return
                elif self._gate is not None and self._gate.fileno() in ready:
                    self._denied = self._judge()
                    self._gate.answer(may_live=self._denied is None)
                elif (
                    not ready
                    and runtime is not None
                    and _stamp(self._pid_file) != self._old_stamp
                    and remains.read_pid(self._pid_file) is not None
                ):
                    self._settle(0)
                    return
        finally:
            if runtime is not None:
                os.close(runtime)

    def _judge(self) -> str | None:
        """Return why what came up must not live."""
        if self._served is None:
            return None
        try:
            status = self._served.status()
        except LazyfsError as error:
            return str(error)
        return judge(status) or failure_of(status)

    def _settle(self, status: int) -> None:
        """The runtime says that it is done: believe it, or end what came up."""
        reason = self._denied or self._judge()
        if status != 0:
            log.info("%s: %s failed (%d)", self._name, Path(self._task.program).name, status)
            if status < 0:  # it could not clear up after itself
                self._destroy()
            remains.kill_holders(self._mount, self._spared())
            self._link.send(verdict=reason, advice=self._advice() if reason is None else "")
            return
        if reason is not None:
            log.error("%s is killed: %s", self._name, reason)
            self._destroy()
            self._link.send(verdict=reason)
            return
        init = remains.read_pid(self._pid_file)
        if not self._link.send(verdict=None) or not self._is_heard():
            log.error("%s is killed: whoever asked for the restore is gone", self._name)
            self._destroy()
            return
        log.info("%s: restored", self._name)
        if self._served is not None and init is not None:
            from lazyfs.asking import complete_of  # the front has no use for it

            device, pid = self._served.path.stat().st_dev, self._served.pid
            hurry = partial(complete_of, device, pid)
            reason = linger(self._served, init, self._name, hurry)
            if reason is not None:
                log.error("%s is killed: %s", self._name, reason)
                self._destroy()

    def _is_heard(self) -> bool:
        """Whether the front has heard that all is well; in the foreground it still runs."""
        heard = self._link.receive() if self._task.call.detach else {}
        self._link.close()
        return heard is not None

    def _advice(self) -> str:
        """Return what CRIU's log of this restore says, and what helps; "" if it says nothing."""
        from lazyfs.restore.criulog import diagnose

        call = self._task.call
        if call.work_path is None:
            return ""
        path = Path(self._task.directory, call.work_path, LOG)
        try:
            if path.stat().st_mtime < self._began_s - 1:
                return ""
            with open(path, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_MOST_BYTES))
                found = diagnose(file.read(_LOG_MOST_BYTES).decode(errors="replace"))
        except OSError:
            return ""
        return "; ".join([*(line.strip() for line in found.lines[:2]), *found.advice[:1]])

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
        if task.call.container and not self._is_taken:
            words = task.call.control("delete", "--force", task.call.container)
            said = remains.run_quietly(task.program, words, task.directory)
            if said is not None:
                log.info("%s: %s delete: %s", self._name, Path(task.program).name, said)
        if _stamp(self._pid_file) != self._old_stamp:
            remains.kill_init(self._pid_file, self._began_ticks)
        if not self._is_taken:
            remains.kill_cgroup(task.cgroups_path, task.call.container, self._began_ticks)
        remains.kill_holders(self._mount, self._spared())

    def _spared(self) -> Sequence[int]:
        """Return who holds the mount and may."""
        ours = [os.getpid()]
        if self._served is not None:
            ours += [self._served.pid, self._served.guard_pid]
        return ours

    def _clean(self) -> None:
        """Unmount, and remove what was made."""
        if self._gate is not None:
            self._gate.close()
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

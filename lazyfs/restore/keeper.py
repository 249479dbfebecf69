"""The process that keeps a restore: parent of all that takes part, and who ends it all.

It is forked from the front (the user's process), in a session of its own, and adopts what CRIU
leaves behind. It holds the mount, answers at the gate, watches the lazy-pages side, and tells the
front what happens, a line of JSON an event; the last is `end`. Before that, whatever happens - the
front is gone, a signal, the mount or the pages are lost - all that was restored is killed. After
a restore that ended well nothing of this is left but the restored tasks.

The front does the same if the keeper itself is killed (`front.py`).
"""

import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lazyfs.ground.errors import (
    LazyfsError,
    NotACheckpoint,
    UsageError,
)
from lazyfs.restore.after import (
    RESTORE_FAILED,
    believe,
    wait_for_own_pages,
    wait_for_pages,
    wait_for_proof,
)
from lazyfs.restore.containers import Asked, remove
from lazyfs.restore.criulog import Diagnosis, diagnose
from lazyfs.restore.gate import Gate
from lazyfs.restore.lazypages import LazyPages
from lazyfs.restore.plan import LOG, Plan
from lazyfs.restore.processes import (
    adopt_orphans,
    die_with_parent,
    kill_descendants,
    reap,
)
from lazyfs.restore.served import Abandoned, Job, Served, serve
from lazyfs.restore.verdict import exit_code_of, judge
from lazyfs.restore.watch import DAEMON_GONE, Watch, status_of

if TYPE_CHECKING:
    from lazyfs.restore.recorded import Recorded

log = logging.getLogger(__name__)

_STANDARD_ERROR = 2
_PATIENCE_S = 5.0
"""For CRIU to fail by itself, once its lazy-pages side has."""
_LOG_MOST_BYTES = 4 << 20
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RestoreFailed(LazyfsError):
    """CRIU or the runtime could not restore it; nothing of it is left."""

    exit_code = RESTORE_FAILED

    def __init__(self, message: str, diagnosis: Diagnosis, program_exit_code: int | None) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis
        self.program_exit_code = program_exit_code


def keep(plan: Plan, telling: int, front: int) -> NoReturn:
    """Be the keeper; never returns.

    Events go to `telling`; `front` can be read when the front is gone.
    """
    code = 1
    try:
        if not plan.keeps_terminal:
            os.setsid()
        adopt_orphans()
        woken = _wake_on_signals()
        code = _Keeper(plan, telling, front, woken).run()
    except BaseException:
        log.critical("the restore's keeper failed: please report this", exc_info=True)
        kill_descendants()
    finally:
        logging.shutdown()
        os._exit(code)


class _Keeper:
    """One restore, from the mount to the last page."""

    def __init__(self, plan: Plan, telling: int, front: int, woken: int) -> None:
        self._plan = plan
        self._watch = Watch(telling, (front, woken))
        self._spared: set[int] = set()
        self._work = Path()
        self._recorded: Recorded | None = None
        self._denied: str | None = None
        self._warnings: list[str] = []

    def run(self) -> int:
        """Restore; tell how it ended; return the exit code."""
        plan = self._plan
        end: dict[str, Any] = {"event": "end", "exit_code": 0, "error": None}
        stack = ExitStack()
        try:
            self._work = self._make_work_dir()
            try:
                with stack:
                    self._restore(stack)
            finally:
                self._spared.clear()
                self._kill()
            if plan.work_dir is None:
                shutil.rmtree(self._work, ignore_errors=True)
        except RestoreFailed as error:
            found = error.diagnosis
            end |= {"log": list(found.lines), "advice": list(found.advice)}
            end |= {"program_exit_code": error.program_exit_code}
            end |= {"exit_code": error.exit_code, "error": str(error)}
        except LazyfsError as error:
            end |= {"exit_code": error.exit_code, "error": str(error)}
            if isinstance(error, Abandoned) and plan.work_dir is None:
                shutil.rmtree(self._work, ignore_errors=True)
        if end["exit_code"] and self._work != Path() and self._work.exists():
            if plan.work_dir is None and not (self._work / LOG).exists():
                shutil.rmtree(self._work, ignore_errors=True)  # there is nothing to be seen
            else:
                end["work_dir"] = str(self._work)
        self._watch.tell(**end, warnings=self._warnings, **self._watch.figures)
        return int(end["exit_code"])

    def _restore(self, stack: ExitStack) -> None:
        plan = self._plan
        served = self._mount(stack)
        gate = stack.enter_context(Gate())
        homes = [gate.home, *([str(self._work)] if plan.work_dir is None else [])]
        self._watch.tell(event="helpers", pids=sorted(self._spared), directories=homes)
        lazy = self._start_lazy_pages(stack, served)
        self._expect_new_name()
        stack.callback(self._undo)
        if self._recorded is not None:
            self._recorded.begin()
        program = self._start(served, gate)
        self._wait_for(program, served, gate, lazy)
        resumed_s = time.monotonic() - plan.started_s
        self._watch.figures["pid"] = gate.root_pid or None
        self._watch.figures["resumed_after_s"] = round(resumed_s, 3)
        if not gate.asked:
            believe(status_of(served))
        self._watch.tell(event="resumed", pid=gate.root_pid or None, after_s=resumed_s)
        if self._recorded is not None:
            self._recorded.last(self._watch, served, gate.root_pid)
        if lazy is not None and not self._pages_are_home:
            wait_for_pages(self._watch, served, lazy)
        if self._has_own_pages:
            wait_for_own_pages(self._watch, served)
        if self._plan.lazy_pages:
            self._note_home(served)
        wait_for_proof(self._watch, served)
        self._spare_all(served, lazy)

    # -- the parts ---------------------------------------------------------------------------

    @property
    def _has_own_pages(self) -> bool:
        return self._plan.lazy_pages and not self._plan.pages_by_criu

    def _make_work_dir(self) -> Path:
        given = self._plan.work_dir
        if given is None:
            return Path(tempfile.mkdtemp(prefix="lazyfs-restore-"))
        try:
            given.mkdir(mode=0o700, exist_ok=True)
            (given / LOG).unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"the work directory {given}: {error.strerror}") from None
        return given.resolve()

    def _mount(self, stack: ExitStack) -> Served:
        """Mount the checkpoint, or the one that a stub stands for; look at what keeps it."""
        plan = self._plan
        served = self._serve(stack, plan.reference)
        if served.stub is not None:
            self._watch.tell(event="stub", reference=served.stub, real=served.reference)
        self._watch.figures["reference"] = served.reference
        self._watch.figures["images_directory"] = served.images_directory
        self._warnings += served.warnings
        blocking = []
        for finding in served.findings:
            if finding["level"] == "blocks" and not plan.force:
                blocking.append(finding["message"])
            elif finding["level"] in ("blocks", "warns"):
                self._warnings.append(finding["message"])
        self._warnings = list(dict.fromkeys(self._warnings))
        self._watch.tell(event="mounted", reference=served.reference, warnings=self._warnings)
        if blocking:
            error = LazyfsError(
                f"it will not restore here: {'; '.join(blocking)}. With --force it is tried"
            )
            error.exit_code = NotACheckpoint.exit_code
            raise error
        self._watch.figures["pages_bytes"] = self._watch.look(served, _pages_bytes)
        self._is_containers = self._watch.look(served, _is_containers)
        return served

    def _serve(self, stack: ExitStack, reference: str) -> Served:
        plan = self._plan
        if plan.recording is not None:
            from lazyfs.restore.recorded import Recorded

            self._recorded = Recorded(plan.recording, self._work, plan.way)
        job = Job(
            reference,
            plan.opening,
            self._work / "lazyfs.log",
            plan.restores,
            plan.check_with,
            self._work if self._has_own_pages else None,
            self._recorded.config if self._recorded is not None else None,
        )

        def wait(why: str) -> None:
            self._watch.tell(event="waiting", why=why)

        served = serve(job, abandon=self._watch.stops, on_waiting=wait)
        stack.callback(self._end_mount, served)
        self._spared |= {served.pid, served.guard_pid}
        return served

    def _end_mount(self, served: Served) -> None:
        if self._recorded is not None:
            self._recorded.end(self._watch)
        if served.has_ended:
            served.end()
            return
        with suppress(LazyfsError):
            self._watch.note(status_of(served))
        served.end()

    def _start_lazy_pages(self, stack: ExitStack, served: Served) -> LazyPages | None:
        if not self._plan.lazy_pages or self._has_own_pages:
            return None
        lazy = LazyPages.start(self._work, served.path, self._plan.criu, served.holders)
        stack.callback(lazy.end)
        self._spared.add(lazy.pid)
        self._watch.tell(event="helpers", pids=sorted(self._spared))
        return lazy

    def _start(self, served: Served, gate: Gate) -> "subprocess.Popen[bytes]":
        """Start CRIU or the runtime, with the caller's descriptors and standard streams."""
        words = self._plan.command(served.path, self._work)
        us = os.getpid()
        try:
            return subprocess.Popen(
                words,
                close_fds=False,
                stdout=_STANDARD_ERROR if self._plan.keeps_stdout_clean else None,
                env={**os.environ, **gate.environment},
                preexec_fn=lambda: die_with_parent(us),
            )
        except OSError as error:
            raise UsageError(
                f"{words[0]} cannot be run: {error.strerror}; install it, or say where it is"
            ) from None

    def _expect_new_name(self) -> None:
        """See that no container has the name: what is undone is undone by name.

        Raises:
            UsageError: one has.
        """
        box, words = self._plan.container, self._plan.ask()
        if box is None or words is None:
            return
        if Asked(words).is_known():
            raise UsageError(
                f"{box.runtime[0]} has a container {box.name} already: give another --id, or "
                "delete that one"
            )
        self._watch.tell(event="helpers", pids=sorted(self._spared), undo=self._plan.undo())

    # -- waiting -----------------------------------------------------------------------------

    def _wait_for(
        self,
        program: "subprocess.Popen[bytes]",
        served: Served,
        gate: Gate,
        lazy: LazyPages | None,
    ) -> None:
        """Wait until the program has restored it, or raise what became of it instead."""
        pidfd = os.pidfd_open(program.pid)
        watched = [pidfd, gate.fileno(), served.fileno()]
        if lazy is not None:
            watched.append(lazy.fileno())
        lost: str | None = None
        patient_until_s = float("inf")
        try:
            while time.monotonic() < patient_until_s:
                ready = self._watch.wait(watched, served)
                if gate.fileno() in ready:
                    self._denied = served.judge() or lost
                    gate.answer(may_live=self._denied is None)
                if served.fileno() in ready:
                    raise LazyfsError(DAEMON_GONE)
                if pidfd in ready:
                    break
                if lazy is not None and lazy.fileno() in ready:
                    watched.remove(lazy.fileno())
                    lost = lazy.wait()
                    self._pages_are_home = lost is None
                    if lost is not None:  # CRIU has failed, or is to
                        patient_until_s = time.monotonic() + _PATIENCE_S
            else:
                program.kill()
        finally:
            os.close(pidfd)
        code = program.wait()
        if code == 0 and lost is None:
            return
        self._fail(served, code, lost if code in (0, -signal.SIGKILL) else None)

    _pages_are_home = False
    _is_containers = False

    def _fail(self, served: Served, code: int, lost: str | None) -> NoReturn:
        """Raise why it was not restored: the bytes, or what CRIU says."""
        status = status_of(served)
        why = self._denied or judge(status)
        self._watch.note(status)
        if why is not None:
            error = LazyfsError(f"{why}; what had been restored is killed")
            error.exit_code = exit_code_of(status)
            raise error
        program = "criu"
        bare = self._plan.container is None and self._is_containers
        if self._plan.container is not None:
            program = Path(self._plan.container.runtime[0]).name
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        text = _log_text(self._work / LOG)
        message = f"{program} {how}; nothing of it is left"
        if lost is not None:
            message = f"{lost}; nothing of it is left"
        raise RestoreFailed(message, diagnose(text, bare=bare), code)

    def _note_home(self, served: Served) -> None:
        home_s = time.monotonic() - self._plan.started_s
        status = status_of(served)
        believe(status)
        self._watch.note(status)
        self._watch.figures["home_after_s"] = round(home_s, 3)
        self._watch.tell(event="home", after_s=home_s)

    # -- the end -----------------------------------------------------------------------------

    def _undo(self) -> None:
        """Kill and remove what was restored, unless it may live."""
        if self._lives:
            return
        words = self._plan.undo()
        if words is not None:
            remove(words)
        self._kill()

    _lives = False

    def _kill(self) -> None:
        if not self._lives:
            left = kill_descendants(self._spared)
            if left:
                log.error("processes that cannot be killed are left: %s", left)

    def _spare_all(self, served: Served, lazy: LazyPages | None) -> None:
        """It may live from here on."""
        self._lives = True
        if lazy is not None:
            lazy.end()
        self._end_mount(served)
        reap()


def _pages_bytes(images: Path) -> int | None:
    with suppress(OSError):
        return sum(each.stat().st_size for each in images.glob("pages-*.img"))
    return None


def _is_containers(images: Path) -> bool:
    """Whether runc or crun made the dump: both leave this file in it."""
    return (images / "descriptors.json").exists()


def _log_text(path: Path) -> str:
    """Return the end of a log."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _LOG_MOST_BYTES))
        return file.read().decode(errors="replace")
    return ""


def _wake_on_signals() -> int:
    """Return what can be read once a signal wants us to stop."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _STOPPING:
        signal.signal(number, lambda *_: None)
    return reading

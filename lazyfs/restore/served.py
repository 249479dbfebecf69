"""A checkpoint that is served to whoever restores it: the daemon, its state, its end.

The daemon is forked from this process, so that no second interpreter is started. It takes nothing
of the caller's along: no standard output, no descriptor (engines wait until a container's pipes
are closed), and is in a session of its own. It ends by itself when the mount's last descriptor is
closed, and, before it has said that it is ready, when its starter has ended.

To be used by a process without other threads and outside of an event loop, since it forks.
"""

import json
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import asdict

from lazyfs.background import Waiting, close_inherited, log_to
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.ground.errors import LazyfsError
from lazyfs.mountpoint import answer_of
from lazyfs.restore.detached import Place, open_place
from lazyfs.restore.verdict import judge

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig
    from lazyfs.mount import Ready
    from lazyfs.trace_file import RecordConfig

log = logging.getLogger(__name__)

_MESSAGE_MOST_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_STATUS_XATTR = "user.lazyfs.status"
_END_TIMEOUT_S = 10.0
_SILENT_S = 2.0
_KILL_TIMEOUT_S = 5.0


class Abandoned(LazyfsError):
    """Whoever wanted the mount is gone."""


class NoAnswer(LazyfsError):
    """The daemon lives, but has not answered in time: it may be busy, stopped, or stuck."""


class Job(msgspec.Struct, frozen=True):
    """What is to be served, and for what."""

    reference: str
    opening: "Callable[[], OpenConfig]"
    """Called by the daemon, so that what it imports is not imported before the fork."""
    log_file: Path
    restores: str
    """What it is for, as `lazyfs status` shows it: a container's name or id."""
    check_with: str | None = None
    """The CRIU that will restore it, for `Served.findings`; None: they are not looked for."""
    lazy_pages: Path | None = None
    """The work directory of a restore with lazy pages, which the daemon is to serve."""
    recording: "RecordConfig | None" = None
    """Where to write what is needed of it, if that is wanted."""


class Served:
    """A mount that answers."""

    def __init__(self, place: Place, lifeline: int, pid: int, told: Mapping[str, Any]) -> None:
        self._place = place
        self._lifeline = lifeline
        self._pidfd = os.pidfd_open(pid)
        self.pid = pid
        """The daemon's; it is our child."""
        self.guard_pid = int(told["guard_pid"])
        """Of who kills the tasks that wait for memory if the daemon is killed; 0 if there is none.
        It must not be killed before them."""
        self.reference = str(told["reference"])
        """Pinned by digest where it has one."""
        self.stub: str | None = told["stub"]
        """The stub that was asked for, if this is what it stands for."""
        self.images_directory = str(told["images_directory"])
        """Where in the checkpoint it is."""
        self.warnings: tuple[str, ...] = tuple(told["warnings"])
        """What may keep it from being restored here, as far as the annotations tell."""
        self.findings: tuple[Mapping[str, str], ...] = tuple(told["findings"])
        """What `inspect --check` finds: `level`, `subject`, `message`."""

    @property
    def path(self) -> Path:
        """Return the images directory for CRIU and container runtimes.

        It holds for as long as this process lives and has not called `end` or `let_go`.
        """
        return self._place.path

    @property
    def holders(self) -> tuple[int, ...]:
        """Return the descriptors of which one must be open somewhere for the mount to live on.

        They are closed on exec; hand them on where somebody else is to keep it alive.
        """
        return (self._lifeline,) if self._place.directory else (self._place.root,)

    def status(self) -> Mapping[str, Any]:
        """Return the mount's account of itself (`docs/json.md`).

        Raises:
            NoAnswer: there is none within five seconds.
            LazyfsError: there is none.
        """
        path = self.path

        def ask() -> bytes | OSError:
            try:
                return os.getxattr(path, _STATUS_XATTR)
            except OSError as error:
                return error

        try:
            answer = answer_of(ask)
            if isinstance(answer, OSError):
                raise LazyfsError(f"the daemon of the mount is gone: {answer.strerror}")
            told = json.loads(answer)
        except TimeoutError:
            raise NoAnswer("the daemon of the mount does not answer") from None
        except ValueError:
            raise LazyfsError("the daemon of the mount says what cannot be understood") from None
        return told if isinstance(told, dict) else {}

    def judge(self) -> str | None:
        """Return why what was restored from it must not live; None if it may."""
        try:
            return judge(self.status())
        except LazyfsError as error:
            return str(error)

    def let_go(self) -> None:
        """Give up our part: it lives on while others hold one of `holders`, or files of it."""
        self._place.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
        self._lifeline = -1

    def end(self, timeout_s: float = _END_TIMEOUT_S) -> None:
        """Unmount and wait until the daemon has ended; killed, if it does not. May be repeated."""
        self.let_go()
        if self._pidfd < 0:
            return
        for number, patience_s in (
            (0, timeout_s),
            (signal.SIGTERM, _KILL_TIMEOUT_S),
            (signal.SIGKILL, _KILL_TIMEOUT_S),
        ):
            if number:
                log.info("the mount's daemon does not end: %s", signal.Signals(number).name)
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, number)
            if _wait_readable([self._pidfd], patience_s):
                break
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        os.close(self._pidfd)
        self._pidfd = -1

    def fileno(self) -> int:
        """Return what can be read when the daemon has ended."""
        return self._pidfd

    @property
    def has_ended(self) -> bool:
        """Whether the daemon has."""
        return self._pidfd < 0 or bool(_wait_readable([self._pidfd], 0))

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def serve(
    job: Job, *, abandon: Sequence[int] = (), on_waiting: Callable[[str], None] = lambda why: None
) -> Served:
    """Start a daemon that serves a checkpoint; return when it answers.

    It is given up as soon as one of the descriptors `abandon` can be read. `on_waiting` is told
    what it waits for, if that takes a while.

    Raises:
        Abandoned: one of those could be.
        LazyfsError: what went wrong, with its exit code: FUSE, the source, the checkpoint.
    """
    place = open_place(job.reference)
    hearing, telling = os.pipe()
    watching, lifeline = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        place.close()
        for descriptor in (hearing, telling, watching, lifeline):
            os.close(descriptor)
        raise LazyfsError(f"no daemon can be started: {error.strerror}") from None
    if pid == 0:
        _live(job, place, telling, watching)
    os.close(telling)
    os.close(watching)
    place.let_go_of_fuse()
    try:
        told = _hear(hearing, pid, abandon, job.reference, on_waiting)
        return Served(place, lifeline, pid, told)
    except BaseException:
        place.close()
        os.close(lifeline)
        _be_rid_of(pid)
        raise
    finally:
        os.close(hearing)


def _hear(
    hearing: int,
    pid: int,
    abandon: Sequence[int],
    reference: str,
    on_waiting: Callable[[str], None],
) -> Mapping[str, Any]:
    """Return what the daemon says when it is ready; before that, a line for what it waits for.

    Raises:
        LazyfsError: it says what went wrong, or ends without a word.
    """
    heard = bytearray()
    silent_s: float | None = _SILENT_S
    while True:
        readable = _wait_readable([hearing, *abandon], silent_s)
        if not readable:
            on_waiting(f"{parse_reference(reference)} is not mounted yet")
            silent_s = None
            continue
        if hearing not in readable:
            raise Abandoned("interrupted; nothing of the restore is left")
        piece = os.read(hearing, _PIECE_BYTES)
        if not piece or len(heard) > _MESSAGE_MOST_BYTES:
            break
        heard += piece
        *lines, heard = heard.split(b"\n")
        for line in lines:
            on_waiting(json.loads(line)["waiting"])
            silent_s = None
    try:
        told = json.loads(bytes(heard))
    except ValueError:
        _, wait_status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(wait_status)
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        raise LazyfsError(f"the mount's daemon ended {how} before it was ready") from None
    if "error" in told:
        error = LazyfsError(told["error"])
        error.exit_code = told["exit_code"]
        raise error
    return dict(told)


def _live(job: Job, place: Place, telling: int, watching: int) -> None:
    """Be the daemon; never returns."""
    code = 1
    try:
        os.setsid()
        _forget_signals()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        kept = {telling, watching, place.fuse}
        if job.recording is not None and job.recording.link is not None:
            kept.add(job.recording.link)
        close_inherited(kept)
        log_to(job.log_file)
        code = _serve(job, place, telling, watching)
    except BaseException:
        log.critical("the mount ends: please report this", exc_info=True)
    finally:
        logging.shutdown()
        os._exit(code)


def _serve(job: Job, place: Place, telling: int, watching: int) -> int:
    """Mount and serve to the end; return the daemon's exit code."""
    guard = None
    if job.lazy_pages is not None:
        from lazyfs.lazypages.guard import Guard

        guard = Guard.start()
    is_ready = False
    waiting = Waiting(lambda why: _write(telling, {"waiting": why}, b"\n"))
    try:
        opening = job.opening()  # what that begins goes on while the rest is imported
        import trio

        from lazyfs.ground.errors import raise_sole_error
        from lazyfs.mount import MountConfig, serve_mount

        def tell(ready: "Ready") -> None:
            nonlocal is_ready
            words = {
                "reference": ready.reference,
                "stub": ready.stub,
                "images_directory": ready.images_directory,
                "warnings": ready.warnings,
                "guard_pid": guard.pid if guard is not None else 0,
                "findings": [asdict(each) for each in ready.findings],
            }
            waiting.silence()
            os.chdir("/")  # not before: a reference may be a path
            try:
                _say(telling, words)
            except BrokenPipeError:
                raise LazyfsError("whoever asked for the mount is gone; unmounting") from None
            is_ready = True

        async def end_with_starter(scope: trio.CancelScope) -> None:
            await trio.lowlevel.wait_readable(watching)
            if not is_ready or place.directory is not None:
                log.info("whoever asked for the mount is gone")
                scope.cancel()

        async def main() -> None:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(end_with_starter, nursery.cancel_scope)
                    await serve_mount(config, tell)
                    nursery.cancel_scope.cancel()
            except BaseExceptionGroup as group:
                raise_sole_error(group)

        config = MountConfig(
            job.reference,
            place.mount_point,
            opening,
            descriptor=place.fuse if place.fuse >= 0 else None,
            restores=job.restores,
            check_with=job.check_with,
            lazy_pages=job.lazy_pages,
            guard=guard,
            recording=job.recording,
        )
        trio.run(main)
    except LazyfsError as error:
        log.log(logging.CRITICAL if is_ready else logging.INFO, "the mount ends: %s", error)
        waiting.silence()
        if not is_ready:
            with suppress(BrokenPipeError):
                _say(telling, {"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    finally:
        if place.directory is not None:
            for each in (place.directory, place.directory.parent):
                with suppress(OSError):
                    each.rmdir()
    return 0


def _say(telling: int, words: Mapping[str, Any]) -> None:
    """Say the last of it."""
    _write(telling, words)
    os.close(telling)


def _write(telling: int, words: Mapping[str, Any], end: bytes = b"") -> None:
    text = json.dumps(words).encode() + end
    while text:
        text = text[os.write(telling, text) :]


def _forget_signals() -> None:
    """Undo what the caller has had done with signals: they are not for us."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _be_rid_of(pid: int) -> None:
    """Kill a daemon that was not ready, and reap it."""
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + _KILL_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait_readable(descriptors: Sequence[int], timeout_s: float | None) -> list[int]:
    """Return which of them can be read, or whose other end is gone."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    found = poll.poll(None if timeout_s is None else timeout_s * 1000)
    return [descriptor for descriptor, _ in found]

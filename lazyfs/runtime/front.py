"""The front of a restore: what the engine has started and waits for.

Runs the real runtime as its child, with every descriptor, variable and signal that the engine
gave, and ends as it has ended: with its exit code, or by its signal. Is no subreaper: the restored
init becomes the child of conmon or of the shim. If the front is killed, the runtime is
(PR_SET_PDEATHSIG, prctl(2)), and the keeper does the rest.

What the engine is told goes to the runtime's log and to standard error, and only if the restore
has failed: conmon and shims take standard error for the container's own once it runs.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lazyfs.ground.printable import printable
from lazyfs.restore.processes import die_with_parent
from lazyfs.runtime import remains
from lazyfs.runtime.arguments import RestoreCall
from lazyfs.runtime.enginelog import EngineLog, open_engine_log
from lazyfs.runtime.keeper import Task, start_keeper
from lazyfs.runtime.link import Link

log = logging.getLogger(__name__)

_NOT_RUN = 127
_KEEPER_GONE = (
    "the process that looks after the restore was killed; whether the checkpoint's bytes were "
    "right is not known"
)
_PASSED_ON: tuple[int, ...] = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1),
    *(signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT, signal.SIGALRM),
)


def restore(task: Task) -> int:
    """Restore a container from a stub's real image; return the exit code for the engine.

    Raises:
        LazyfsError: not even a process can be had.
    """
    call = task.call
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it hides how children end
    engine_log = open_engine_log(call.log, call.log_format)
    link = start_keeper(task)
    told = link.receive() or {"error": _KEEPER_GONE, "exit_code": 1}
    if "error" in told:
        tell(engine_log, _in_full(task, str(told["error"])))
        return int(told["exit_code"]) or 1
    words = call.with_image_path(str(told["path"]), *map(str, told["more"]))
    status = _run(task, words, dict(told["environment"]), link)
    heard = link.receive() if link.send(ended=status) or not call.detach else None
    link.send(heard=True)
    link.close()
    if heard is None:
        if not told.get("taken"):
            _be_rid_of(task)
        verdict: str | None = _KEEPER_GONE
    else:
        verdict = heard.get("verdict") or heard.get("advice") or None
    if verdict is not None:
        last = engine_log.last_error() if status != 0 else None
        name = Path(task.program).name
        tell(engine_log, _in_full(task, verdict + (f" ({name}: {last})" if last else "")))
        return status if status > 0 else 1
    return _end_as(status)


def tell(engine_log: EngineLog, message: str) -> None:
    """Tell the engine what went wrong, in one line, in both places where it may look."""
    message = printable(" ".join(message.split()))
    engine_log.replace(f"lazyfs: {message}")
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"lazyfs: {message}\n".encode(errors="backslashreplace"))


def _in_full(task: Task, reason: str) -> str:
    name = task.call.container[:12]
    where = "" if task.reference in reason else f" from {task.reference}"
    return f"{name} cannot be restored{where}: {reason}; more in {task.log_file}"


def _run(task: Task, words: Sequence[str], more: Mapping[str, str], link: Link) -> int:
    """Run the runtime to its end; return its exit code, or minus the signal that ended it."""
    child = 0

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    parent = os.getpid()
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is who gets them
    for number in _PASSED_ON:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    child = os.fork()
    if child == 0:
        _become(task, words, {**os.environ, **more}, link, parent, blocked)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _, wait_status = os.waitpid(child, 0)
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)
    return os.waitstatus_to_exitcode(wait_status)


def _become(
    task: Task,
    words: Sequence[str],
    environ: Mapping[str, str],
    link: Link,
    parent: int,
    blocked: Collection[int],
) -> None:
    """Be the runtime, with these signals blocked; never returns."""
    try:
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        die_with_parent(parent)
        if link.send(runs=os.getpid()):
            for number in task.heard:
                signal.signal(number, signal.SIG_DFL)
            os.execve(task.program, [task.program, *words], environ)  # noqa: S606 - a runtime's way
    except OSError as error:
        with contextlib.suppress(OSError):
            os.write(2, f"lazyfs: {task.program} cannot be run: {error.strerror}\n".encode())
    finally:
        os._exit(_NOT_RUN)


def _be_rid_of(task: Task) -> None:
    """Kill what came up without anybody to judge it."""
    call: RestoreCall = task.call
    if call.container:
        words = call.control("delete", "--force", call.container)
        remains.run_quietly(task.program, words, task.directory)
    began_ticks = remains.started_ticks(os.getpid())
    remains.kill_cgroup(task.cgroups_path, call.container, began_ticks)


def _end_as(status: int) -> int:
    """Return an exit code, or end by a signal as the runtime did."""
    if status >= 0:
        return status
    with contextlib.suppress(OSError, ValueError):
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return 128 - status

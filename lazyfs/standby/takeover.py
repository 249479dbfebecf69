"""A deputy takes on what its client has and a child of it would: groups, limits, priorities, files.

All of it is done before anything of the command is, and whatever cannot be had ends the deputy: the
client carries on by itself, and is told why.

Sources: cgroups(7), cgroup v2 ("Organizing Processes"), getrlimit(2), proc_pid_oom_score_adj(5),
ioprio_set(2), proc_pid_loginuid(5), fcntl(2) (F_SETSIG), pipe(7).
"""

import ctypes
import fcntl
import os
import platform
import resource
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_IOPRIO = {
    "x86_64": (252, 251),
    "aarch64": (31, 30),
    "riscv64": (31, 30),
    "loongarch64": (31, 30),
}
"""Numbers of ioprio_get(2) and ioprio_set(2)."""
_IOPRIO_WHO_PROCESS = 1
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


class CannotBe(Exception):
    """The deputy cannot be what its client is; says in what."""


def take_on_groups(client: int) -> None:
    """Move to the control groups of the client, of both versions.

    Raises:
        CannotBe: that is not allowed here.
    """
    theirs = _groups_of(client)
    ours = _groups_of("self")
    if theirs == ours:
        return
    mounts = _group_mounts()
    for hierarchy, group in theirs.items():
        if ours.get(hierarchy) == group:
            continue
        directory = _directory_of(mounts, hierarchy, group)
        try:
            with open(f"{directory}/cgroup.procs", "w") as procs:
                procs.write("0")
        except OSError as problem:
            raise CannotBe(f"in the control group {group}: {problem.strerror}") from None
    if _groups_of("self") != theirs:
        raise CannotBe("in the client's control groups")


def take_on_limits(client: int) -> None:
    """Have the client's limits, priorities and processors.

    Raises:
        CannotBe: that is not allowed.
    """
    try:
        for limit in _LIMITS:
            wanted = resource.prlimit(client, limit)
            if wanted != resource.getrlimit(limit):
                resource.setrlimit(limit, wanted)
        if os.sched_getscheduler(client) != os.sched_getscheduler(0):
            raise CannotBe("scheduled as the client is")
        processors = os.sched_getaffinity(client)
        if processors != os.sched_getaffinity(0):
            os.sched_setaffinity(0, processors)
        nice = os.getpriority(os.PRIO_PROCESS, client)
        if nice != os.getpriority(os.PRIO_PROCESS, 0):
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        _take_on_io_priority(client)
        for name in ("oom_score_adj", "loginuid"):
            _take_on_value(client, name)
    except (OSError, ValueError) as problem:
        raise CannotBe(f"limited as the client is: {problem}") from None


def die_with(lifeline: int) -> None:
    """Be killed when the other end of a pipe has no holder left.

    By the kernel, so that no thread has to look: a pipe whose last writer is gone signals whoever
    asked for that (fs/pipe.c, pipe_release: kill_fasync), here by SIGKILL.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, 0)
    if poll.poll(0):  # it had none left already
        os._exit(1)


def put_descriptors(given: Sequence[int], numbers: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Give descriptors the numbers that the client has them by; return new ones of those kept.

    Nothing else stays open. What is kept is closed on exec, as what has a number is not.

    Raises:
        CannotBe: there are too many.
    """
    above = max(numbers) + 1
    try:
        moved = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in (*kept, *given)]
    except (OSError, ValueError) as problem:
        raise CannotBe(f"given so high a descriptor: {problem}") from None
    ours, theirs = moved[: len(kept)], moved[len(kept) :]
    for number, descriptor in zip(numbers, theirs, strict=True):
        os.dup2(descriptor, number)
    wanted = {*numbers, *ours}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) not in wanted:
            with suppress(OSError):  # the listing's own
                os.close(int(name))
    return ours


def _groups_of(process: int | str) -> dict[str, str]:
    """Return the control group of each hierarchy, which is named by its controllers."""
    found = {}
    with open(f"/proc/{process}/cgroup", errors="surrogateescape") as file:
        for line in file:
            _, controllers, group = line.rstrip("\n").split(":", 2)
            found[controllers] = group
    return found


def _group_mounts() -> list[tuple[str, str, str]]:
    """Return where hierarchies are mounted: controllers, the group that is shown, directory."""
    found = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            mount, _, filesystem = line.rstrip("\n").partition(" - ")
            kind, _, options = filesystem.partition(" ")
            if kind in ("cgroup", "cgroup2"):
                _, _, _, root, directory, *_ = mount.split()
                controllers = "" if kind == "cgroup2" else options.rpartition(" ")[2]
                found.append((controllers, root, directory))
    return found


def _directory_of(mounts: list[tuple[str, str, str]], hierarchy: str, group: str) -> Path:
    wanted = set(hierarchy.split(",")) if hierarchy else set()
    for controllers, root, directory in mounts:
        is_it = wanted <= set(controllers.split(",")) if wanted else not controllers
        below = group == root or root == "/" or group.startswith(f"{root}/")
        if is_it and below:
            return Path(directory) / group.removeprefix(root.rstrip("/")).lstrip("/")
    raise CannotBe(f"in the control group {group}, which is mounted nowhere")


def _take_on_value(client: int, name: str) -> None:
    wanted = _value(f"/proc/{client}/{name}")
    if wanted != _value(f"/proc/self/{name}"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(wanted)


def _value(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:  # a kernel without it
        return ""


def _take_on_io_priority(client: int) -> None:
    numbers = _IOPRIO.get(platform.machine())
    if numbers is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    get, put = numbers
    wanted = libc.syscall(ctypes.c_long(get), _IOPRIO_WHO_PROCESS, client)
    if wanted < 0 or wanted == libc.syscall(ctypes.c_long(get), _IOPRIO_WHO_PROCESS, 0):
        return
    if libc.syscall(ctypes.c_long(put), _IOPRIO_WHO_PROCESS, 0, ctypes.c_int(wanted)) < 0:
        raise OSError(ctypes.get_errno(), "the priority of its input and output")

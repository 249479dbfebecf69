"""What a restore that must not be leaves behind, found and killed.

Half restored tasks are CRIU's children and in the container's namespaces, and when CRIU or the
runtime is killed they are nobody's. But they hold the images directory open until they are let run
(CRIU, `criu/cr-restore.c`: the directory's descriptor is closed last of all): who has a descriptor
of our mount is one of them. /proc/PID/fdinfo names a descriptor's mount without touching the
filesystem, which may hang. What runs already is found by the runtime's own state, by the pid file
that it has written, and by the container's cgroup.

Kills by pidfd, after a second look: a number may be another process by then.
"""

import contextlib
import logging
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_MOUNT_ID = re.compile(rb"^mnt_id:\s*(\d+)$", re.MULTILINE)
_DETACHED = re.compile(r"/proc/\d+/fd/(\d+)")
_CGROUPS = Path("/sys/fs/cgroup")
_LOOKS_MOST = 100
_PAUSE_S = 0.02
_END_TIMEOUT_S = 10.0
_RUNTIME_TIMEOUT_S = 60.0
_STAT_START_FIELD = 22
"""proc(5), /proc/PID/stat, in clock ticks since boot."""


def mount_id(images: Path) -> int | None:
    """Return the mount that `/proc/PID/fd/N` of this process is of; None of a directory."""
    found = _DETACHED.fullmatch(str(images))
    return _mount_of(Path(f"/proc/self/fdinfo/{found[1]}")) if found is not None else None


def kill_holders(mount: int | None, spared: Collection[int]) -> int:
    """Kill all who have a descriptor of a mount; return how many there were."""
    killed = 0
    for _ in range(_LOOKS_MOST):
        found = 0
        for pid in list(_holders(mount, spared)):
            found += _kill(pid, lambda pid=pid: _holds(pid, mount))  # type: ignore[misc]
        if not found:
            break
        killed += found
        time.sleep(_PAUSE_S)
    return killed


def kill_cgroup(cgroups_path: str, container: str, not_before_ticks: int) -> int:
    """Kill what has begun since in a container's cgroup, if its path names it; return how many.

    What was there before is another container's: `ctr` restores each copy of a container into the
    cgroup that the first one had.
    """
    killed = 0
    for _ in range(_LOOKS_MOST):
        found = 0
        for place in _cgroups(cgroups_path, container):
            for file in [place / "cgroup.procs", *place.glob("**/cgroup.procs")]:
                with contextlib.suppress(OSError, ValueError):
                    pids = [int(word) for word in file.read_text().split()]
                    found += sum(_kill(pid, _begun(pid, not_before_ticks)) for pid in pids if pid)
        if not found:
            break
        killed += found
        time.sleep(_PAUSE_S)
    return killed


def kill_init(pid_file: Path | None, not_before_ticks: int) -> bool:
    """Kill the process that a pid file names, if it has begun since; return whether there was."""
    pid = read_pid(pid_file)
    if pid is None:
        return False
    return bool(_kill(pid, lambda: started_ticks(pid) >= not_before_ticks, wait=True))


def _begun(pid: int, not_before_ticks: int) -> Callable[[], bool]:
    return lambda: started_ticks(pid) >= not_before_ticks


def read_pid(pid_file: Path | None) -> int | None:
    """Return what a pid file says; None if that is nothing."""
    if pid_file is not None:
        with contextlib.suppress(OSError, ValueError):
            pid = int(pid_file.read_text()[:32])
            return pid if pid > 1 else None
    return None


def started_ticks(pid: int) -> int:
    """Return when a process began; -1 if there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[_STAT_START_FIELD - 3])
    return -1


def run_quietly(program: str, words: Sequence[str], directory: str) -> str | None:
    """Run a command of the real runtime; return what it complained of, None if it did not."""
    try:
        done = subprocess.run(
            [program, *words],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_RUNTIME_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = " ".join(done.stderr.decode(errors="replace").split())
    return said[-1000:] or f"exit status {done.returncode}"


def _holders(mount: int | None, spared: Collection[int]) -> Iterator[int]:
    if mount is None:
        return
    for entry in os.scandir("/proc"):
        if (
            entry.name.isdigit()
            and int(entry.name) not in spared
            and _holds(int(entry.name), mount)
        ):
            yield int(entry.name)


def _holds(pid: int, mount: int | None) -> bool:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fdinfo"):
            if _mount_of(Path(entry.path)) == mount:
                return True
    return False


def _mount_of(info: Path) -> int | None:
    with contextlib.suppress(OSError):
        found = _MOUNT_ID.search(info.read_bytes())
        return int(found[1]) if found is not None else None
    return None


def _kill(pid: int, is_it: Callable[[], bool], *, wait: bool = False) -> int:
    """Kill a process that is still what it was taken for; return 1 if there was one."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return 0
    try:
        if not is_it():
            return 0
        log.info("killing process %d", pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if wait:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(_END_TIMEOUT_S * 1000)
    except OSError:
        return 0
    finally:
        os.close(pidfd)
    return 1


def _cgroups(cgroups_path: str, container: str) -> Iterator[Path]:
    """Yield the directories of a container's cgroup: one, or one a hierarchy of version 1.

    Source: runc, `docs/systemd.md`: `SLICE:PREFIX:NAME` is SLICE/PREFIX-NAME.scope, and
    `a-b.slice` lies in `a.slice`.
    """
    slice_name, first, rest = cgroups_path.partition(":")
    if first:
        prefix, _, name = rest.partition(":")
        scope = f"{prefix}-{name}.scope" if not name.endswith(".slice") else name
        parts = slice_name.removesuffix(".slice").split("-") if slice_name else ["system"]
        above = ["-".join(parts[: count + 1]) + ".slice" for count in range(len(parts))]
        relative = "/".join([*above, scope])
    else:
        relative = cgroups_path.strip("/")
    last = relative.rpartition("/")[2]
    if not container or container not in last or ".." in relative.split("/"):
        return
    for base in (_CGROUPS, *_CGROUPS.glob("*")):
        with contextlib.suppress(OSError):
            if (base / relative).is_dir():
                yield base / relative

"""`lazyfs mount` as its own process, looked at from outside, and everything it left behind."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lazyfs import mountpoint

LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) \d+ (.*)$")
TIMEOUT_S = 60.0
AT_ONCE_S = 20.0
"""What waits for nothing is over by then, on any machine; what waits for a source is not: it has
90 seconds by default."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lazyfs", *map(str, arguments)]


def run(arguments: Sequence[str | Path], **options: Any) -> Done:
    """Run a program to its end; text is whatever bytes there were."""
    done = subprocess.run(
        [str(each) for each in arguments],
        capture_output=True,
        check=False,
        text=True,
        errors="surrogateescape",
        **{"timeout": TIMEOUT_S, "stdin": subprocess.DEVNULL, **options},
    )
    return Done(done.returncode, done.stdout, done.stderr)


def lazyfs(*arguments: str | Path, **options: Any) -> Done:
    return run(command(*arguments), **options)


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Look again and again, until it is so."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, f"after {timeout_s} s still not so: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors(pid: int) -> dict[int, str]:
    """Return what a process has open, by number; it works on, and may close some meanwhile."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found[int(entry.name)] = str(entry.readlink())
    return found


def is_asleep(pid: int) -> bool:
    """Whether a process waits for something in the kernel (proc(5), `stat`: state)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SD"


def error_of(action: Callable[[], object]) -> str | None:
    """Return the name of the errno that an action fails with; None if it does not fail."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return None


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Read with one system call."""
    with open_file(path) as file:
        return os.pread(file, size, offset)


@contextmanager
def open_file(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    file = os.open(path, flags)
    try:
        yield file
    finally:
        os.close(file)


class Waiter:
    """Something that may hang, done in a process of its own, which may be killed."""

    _SCRIPT = """
import errno, os, sys
what, path = sys.argv[1:]
print(flush=True)
try:
    print({"stat": lambda: os.stat(path).st_size, "ls": lambda: " ".join(sorted(os.listdir(path)))}
          [what]())
except OSError as error:
    print(errno.errorcode[error.errno])
"""

    def __init__(self, what: Literal["stat", "ls"], path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._SCRIPT, what, path], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "\n", "it begins"

    def result(self, timeout_s: float = 30) -> str:
        """Return the size, the names, or the errno's name."""
        self._process.wait(timeout=timeout_s)
        assert self._process.stdout is not None
        with self._process.stdout as out:
            return out.read().strip()

    def is_waiting(self) -> bool:
        """Whether it has asked, and is not answered yet."""
        return self._process.poll() is None and is_asleep(self._process.pid)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """Kill it: the kernel lets it go when the filesystem has answered, and no sooner."""
        self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Reader:
    """A read in a process of its own: it may hang, and be killed, without the tests hanging."""

    _SCRIPT = """
import errno, hashlib, os, sys
path, offset, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    file = os.open(path, os.O_RDONLY)
    print("open", flush=True)
    data = os.pread(file, size, offset)
    print(len(data), hashlib.sha256(data).hexdigest())
except OSError as error:
    print(errno.errorcode[error.errno])
"""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._SCRIPT, path, str(offset), str(size)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline().strip()
        """"open", unless opening failed."""

    def result(self, timeout_s: float = 30) -> str:
        """Return "<length> <sha256>", or the errno's name."""
        self._process.wait(timeout=timeout_s)
        assert self._process.stdout is not None
        with self._process.stdout as out:
            return out.read().strip() or self.said

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_waiting(self) -> bool:
        """Whether it has asked, and is not answered yet."""
        return self._process.poll() is None and is_asleep(self._process.pid)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Mount:
    """A mount that answers."""

    def __init__(self, directory: Path, said: Done, pid: int | None = None) -> None:
        self.directory = directory
        self.said = said
        self.pid = pid or int(os.getxattr(directory, "user.lazyfs.pid"))

    def __str__(self) -> str:
        return str(self.directory)

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(os.getxattr(self.directory, "user.lazyfs.status"))
        return status

    def asked_again(self) -> int:
        """How often something was asked for once more, because it was slow or failed."""
        status = self.status()
        return int(status["hedges"] + status["retries"])

    def umount(self, *options: str) -> Done:
        return lazyfs("umount", *options, self.directory)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_end(self, timeout_s: float = 15) -> None:
        wait_until(lambda: not is_alive(self.pid), "the daemon has ended", timeout_s)

    @property
    def is_mounted(self) -> bool:
        return mountpoint.mounted_at(self.directory) is not None


class Mounts:
    """Mounts below one directory; `close` clears them away and looks at what they logged."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.cache_dir = home / "cache"
        self.log_files: list[Path] = []
        self._expected: list[str] = []
        self._tolerated: list[str] = []

    def options(self, *options: str | Path) -> list[str]:
        """Return options with a cache directory of the test's own, unless one is among them."""
        given = [str(each) for each in options]
        if not any(each.startswith("--cache-dir") for each in given):
            given.append(f"--cache-dir={self.cache_dir}")
        return given

    def mount(
        self, reference: str, *options: str | Path, at: Path | None = None, **run_options: Any
    ) -> Mount:
        """Mount, on `mnt` by default; it must come up."""
        directory = at or self.home / "mnt"
        with suppress(OSError):  # a dead mount, which is to be mounted over
            directory.mkdir(exist_ok=True)
        done = lazyfs("mount", *self.options(*options), reference, directory, **run_options)
        assert done.code == 0, done
        return Mount(directory, done)

    def refuse(
        self, reference: str, *options: str | Path, at: Path | None = None, **run_options: Any
    ) -> Done:
        """Try to mount: it must fail, with a message fit for a person, and leave nothing behind."""
        directory = at or self.home / "mnt"
        if at is None:
            directory.mkdir(exist_ok=True)
        before = mountpoint.mounted_at(directory)
        done = lazyfs("mount", *self.options(*options), reference, directory, **run_options)
        assert done.code not in (0, 1) or (done.code == 1 and "lazyfs: " in done.err), done
        assert done.out == ""
        assert "Traceback" not in done.err
        assert "a bug" not in done.err
        assert mountpoint.mounted_at(directory) == before
        return done

    def expect_log(self, pattern: str) -> None:
        """Let warnings and errors that match be logged; there must be at least one."""
        self._expected.append(pattern)

    def tolerate_log(self, pattern: str) -> None:
        """Let warnings and errors that match be logged; there may be none."""
        self._tolerated.append(pattern)

    def log(self) -> str:
        """All that was logged."""
        files = [*self.cache_dir.glob("log/*.log"), *self.log_files]
        return "".join(file.read_text(errors="surrogateescape") for file in files if file.exists())

    def processes(self) -> list[int]:
        """Find the lazyfs processes that were started with this test's directory."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                words = (
                    (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
                )
                ours = any(os.fsencode(self.home) in word for word in words)
                if b"lazyfs" in words and ours and is_alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Unmount and kill all that is left; fail on what was logged and not expected."""
        below = [each for each in mountpoint.mounts() if str(self.home) in each.directory]
        for mounted in reversed(below):
            run(["umount", "-l", mounted.directory])
        deadline_s = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        log = self.log()
        for file in self.home.rglob("layers"):
            shutil.rmtree(file, ignore_errors=True)
        assert not left, f"daemons were left behind; their log:\n{log}"
        self._look_at(log)

    def _look_at(self, log: str) -> None:
        lines = log.splitlines()
        wrong = []
        for line in lines:
            found = LOG_LINE.match(line)
            if found is None or found[1] in ("WARNING", "ERROR", "CRITICAL"):
                wrong.append(line)
        for pattern in self._expected:
            matching = [line for line in wrong if re.search(pattern, line)]
            assert matching, f"nothing like {pattern!r} was logged:\n{log}"
            wrong = [line for line in wrong if line not in matching]
        for pattern in self._tolerated:
            wrong = [line for line in wrong if not re.search(pattern, line)]
        assert not wrong, "unexpected in the log:\n" + "\n".join(wrong)

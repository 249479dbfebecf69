"""lazyfs as these tests run it: as a program, and mounts that have to end in good order."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from testbed import TestbedError
from testbed.guard import forget, watch
from testbed.process import wait_until

_ALARMING = (" WARNING ", " ERROR ", " CRITICAL ")


def lazyfs(*words: str | Path, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    """Run a command of lazyfs to its end."""
    command = [sys.executable, "-m", "lazyfs", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


class Mount:
    """`lazyfs mount` on `work`/mount; its log is `work`/lazyfs.log, its cache `cache`."""

    def __init__(self, reference: str, work: Path, options: tuple[str, ...], cache: Path) -> None:
        self.directory = work / "mount"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = work / "lazyfs.log"
        self._command = ["mount", "--cache-dir", str(cache), "--log-file", str(self.log)]
        self._command += ["--plain-http", *options, reference, str(self.directory)]
        self._pid = 0
        self._pidfd = -1

    def start(self) -> None:
        """Mount; again, if it was killed or unmounted before."""
        done = lazyfs(*self._command)
        assert done.returncode == 0, f"{done.stderr}\n{self.log_text()}"
        self._forget_daemon()
        self._pid = self.status()["pid"]
        self._pidfd = os.pidfd_open(self._pid)
        watch(self._pid)

    def status(self) -> dict[str, Any]:
        """Return the mount's account of itself."""
        return self.state_of(self.directory)

    @staticmethod
    def state_of(directory: Path) -> dict[str, Any]:
        """Return the account of whatever is mounted there."""
        state: dict[str, Any] = json.loads(os.getxattr(directory, "user.lazyfs.status"))
        return state

    def wait_fetched(self, count: int, timeout_s: float = 60) -> None:
        """Wait until so many bytes have been fetched."""
        wait_until(
            lambda: self.status()["bytes_fetched"] >= count, f"{count} bytes fetched", timeout_s
        )

    def wait_quiet(self, quiet_s: float = 1, timeout_s: float = 60) -> None:
        """Wait until nothing has been fetched for so long."""
        seen, since_s = -1, time.monotonic()

        def quiet() -> bool:
            nonlocal seen, since_s
            fetched = self.status()["bytes_fetched"]
            if fetched != seen:
                seen, since_s = fetched, time.monotonic()
            return time.monotonic() - since_s >= quiet_s

        wait_until(quiet, "nothing is fetched any more", timeout_s)

    def wait_retries(self, count: int, timeout_s: float = 60) -> None:
        """Wait until lazyfs has asked again so many times more than up to now."""
        before = self.status()["retries"]
        wait_until(
            lambda: self.status()["retries"] >= before + count, f"{count} retries", timeout_s
        )

    def kill(self) -> None:
        """Kill the daemon as the kernel's OOM killer would; the dead mount stays."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._wait_end(20)
        forget(self._pid)

    def umount(self) -> None:
        """Unmount as a user does."""
        done = lazyfs("umount", self.directory)
        assert done.returncode == 0, f"{done.stderr}\n{self.log_text()}"
        assert not os.path.ismount(self.directory)
        self._wait_end(0)
        forget(self._pid)

    def umount_by_hand(self) -> None:
        """Unmount with umount(8): no second Python is started for it.

        A child that another thread has just forked may hold our descriptors for a moment.
        """
        command = ["umount", str(self.directory)]
        wait_until(
            lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0,
            f"{self.directory} can be unmounted",
            20,
        )
        self._wait_end(20)
        forget(self._pid)

    def log_text(self) -> str:
        """Return what the daemon has logged."""
        return self.log.read_text() if self.log.exists() else "(no log)"

    def alarms(self) -> list[str]:
        """Return the warnings and errors of the log."""
        lines = self.log_text().splitlines()
        return [line for line in lines if any(word in line for word in _ALARMING)]

    def clear(self) -> None:
        """Whatever has happened: leave neither a mount nor a daemon."""
        subprocess.run(["umount", "-l", str(self.directory)], capture_output=True, check=False)
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._wait_end(20)
            forget(self._pid)
        self._forget_daemon()

    def _wait_end(self, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TestbedError(f"the daemon {self._pid} has not ended\n{self.log_text()}")

    def _forget_daemon(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1


@contextmanager
def mounted(
    reference: str,
    work: Path,
    *options: str,
    cache: Path | None = None,
    forgiven: tuple[str, ...] = (),
) -> Iterator[Mount]:
    """Mount for the length of a block.

    At its end the mount must go in good order, and its log must be without warnings but those
    that contain one of `forgiven`, or tell of a process that happens to have a pid of the
    checkpoint's for a moment. If the block fails, the log is printed.
    """
    mount = Mount(reference, work, options, cache or work / "cache")
    try:
        mount.start()
        yield mount
        mount.umount()
    finally:
        mount.clear()
        print(f"{mount.log}:\n{mount.log_text()}")
    excuses = (*forgiven, "here already, and")
    alarms = [line for line in mount.alarms() if not any(excuse in line for excuse in excuses)]
    assert not alarms, "\n".join(alarms)

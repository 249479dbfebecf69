"""A mount that serves lazy pages, and what it tells of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from testbed import Restored
from testbed.process import wait_until

from lazyfs.lazypages.protocol import SOCKET_NAME
from tests.real.checkpoints import Checkpoint
from tests.real.mounts import Mount, mounted


def lazily(mount: Mount) -> dict[str, Any]:
    """Return what a mount tells of the memory that it serves."""
    told: dict[str, Any] = mount.status()["lazy_pages"]
    return told


def wait_home(mount: Mount, timeout_s: float = 60) -> dict[str, Any]:
    """Wait until nobody misses memory any more; return what is told then."""
    wait_until(
        lambda: lazily(mount)["state"] in ("home", "failed"), "all memory is home", timeout_s
    )
    told = lazily(mount)
    assert (told["state"], told["failed"], told["missing_bytes"]) == ("home", None, 0), told
    return told


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def served(
    reference: str, work: Path, *options: str, forgiven: tuple[str, ...] = ()
) -> Iterator[tuple[Mount, Path]]:
    """Mount with a socket for lazy pages; give the mount, and CRIU's work directory."""
    criu = work / "criu"
    criu.mkdir(parents=True)
    with mounted(reference, work, "--lazy-pages", str(criu), *options, forgiven=forgiven) as mount:
        yield mount, criu


def restored(dumped: Checkpoint, mount: Mount, criu: Path) -> Restored:
    return dumped.restore(mount.directory, criu, lazy_pages=criu / SOCKET_NAME)

"""What is to be restored, and how: the words of the program that does it."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig
    from lazyfs.until import Until

LOG = "restore.log"
"""CRIU's log, in the work directory; runc and crun call it so too."""
PIDFILE = "restore.pid"
_SHELL_JOB = re.compile(r"--shell-job|-[A-Za-z]*j")


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """A container that a runtime is to restore."""

    runtime: tuple[str, ...]
    """The program, with arguments of its own if it needs some: runc, crun."""
    bundle: Path
    name: str
    """Its id, as the runtime will know it."""


class Recording(msgspec.Struct, frozen=True):
    """What is needed, to be written to a file."""

    file: Path
    until: "Until"
    """What it lasts until, from when the tasks run."""
    began_s: float
    """When the command's process was started, by time.monotonic()."""
    is_precise: bool = True
    """Whether only what is wanted is brought meanwhile; else all goes as it would otherwise."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One restore."""

    reference: str
    opening: "Callable[[], OpenConfig]"
    criu: tuple[str, ...] = ("criu",)
    """The program, with arguments of its own if it needs some."""
    container: Container | None = None
    """None: CRIU is called itself."""
    lazy_pages: bool = False
    pages_by_criu: bool = False
    """With `lazy_pages`: have `criu lazy-pages` bring the memory, not the mount's own daemon."""
    work_dir: Path | None = None
    """Where CRIU works; None: in a fresh directory, which is removed on success."""
    extra: tuple[str, ...] = ()
    """Options for `criu restore`, or for the runtime's restore."""
    force: bool = False
    """Restore in spite of what the preflight says."""
    keeps_stdout_clean: bool = False
    """What CRIU or the runtime prints goes to standard error: the caller's output is JSON."""
    started_s: float = 0.0
    """By time.monotonic()."""
    recording: "Recording | None" = None
    """What is to be recorded, if anything is."""

    @property
    def restores(self) -> str:
        """Return what `lazyfs status` calls it."""
        return self.container.name if self.container is not None else self.reference

    @property
    def check_with(self) -> str:
        """Return the CRIU that will restore it, as `--criu` has it; runtimes use the PATH's."""
        return shlex.join(self.criu) if self.container is None else "criu"

    @property
    def way(self) -> str:
        """Return how memory comes, as a recording has it."""
        if not self.lazy_pages:
            return "eager"
        return "criu lazy-pages" if self.pages_by_criu else "lazy pages"

    @property
    def keeps_terminal(self) -> bool:
        """Whether the tasks are to belong to the session of whoever calls: --shell-job."""
        return self.container is None and any(map(_SHELL_JOB.fullmatch, self.extra))

    def command(self, images: Path, work: Path) -> list[str]:
        """Return the words that restore it.

        Sources: criu(8); runc-restore(8); crun(1). CRIU's own log is in `work`, as LOG.
        """
        lazy = ["--lazy-pages"] if self.lazy_pages else []
        if self.container is not None:
            box = self.container
            words = [*box.runtime, "restore", "--detach", "--image-path", str(images)]
            words += ["--work-path", str(work), "--bundle", str(box.bundle)]
            return [*words, *lazy, *self.extra, box.name]
        words = [*self.criu, "restore", "--restore-detached", "--images-dir", str(images)]
        words += ["--work-dir", str(work), "--log-file", LOG, "-v3", "--pidfile", PIDFILE]
        return [*words, *lazy, *self.extra]

    def ask(self) -> list[str] | None:
        """Return the words that ask for a container of that name: an error if there is none."""
        if self.container is None:
            return None
        return [*self.container.runtime, "state", self.container.name]

    def undo(self) -> list[str] | None:
        """Return the words that remove a container, dead or alive."""
        if self.container is None:
            return None
        return [*self.container.runtime, "delete", "--force", self.container.name]

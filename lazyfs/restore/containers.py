"""Whether a container runtime knows a container of a name, before anybody would remove it by that.

What a failed restore leaves is removed by its name (`delete --force`). A name that was in use
before is another container's: the runtime refuses to restore to it, and nobody may remove it.
So it is asked for before the restore, while all is well.

Source: OCI runtime-spec, `runtime.md`, "Query State": an error where there is no such container.
"""

import subprocess
from collections.abc import Sequence
from contextlib import suppress

_TIMEOUT_S = 10.0
_REMOVE_TIMEOUT_S = 20.0


class Asked:
    """A runtime that has been asked; it answers while its caller does something else."""

    def __init__(self, words: Sequence[str], directory: str | None = None) -> None:
        """`words`: the program and its command, `state NAME`; run in `directory`."""
        self._process: subprocess.Popen[bytes] | None = None
        null = subprocess.DEVNULL
        with suppress(OSError):  # a program that cannot be run knows nothing, and will do nothing
            self._process = subprocess.Popen(
                words, cwd=directory, stdin=null, stdout=null, stderr=null
            )

    def is_known(self) -> bool:
        """Whether there is such a container; also where the runtime does not answer in time."""
        if self._process is None:
            return False
        try:
            return self._process.wait(_TIMEOUT_S) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return True


def remove(words: Sequence[str]) -> None:
    """Have a runtime remove a container of ours, dead or alive; errors are swallowed."""
    null = subprocess.DEVNULL
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            words, stdin=null, stdout=null, stderr=null, timeout=_REMOVE_TIMEOUT_S, check=False
        )

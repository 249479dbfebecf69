"""Whether what was restored from a mount may live.

CRIU up to 4.2 ignores some read errors (shared memory: `shmem.c`, `do_restore_shmem_content`) and
resumes the process with zeroed memory. So one failed read is enough: what came up is not believed.

Sans-I/O. What it is given is what the mount's daemon says of itself (`docs/json.md`).
"""

from collections.abc import Mapping
from typing import Any

from lazyfs.ground.errors import IntegrityError, SourceError


def judge(status: Mapping[str, Any]) -> str | None:
    """Return why what was restored must be killed, in words for a person; None if it may live."""
    failed = status.get("failed", "its daemon does not say how it is")
    if failed is not None:
        return f"the checkpoint's bytes are not to be believed: {failed}"
    reads = status.get("failed_reads")
    if not isinstance(reads, int) or isinstance(reads, bool):
        return "the mount's daemon does not say whether reads have failed"
    if reads:
        last = status.get("last_error")
        many = "a read" if reads == 1 else f"{reads} reads"
        return f"{many} of the checkpoint failed" + (f": {last}" if last else "")
    return None


def exit_code_of(status: Mapping[str, Any]) -> int:
    """Return the exit code for a verdict: wrong bytes, or none to be had."""
    return IntegrityError.exit_code if status.get("failed") is not None else SourceError.exit_code

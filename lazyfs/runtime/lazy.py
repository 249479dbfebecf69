"""Lazy pages under a container runtime: can it, and have they come?

The mount's daemon brings them (`lazypages/`). It has to share the work directory with the runtime's
CRIU. runc has `--lazy-pages`; crun has not (as of 1.21), which its help tells, so a later one may.
"""

import subprocess
from collections.abc import Mapping
from typing import Any

_HELP_TIMEOUT_S = 20.0
_TO_COME = ("waiting", "restoring", "transferring")


def knows_lazy_pages(program: str) -> bool:
    """Whether a runtime's `restore` has an option --lazy-pages."""
    try:
        done = subprocess.run(
            [program, "restore", "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_HELP_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"--lazy-pages" in done.stdout + done.stderr


def failure_of(status: Mapping[str, Any]) -> str | None:
    """Return why pages will be missing for ever, by what the mount tells; None if all is well."""
    pages = status.get("lazy_pages")
    failed = pages.get("failed") if isinstance(pages, Mapping) else None
    return f"its memory cannot be had: {failed}" if failed is not None else None


def are_home(status: Mapping[str, Any]) -> bool:
    """Whether no pages are to come any more."""
    pages = status.get("lazy_pages")
    return not isinstance(pages, Mapping) or pages.get("state") not in _TO_COME


def has_begun(status: Mapping[str, Any]) -> bool:
    """Whether somebody has come for pages."""
    pages = status.get("lazy_pages")
    return isinstance(pages, Mapping) and pages.get("state") != "waiting"

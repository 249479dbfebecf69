"""What has to come after the tasks have been resumed: their pages, and the proof of what was read.

Whatever is raised here means that the tasks must be killed.
"""

import time
from collections.abc import Mapping
from typing import Any, NoReturn

from lazyfs.asking import complete_of
from lazyfs.ground.errors import LazyfsError, SourceError
from lazyfs.restore.lazypages import LazyPages
from lazyfs.restore.served import Served
from lazyfs.restore.verdict import exit_code_of, judge
from lazyfs.restore.watch import DAEMON_GONE, Watch, status_of

RESTORE_FAILED = 6
"""Exit code: CRIU or the runtime could not restore it, or its lazy-pages side has failed."""
_OWN_TICK_S = 0.05
_CONNECT_TIMEOUT_S = 10.0


def wait_for_pages(watch: Watch, served: Served, lazy: LazyPages) -> None:
    """Wait until the last page is home; what has come up is killed if one is lost."""
    while True:
        ready = watch.wait([lazy.fileno(), served.fileno()], served)
        if lazy.fileno() in ready:
            lost = lazy.wait()
            if lost is not None:
                _lose(served, lost)
            return
        if served.fileno() in ready:
            raise LazyfsError(DAEMON_GONE)


def wait_for_own_pages(watch: Watch, served: Served) -> None:
    """Wait until the mount's daemon has brought the last page."""
    patient_until_s = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        status = status_of(served)
        pages = status.get("lazy_pages") or {}
        if pages.get("state") == "waiting" and time.monotonic() > patient_until_s:
            _lose(served, "whoever restored did not ask for them; restore without --lazy-pages")
        raise_if_lost(served, status)
        if pages.get("state") == "home":
            return
        if served.fileno() in watch.wait([served.fileno()], served, _OWN_TICK_S):
            raise LazyfsError(DAEMON_GONE)


def raise_if_lost(served: Served, status: Mapping[str, Any]) -> None:
    """Raise why the mount's daemon could not bring memory, if that is so."""
    pages = status.get("lazy_pages") or {}
    if pages.get("failed") is not None:
        _lose(served, str(pages["failed"]), of_source=True)


def _lose(served: Served, lost: str, *, of_source: bool = False) -> NoReturn:
    status = status_of(served)
    why = judge(status)
    error = LazyfsError(f"pages are lost: {why or lost}; what had been restored is killed")
    is_of_bytes = of_source or why is not None
    error.exit_code = exit_code_of(status) if is_of_bytes else RESTORE_FAILED
    raise error


def wait_for_proof(watch: Watch, served: Served) -> None:
    """Wait until all that a digest promises is proven: what was read may have been wrong."""
    asked = False
    while True:
        status = status_of(served)
        believe(status)
        watch.note(status)
        if status.get("served_proven") is True:
            break
        completion = status.get("completion") or {}
        state = completion.get("state")
        if asked and state == "done":
            break
        if asked and state == "failed":
            error = LazyfsError(
                f"what was restored cannot be proven: {completion['error']}; it is killed"
            )
            error.exit_code = completion["exit_code"] or SourceError.exit_code
            raise error
        if not asked:
            watch.tell(event="proving")
            asked = complete_of(served.path.stat().st_dev, served.pid)
        if served.fileno() in watch.wait([served.fileno()], served):
            raise LazyfsError(DAEMON_GONE)


def believe(status: Mapping[str, Any]) -> None:
    """Go on only if what was restored may live."""
    why = judge(status)
    if why is not None:
        error = LazyfsError(f"{why}; what had been restored is killed")
        error.exit_code = exit_code_of(status)
        raise error

"""After a restore, while something about it can still turn out to be wrong.

A layer whose chunks have no digests of their own is believed as it comes, and proven as a whole
behind what was read (`--verify=background`). A container that was restored from it runs meanwhile;
so the mount stays until the layer is proven, and a container whose bytes were wrong is killed. With
lazy pages the mount stays until the last page is home, too.

What cannot be proven is killed, too: who serves wrong bytes could as well serve no proof. But a
registry that is away for a while does no harm: the proof is asked for again until nothing has come
for ten minutes. Nor does a machine that is so busy that the daemon does not answer at once.
"""

import logging
import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.served import NoAnswer
from lazyfs.restore.verdict import judge
from lazyfs.runtime.lazy import are_home, failure_of, has_begun

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_STANDSTILL_MOST_S = 600.0
_ASKED_IN_VAIN_MOST = 12
"""Five seconds each."""


class Told(Protocol):
    """A mount that tells how it is: `Served`."""

    def status(self) -> Mapping[str, Any]:
        """Return its account of itself.

        Raises:
            NoAnswer: there is none in time.
            LazyfsError: there is none.
        """
        ...


def linger(mount: Told, init: int, name: str, hurry: Callable[[], object]) -> str | None:
    """Wait until a restore is proven; return why the container must be killed, else None.

    `init`: its first process; when that has ended there is nothing to wait for. `hurry` has the
    mount fetch and prove all that is missing; it may be asked again when that has failed.
    """
    try:
        pidfd = os.pidfd_open(init)
    except OSError:
        pidfd = None
    try:
        return _linger(mount, pidfd, name, hurry)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _linger(
    mount: Told,
    pidfd: int | None,
    name: str,
    hurry: Callable[[], object],
) -> str | None:
    is_asked, seen, since_s = False, None, time.monotonic()
    in_vain = 0
    while True:
        try:
            status = mount.status()
        except LazyfsError as error:
            in_vain += 1
            if isinstance(error, NoAnswer) and in_vain < _ASKED_IN_VAIN_MOST:
                log.warning("%s: %s", name, error)
                continue
            return f"what it was restored from cannot be proven any more: {error}"
        in_vain = 0
        reason = judge(status) or failure_of(status)
        if reason is not None:
            return reason
        is_home = are_home(status) or (not has_begun(status) and _has_ended(pidfd))
        if is_home and (is_proven(status) or _has_ended(pidfd)):
            return None
        if is_home:
            state = (status.get("completion") or {}).get("state")
            if not is_asked or state == "failed":
                log.info("%s: what it was restored from is to be proven", name)
                hurry()
                is_asked = True
            now = (status.get("proven_bytes"), status.get("bytes_fetched"))
            if now != seen:
                seen, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > _STANDSTILL_MOST_S:
                return "what it was restored from cannot be proven: the rest does not come"
        time.sleep(_LOOK_EVERY_S)


def _has_ended(pidfd: int | None) -> bool:
    """Whether a container's first process has."""
    if pidfd is None:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def is_proven(status: Mapping[str, Any]) -> bool:
    """Whether nothing that was served can turn out to be wrong any more."""
    return status.get("served_proven") is True

"""After a restore, while something about it can still turn out to be wrong.

A layer whose chunks have no digests of their own is believed as it comes, and proven as a whole
behind what was read (`--verify=background`). A container that was restored from it runs meanwhile;
so the mount stays until the layer is proven, and a container whose bytes were wrong is killed. With
lazy pages the mount stays until the last page is home, too.

Gives up, with a warning, when nothing has come for a long time, or the mount's daemon is gone: what
was read is then as good as the connection that it came by. Pages that come lazily are another
matter: without them the container cannot live.
"""

import logging
import os
import select
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.verdict import judge

if TYPE_CHECKING:
    from lazyfs.runtime.keeper import Pages

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.25
_STANDSTILL_MOST_S = 600.0


class Told(Protocol):
    """A mount that tells how it is: `Served`."""

    def status(self) -> Mapping[str, Any]:
        """Return its account of itself.

        Raises:
            LazyfsError: there is none.
        """
        ...


def linger(mount: Told, init: int, pages: "Pages | None", name: str) -> str | None:
    """Wait until a restore is proven; return why the container must be killed, else None.

    `init`: its first process; when that has ended there is nothing to wait for.
    """
    try:
        pidfd = os.pidfd_open(init)
    except OSError:
        return None
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        seen, since_s = None, time.monotonic()
        while True:
            try:
                status = mount.status()
            except LazyfsError as error:
                if pages is not None and not pages.has_ended():
                    return str(error)
                log.warning("%s: its layer could not be proven: %s", name, error)
                return None
            reason = (pages.failure() if pages is not None else None) or judge(status)
            if reason is not None:
                return reason
            if is_proven(status) and (pages is None or pages.has_ended()):
                return None
            now = (status.get("proven_bytes"), status.get("bytes_fetched"))
            if now != seen:
                seen, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > _STANDSTILL_MOST_S and pages is None:
                log.warning("%s: its layer could not be proven; what came was believed", name)
                return None
            if poll.poll(_LOOK_EVERY_S * 1000):
                return None
    finally:
        os.close(pidfd)


def is_proven(status: Mapping[str, Any]) -> bool:
    """Whether nothing that was served can turn out to be wrong any more."""
    return bool(status.get("chunks_proven") or status.get("blob_proven"))

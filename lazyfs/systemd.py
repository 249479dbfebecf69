"""What systemd is told of a mount that it runs as a service of `Type=notify`.

Source: sd_notify(3), sd_watchdog_enabled(3): datagrams of `KEY=VALUE` to the socket that
`NOTIFY_SOCKET` names; a name that begins with `@` is an abstract one. Whoever is not run by systemd
tells nobody, and nothing here can fail.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, MutableMapping

log = logging.getLogger(__name__)

_STATUS_EVERY_S = 10.0


class Notifier:
    """The service manager that started this process, if there is one."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take the variables out of the environment: they are for this process, not its children.

        A watchdog is for the process that it names, or for any.
        """
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", "") or str(os.getpid())
        self._address = address if address.startswith(("/", "@")) else ""
        self._watchdog_s: float | None = None
        if self._address and watched == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._watchdog_s = int(watchdog_us) / 1e6 or None

    def tell(self, **variables: str) -> None:
        """Tell something: `READY="1"`, `STATUS="…"`."""
        if not self._address:
            return
        lines = (f"{key}={' '.join(value.split())}" for key, value in variables.items())
        address = self._address.encode()
        if address.startswith(b"@"):
            address = b"\0" + address[1:]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
                link.setblocking(False)
                link.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.debug("the service manager does not hear: %s", error)

    async def keep_telling(self, describe: Callable[[], str]) -> None:
        """Tell that the event loop runs, twice as often as is asked for; and how things are.

        It ends with the loop, and a loop that is stuck tells nothing: then systemd ends us.
        """
        if not self._address:
            return
        import trio  # not needed by those who only take their leave of the environment

        pause_s = min(_STATUS_EVERY_S, (self._watchdog_s or _STATUS_EVERY_S) / 2)
        told, told_at_s = "", float("-inf")
        while True:
            news: dict[str, str] = {"WATCHDOG": "1"} if self._watchdog_s else {}
            now_s = trio.current_time()
            if now_s - told_at_s >= _STATUS_EVERY_S:
                told_at_s = now_s
                status = _status(describe)
                if status != told:
                    news["STATUS"] = told = status
            if news:
                self.tell(**news)
            await trio.sleep(pause_s)


def _status(describe: Callable[[], str]) -> str:
    try:
        return describe()
    except Exception:  # a bug must not end the mount
        log.exception("what the service manager is told is not known: please report this")
        return "not known"

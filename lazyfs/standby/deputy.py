"""The child of a standby that becomes a client's command: from its fork to its end.

It takes on all that the client is, says READY, and waits for GO; before that it has done nothing,
and whatever cannot be had ends it. Then it is the command, as a fresh process would be: what an
interpreter sets up as it starts - streams, sys.argv, the environment, signals - is set up anew.

It ends without the interpreter's own end, which would take apart all that was imported.
"""

import atexit
import locale
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from socket import CMSG_SPACE, MSG_CTRUNC, MSG_TRUNC, SCM_RIGHTS, SOL_SOCKET, socket
from typing import Any, NoReturn

from lazyfs.standby import takeover, wire
from lazyfs.standby.adopter import adopter
from lazyfs.standby.cmdline import show_as
from lazyfs.standby.takeover import CannotBe

Command = Callable[[Sequence[str]], int]
"""Runs the arguments of a command line, without the program's name; returns the exit code."""

_REQUEST_TIMEOUT_S = 10.0
_FAILED = 1
_INTERRUPTED = 130
_STANDARD_ERROR = 2
_WITHOUT_NUMBER = 2
"""Descriptors of a request: see `wire.Request.descriptors`."""


class Origin:
    """What a standby is, to compare a request with."""

    def __init__(self) -> None:
        """Look."""
        self.identity = wire.identity()
        self.read_at_start = wire.read_at_start(wire.variables())
        self.parent = os.getppid()
        self.adopter = adopter()

    def look_again(self) -> None:
        """See whose children its orphans become, if its own parent has ended."""
        if os.getppid() != self.parent:
            self.parent = os.getppid()
            self.adopter = adopter()


def become(link: socket, client: int, origin: Origin, commands: Mapping[str, Command]) -> NoReturn:
    """Be what is asked for on `link` by the process `client`; for a fresh child of a standby."""
    code = _FAILED
    try:
        signal.set_wakeup_fd(-1)
        link.settimeout(_REQUEST_TIMEOUT_S)
        try:
            request, given = _receive(link)
            command = _check(request, origin, commands)
            lifeline, here, *files = given
            os.fchdir(here)
            kept = [link.fileno(), lifeline]
            moved, lifeline = takeover.put_descriptors(files, request.descriptors, kept)
            link.detach()
            link = socket(fileno=moved)
            _take_on(request, client)
            takeover.die_with(lifeline)
            _say_ready(link)
        except (CannotBe, ValueError, OSError) as problem:
            with suppress(OSError):
                link.send(wire.NO + f"it cannot be {problem}".encode()[: wire.REASON_MOST_BYTES])
            os._exit(_FAILED)
        link.settimeout(None)  # who has seen READY is waited for, and we are killed if he goes
        if link.recv(1) == wire.GO:
            code = _run(command, sys.argv[1:], request.blocked)
            with suppress(OSError):
                link.send(wire.ENDED + code.to_bytes(4, sys.byteorder))
    finally:
        os._exit(code)


def _check(request: wire.Request, origin: Origin, commands: Mapping[str, Command]) -> Command:
    """Return the command, if a child of the standby can be it."""
    if request.identity != origin.identity:
        raise CannotBe("another lazyfs, or in another Python, than the standby is")
    if wire.read_at_start(request.environment) != origin.read_at_start:
        raise CannotBe("with other settings of Python than the standby has")
    if request.adopter and request.adopter != origin.adopter:
        raise CannotBe("one whose restored tasks become children of who is to have them")
    command = commands.get(request.program.decode())
    if command is None:
        raise CannotBe("a program that the standby does not know")
    return command


def _take_on(request: wire.Request, client: int) -> None:
    """Be what the client is, with all signals blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.setsid()
    takeover.take_on_groups(client)
    takeover.take_on_limits(client)
    show_as(client, b"\0".join(request.environment) + b"\0")
    _begin_anew(request, _ignored_by(client))


def _receive(link: socket) -> tuple[wire.Request, list[int]]:
    room = CMSG_SPACE(wire.DESCRIPTORS_MOST * 4)
    message, rights, flags, _ = link.recvmsg(wire.REQUEST_MOST_BYTES, room)
    given = array("i")
    for level, kind, data in rights:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            given.frombytes(data[: len(data) - len(data) % given.itemsize])
    if flags & (MSG_TRUNC | MSG_CTRUNC):
        raise CannotBe("asked so much")
    request = wire.parse_request(message)
    if len(given) != len(request.descriptors) + _WITHOUT_NUMBER:
        raise ValueError("given other descriptors than it names")
    return request, list(given)


def _say_ready(link: socket) -> None:
    pidfd = os.pidfd_open(os.getpid())
    rights = array("i", [pidfd])
    link.sendmsg([wire.READY], [(SOL_SOCKET, SCM_RIGHTS, rights)])
    os.close(pidfd)


def _begin_anew(request: wire.Request, ignored: int) -> None:
    """Be as an interpreter is that has just started for the request."""
    os.umask(request.umask)
    os.environb.clear()
    for each in request.environment:
        name, _, value = each.partition(b"=")
        os.environb[name] = value
    time.tzset()
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    tempfile.tempdir = None
    sys.argv = [os.fsdecode(each) for each in request.arguments]
    sys.path[:] = [os.fsdecode(each) for each in request.path]
    _open_streams([each.decode("ascii") for each in request.streams])
    _forget_logging()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        is_ignored = ignored >> (number - 1) & 1
        handler = signal.SIG_IGN if is_ignored else signal.SIG_DFL
        if number == signal.SIGINT and not is_ignored:
            signal.signal(number, signal.default_int_handler)
        elif signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _open_streams(words: Sequence[str]) -> None:
    """Open the three streams as the interpreter does (Python/pylifecycle.c, create_stdio)."""
    made: list[Any] = []
    for number, mode in enumerate(("r", "w", "w")):
        encoding, errors = words[2 * number : 2 * number + 2]
        if not encoding:
            made.append(None)
            continue
        lines = 1 if number == _STANDARD_ERROR else -1
        made.append(open(number, mode, lines, encoding, errors or None, closefd=False))  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = made
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = made  # type: ignore[misc]


def _forget_logging() -> None:
    logger = logging.getLogger("lazyfs")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def _ignored_by(client: int) -> int:
    """Return the signals that it ignores, bit n-1 for signal n. Source: proc_pid_status(5)."""
    with open(f"/proc/{client}/status") as file:
        for line in file:
            if line.startswith("SigIgn:"):
                return int(line.split()[1], 16)
    raise CannotBe("told which signals are ignored")


def _run(command: Command, arguments: Sequence[str], blocked: Sequence[int]) -> int:
    """Run it to its end, whatever that is, with these signals blocked; return the exit code."""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        code = command(arguments)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BaseException:  # noqa: BLE001 - there is nobody else to tell
        traceback.print_exc()
        code = _FAILED
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    return code & 0xFF

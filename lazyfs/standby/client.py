"""What a command does before it imports anything: see whether a standby will be it.

The standby's child, the *deputy*, then is the command, with our descriptors, and we wait for its
exit code. It gets the signals that we get. If we end, however, it is killed: the kernel sees to
that, by a pipe of which only we hold the end that is written to.

Everything here may fail, and then the command is run as if there were no standby: nothing has been
done until GO is said. `LAZYFS_STANDBY=off` asks for none; `LAZYFS_STANDBY=must` says why there is
none, and ends.

Light imports only, C modules where there are some: who starts without a standby pays for a `stat`,
and who has one for little more than the interpreter.
Source: pidfd_send_signal(2), unix(7).
"""

import _signal  # type: ignore[import-not-found]  # what `signal` is made of, without its enums
import _socket
import os
import sys

from lazyfs.standby import wire
from lazyfs.standby.adopter import adopter
from lazyfs.transport.run_directory import run_directory

_COMMANDS = frozenset(
    ["mount", "restore", "umount", "status", "wait", "warm", "inspect", "ls", "cat"]
)
_OWN_PROCESS = frozenset(["--foreground", "--shell-job"])
"""Words that ask for this very process, or its session; so does CRIU's `-j`, as in `-vj`."""
_ANSWER_TIMEOUT_S = 3.0
"""After that the standby is stopped, or stuck. A fork takes milliseconds, but hosts are busy."""
_END_TIMEOUT_S = 1.0
"""For a command that has said that it has ended to be gone."""
_FAILED = 1
_SIGNALLED = 128
_TO_STOP = (_signal.SIGTSTP, _signal.SIGTTIN, _signal.SIGTTOU)
_PASSED_ON = (
    *(_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT),
    *(_signal.SIGUSR1, _signal.SIGUSR2, _signal.SIGALRM, _signal.SIGWINCH, _signal.SIGCONT),
)


class _NoStandby(Exception):
    """There is none that would be this command; says why."""


def run_elsewhere(program: str) -> int | None:
    """Have a standby run this process's command line; return its exit code.

    None: there is no standby, or none for this; nothing has been done.
    """
    wanted = os.environ.get("LAZYFS_STANDBY", "")
    if wanted == "off" or not _is_for_a_standby(program, sys.argv[1:]):
        return None
    try:
        link = _connect()
    except (OSError, _NoStandby) as problem:
        return _without(wanted, problem)
    held = _signal.pthread_sigmask(_signal.SIG_BLOCK, [*_PASSED_ON, *_TO_STOP])
    try:
        deputy = _ask(link, program, held)
        link.send(wire.GO)
        _pass_signals_on(deputy)
    except (OSError, _NoStandby) as problem:
        link.close()
        return _without(wanted, problem)
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, held)
    return _wait(link)


def _is_for_a_standby(program: str, arguments: list[str]) -> bool:
    """Whether it gains by one, and is nothing that only a child of its caller can be."""
    if "NOTIFY_SOCKET" in os.environ:  # systemd wants to hear from the process that it started
        return False
    if program == "mount.lazyfs":
        return True
    if not _OWN_PROCESS.isdisjoint(arguments) or any(map(_is_shell_job, arguments)):
        return False
    command = next((each for each in arguments if not each.startswith("-")), "")
    return command in _COMMANDS


def _is_shell_job(word: str) -> bool:
    """As `restore.plan` sees it."""
    return word.startswith("-") and word.endswith("j") and word[1:].isalpha()


def _without(wanted: str, problem: Exception) -> int | None:
    if wanted != "must":
        return None
    if isinstance(problem, FileNotFoundError | ConnectionRefusedError):
        problem = _NoStandby("there is none; `lazyfs standby &` starts one")
    sys.stderr.write(f"lazyfs: no standby runs this: {problem}\n")
    return _FAILED


def _connect() -> _socket.socket:
    """Connect to this user's standby, if it is that."""
    directory = run_directory()
    path = f"{directory}/{wire.SOCKET_NAME}"
    os.stat(path)  # noqa: PTH116 - no pathlib here
    status = os.lstat(directory)
    user = os.geteuid()
    if status.st_uid != user or status.st_mode & 0o077:
        raise _NoStandby(f"others may get at {directory}")
    link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    link.settimeout(_ANSWER_TIMEOUT_S)
    link.connect(path)
    credentials = link.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    if int.from_bytes(credentials[4:8], sys.byteorder) != user:
        raise _NoStandby("it belongs to another user")
    return link


def _ask(link: _socket.socket, program: str, held: set[int]) -> int:
    """Return a pidfd of the deputy, which waits for GO."""
    _expect(wire.WELCOME, link.recv(wire.REASON_MOST_BYTES))
    numbers = _inheritable_descriptors()
    if len(numbers) + 2 > wire.DESCRIPTORS_MOST:
        raise _NoStandby("there are too many open files")
    umask = os.umask(0o077)
    os.umask(umask)
    request = wire.Request(
        wire.identity(),
        program.encode(),
        [os.fsencode(each) for each in sys.argv],
        wire.variables(),
        [os.fsencode(each) for each in sys.path],
        _streams(),
        numbers,
        sorted(held),
        umask,
        adopter() if "restore" in sys.argv else 0,
    )
    lifeline, _ours = os.pipe()  # which we hold as long as we live
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    rights = b"".join(
        each.to_bytes(4, sys.byteorder, signed=True) for each in (lifeline, here, *numbers)
    )
    link.sendmsg([request.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    os.close(here)
    os.close(lifeline)
    answer, received, _, _ = link.recvmsg(wire.REASON_MOST_BYTES, _socket.CMSG_SPACE(4))
    _expect(wire.READY, answer)
    if not received:
        raise _NoStandby("it has no descriptors left")
    pidfd = int.from_bytes(received[0][2][:4], sys.byteorder)
    os.set_inheritable(pidfd, False)
    return pidfd


def _expect(wanted: bytes, answer: bytes) -> None:
    if answer != wanted:
        raise _NoStandby(answer[1:].decode(errors="replace") or "it is gone")


def _inheritable_descriptors() -> list[int]:
    """Return those that a program which is started gets: all that our caller gave us.

    And the standard ones, which he may have closed, and which are /dev/null then.
    """
    found = [0, 1, 2]
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - as above
        try:
            if int(name) > found[2] and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:  # of the listing itself
            continue
    return found


def _streams() -> list[bytes]:
    words: list[bytes] = []
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        encoding = stream.encoding if stream is not None else ""
        handler = (stream.errors if stream is not None else "") or ""
        words += [encoding.encode(), handler.encode()]
    return words


def _pass_signals_on(deputy: int) -> None:
    """Hand every signal on to the deputy; one that stops us stops it, and we stop."""

    def pass_on(number: int, _: object) -> None:
        _send(deputy, number)

    def stop(number: int, _: object) -> None:
        _send(deputy, _signal.SIGSTOP)
        os.kill(os.getpid(), _signal.SIGSTOP)

    for numbers, handler in ((_PASSED_ON, pass_on), (_TO_STOP, stop)):
        for number in numbers:
            if _signal.getsignal(number) != _signal.SIG_IGN:
                _signal.signal(number, handler)


def _send(deputy: int, number: int) -> None:
    try:
        _signal.pidfd_send_signal(deputy, number)
    except OSError:  # it has ended
        return


def _wait(link: _socket.socket) -> int:
    """Return the exit code; ends as the deputy did if a signal ended that."""
    link.settimeout(None)
    try:
        answer = link.recv(wire.REASON_MOST_BYTES)
    except OSError:
        answer = b""
    number = int.from_bytes(answer[1:5], sys.byteorder)
    if answer[:1] == wire.ENDED:
        _wait_until_gone(link)
        return number
    if answer[:1] != wire.KILLED:
        sys.stderr.write("lazyfs: the standby and its command were killed\n")
        return _FAILED
    try:  # noqa: SIM105 - no contextlib here
        _signal.signal(number, _signal.SIG_DFL)
    except (OSError, ValueError):  # SIGKILL cannot be set to what it is
        pass
    os.kill(os.getpid(), number)
    return _SIGNALLED + number


def _wait_until_gone(link: _socket.socket) -> None:
    """Come back when the deputy has no files open any more, and is in no control group.

    The standby says ENDED once more when it has reaped it; without a standby the link ends then.
    """
    try:
        link.settimeout(_END_TIMEOUT_S)
        link.recv(wire.REASON_MOST_BYTES)
    except OSError:  # the standby is stopped
        return

"""A command that returns when its daemon is ready: fork, a pipe, and who says what to whom.

The child keeps the caller's standard error until it is ready, so that what goes wrong on the
way is said where it was asked; then it belongs to its log. If the caller goes away before it has
heard, the child ends too: nobody would know of it. So the caller answers: what is in a pipe may be
there for somebody who is being killed, and will not run again.
"""

import errno
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from lazyfs.background import close_inherited, log_to

_READY_LIMIT_BYTES = 64 * 1024
_HEARD = b"h"
_ANSWER_TIMEOUT_S = 5.0
"""A caller who does not answer is stopped; he will hear it when he goes on."""
_INTERRUPTED = 130


def run_detached(
    serve: Callable[[Callable[[str], None]], int],
    log_file: Path,
    kept: Collection[int] = (),
) -> tuple[int, str]:
    """Run `serve` in a child that lives on; return when it is ready or has failed.

    `serve` is given a function to call once, with a message for the caller, when it is ready;
    what it returns is the child's exit code. Returned are the exit code for the caller (0 when
    ready) and that message. The child keeps the descriptors `kept`, and no other of the caller's.
    Ctrl-C ends the child too, from the moment there is one; once it is ready, the caller has all
    but returned, and is not interrupted any more.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    hearing, answering = os.pipe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.close(answering)
        _live(serve, writing, hearing, log_file, kept, blocked)
    os.close(writing)
    os.close(hearing)
    try:
        with open(reading, "rb") as pipe, open(answering, "wb", buffering=0) as answer:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            message = pipe.read(_READY_LIMIT_BYTES)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with suppress(BrokenPipeError):  # it has failed, or waits no longer
                answer.write(_HEARD)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        return _INTERRUPTED, ""
    if message:
        return 0, message.decode()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _, wait_status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    if code < 0:
        sys.stderr.write(f"lazyfs: the daemon was ended by signal {-code}\n")
    return abs(code) or 1, ""


def _live(
    serve: Callable[[Callable[[str], None]], int],
    pipe: int,
    hearing: int,
    log_file: Path,
    kept: Collection[int],
    blocked: Collection[int],
) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        close_inherited({pipe, hearing, *kept})

        def ready(message: str) -> None:
            os.chdir("/")  # the caller's directory may want to be removed or unmounted
            os.write(pipe, message.encode())
            os.close(pipe)
            _await_answer(hearing)
            os.close(hearing)
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.close(null)

        log_to(log_file)
        code = serve(ready)
    except BaseException as error:  # noqa: BLE001 - nobody else will say it
        from lazyfs.cli.main import report

        code = report(error)
    finally:
        logging.shutdown()
        os._exit(code)


def _await_answer(hearing: int) -> None:
    """Come back when the caller has heard, or has not gone within some seconds.

    Raises:
        BrokenPipeError: he is gone, and has not.
    """
    poll = select.poll()
    poll.register(hearing, select.POLLIN)
    if poll.poll(_ANSWER_TIMEOUT_S * 1000) and not os.read(hearing, 1):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

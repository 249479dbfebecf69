"""A command that returns when its daemon is ready: fork, a pipe, and who says what to whom.

The child keeps the caller's standard error until it is ready, so that what goes wrong on the
way is said where it was asked; then it belongs to its log. If the caller goes away before that,
the child ends too: nobody would know of it.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from lazyfs.background import close_inherited, log_to

_READY_LIMIT_BYTES = 64 * 1024
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
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live(serve, writing, log_file, kept)
    os.close(writing)
    try:
        with open(reading, "rb") as pipe:
            message = pipe.read(_READY_LIMIT_BYTES)
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        return _INTERRUPTED, ""
    if message:
        return 0, message.decode()
    _, wait_status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    if code < 0:
        sys.stderr.write(f"lazyfs: the daemon was ended by signal {-code}\n")
    return abs(code) or 1, ""


def _live(
    serve: Callable[[Callable[[str], None]], int], pipe: int, log_file: Path, kept: Collection[int]
) -> None:
    """Be the child; never returns."""
    code = 1
    try:
        os.setsid()
        close_inherited({pipe, *kept})

        def ready(message: str) -> None:
            os.write(pipe, message.encode())
            os.close(pipe)
            os.chdir("/")  # the caller's directory may want to be removed or unmounted
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

"""The command `lazyfs`, also as `python -m lazyfs`; and mount(8)'s helper `mount.lazyfs`."""

import gc
import os
import sys

_INTERRUPTED = 130
_STANDARD_ERROR = 2
_GARBAGE_OBJECTS = 100_000
"""Importing makes some 50,000 objects and no garbage: looking for some is a tenth of its time."""


def main() -> None:
    """Run the command line and exit with its code."""
    gc.set_threshold(_GARBAGE_OBJECTS)
    _open_standard_descriptors()
    _leave_to_standby("lazyfs")
    try:
        from lazyfs.cli.main import run
    except KeyboardInterrupt:  # what a command itself does with it, `run` decides
        sys.exit(_INTERRUPTED)
    _leave(run(sys.argv[1:]))


def mount_helper() -> None:
    """Do what mount(8) asks for and exit with a code of its own."""
    _open_standard_descriptors()
    _leave_to_standby("mount.lazyfs")
    from lazyfs.cli.mount_helper import run_helper

    sys.exit(run_helper(sys.argv[1:]))


def _leave_to_standby(program: str) -> None:
    """Exit with a standby's exit code, if there is one that has been this command."""
    try:
        from lazyfs.standby.client import run_elsewhere

        code = run_elsewhere(program)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code is not None:
        os._exit(code)  # nothing was printed here that is not out


def _leave(code: int) -> None:
    """End with `code`, and at once, unless there is somebody to wait for.

    The interpreter frees what was imported piece by piece, 10 ms of it, while whoever asked for a
    mount waits; the kernel frees it at once.
    """
    import contextlib  # imported by now; who leaves all to a standby does without
    import logging
    import threading

    here = threading.current_thread()
    if any(not each.daemon for each in threading.enumerate() if each is not here):
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # `run` has told it, if it could
            stream.flush()
    os._exit(code)


def _open_standard_descriptors() -> None:
    """Put /dev/null where a caller has closed standard input, output or error.

    Else the next file to be opened, one of the cache perhaps, would be what is printed to.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as the interpreter does
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()

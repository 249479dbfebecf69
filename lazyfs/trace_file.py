"""The file that a trace is put into: whole or not at all, and for nobody else to read.

It tells where in its memory a process was at work. Light imports only: looked at before a fork.
"""

import os
from contextlib import suppress
from pathlib import Path

import msgspec

from lazyfs.ground.errors import UsageError

_PROBE_BYTES = 64 * 1024
_NAME_MOST = 200


class RecordConfig(msgspec.Struct, frozen=True):
    """What is recorded, and where it goes."""

    file: Path
    way: str = ""
    """How memory comes; `trace.Recording.way`."""
    began_s: float = 0.0
    """When the command began, by `time.monotonic`."""
    link: int | None = None
    """A socket to who says when it is over; None: the end of the mount is."""
    is_precise: bool = True
    """Whether only what is wanted is brought meanwhile; else all goes as it would otherwise."""


def check_recordable(file: Path) -> Path:
    """Return the file's absolute path, if a trace can be put there.

    Raises:
        UsageError: it cannot.
    """
    file = file.absolute()
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"the trace {file} is to be a regular file")
        made = _beside(file, bytes(_PROBE_BYTES))
        made.unlink()
    except OSError as error:
        raise UsageError(f"the trace {file} cannot be written: {error.strerror}") from None
    return file


def write_whole(file: Path, data: bytes) -> None:
    """Put a file in the place of what is there; for nobody else to read.

    Raises:
        OSError: it cannot be.
    """
    made = _beside(file, data)
    try:
        made.replace(file)
    except OSError:
        made.unlink()
        raise


def _beside(file: Path, data: bytes) -> Path:
    """Write a new file beside one."""
    made = file.with_name(f".{file.name[:_NAME_MOST]}.{os.getpid()}")
    made.unlink(missing_ok=True)
    try:
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as writing:
            writing.write(data)
            writing.flush()
            os.fsync(writing.fileno())
    except OSError:
        with suppress(OSError):
            made.unlink()
        raise
    return made

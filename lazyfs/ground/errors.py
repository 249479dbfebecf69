"""One tree of errors; each knows its errno for a reader and its exit code for a shell.

Foreign exceptions are translated into these in the module that imports their library, and
nowhere else. A message says what was asked, of whom, and what to do about it, and carries no
credentials and no query string of a URL (it may be signed).

Exit codes are a promise to scripts (README, "Exit codes"):

    1  anything not named below          4  not a checkpoint that lazyfs can show
    2  the command line is wrong         5  bytes contradict their digest
    3  the source cannot be had
"""

import errno as _errno
from typing import NoReturn

CONDEMNED = "; every read fails from now on"
"""How a log line ends that tells of a failed proof."""


class LazyfsError(Exception):
    """Base of everything that lazyfs raises on purpose."""

    errno: int = _errno.EIO
    exit_code: int = 1


class UsageError(LazyfsError):
    """The command line asks for something that cannot be: options, reference, mount point."""

    errno = _errno.EINVAL
    exit_code = 2


class SourceError(LazyfsError):
    """The source does not give what was asked, and asking again will not help.

    Unreachable for good, 401, 403, 404, no support for ranges.
    """

    exit_code = 3


class FetchError(SourceError):
    """Bytes could not be obtained this time.

    `transient` says whether a retry may help; `retry_after_s` is the server's own wish.
    """

    def __init__(
        self, message: str, *, transient: bool, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.transient = transient
        self.retry_after_s = retry_after_s


class ClosedEarly(FetchError):
    """The connection was closed before any answer; on one that was idle, that is nobody's fault."""


class NotTls(SourceError):
    """What answers does not speak TLS: perhaps plain HTTP."""


class OddAnswer(SourceError):
    """Not what HTTP has a server answer: if it was mangled on the way, the next may be right."""


class UnknownHost(FetchError):
    """A name that no name server knows: while mounting a slip of the pen, later only weather."""


class NotACheckpoint(LazyfsError):
    """The image is whole, but it is something else than a checkpoint."""

    exit_code = 4


class UnsupportedLayer(LazyfsError):
    """A layer format that this version does not read; the message names what works."""

    exit_code = 4


class MalformedError(LazyfsError):
    """Bytes that do not follow their own format: a manifest, a tar header, a TOC."""

    exit_code = 4


class IntegrityError(LazyfsError):
    """Bytes contradict the digest that the manifest promised. Never retried, never served."""

    exit_code = 5


def raise_sole_error(group: BaseExceptionGroup[BaseException]) -> NoReturn:
    """Raise the first LazyfsError of a nursery's group, if there is nothing else in it.

    Else, where a bug or a cancellation is in it too, raise the group as it is.
    """
    ours, others = group.split(LazyfsError)
    if ours is None or others is not None:
        raise group
    leaf: BaseException = ours
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    raise leaf from None

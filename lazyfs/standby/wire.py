"""What a client and its standby say to each other, on a SOCK_SEQPACKET socket.

    standby  WELCOME; or NO and why: the client carries on by itself, now or later
    client   Request, with its descriptors (SCM_RIGHTS), which a standby that is stopped never gets
    standby  READY, with a pidfd of the deputy, which has taken on all that the client is; or NO
    client   GO: from here on the deputy is the command, and never before
    standby  ENDED and four bytes, an exit code; or KILLED and four bytes, a signal

A request is text fields, each ended by a NUL, which none of them can contain: lists, each led by
its length. The end of the client's pipe is the end of the deputy (`takeover.die_with`).

Light imports only: these are the first milliseconds of every command.
Source: unix(7), SOCK_SEQPACKET, SCM_RIGHTS.
"""

import os
import sys

import lazyfs

SOCKET_NAME = "standby.sock"
WELCOME = b"w"
NO = b"n"
READY = b"r"
GO = b"g"
ENDED = b"e"
KILLED = b"k"

REQUEST_MOST_BYTES = 1 << 20
"""A socket takes some 200 KiB; who has a longer environment carries on by himself."""
DESCRIPTORS_MOST = 253
"""SCM_MAX_FD, unix(7)."""
REASON_MOST_BYTES = 512

_COUNT_MOST = 100_000
_READ_AT_START = (
    *("PYTHON", "LD_", "GLIBC_", "MALLOC_", "OPENSSL_", "PROTOCOL_BUFFERS_", "PROMETHEUS_"),
    "COVERAGE_",
)
"""Variables with such names are read by an interpreter or a library as it starts, once."""


_FLAGS = (
    *("debug", "inspect", "interactive", "optimize", "dont_write_bytecode", "no_user_site"),
    *("no_site", "ignore_environment", "verbose", "bytes_warning", "quiet", "hash_randomization"),
    *("isolated", "dev_mode", "warn_default_encoding", "safe_path", "int_max_str_digits"),
)
"""All but utf8_mode: whether it is that, or the locale, makes no difference to the encoding."""


class Request:
    """A command line, and what it is to be run with."""

    __slots__ = (
        "adopter",
        "arguments",
        "blocked",
        "descriptors",
        "environment",
        "identity",
        "path",
        "program",
        "streams",
        "umask",
    )

    def __init__(
        self,
        identity: list[bytes],
        program: bytes,
        arguments: list[bytes],
        environment: list[bytes],
        path: list[bytes],
        streams: list[bytes],
        descriptors: list[int],
        blocked: list[int],
        umask: int,
        adopter: int,
    ) -> None:
        self.identity = identity
        """See `identity`."""
        self.program = program
        """`lazyfs` or `mount.lazyfs`."""
        self.arguments = arguments
        """Those of the command line, the program's name first."""
        self.environment = environment
        """NAME=VALUE."""
        self.path = path
        """sys.path."""
        self.streams = streams
        """Encoding and error handler of each of sys.stdin, stdout and stderr; empty: it is None."""
        self.descriptors = descriptors
        """The numbers of those that come with the request, in their order. Before them come two
        without a number: a pipe that nobody writes to, and the working directory."""
        self.blocked = blocked
        """The signals that are."""
        self.umask = umask
        self.adopter = adopter
        """Whose child an orphan of the client becomes; 0: it leaves none that anybody waits for."""

    def encode(self) -> bytes:
        """Return the message."""
        lists = [
            self.identity,
            [self.program],
            self.arguments,
            self.environment,
            self.path,
            self.streams,
            [b"%d" % each for each in self.descriptors],
            [b"%d" % each for each in self.blocked],
            [b"%d" % self.umask, b"%d" % self.adopter],
        ]
        fields: list[bytes] = []
        for each in lists:
            fields.append(b"%d" % len(each))
            fields += each
        return b"\0".join(fields) + b"\0"


def parse_request(message: bytes) -> Request:
    """Return what was encoded.

    Raises:
        ValueError: it is no request.
    """
    if not message.endswith(b"\0"):
        raise ValueError("asked for by half a request")
    fields = message[:-1].split(b"\0")
    lists: list[list[bytes]] = []
    at = 0
    while at < len(fields):
        count = _number(fields[at], _COUNT_MOST)
        lists.append(fields[at + 1 : at + 1 + count])
        at += 1 + count
    if at != len(fields) or len(lists) != 9:
        raise ValueError("asked for without all that is needed")
    identity, program, arguments, environment, path, streams, descriptors, blocked, rest = lists
    if len(program) != 1 or len(rest) != 2 or len(streams) != 6 or not arguments:
        raise ValueError("asked for without all that is needed")
    numbers = [_number(each, 1 << 30) for each in descriptors]
    if len(set(numbers)) != len(numbers) or not {0, 1, 2} <= set(numbers):
        raise ValueError("given descriptors without the three of each program")
    return Request(
        identity,
        program[0],
        arguments,
        environment,
        path,
        streams,
        numbers,
        [_number(each, 64) for each in blocked],
        _number(rest[0], 0o777),
        _number(rest[1], 1 << 30),
    )


def _number(text: bytes, most: int) -> int:
    if not text.isdigit() or len(text) > 10 or int(text) > most:
        raise ValueError("asked for with something else where a number belongs")
    return int(text)


def identity() -> list[bytes]:
    """Return which lazyfs this is, in which interpreter; two that differ are not one program."""
    texts = [
        *(lazyfs.__version__, str(lazyfs.__file__), sys.version, sys.prefix, sys.base_prefix),
        *(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()),
        *(str(getattr(sys.flags, name, None)) for name in _FLAGS),
        *sys.warnoptions,
        *(f"{name}={value}" for name, value in sorted(sys._xoptions.items())),
        *sys.path[1:],
    ]
    return [os.fsencode(text) for text in texts]


def read_at_start(environment: list[bytes]) -> list[bytes]:
    """Return those variables that a process which runs already cannot take on."""
    names = tuple(name.encode() for name in _READ_AT_START)
    return sorted(each for each in environment if each.startswith(names))


def variables() -> list[bytes]:
    """Return this process's environment, NAME=VALUE."""
    return [name + b"=" + value for name, value in os.environb.items()]

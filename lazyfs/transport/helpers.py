"""Credential helpers: programs that keep what people do not want in a file.

Decides how `docker-credential-NAME get` is asked and what its answer means. The server goes in on
standard input and the secret comes out on standard output: neither is in an argument or in the
environment, which others can read. What a helper says when it fails is not shown, since nobody
promises that there is no secret in it; the message says how a person can see it.

Input and output are files in memory, so a helper that leaves a child behind (`gpg-agent`) cannot
keep us waiting for the end of a pipe.

Source: docker-credential-helpers, `client/client.go`, `credentials/error.go`; the name `<token>`
is as docker/cli and containers/image (`pkg/docker/config`) have it.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

import msgspec

from lazyfs.ground.discreet import Discreet
from lazyfs.ground.errors import SourceError

_HELPER_MOST_S = 30.0
_ANSWER_LIMIT_BYTES = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_NONE = {b"credentials not found in native keychain", b"no credentials server URL"}
_TOKEN = "<token>"  # noqa: S105 - what stands in place of a user's name


class HelperError(SourceError):
    """A helper did not answer as it should: perhaps it does so later."""


class NoHelper(SourceError):
    """There is no such helper on this machine."""


class HelperAnswer(Discreet, frozen=True):
    """What a helper knows. Its repr tells nothing of it."""

    unprinted = ("username", "secret")
    username: str
    secret: str

    @property
    def is_identity_token(self) -> bool:
        """Whether the secret is a refresh token and there is no user name."""
        return self.username == _TOKEN


class _Reply(msgspec.Struct, frozen=True):
    username: str = msgspec.field(default="", name="Username")
    secret: str = msgspec.field(default="", name="Secret")


def ask_helper(
    name: str, server: str, *, environ: Mapping[str, str], timeout_s: float = _HELPER_MOST_S
) -> HelperAnswer | None:
    """Return what `docker-credential-NAME` knows of `server`; None: nothing. Blocks.

    Raises:
        NoHelper: it is not on PATH, or the name is none.
        HelperError: it failed, took too long, or answered something else.
    """
    if not _NAME.fullmatch(name):
        raise NoHelper(f"{name[:100]!r} is not the name of a credential helper")
    program = f"docker-credential-{name}"
    found = shutil.which(program, path=environ.get("PATH", os.defpath))
    if found is None:
        raise NoHelper(f"the credential helper {program} is not on PATH")
    status, output = _run(found, server, environ, timeout_s)
    if status is None:
        raise HelperError(f"{program} did not answer for {server} within {timeout_s:g} s")
    if status != 0:
        if output.strip() in _NONE:
            return None
        raise HelperError(
            f"{program} failed for {server} (exit status {status}); "
            f"`echo {server} | {program} get` shows why"
        )
    return parse_answer(output, program, server)


def parse_answer(output: bytes, program: str, server: str) -> HelperAnswer | None:
    """Read what a helper printed; None: nothing secret is in it.

    Raises:
        HelperError: it is something else than an answer.
    """
    try:
        reply = msgspec.json.decode(output, type=_Reply)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise HelperError(f"{program} answered for {server} with something else") from None
    return HelperAnswer(reply.username, reply.secret) if reply.secret else None


def _run(
    program: str, server: str, environ: Mapping[str, str], timeout_s: float
) -> tuple[int | None, bytes]:
    """Return exit status (None: it took too long and was killed) and standard output."""
    with (
        open(os.memfd_create("server"), "w+b") as question,
        open(os.memfd_create("answer"), "w+b") as answer,
    ):
        question.write(server.encode())
        question.seek(0)
        try:
            process = subprocess.Popen(
                [program, "get"],
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env=dict(environ),
            )
        except OSError as error:
            raise HelperError(f"{program} cannot be run: {error.strerror or error}") from None
        with process:
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                return None, b""
        answer.seek(0)
        return status, answer.read(_ANSWER_LIMIT_BYTES)

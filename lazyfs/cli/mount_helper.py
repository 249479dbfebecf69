"""`mount.lazyfs`: what mount(8) calls for `mount -t lazyfs REF DIR -o …`, and for a line of fstab.

Decides what the options mean. `lazyfs mount`'s own have the same names here, less the dashes
(`cache-dir=/srv/lazyfs`, `plain-http`); those of mount(8) that are for itself, for systemd or
about what a read-only filesystem does not do are accepted. Anything else is an error, but not
with `-s`. Whoever asks to write is not refused: mount(8) itself puts `rw` before the options
unless `ro` is among them (libmount, `src/optlist.c`, `mnt_optlist_strdup_optstr`), so the word says
nothing.

What mountinfo shows as the mount's source is REF as it was given: mount(8) takes it for mounted by
that (`mount -a`, `umount REF`). A URL's query, which may be a signature, is not shown.

Source of the calling convention and of the exit codes: mount(8), "External helpers", "Exit status".
"""

import contextlib
import getopt
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

import lazyfs
from lazyfs import mountpoint
from lazyfs.checkpoint.reference import parse_reference
from lazyfs.cli.main import report, run
from lazyfs.cli.mount import mount_command
from lazyfs.cli.options import log_to_stderr
from lazyfs.cli.text import printable
from lazyfs.ground.errors import LazyfsError, UsageError

USAGE = """\
Usage: mount.lazyfs REF DIR [-sfnv] [-o OPTION[,OPTION...]]

For mount(8): mount -t lazyfs REF DIR -o OPTIONS, and lines of fstab.

  -o  the options of `lazyfs mount`, without dashes, and mount(8)'s own; a value with commas in
      double quotes: cache-dir="/a,b"
  -f  fake: check the words and DIR, mount nothing
  -s  ignore options that are not known
  -v  say what is mounted
  -n  nothing: there is no mtab to be written
"""

_DONE = 0
_INCORRECT = 1
_INTERRUPTED = 8
_FAILED = 32
_OF_LAZYFS = {0: _DONE, 130: _INTERRUPTED}
"""Exit codes of mount(8) for those of `lazyfs mount`; all others are failures."""

_OBEYED_ELSEWHERE = frozenset(
    [
        *("ro", "rw", "suid", "nosuid", "dev", "nodev", "default_permissions"),
        *("defaults", "auto", "noauto", "nofail", "_netdev"),
        *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
        *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime"),
        *("strictatime", "nostrictatime", "lazytime", "nolazytime", "iversion", "noiversion"),
        *("sync", "async", "dirsync", "mand", "nomand", "silent", "loud"),
    ]
)
"""What mount(8) or systemd has obeyed; what makes no difference to a mount that nobody writes to;
and what always is so: nosuid, nodev and default_permissions are, whatever is asked for."""
_OBEYED_ELSEWHERE_STARTS = ("x-", "X-", "comment=", "user=", "helper=", "uhelper=")
_NOT_FOR_FSTAB = frozenset(["help", "foreground", "verbose", "noexec", "source-name"])
_TYPES = ("lazyfs", "fuse.lazyfs")


class Asked(msgspec.Struct, frozen=True):
    """A call of the helper, understood."""

    reference: str
    directory: Path
    words: tuple[str, ...]
    """The options for `lazyfs mount`."""
    is_fake: bool = False


def run_helper(arguments: Sequence[str]) -> int:
    """Do what mount(8) asks for; return an exit code of its own."""
    log_to_stderr()
    try:
        if wanted := _told(arguments):
            click.echo(wanted)
            return _DONE
        asked = understand(arguments)
        if asked.is_fake:
            mountpoint.check(asked.directory, replace="--replace" in asked.words)
            return _DONE
    except click.ClickException as error:
        return _incorrect(error.format_message())
    except _Usage as error:
        return _incorrect(str(error))
    except LazyfsError as error:
        report(error)
        return _FAILED
    with contextlib.redirect_stdout(io.StringIO()):  # mount(8) says nothing; -v, on stderr
        code = run(["mount", *asked.words, "--", asked.reference, str(asked.directory)])
    return _OF_LAZYFS.get(code, _FAILED)


def _incorrect(message: str) -> int:
    lines = [printable(line) for line in f"mount.lazyfs: {message}".split("\n")]
    click.echo("\n".join(lines), err=True)
    return _INCORRECT


class _Usage(Exception):
    """The helper was called with words that mean nothing."""


def understand(arguments: Sequence[str]) -> Asked:
    """Take a call apart: `REF DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]`, in any order.

    Raises:
        _Usage, click.ClickException: it is wrong in itself.
        LazyfsError: it asks for what cannot be.
    """
    try:
        found, rest = getopt.gnu_getopt(list(arguments), "sfnvN:o:t:")
    except getopt.GetoptError as error:
        raise _Usage(f"{error.msg}\n{USAGE}") from None
    given = dict(found)
    if len(rest) != 2:
        raise _Usage(f"REF and DIR are wanted, and {len(rest)} such words were given\n{USAGE}")
    if given.get("-t", _TYPES[0]) not in _TYPES:
        raise _Usage(f"type {given['-t']} is not {' or '.join(_TYPES)}")
    if "-N" in given:
        raise LazyfsError(
            "mount.lazyfs cannot mount into another namespace; enter it: "
            f"nsenter --mount={given['-N']} mount -t lazyfs …"
        )
    reference, directory = rest
    options = [each for name, text in found if name == "-o" for each in split_options(text)]
    words = [*words_of(options, is_sloppy="-s" in given), f"--source-name={_shown(reference)}"]
    if "-v" in given:
        words.append("--verbose")
    mount_command.make_context("mount.lazyfs", [*words, "--", reference, directory])
    try:
        parse_reference(reference)
    except UsageError as error:
        raise _Usage(str(error)) from None
    return Asked(reference, Path(directory), tuple(words), "-f" in given)


def _shown(reference: str) -> str:
    """Return a reference as it was given, but for a URL's query: all may read mountinfo."""
    return reference.partition("?")[0] if "://" in reference else reference


def split_options(text: str) -> Iterator[str]:
    """Yield what stands between commas; one in double quotes separates nothing.

    Quotes are those of libmount (`src/optstr.c`), and are taken away.
    """
    option = ""
    is_quoted = False
    for character in text:
        if character == '"':
            is_quoted = not is_quoted
        elif character == "," and not is_quoted:
            if option:
                yield option
            option = ""
        else:
            option += character
    if option:
        yield option


def words_of(options: Sequence[str], *, is_sloppy: bool) -> list[str]:
    """Return `lazyfs mount`'s words for options of fstab.

    Raises:
        _Usage: one is not known, lacks its value or has one that it cannot have.
        LazyfsError: a mount is asked for that there cannot be.
    """
    known = {
        name.removeprefix("--"): option
        for option in mount_command.params
        if isinstance(option, click.Option)
        for name in option.opts
        if name.startswith("--") and name.removeprefix("--") not in _NOT_FOR_FSTAB
    }
    words: dict[str, str] = {}
    for option in options:
        name, has_value, value = option.partition("=")
        if name == "remount":
            raise LazyfsError("a mount of lazyfs cannot be changed: unmount it and mount it again")
        if name in ("noexec", "exec"):
            words.pop("noexec", None)
            if name == "noexec":
                words[name] = "--noexec"
        elif name == "allow_other":
            if os.geteuid() != 0:
                raise _Usage("allow_other is for mounts by root, which others may always read")
        elif name in _OBEYED_ELSEWHERE or option.startswith(_OBEYED_ELSEWHERE_STARTS):
            continue
        elif name not in known:
            if not is_sloppy:
                names = ", ".join(sorted(known))
                raise _Usage(f"option {name} is not known; lazyfs's own are {names}")
        elif known[name].is_flag:
            if has_value:
                raise _Usage(f"option {name} takes no value")
            words[name] = f"--{name}"
        elif not value:
            raise _Usage(f"option {name} needs a value: {name}=…")
        else:
            words[name] = f"--{name}={value}"
    return list(words.values())


def _told(arguments: Sequence[str]) -> str | None:
    """Return what a person asks for who calls the helper by hand."""
    if {"-h", "--help"} & set(arguments):
        return USAGE
    if {"-V", "--version"} & set(arguments):
        return f"mount.lazyfs {lazyfs.__version__}"
    return None

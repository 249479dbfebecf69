"""`lazyfs wait`: come back when a mount is whole, or unused."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.options import MountPoint, verbose_option
from lazyfs.cli.sizes import Seconds
from lazyfs.cli.text import human_bytes
from lazyfs.ground.errors import IntegrityError, LazyfsError, SourceError, UsageError

if TYPE_CHECKING:
    from lazyfs.asking import Known

_ERRORS: Mapping[int, type[LazyfsError]] = {3: SourceError, 5: IntegrityError}
_CANNOT_BE = {
    "dead": "its daemon has ended; mount again",
    "stuck": "its daemon does not answer",
    "silent": "its daemon has no control socket that could be asked, see its log",
}


@click.command("wait")
@click.argument("directory", metavar="DIR", type=MountPoint())
@click.option(
    "--complete",
    is_flag=True,
    help="Have all of it fetched and proven, also what nobody reads, and wait until the source is "
    "needed no more.",
)
@click.option("--unused", is_flag=True, help="Wait until nobody holds a file or a directory open.")
@click.option(
    "--timeout",
    type=Seconds(min=0),
    metavar="SECONDS",
    help="Give up after so long.  [default: never]",
)
@verbose_option
def wait_command(directory: Path, complete: bool, unused: bool, timeout: float | None) -> None:
    """Come back when a mount is safe to go offline, or safe to unmount.

    With --complete the mount fetches all that is missing behind what is read, and goes on with it
    if you do not wait; it ends with an error (exit codes as everywhere) if the source cannot be
    had or bytes are wrong. With both, both are waited for.
    """
    if not complete and not unused:
        raise UsageError("what to wait for: --complete, --unused, or both")
    from lazyfs import asking

    bar = _Bar()

    def look(known: "Known") -> None:
        _raise_if_hopeless(known, directory)
        if complete:
            _raise_if_incomplete(known, directory)
            bar.show(known.told)

    def is_so(known: "Known") -> bool:
        told = known.told
        if complete and told.get("safe_offline") is not True:
            return False
        return not unused or told.get("safe_unmount") is True

    if complete:
        _raise_if_hopeless(asking.known_mount(directory), directory)
        asking.request_completion(directory)
    try:
        asking.wait_for(directory, is_so, look, timeout_s=timeout)
    except TimeoutError:
        raise LazyfsError(
            f"{directory} is not {_wish(complete, unused)} after {timeout:g} s; `lazyfs status "
            f"{directory}` tells more"
        ) from None
    finally:
        bar.end()


def _wish(complete: bool, unused: bool) -> str:
    words = ["complete"] if complete else []
    return " and ".join([*words, "unused"] if unused else words)


def _raise_if_hopeless(known: "Known", directory: Path) -> None:
    if known.state in _CANNOT_BE:
        raise LazyfsError(f"{directory}: {_CANNOT_BE[known.state]}")


def _raise_if_incomplete(known: "Known", directory: Path) -> None:
    """Raise what has come of the wish to have all of it, if that is bad."""
    failed = known.told.get("failed")
    if failed is not None:
        raise IntegrityError(f"{directory} has failed: {failed}")
    completion = known.told.get("completion")
    if isinstance(completion, Mapping) and completion.get("state") == "failed":
        kind = _ERRORS.get(_whole_number(completion, "exit_code"), LazyfsError)
        raise kind(f"{directory} cannot be completed: {completion.get('error')}")


def _whole_number(told: Mapping[str, Any], key: str) -> int:
    value = told.get(key)
    return value if isinstance(value, int) else 0


class _Bar:
    """How far it is, for a person who looks at the terminal."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._drawn = False

    def show(self, told: Mapping[str, Any]) -> None:
        completion = told.get("completion")
        if not self._is_shown or not isinstance(completion, Mapping):
            return
        done = _whole_number(completion, "done_bytes")
        whole = max(1, _whole_number(completion, "all_bytes"))
        here = human_bytes(_whole_number(told, "here_bytes"))
        click.echo(f"\r\x1b[K{min(100, done * 100 // whole):3d}%  {here} here", nl=False, err=True)
        self._drawn = True

    def end(self) -> None:
        if self._drawn:
            click.echo("\r\x1b[K", nl=False, err=True)

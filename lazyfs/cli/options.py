"""Options that several commands share, and the settings that they become."""

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import click
import msgspec
from msgspec.structs import replace

from lazyfs.background import OneLine
from lazyfs.checkpoint.reference import FORMS
from lazyfs.cli.sizes import Seconds, size_or_share
from lazyfs.ground.settings import (
    CACHE_LIMIT,
    MIRRORS,
    ContentSettings,
    Limit,
    TransportSettings,
)
from lazyfs.transport.run_directory import run_directory

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig
    from lazyfs.checkpoint.trace import Trace
    from lazyfs.content.cache import Cache

_P = ParamSpec("_P")
_R = TypeVar("_R")

REFERENCE_HELP = f"\b\nREF is one of\n{FORMS}"
"""For the end of a command's help."""


class SourceOptions(msgspec.Struct, frozen=True):
    """How a checkpoint is to be opened."""

    cache_dir: Path
    transport: TransportSettings
    content: ContentSettings
    referrers: Literal["auto", "always", "never"]
    cache_kind: Literal["disk", "memory"] = "disk"
    cache_limit: Limit = CACHE_LIMIT
    shows_stubs: bool = False
    """Whether a stub is taken for what it is."""
    trace: Literal["off", "auto"] | Path = "off"
    """Where what to fetch first is had from; see `OpenConfig.trace`."""
    given_trace: "Trace | None" = None
    """What the file says that `trace` names."""
    workload: str = ""
    """Whose trace to take, of several."""

    def cache(self) -> "Cache":
        """Return where fetched bytes are to be kept; on disk there is a directory then.

        Raises:
            UsageError: others could read or change what is put into the directory.
        """
        from lazyfs.content.cache import Cache
        from lazyfs.content.private_dir import make_private

        if self.cache_kind == "memory":
            return Cache.memory(self.cache_limit)
        make_private(self.cache_dir)
        return Cache(self.cache_dir.absolute(), self.cache_limit)

    def opening(
        self, reference: str, on_proof: Callable[[int, int], None] | None = None
    ) -> "OpenConfig":
        """Return how a checkpoint is to be opened, and begin: to be called once, and soon used.

        Raises:
            UsageError: as `cache`; or the reference is none.
        """
        from lazyfs.checkpoint.ahead import Ahead
        from lazyfs.cli.waiting import tell_of_waiting

        tell_of_waiting()
        cache = self.cache()
        traced = self.trace == "auto"
        ahead = Ahead(reference, self.transport, cache, traced=traced, referrers=self.referrers)
        from lazyfs.checkpoint.desk import OpenConfig  # which imports trio: see `ahead.py`

        return OpenConfig(
            cache,
            self.transport,
            self.content,
            self.referrers,
            on_proof,
            self.shows_stubs,
            ahead,
            self.trace,
            self.given_trace,
            self.workload,
        )


class MountPoint(click.Path):
    """A directory that nobody looks at yet: a mount whose daemon is stuck answers no look."""

    def __init__(self) -> None:
        """Take any."""
        super().__init__(path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """Return the path as it was given; `click.Path` would call stat(2)."""
        return self.coerce_path_result(value)


def default_cache_dir() -> Path:
    """Return /var/cache/lazyfs for root, and a user's own cache directory for anybody else.

    Source: XDG base directory specification: a relative XDG_CACHE_HOME is to be ignored.
    """
    if os.geteuid() == 0:
        return Path("/var/cache/lazyfs")
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given.startswith("/") else Path.home() / ".cache") / "lazyfs"


def cache_dir_option(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `--cache-dir`; None if it is not given."""
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path),
        envvar="LAZYFS_CACHE_DIR",
        show_envvar=True,
        metavar="DIR",
        help="Keep fetched bytes in DIR.  [default: /var/cache/lazyfs for root, "
        "otherwise lazyfs in the user's cache directory]",
    )(command)


def cache_size_option(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `--cache-size`."""
    return click.option(
        "--cache-size",
        "cache_limit",
        type=size_or_share,
        default=CACHE_LIMIT,
        envvar="LAZYFS_CACHE_SIZE",
        show_envvar=True,
        show_default="50% of the filesystem, or of available memory",
        metavar="SIZE",
        help="Keep at most so much (50G, 512MiB, 20%). What was used longest ago makes room; what "
        "is mounted stays, and is read on without being kept where there is no room.",
    )(command)


def source_options(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command the options of everything that opens a checkpoint, as `source`."""

    @click.option(
        "--cache",
        "cache_kind",
        type=click.Choice(["disk", "memory"]),
        default="disk",
        show_default=True,
        help="Keep fetched bytes on disk, for later mounts too; or in this daemon's memory, so "
        "that no process's memory gets to a disk (but for swap).",
    )
    @cache_dir_option
    @cache_size_option
    @click.option(
        "--plain-http",
        is_flag=True,
        help="Speak HTTP, not HTTPS, to the registry. Loopback needs no such word.",
    )
    @click.option(
        "--authfile",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Take credentials from FILE, read anew whenever they are needed.  [default: "
        "$REGISTRY_AUTH_FILE, otherwise where Podman and Docker keep them]",
    )
    @click.option(
        "--tls-verify",
        type=click.BOOL,
        default=True,
        metavar="BOOL",
        help="--tls-verify=false believes whoever answers in the registry's place, over HTTP too. "
        "Wherever it redirects to is checked all the same. An authority of your own belongs "
        "into certs.d (containers-certs.d(5)).",
    )
    @click.option(
        "--allow-local-redirects",
        is_flag=True,
        help="Let a registry that is elsewhere lead to loopback and link-local addresses, where "
        "services trust whoever is near (cloud metadata). Refused otherwise.",
    )
    @click.option(
        "--mirrors",
        default=TransportSettings().mirrors,
        show_default=True,
        envvar="LAZYFS_MIRRORS",
        show_envvar=True,
        metavar="WHICH",
        callback=_mirrors,
        help="Whose mirrors to ask before the registry: containers (registries.conf), containerd "
        "(/etc/containerd/certs.d), auto (containerd's for what registries.conf says nothing of), "
        "none; or the path of a registries.conf, or of a directory like /etc/containerd/certs.d.",
    )
    @click.option(
        "--verify",
        type=click.Choice(["background", "full", "strict"]),
        default="background",
        show_default=True,
        help="Compare a layer with its digest behind what is read, or in full before the first "
        "byte is given out. A layer with digests for its chunks (zstd:chunked, eStargz) needs "
        "neither: there, each chunk is proven before it is given out. strict: as full, and "
        "nothing is taken that no digest proves: no tag, no archive.",
    )
    @click.option(
        "--referrers",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="Whether to read a gzip layer by an index (SOCI v1) that somebody has attached to the "
        "image, and which is proven only behind what is read. auto: if the image is named by a "
        "tag; whoever may attach one could as well have moved that.",
    )
    @click.option(
        "--deadline",
        type=Seconds(min=0, min_open=True),
        default=TransportSettings().deadline_s,
        show_default=True,
        metavar="SECONDS",
        help="Give up on a fetch when no byte of it has come for so long, whatever was tried: the "
        "read fails, the next one asks again. What is needed before there is a directory to read "
        "is given up after 20 at most.",
    )
    @click.option(
        "--connections",
        type=click.IntRange(min=0),
        default=TransportSettings().shared_connections,
        show_default=True,
        metavar="N",
        help="Have at most N requests under way at one host from all your mounts on this machine "
        "together, beside two for each.",
    )
    @verbose_option
    @functools.wraps(command)
    def with_source(
        *args: Any,
        cache_kind: Literal["disk", "memory"],
        cache_dir: Path | None,
        cache_limit: Limit,
        plain_http: bool,
        authfile: Path | None,
        tls_verify: bool,
        allow_local_redirects: bool,
        mirrors: str,
        verify: Literal["background", "full", "strict"],
        deadline: float,
        connections: int,
        referrers: Literal["auto", "always", "never"],
        **kwargs: Any,
    ) -> _R:
        source = SourceOptions(
            cache_dir=cache_dir or default_cache_dir(),
            transport=TransportSettings(
                plain_http=plain_http,
                authfile=None if authfile is None else str(authfile.absolute()),
                tls_verify=tls_verify,
                allow_local_redirects=allow_local_redirects,
                mirrors=mirrors,
                deadline_s=deadline,
                stall_timeout_s=min(deadline, TransportSettings().stall_timeout_s),
                connect_timeout_s=min(deadline, TransportSettings().connect_timeout_s),
                shared_connections=connections,
                run_directory=run_directory(),
            ),
            content=ContentSettings(verify=verify),
            referrers=referrers,
            cache_kind=cache_kind,
            cache_limit=cache_limit,
        )
        return command(*args, source=source, **kwargs)

    return with_source


def record_options(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `--record`, `--until` (None if they are not given) and `--as-usual`."""
    command = click.option(
        "--as-usual",
        is_flag=True,
        help="With --record: let all go as it would otherwise, with traces followed and memory "
        "brought ahead. This shows where the seconds go (lazyfs report); what is needed is known "
        "in part only, so such a trace cannot be pushed.",
    )(command)
    command = click.option(
        "--until",
        metavar="WHAT",
        help="Record until WHAT: port:[HOST:]PORT takes a connection, http://HOST:PORT/PATH "
        "answers well, exec:COMMAND exits with 0 (it is tried again and again, without a shell), "
        "or so many SECONDS have passed. What has not come after ten minutes is not waited for.  "
        "[default: 10 seconds after the tasks run; of a mount, its end]",
    )(command)
    return click.option(
        "--record",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write to FILE which ranges were needed, and when: a trace, by which later restores "
        "fetch these first (lazyfs trace push), and of which lazyfs report makes a picture.",
    )(command)


def follow_option(command: Callable[..., _R]) -> Callable[..., _R]:
    """Give a command `--no-follow`, below `source_options`, as a part of its `source`."""

    @click.option(
        "--no-follow",
        "shows_stubs",
        is_flag=True,
        help="Take a stub (lazyfs stub) for what it is, instead of the checkpoint that it names.",
    )
    @functools.wraps(command)
    def with_follow(*args: Any, source: SourceOptions, shows_stubs: bool, **kwargs: Any) -> _R:
        return command(*args, source=replace(source, shows_stubs=shows_stubs), **kwargs)

    return with_follow


def _mirrors(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Take a word, or a path, which is made absolute: a daemon is elsewhere."""
    if "/" in value:
        return str(Path(value).absolute())
    if value not in MIRRORS:
        raise click.BadParameter(
            f"{value!r} is none of {', '.join(MIRRORS)}; a path has a slash in it (./FILE)"
        )
    return value


def verbose_option(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a command `-v`: one tells what is going on, two tell all."""
    return click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_be_verbose,
        help="Say what is going on, on standard error; twice, in detail.",
    )(command)


def is_verbose() -> bool:
    """Whether the user asked for more than results and errors."""
    logger = logging.getLogger("lazyfs")
    shown = all(handler.level <= logging.INFO for handler in logger.handlers)
    return shown and logger.isEnabledFor(logging.INFO)


def log_to_stderr() -> None:
    """Send warnings, and whatever `-v` asks for, to standard error, in the form of errors."""
    logger = logging.getLogger("lazyfs")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(OneLine("lazyfs: %(message)s"))
        logger.addHandler(handler)


def _be_verbose(context: click.Context, parameter: click.Parameter, count: int) -> None:
    """Raise the logger's level; `-v` before and after the command's name add up to the most."""
    logger = logging.getLogger("lazyfs")
    wanted = {0: logging.WARNING, 1: logging.INFO}.get(count, logging.DEBUG)
    if count or logger.level == logging.NOTSET:
        logger.setLevel(min(wanted, logger.level or wanted))

"""`lazyfs runtime`: what `lazyfs-runtime` becomes when it is asked to restore a stub."""

import logging
import os
import signal
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from msgspec.structs import replace

from lazyfs.checkpoint.reference import RegistryReference
from lazyfs.checkpoint.stub import LARGEST_MARKER_BYTES, MARKER, Stub, read_stub, real_reference
from lazyfs.cli.options import SourceOptions, default_cache_dir
from lazyfs.cli.sizes import size_or_share
from lazyfs.content.private_dir import make_private
from lazyfs.ground.errors import LazyfsError, MalformedError, UsageError
from lazyfs.ground.settings import CACHE_LIMIT, MIRRORS, ContentSettings, TransportSettings
from lazyfs.runtime.arguments import RestoreCall, parse_restore
from lazyfs.runtime.config import Kubelet, RuntimeConfig, read_config
from lazyfs.runtime.enginelog import open_engine_log
from lazyfs.runtime.policy import check_allowed, read_bundle, wants_lazy_pages
from lazyfs.transport.run_directory import run_directory

if TYPE_CHECKING:
    from lazyfs.checkpoint.desk import OpenConfig

log = logging.getLogger(__name__)

_PYTHONS_OWN = (signal.SIGPIPE, signal.SIGXFSZ)
"""What Python ignores, and a program that it runs would."""


@click.command(
    "runtime",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="The configuration is /etc/lazyfs/runtime.toml, or what LAZYFS_RUNTIME_CONFIG names.",
)
@click.option("--ignored", default="0", hidden=True, help="SigIgn of /proc/PID/status, before.")
@click.argument("program", metavar="RUNTIME", type=click.UNPROCESSED)
@click.argument("words", metavar="[ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
def runtime_command(ignored: str, program: str, words: tuple[str, ...]) -> int:
    """Run an OCI runtime; a restore of a stub becomes one of its real image.

    Not to be called by hand: name `lazyfs-runtime` to the engine as its runtime, or `lazyfs-runc`,
    `lazyfs-crun`. They come here only to restore a stub; `lazyfs restore` is for people.
    """
    call = parse_restore(words)
    directory = Path.cwd()
    found = _stub_directory(call, directory, program) if call is not None else None
    heard = tuple(number for number in _PYTHONS_OWN if not _is_ignored(number, ignored))
    if call is None or found is None:
        _exec(program, words, heard)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return _restore(call, program, directory, found, heard)
    except LazyfsError as error:
        from lazyfs.runtime.front import tell

        what = f"{call.container[:12]} cannot be restored: {error}"
        tell(open_engine_log(call.log, call.log_format), what)
        return error.exit_code


def _exec(program: str, words: tuple[str, ...], heard: tuple[int, ...]) -> NoReturn:
    """Become the real runtime.

    Raises:
        LazyfsError: there is none.
    """
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
    try:
        os.execv(program, [program, *words])  # noqa: S606 - that is what a runtime is for
    except OSError as error:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise LazyfsError(
            f"{program} cannot be run: {error.strerror}; RUNTIME is a runtime's full path"
        ) from None


def _is_ignored(number: int, mask: str) -> bool:
    try:
        return bool(int(mask, 16) >> (number - 1) & 1)
    except ValueError:
        return False


def _stub_directory(call: RestoreCall, directory: Path, program: str) -> Path | None:
    """Return the images directory if it is a stub's.

    Where Podman has kept one (`--keep`), its next checkpoint is written over it: with pages beside
    the marker it is a checkpoint of its own.
    """
    for each in call.images_directories(str(directory), program):
        path = Path(each)
        if (path / MARKER).exists():
            return path if not any(page.is_file() for page in path.glob("pages-*.img")) else None
    return None


def _restore(
    call: RestoreCall, program: str, directory: Path, found: Path, heard: tuple[int, ...]
) -> int:
    from lazyfs.runtime.front import restore
    from lazyfs.runtime.keeper import Task

    config = read_config(os.environ)
    stub = _read_marker(found / MARKER)
    check_allowed(stub, config)
    bundle = read_bundle(directory / (call.bundle or "."))
    is_lazy = wants_lazy_pages(config, bundle.annotations, stub, asked=call.lazy_pages)
    reference = real_reference(stub)
    source = replace(_source(config, reference.host), workload=bundle.workload)
    make_private(source.cache_dir)  # before a log is written there
    opening = partial(_open_config, source, config.kubelet, reference)
    task = Task(
        reference=str(reference),
        opening=opening,
        call=call,
        program=program,
        directory=str(directory),
        stub_directory=found,
        pid_file=directory / call.pid_file if call.pid_file else None,
        cgroups_path=bundle.cgroups_path,
        log_file=Path(config.log.file) if config.log.file else _log_file(source.cache_dir),
        log_level=getattr(logging, config.log.level.upper()),
        lazy_pages=is_lazy,
        heard=heard,
    )
    if config.on_failure == "fetch":
        from lazyfs.runtime.fetched import fetch_images

        task = replace(task, fetch=partial(fetch_images, opening))
    return restore(task)


def _log_file(cache_dir: Path) -> Path:
    return cache_dir / "log" / "runtime.log"


def _read_marker(path: Path) -> Stub:
    """Read a marker, which whoever pushed the stub has made: perhaps no file, but a pipe or a link.

    Raises:
        LazyfsError: it cannot be read, or is none.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise MalformedError(f"{path} is not a file")
            return read_stub(file.read(LARGEST_MARKER_BYTES + 1))
    except OSError as error:
        raise LazyfsError(f"{path} cannot be read: {error.strerror}") from None


def _source(config: RuntimeConfig, host: str) -> SourceOptions:
    """Return how the image of a stub is opened.

    Raises:
        UsageError: a value in the configuration is none.
    """
    if "/" not in config.mirrors and config.mirrors not in MIRRORS:
        raise UsageError(
            f"`mirrors` in the configuration is {config.mirrors!r}: one of {', '.join(MIRRORS)}, "
            "or an absolute path"
        )
    limit = CACHE_LIMIT
    if config.cache_size is not None:
        try:
            limit = size_or_share(config.cache_size)
        except click.BadParameter as error:
            raise UsageError(f"`cache-size` in the configuration: {error.message}") from None
    if config.authfile is not None and not Path(config.authfile).exists():
        log.warning("`authfile` in the configuration, %s, is not there", config.authfile)
    given = config.cache_dir or os.environ.get("LAZYFS_CACHE_DIR")
    registry, usual = config.registry(host), TransportSettings()
    return SourceOptions(
        cache_dir=Path(given).absolute() if given else default_cache_dir(),
        transport=replace(
            usual,
            plain_http=registry.plain_http,
            tls_verify=registry.tls_verify,
            authfile=config.authfile,
            mirrors=config.mirrors,
            deadline_s=config.deadline,
            stall_timeout_s=min(config.deadline, usual.stall_timeout_s),
            connect_timeout_s=min(config.deadline, usual.connect_timeout_s),
            shared_connections=config.connections,
            run_directory=run_directory(),
        ),
        content=ContentSettings(verify=config.verify),
        referrers="auto",
        cache_kind=config.cache,
        cache_limit=limit,
        trace=config.trace,
    )


def _open_config(
    source: SourceOptions, kubelet: Kubelet | None, reference: RegistryReference
) -> "OpenConfig":
    transport = source.transport
    if kubelet is not None:
        transport = _with_login(transport, kubelet, reference)
    # What a marker names is a whole checkpoint: a stub of a stub might lead to what is not allowed.
    source = replace(source, transport=transport, shows_stubs=True)
    return source.opening(str(reference))


def _with_login(
    transport: TransportSettings, kubelet: Kubelet, reference: RegistryReference
) -> TransportSettings:
    """Ask the kubelet's providers; what they know becomes an auth file in this process's memory."""
    from lazyfs.transport.kubelet import find_login

    where, host = Path(kubelet.bin_dir), reference.host
    found = find_login(Path(kubelet.config), where, host, reference.repository, os.environ)
    if found is None:
        return transport
    log.info("credentials for %s are from the credential provider %s", host, found.provider)
    file = os.memfd_create("auth")
    os.write(file, found.auth_file(host))
    return replace(transport, authfile=f"/proc/{os.getpid()}/fd/{file}")

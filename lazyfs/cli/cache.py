"""`lazyfs cache`: what mounts have kept, how much it is, what may go, whether it is still good."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from lazyfs.cli.options import (
    cache_dir_option,
    cache_size_option,
    default_cache_dir,
    verbose_option,
)
from lazyfs.cli.sizes import age, size
from lazyfs.cli.text import human_bytes, plural
from lazyfs.ground.errors import LazyfsError, UsageError
from lazyfs.ground.settings import Limit

if TYPE_CHECKING:
    from lazyfs.content.audit import Audit
    from lazyfs.content.room import Level
    from lazyfs.content.shelf import Document, Shelved

_DAMAGED = 5
"""Exit code, as for any bytes that are not what they should be."""
_SHORT_DIGITS = 12
_LEAST_DIGITS = 4
_Item = TypeVar("_Item", "Shelved", "Document", "Shelved | Document")


@click.group("cache")
def cache_command() -> None:
    """Look after what mounts have kept.

    The cache bounds itself (--cache-size of the commands that fill it): what was used longest ago
    goes first, and never what is mounted. These commands need no network.
    """


class Row(msgspec.Struct, frozen=True):
    """What is told of one layer."""

    layer: "Shelved"
    here_bytes: int
    proven: bool
    users: frozenset[int]

    @property
    def proof(self) -> str:
        """What a digest has proven of it."""
        return "whole" if self.proven else "chunks" if self.layer.chunks_proven else "-"

    @property
    def last_used_at(self) -> str:
        """ISO 8601, UTC."""
        return datetime.fromtimestamp(int(self.layer.last_used_s), UTC).isoformat()

    def as_json(self) -> dict[str, Any]:
        """The row as plain values; the keys are in docs/json.md."""
        layer = self.layer
        return {
            "digest": str(layer.digest),
            "format": layer.format_name,
            "disk_bytes": layer.disk_bytes,
            "content_bytes": layer.content_bytes,
            "here_bytes": self.here_bytes,
            "blob_proven": self.proven,
            "chunks_proven": layer.chunks_proven,
            "used_by": sorted(self.users),
            "last_used_at": self.last_used_at,
            "path": str(layer.home),
        }


@cache_command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One object; its keys are in docs/json.md.")
@cache_dir_option
@cache_size_option
@verbose_option
def cache_ls_command(as_json: bool, cache_dir: Path | None, cache_limit: Limit) -> None:
    """List the layers in the cache, the latest used last.

    HERE is the share of a layer's content that has been fetched. PROVEN says "whole" once all of
    it was found to match its digest, and "chunks" where each was before it was kept. In a pipe, a
    line is: digest, format, bytes on disk, bytes of content here and in all, whole or chunks or -,
    number of mounts, time of last use; with tabs between.
    """
    from lazyfs.content import audit, room, shelf

    directory = _existing(cache_dir)
    held = shelf.holders()
    rows = [
        Row(
            layer, audit.here_bytes(layer), audit.is_proven(layer), shelf.users_of(layer.home, held)
        )
        for layer in shelf.shelved(directory)
    ]
    level = room.level_of(directory if directory.exists() else Path("/"), cache_limit)
    passes = {path: bool(shelf.users_of(path, held)) for path in shelf.unfinished(directory)}
    sizes = {path: shelf.disk_bytes_of(path) for path in passes}
    documents = shelf.documents(directory)
    growing_bytes = sum(size for path, size in sizes.items() if passes[path])
    left_bytes = sum(sizes.values()) - growing_bytes
    if as_json:
        click.echo(
            json.dumps(
                {
                    "directory": str(directory),
                    "limit_bytes": level.limit_bytes,
                    "used_bytes": level.used_bytes,
                    "free_bytes": level.free_bytes,
                    "growing_bytes": growing_bytes,
                    "left_bytes": left_bytes,
                    "documents": len(documents),
                    "documents_bytes": sum(each.disk_bytes for each in documents),
                    "layers": [row.as_json() for row in rows],
                },
                indent=2,
            )
        )
    elif sys.stdout.isatty():
        _print_table(rows)
        for line in _summary(directory, rows, level, growing_bytes, left_bytes):
            click.echo(line)
        if documents:
            taken = human_bytes(sum(each.disk_bytes for each in documents))
            what = plural(len(documents), "document")
            click.echo(f"{what} ({taken}) tell how images are to be read without asking")
    else:
        for row in rows:
            click.echo(_plain(row))


def _plain(row: Row) -> str:
    layer = row.layer
    sizes = (layer.disk_bytes, row.here_bytes, layer.content_bytes)
    columns = (layer.digest, layer.format_name, *sizes, row.proof, len(row.users), row.last_used_at)
    return "\t".join(map(str, columns))


def _summary(
    directory: Path, rows: Sequence[Row], level: "Level", growing_bytes: int, left_bytes: int
) -> Iterator[str]:
    yield (
        f"{directory}: {plural(len(rows), 'layer')}, {human_bytes(level.used_bytes)} of at most "
        f"{human_bytes(level.limit_bytes)}; {human_bytes(level.free_bytes)} of the disk are free"
    )
    if growing_bytes:
        yield f"{human_bytes(growing_bytes)} of that are being decoded by mounts"
    if left_bytes:
        yield f"{human_bytes(left_bytes)} of that were left unfinished: `lazyfs cache prune`"


def _print_table(rows: Iterable[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("LAYER", "FORMAT", "ON DISK", "HERE", "PROVEN", "IN USE", "LAST USED"):
        table.add_column(name, justify="right" if name in ("ON DISK", "HERE") else "left")
    for row in rows:
        whole_bytes = row.layer.content_bytes
        share = 100 * row.here_bytes // whole_bytes if whole_bytes else 100
        table.add_row(
            _short(row.layer),
            row.layer.format_name,
            human_bytes(row.layer.disk_bytes),
            f"{share}%",
            row.proof,
            plural(len(row.users), "mount") if row.users else "-",
            _ago(time.time() - row.layer.last_used_s),
        )
    if table.row_count:
        Console(highlight=False).print(table)


@cache_command.command("prune")
@click.argument("digests", metavar="[DIGEST]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove all that is not in use.")
@click.option(
    "--older-than",
    "age_s",
    type=age,
    metavar="AGE",
    help="Remove what nobody used for so long: 7d, 12h, 30m.",
)
@click.option(
    "--to-size",
    "target_bytes",
    type=size,
    metavar="SIZE",
    help="Remove what was used longest ago, until so much is left: 10G, 512MiB.",
)
@click.option("--dry-run", is_flag=True, help="Tell what would be removed, and remove nothing.")
@cache_dir_option
@cache_size_option
@verbose_option
def cache_prune_command(
    digests: tuple[str, ...],
    everything: bool,
    age_s: float | None,
    target_bytes: int | None,
    dry_run: bool,
    cache_dir: Path | None,
    cache_limit: Limit,
) -> None:
    """Remove what nobody uses.

    By itself it removes what daemons that were killed have left, and what is over --cache-size or
    too much for the disk. A DIGEST is a layer's, as `lazyfs cache ls` prints it, or an image's;
    its first digits will do. What a mount is using stays. Exits with 1 if what was asked for could
    not be had.
    """
    from lazyfs.content import janitor, room, shelf

    ways = [bool(digests), everything, age_s is not None, target_bytes is not None]
    if sum(ways) > 1:
        raise UsageError("choose one: DIGEST, --all, --older-than or --to-size")
    directory = _existing(cache_dir)
    if not directory.exists():
        return
    found: list[Shelved | Document] = [*shelf.shelved(directory), *shelf.documents(directory)]
    found.sort(key=lambda item: item.last_used_s)
    wanted_bytes: int | None = None
    if digests:
        found = _named(found, digests)
    elif age_s is not None:
        found = [item for item in found if time.time() - item.last_used_s > age_s]
    elif not everything:
        level = room.level_of(directory, cache_limit)
        over_bytes = -level.spare_bytes
        if target_bytes is not None:
            over_bytes = level.used_bytes - target_bytes
        wanted_bytes = max(0, over_bytes)
    left_bytes = _left_bytes(directory) if dry_run else janitor.remove_leftovers(directory)
    if left_bytes:
        click.echo(f"{_would(dry_run)} {human_bytes(left_bytes)} that were left unfinished")
    freed_bytes, kept = _prune(directory, found, wanted_bytes, left_bytes, dry_run=dry_run)
    click.echo(f"{'would free' if dry_run else 'freed'} {human_bytes(freed_bytes)}")
    missed = target_bytes is not None and wanted_bytes is not None and freed_bytes < wanted_bytes
    if missed:
        click.echo("lazyfs: what is left is in use", err=True)
    if missed or (digests and kept):
        sys.exit(1)


def _prune(
    directory: Path,
    found: Iterable["Shelved | Document"],
    wanted_bytes: int | None,
    freed_bytes: int,
    *,
    dry_run: bool,
) -> tuple[int, int]:
    """Remove things until enough is free; return how much is, and how many were in use."""
    from lazyfs.content import janitor
    from lazyfs.content.shelf import Document

    kept = 0
    documents = 0
    for layer in found:
        if wanted_bytes is not None and freed_bytes >= wanted_bytes:
            break
        if isinstance(layer, Document):
            documents += 1
            freed_bytes += layer.disk_bytes if dry_run else janitor.remove_document(layer)
            continue
        if dry_run:
            with janitor.sole_user(layer.home) as fd:
                removed_bytes = layer.disk_bytes if fd is not None else None
        else:
            try:
                removed_bytes = janitor.remove(directory, layer)
            except OSError as error:
                raise LazyfsError(f"{layer.home} cannot be removed: {error.strerror}") from None
        what = f"{_short(layer)} ({layer.format_name}, {human_bytes(layer.disk_bytes)})"
        if removed_bytes is None:
            kept += 1
            click.echo(f"in use: {what}")
        else:
            freed_bytes += removed_bytes
            click.echo(f"{_would(dry_run)} {what}")
    if documents:
        click.echo(f"{_would(dry_run)} {plural(documents, 'document')}")
    return freed_bytes, kept


def _left_bytes(directory: Path) -> int:
    """Return what nobody seems to be working on, as far as can be seen without a lock."""
    from lazyfs.content import shelf

    held = shelf.holders()
    left = [path for path in shelf.unfinished(directory) if not shelf.users_of(path, held)]
    return sum(map(shelf.disk_bytes_of, [*left, *shelf.torsos(directory)]))


def _would(dry_run: bool) -> str:
    return "would remove" if dry_run else "removed"


@cache_command.command("verify")
@click.argument("digests", metavar="[DIGEST]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One object; its keys are in docs/json.md.")
@cache_dir_option
@verbose_option
def cache_verify_command(digests: tuple[str, ...], as_json: bool, cache_dir: Path | None) -> None:
    """Compare all that is kept with what it was when it was stored.

    A mount does that too, chunk by chunk, before it believes what another has left; this finds a
    bad disk before. Each chunk is compared with its mark (xxh3), and an uncompressed layer that is
    all here with its digest. What is damaged is dropped, so that it is fetched anew, unless a
    mount is using the layer. Exits with 5 if anything was damaged.
    """
    from lazyfs.content import audit, shelf

    directory = _existing(cache_dir)
    layers, documents = shelf.shelved(directory), shelf.documents(directory)
    if digests:
        layers, documents = _named(layers, digests), []
    audits = _audits(directory, layers)
    torn = [each for each in documents if not audit.verify_document(each.path)]
    if as_json:
        damaged = sum(len(found.damaged) for found in audits)
        told = {
            "damaged_chunks": damaged,
            "damaged_documents": len(torn),
            "layers": [_audit_json(found) for found in audits],
        }
        click.echo(json.dumps(told, indent=2))
    else:
        for found in audits:
            click.echo(f"{_short(found.layer)} ({found.layer.format_name}): {_verdict(found)}")
        if torn:
            click.echo(f"{plural(len(torn), 'damaged document')}: dropped, and had anew in need")
    if torn or any(found.is_damaged for found in audits):
        sys.exit(_DAMAGED)


def _audits(directory: Path, layers: Sequence["Shelved"]) -> list["Audit"]:
    from lazyfs.content.audit import audit

    with ExitStack() as stack:
        on_bytes: Callable[[int], None] = lambda count: None  # noqa: E731
        if sys.stderr.isatty() and layers:
            all_bytes = sum(layer.disk_bytes for layer in layers)
            label = f"verifying {human_bytes(all_bytes)}"
            bar = click.progressbar(length=all_bytes, label=label, file=sys.stderr)
            on_bytes = stack.enter_context(bar).update
            stack.callback(lambda: bar.update(all_bytes - bar.pos))
        return [audit(directory, layer, on_bytes) for layer in layers]


def _verdict(found: "Audit") -> str:
    if found.unknown is not None:
        return f"not compared: {found.unknown}"
    checked = f"{human_bytes(found.checked_bytes)} in {plural(found.checked_chunks, 'chunk')}"
    if not found.is_damaged:
        return f"{checked}, as stored{', as its digest promises' if found.digest_matches else ''}"
    what = f"{checked}, {plural(len(found.damaged), 'place')} of it damaged"
    if found.digest_matches is False:
        what = f"{checked}: not what its digest promises"
    if found.repaired:
        return f"{what}; dropped, and fetched anew by the next mount"
    return f"{what}; left alone: a mount is using it, or it cannot be written"


def _audit_json(found: "Audit") -> Mapping[str, Any]:
    return {
        "digest": str(found.layer.digest),
        "format": found.layer.format_name,
        "path": str(found.layer.home),
        "checked_chunks": found.checked_chunks,
        "checked_bytes": found.checked_bytes,
        "damaged": [{"start": each.start, "stop": each.stop} for each in found.damaged],
        "dropped": found.repaired,
        "digest_matches": found.digest_matches,
        "unknown": found.unknown,
    }


# -- what they share ----------------------------------------------------------------------------


def _existing(cache_dir: Path | None) -> Path:
    """Return the cache directory that is meant, there or not.

    Raises:
        UsageError: it is not its user's own.
    """
    from lazyfs.content.private_dir import insist_on_private

    directory = (cache_dir or default_cache_dir()).absolute()
    insist_on_private(directory)
    return directory


def _named(layers: Sequence["_Item"], digests: Iterable[str]) -> list["_Item"]:
    """Return what has one of the digests that a person has named, or begun to name.

    Raises:
        UsageError: there is none, or there are several.
    """
    found = []
    for text in digests:
        wanted = text if ":" in text else f"sha256:{text}"
        digits = wanted.partition(":")[2]
        alike = [layer for layer in layers if str(layer.digest).startswith(wanted)]
        if len(digits) < _LEAST_DIGITS or not alike:
            raise UsageError(f"{text!r} is no layer in the cache: `lazyfs cache ls` lists them")
        if len({layer.digest for layer in alike}) > 1:
            raise UsageError(f"{text!r} is the beginning of several digests: write more")
        found += [layer for layer in alike if layer not in found]
    return found


def _short(layer: "Shelved") -> str:
    return f"{layer.digest.algorithm}:{layer.digest.hex[:_SHORT_DIGITS]}"


def _ago(seconds: float) -> str:
    for size_s, thing in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size_s:
            return f"{plural(int(seconds // size_s), thing)} ago"
    return "just now"

"""`lazyfs stub`: the same checkpoint less its memory, for engines that restore it by lazyfs."""

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec.structs import replace

from lazyfs import __version__
from lazyfs.checkpoint.reference import (
    ImageArchiveReference,
    LayoutReference,
    Reference,
    RegistryReference,
    parse_reference,
)
from lazyfs.cli.opening import with_checkpoint
from lazyfs.cli.options import REFERENCE_HELP, SourceOptions, source_options
from lazyfs.cli.text import human_bytes, printable
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, UsageError

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint
    from lazyfs.checkpoint.stub_image import StubReport
    from lazyfs.transport.push import RegistryTarget
    from lazyfs.transport.target import Target

NEWREF_FORMS = """\
  [docker://]HOST[:PORT]/REPOSITORY[:TAG]  in a registry
  oci:DIRECTORY[:TAG]                      in an OCI layout on disk
  oci-archive:FILE[:TAG]                   a tar of an OCI layout
  containers-storage:NAME                  Podman's and CRI-O's, by skopeo"""
_STORAGE = "containers-storage:"
_TAG_IN_PASSING = "stub"


@click.command("stub", epilog=f"{REFERENCE_HELP}\n\n\b\nNEWREF is one of\n{NEWREF_FORMS}")
@click.argument("reference", metavar="REF")
@click.argument("new_reference", metavar="NEWREF")
@click.option(
    "--real",
    "real_reference",
    metavar="REF2",
    help="The stub stands for REF2, in a registry: the same image as REF, which is checked.",
)
@click.option(
    "--lazy-pages/--no-lazy-pages",
    default=None,
    help="Wish that it be restored with lazy pages, or without; each machine may have it its way.",
)
@click.option("--json", "as_json", is_flag=True, help="One object; its keys are in docs/json.md.")
@source_options
def stub_command(
    reference: str,
    new_reference: str,
    real_reference: str | None,
    lazy_pages: bool | None,
    as_json: bool,
    source: SourceOptions,
) -> None:
    """Write the stub of a checkpoint image: all of it but memory.

    An engine pulls the stub in no time and restores it through lazyfs-runtime, which takes the
    memory from REF as it is needed: REF has to stay in its registry, and keeps its tag. Without
    lazyfs-runtime the stub cannot be restored: CRIU says that it cannot open its pages files.

    What goes into a stub is proven before. Of a layer whose digest is the only proof that takes
    all of it, once.
    """
    from lazyfs.checkpoint.stub_image import write_stub_of

    asked, where = parse_reference(reference), _parse_target(new_reference)
    _insist_on_another_name(where, [reference, *filter(None, [real_reference])], source)
    real = _real(asked, real_reference, source)
    source = replace(source, shows_stubs=True)
    if source.content.verify == "background":
        source = replace(source, content=replace(source.content, verify="full"))

    async def write(checkpoint: "OpenedCheckpoint") -> "StubReport":
        stands_for = checkpoint.reference
        if real is not None:
            if checkpoint.image.digest != real.digest:
                raise UsageError(
                    f"{real} is not {checkpoint.reference}: their digests differ; copy the image "
                    "there as it is (skopeo copy --preserve-digests)"
                )
            stands_for = str(real)
        with _target(where, asked, source) as (target, tag):
            return await write_stub_of(
                checkpoint,
                target,
                tag,
                real=stands_for,
                lazy_pages=lazy_pages,
                made_by=f"lazyfs {__version__}",
            )

    _try_out(where, asked, source)
    report = with_checkpoint(reference, source, write)
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else printable(_said(report)))


def _insist_on_another_name(where: "_Where", taken: Sequence[str], source: SourceOptions) -> None:
    """See that the real image keeps its tag: a registry clears away what has none.

    Raises:
        UsageError: the stub would be called as one of `taken` is.
    """
    for each in map(parse_reference, taken):
        if not isinstance(where, RegistryReference) or not isinstance(each, RegistryReference):
            continue
        if replace(each, tag=where.tag, digest=None) != where:
            continue
        has_digest = each.digest is not None
        if each.tag == where.tag or (has_digest and _named(where, source) == each.digest):
            raise UsageError(
                f"{where} is the image itself, which has to stay: call the stub by another name"
            )


def _named(where: RegistryReference, source: SourceOptions) -> Digest | None:
    """Return what a tag names by now, if that can be told."""
    from lazyfs.checkpoint.image import resolve
    from lazyfs.ground.counters import Counters

    try:
        with closing(resolve(where, source.transport, Counters())) as image:
            return image.digest
    except LazyfsError:
        return None  # nothing; or it is said when it is written to


def _said(report: "StubReport") -> str:
    sizes = f"{human_bytes(report.image_bytes)} in place of {human_bytes(report.real_image_bytes)}"
    said = f"wrote {report.reference} ({sizes}; stands for {report.stands_for})"
    if report.largest_file is not None:
        size = human_bytes(report.largest_file_bytes)
        said += f"; its largest file, {size}, engines unpack themselves: {report.largest_file}"
    return said


def _real(
    asked: Reference, real_reference: str | None, source: SourceOptions
) -> RegistryReference | None:
    """Return the image that the stub stands for if it is not REF itself, by digest.

    Raises:
        UsageError: there is none that a stub could name.
    """
    if real_reference is None:
        if isinstance(asked, RegistryReference):
            return None
        raise UsageError(
            f"a stub has to name an image in a registry, and {asked} is none: push it there "
            "(skopeo copy --preserve-digests, podman push) and say --real HOST/REPOSITORY:TAG, or "
            "make the stub of that one"
        )
    from lazyfs.checkpoint.image import resolve
    from lazyfs.ground.counters import Counters

    parsed = parse_reference(real_reference)
    if not isinstance(parsed, RegistryReference):
        raise UsageError(f"--real {parsed} is no image in a registry")
    image = resolve(parsed, source.transport, Counters())
    image.close()
    if image.digest is None:
        raise UsageError(f"--real {parsed} has no digest")
    return parsed.pinned(image.digest)


class _Storage(msgspec.Struct, frozen=True):
    """A containers-storage, as skopeo calls an image there."""

    name: str


_Where = RegistryReference | LayoutReference | ImageArchiveReference | _Storage


def _parse_target(text: str) -> _Where:
    """Read NEWREF.

    Raises:
        UsageError: it is nothing that can be written to.
    """
    if text.startswith(_STORAGE):
        return _Storage(text)
    parsed = parse_reference(text)
    if isinstance(parsed, RegistryReference | LayoutReference) and parsed.digest is None:
        return parsed
    if isinstance(parsed, ImageArchiveReference) and parsed.scheme == "oci-archive":
        return parsed
    raise UsageError(f"a stub cannot be written to {parsed}. NEWREF is one of\n{NEWREF_FORMS}")


def _open_registry(
    where: RegistryReference, asked: Reference, source: SourceOptions
) -> "RegistryTarget":
    from lazyfs.ground.counters import Counters
    from lazyfs.transport.push import RegistryTarget

    return RegistryTarget(
        where.host,
        where.repository,
        settings=source.transport,
        counters=Counters(),
        mount_from=_neighbours(asked, where),
    )


def _try_out(where: _Where, asked: Reference, source: SourceOptions) -> None:
    """Find out early whether a registry takes anything: proving a large image takes its time.

    Raises:
        SourceError: it does not.
    """
    if isinstance(where, RegistryReference):
        with closing(_open_registry(where, asked, source)) as registry:
            registry.try_out()


@contextmanager
def _target(
    where: _Where, asked: Reference, source: SourceOptions
) -> "Iterator[tuple[Target, str]]":
    """Give what NEWREF stands for, to be written to, and under which tag.

    Raises:
        LazyfsError: it cannot be written to.
    """
    from lazyfs.transport.layout_writer import LayoutTarget, archive_target

    if isinstance(where, _Storage):
        with _storage_target(where.name) as target:
            yield target, _TAG_IN_PASSING
    elif isinstance(where, LayoutReference):
        yield LayoutTarget(where.directory), where.tag or ""
    elif isinstance(where, ImageArchiveReference):
        with archive_target(where.path) as target:
            yield target, where.tag or ""
    else:
        with closing(_open_registry(where, asked, source)) as registry:
            yield registry, where.wanted


def _neighbours(asked: Reference, target: RegistryReference) -> list[str]:
    """Return the repositories of the target's registry that have the real image's blobs."""
    if isinstance(asked, RegistryReference) and asked.host == target.host:
        return [asked.repository]
    return []


@contextmanager
def _storage_target(text: str) -> "Iterator[Target]":
    """Give a layout that skopeo copies into a containers-storage when the block ends well."""
    from lazyfs.transport.layout_writer import LayoutTarget

    with tempfile.TemporaryDirectory(prefix="lazyfs-stub-") as room:
        yield LayoutTarget(Path(room) / "layout", name=text)
        origin = f"oci:{room}/layout:{_TAG_IN_PASSING}"
        try:
            done = subprocess.run(
                ["skopeo", "copy", "--quiet", "--preserve-digests", origin, text],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except OSError as error:
            raise LazyfsError(
                f"{text} is written by skopeo, which cannot be started ({error.strerror}); install "
                "it, or write to a registry or an oci-archive: and load that"
            ) from error
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise LazyfsError(f"{text}: skopeo failed: {' '.join(last)[:1000]}")

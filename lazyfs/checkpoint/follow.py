"""From a stub to the image that it stands for.

A stub says so twice: in an annotation of its manifest, by which it is followed without looking into
it, and in the marker in its images directory, which is all that a runtime gets to see. An image
that has lost the annotation (Docker's manifests have none) is followed by its marker, once the
layer that it lies in is proven.

A stub that comes from elsewhere may not lead to this machine's own addresses, as no registry may
(`transport/local.py`); judged by the host's name alone.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import trio

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from lazyfs.checkpoint.reference import Reference, RegistryReference, parse_reference
from lazyfs.checkpoint.stub import (
    ANNOTATION,
    LARGEST_MARKER_BYTES,
    MARKER,
    Stub,
    read_stub,
    real_reference,
)
from lazyfs.checkpoint.tree import path_of
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import NotACheckpoint, SourceError
from lazyfs.transport.local import near

_NAME_MOST = 1024
_SMALL_BYTES = 4 << 20
_SMALL_TIMEOUT_S = 1.0


@asynccontextmanager
async def open_followed(
    reference: str,
    config: OpenConfig,
    counters: Counters | None = None,
    *,
    unpack: bool = False,
) -> AsyncIterator[OpenedCheckpoint]:
    """Open a checkpoint as `open_checkpoint` does; of a stub the one that it stands for.

    What is yielded has a `stub`, if one was followed. With `config.shows_stubs` none is.

    Raises:
        as `open_checkpoint`; and
        NotACheckpoint: a stub stands for another stub.
        RealImageMissing: what a stub stands for cannot be had.
        SourceError: it leads to where it may not.
    """
    if counters is None:
        counters = config.ahead.counters if config.ahead is not None else Counters()
    found: Stub | None = None
    name = ""
    try:
        look_at = _note_image if config.shows_stubs else _stop_at_stub
        async with open_checkpoint(
            reference, config, counters, unpack=unpack, look_at=look_at
        ) as checkpoint:
            found = None if config.shows_stubs else await find_stub(checkpoint)
            if found is None:
                yield checkpoint
                return
            name = checkpoint.reference
    except _Annotated as annotated:
        found, name = annotated.stub, annotated.name
    real = real_reference(found)
    _check_way(name, parse_reference(reference), real, config)
    async with _opened_real(name, real, config, counters, unpack=unpack) as checkpoint:
        yield checkpoint


@asynccontextmanager
async def _opened_real(
    name: str,
    real: RegistryReference,
    config: OpenConfig,
    counters: Counters,
    *,
    unpack: bool,
) -> AsyncIterator[OpenedCheckpoint]:
    """Open what the stub `name` stands for; say so where it cannot be had."""
    is_open = False
    try:
        async with open_checkpoint(
            f"docker://{real}", config, counters, unpack=unpack
        ) as checkpoint:
            await _insist_on_memory(checkpoint)
            checkpoint.stub = name
            is_open = True
            yield checkpoint
    except (SourceError, NotACheckpoint) as error:
        if is_open:
            raise
        kind = RealImageMissing if isinstance(error, SourceError) else NotACheckpoint
        raise kind(f"{name} is a stub of {real}: {error}") from error


async def _insist_on_memory(checkpoint: OpenedCheckpoint) -> None:
    """Refuse a stub.

    Raises:
        NotACheckpoint: it is one.
    """
    if ANNOTATION in checkpoint.image.annotations or await find_stub(checkpoint) is not None:
        raise NotACheckpoint("that is a stub too, of another image")


class RealImageMissing(SourceError):
    """What a stub stands for cannot be had."""


class _Annotated(Exception):
    """An image says in its manifest that it is a stub."""

    def __init__(self, stub: Stub, name: str) -> None:
        super().__init__(name)
        self.stub = stub
        self.name = name


def _note_image(image: ResolvedImage) -> None:
    """Take any image for what it is."""


def _stop_at_stub(image: ResolvedImage) -> None:
    """Raise `_Annotated` if the image is a stub by its annotation.

    Raises:
        MalformedError: the annotation names no image in a registry by digest.
    """
    named = image.annotations.get(ANNOTATION)
    if named is not None:
        stub = Stub(reference=named[:_NAME_MOST])
        real_reference(stub)
        raise _Annotated(stub, image.reference)


def _check_way(name: str, asked: Reference, real: RegistryReference, config: OpenConfig) -> None:
    """Let a stub of a registry lead to `real`, unless that is nearer than the registry.

    Raises:
        SourceError: it may not.
    """
    found = near(urlsplit(f"//{real.host}").hostname or "")
    if found is None or config.transport.allow_local_redirects:
        return
    if not isinstance(asked, RegistryReference):
        return  # a file of this machine, which its user named
    if near(urlsplit(f"//{asked.host}").hostname or "") != found:
        raise SourceError(
            f"{name} is a stub of {real}, at {found.value}, which is refused; if that is meant, "
            "say --allow-local-redirects"
        )


async def find_stub(checkpoint: OpenedCheckpoint) -> Stub | None:
    """Return what a stub's marker says, proven if anything proves it; None if it is no stub.

    Of a layer that is read in order, the marker is looked for in front of the inventory, where
    `lazyfs stub` puts it; in one of a few MiB anywhere, if that comes within a second. (A stub that
    is taken for a checkpoint fails: what stands for its memory cannot be opened.)

    Raises:
        MalformedError: its marker is wrong.
        IntegrityError, FetchError, SourceError: it cannot be read.
    """
    images = checkpoint.images
    if images is None:
        return None
    if not images.node.is_complete and MARKER not in images.node.children:
        if sum(layer.descriptor.size_bytes for layer in checkpoint.image_layers) > _SMALL_BYTES:
            return None
        with trio.move_on_after(_SMALL_TIMEOUT_S):
            await checkpoint.complete()
    marker = images.node.children.get(MARKER)
    if marker is None:
        return None
    layer = checkpoint.layers[marker.layer]
    if layer.descriptor.digest is not None:
        await layer.prove()
    return read_stub(await checkpoint.read_file(path_of(marker), LARGEST_MARKER_BYTES))

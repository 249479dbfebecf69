"""The stub of a checkpoint image: which blobs it has, and the documents that name them.

What has no memory in it stays as it is, blob for blob: a stub of several layers has as many, and
only those that held pages files, or get the marker, are others. Its documents are the real image's
own, edited, so whatever an engine finds there it finds in the stub: annotations, the config's
history, a containerd checkpoint's members.

Source: OCI image-spec, manifest.md, image-index.md, config.md (`rootfs.diff_ids`); Docker's image
manifest version 2, schema 2; containers/image, copy/single.go (a layer's digest and its diff id are
compared); containerd, as in containerd.py.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, BinaryIO, TypeVar

import msgspec
import trio

from lazyfs.checkpoint.criu import INVENTORY, PARENT, is_pages
from lazyfs.checkpoint.follow import find_stub
from lazyfs.checkpoint.images import ImagesDirectory
from lazyfs.checkpoint.manifest import INDEX_TYPES, ImageIndex, parse_manifest
from lazyfs.checkpoint.opened import OpenedCheckpoint
from lazyfs.checkpoint.opened_layer import OpenedLayer
from lazyfs.checkpoint.stub import ANNOTATION, MARKER, Pages, Stub, read_stub, write_stub
from lazyfs.checkpoint.stub_documents import (
    annotate,
    compression,
    describe,
    edit_config,
    gzip_type,
    in_layer,
    in_tree,
    parse_document,
    write_document,
)
from lazyfs.checkpoint.stub_layer import Plan, Written, write_layer
from lazyfs.checkpoint.tree import path_of
from lazyfs.content.lanes import Lane
from lazyfs.content.model import Reader
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    IntegrityError,
    LazyfsError,
    MalformedError,
    NotACheckpoint,
    UnsupportedLayer,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.model import Entry, EntryType, LayerDescriptor
from lazyfs.transport.source import Manifest
from lazyfs.transport.target import Target

_DEPTH_MOST = 4
_MEMFD = "lazyfs-stub"
_LARGE_BYTES = 64 << 20
_BUFFER_BYTES = 256 << 10
_T = TypeVar("_T")


class StubReport(msgspec.Struct, frozen=True):
    """What was written. The fields are the keys of `lazyfs stub --json`."""

    reference: str
    """The stub, by its digest."""
    stands_for: str
    """The real image, by its digest."""
    image_bytes: int
    """All layers of the stub."""
    real_image_bytes: int
    pages_files: int
    pages_bytes: int
    largest_file: str | None
    """Of what stays, the largest file, if there is one of more than 64 MiB."""
    largest_file_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


async def write_stub_of(
    checkpoint: OpenedCheckpoint,
    target: Target,
    tag: str,
    *,
    real: str,
    lazy_pages: bool | None = None,
    made_by: str = "",
) -> StubReport:
    """Write the stub of a checkpoint that was opened, and proven, to `target`.

    `real`: the image that the stub stands for, in a registry and by digest: `checkpoint` itself,
    or its like elsewhere.

    Raises:
        NotACheckpoint: it has no images directory, or is a stub already.
        UnsupportedLayer: no stub can be made of images of its shape.
        IntegrityError, FetchError, SourceError: it cannot be read, or not be written.
    """
    await checkpoint.complete()
    if ANNOTATION in checkpoint.image.annotations or await find_stub(checkpoint) is not None:
        raise NotACheckpoint(
            f"{checkpoint.reference} is a stub already: make another of what it stands for"
        )
    images = checkpoint.images
    if images is None:
        raise NotACheckpoint(f"{checkpoint.reference} has no inventory.img: it is no checkpoint")
    pages = list(_pages_of(images))
    stub = Stub(
        reference=real,
        pages=pages,
        checkpoint_bytes=sum(_sizes(images)),
        image_bytes=sum(layer.size_bytes for layer in checkpoint.image.layers),
        lazy_pages=lazy_pages,
        made_by=made_by,
    )
    try:
        read_stub(write_stub(stub))
    except MalformedError as error:
        raise UnsupportedLayer(
            f"{checkpoint.reference}: no stub can name its {len(pages)} pages files: {error}"
        ) from error
    with ExitStack() as stack:
        writer = _Writer(checkpoint, target, stack)
        digest, image_bytes = await writer.write(images, stub, tag)
    largest_path, largest_bytes = _largest(checkpoint)
    return StubReport(
        reference=f"{target.name}@{digest}",
        stands_for=real,
        image_bytes=image_bytes,
        real_image_bytes=stub.image_bytes,
        pages_files=len(pages),
        pages_bytes=stub.pages_bytes,
        largest_file=largest_path,
        largest_file_bytes=largest_bytes,
    )


def _pages_of(images: ImagesDirectory) -> Iterator[Pages]:
    for depth, node in enumerate((images.node, *images.parents)):
        for name in sorted(node.children):
            child = node.children[name]
            if child.type is EntryType.FILE and is_pages(name):
                yield Pages(f"{PARENT}/" * depth + name, child.size_bytes)


def _sizes(images: ImagesDirectory) -> Iterator[int]:
    for node in (images.node, *images.parents):
        for child in node.children.values():
            if child.type is EntryType.FILE:
                yield child.size_bytes


def _largest(checkpoint: OpenedCheckpoint) -> tuple[str | None, int]:
    """Return the largest file that stays in the stub, if it is large, and its size."""
    files = [
        (node.size_bytes, path)
        for path, node in checkpoint.tree.walk(checkpoint.tree.root)
        if node.type is EntryType.FILE and not is_pages(node.name)
    ]
    size_bytes, path = max(files, default=(0, ""))
    return (path, size_bytes) if size_bytes >= _LARGE_BYTES else (None, 0)


class _Writer:
    """Writes one stub. Files that wait to be sent live as long as `stack`."""

    def __init__(self, checkpoint: OpenedCheckpoint, target: Target, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._image = checkpoint.image
        self._target = target
        self._stack = stack
        self._name = checkpoint.reference

    async def write(self, images: ImagesDirectory, stub: Stub, tag: str) -> tuple[Digest, int]:
        """Write all of it; return the manifest's digest, and how large the layers are."""
        if self._image.source is None or self._image.digest is None:
            raise UnsupportedLayer(f"{self._name} is an archive, not an image")
        served = await _in_thread(self._image.source.manifest, str(self._image.digest))
        document = parse_document(served.data, self._name)
        written = await self._write_layers(images, write_stub(stub))
        kind = self._image.manifest.media_type
        if kind in INDEX_TYPES:
            await self._edit_index(document, served, written)
        else:
            await self._edit_manifest(document, kind, written)
        document.pop("subject", None)
        annotate(document, ANNOTATION, stub.reference)
        media_type = str(document.get("mediaType") or kind)
        data = write_document(document)
        digest = await _in_thread(self._target.put_manifest, data, media_type, tag)
        sizes = [
            written[number].size_bytes if number in written else layer.size_bytes
            for number, layer in enumerate(self._image.layers)
        ]
        return digest, sum(sizes)

    async def _write_layers(self, images: ImagesDirectory, marker: bytes) -> dict[int, Written]:
        """Write the layers that become others; return them by their place in the manifest."""
        plans = self._plans(images, marker)
        written: dict[int, Written] = {}
        for number, descriptor in enumerate(self._image.layers):
            layer = next((each for each in plans if each.descriptor is descriptor), None)
            if layer is None:
                await self._put_as_it_is(descriptor)
                continue
            file = self._spool()
            written[number] = await write_layer(
                plans[layer], _reader_of(layer), file, compression(layer.placed)
            )
            await self._put(written[number].digest, written[number].size_bytes, file)
        return written

    def _plans(self, images: ImagesDirectory, marker: bytes) -> dict[OpenedLayer, Plan]:
        """Return what becomes of the layers that cannot stay as they are."""
        head = self._checkpoint.layers[images.layer]
        inventory = path_of(images.node.children[INVENTORY])
        directories = {path_of(node) for node in (images.node, *images.parents)}
        for layer in self._checkpoint.image_layers:
            for entry in layer.walker.entries:
                path = in_tree(layer.placed, entry.path)
                if path.rpartition("/")[2] == INVENTORY:
                    directories.add(path.rpartition("/")[0])
        plans = {}
        for layer in self._checkpoint.image_layers:
            placed = layer.placed
            plan = Plan(
                tuple(layer.walker.entries),
                {each for path in directories if (each := in_layer(placed, path)) is not None},
                marker_before=in_layer(placed, inventory) if layer is head else None,
                marker=marker,
                marker_name=MARKER,
            )
            if not plan.changes:
                continue
            if placed.kind != "layer":
                raise UnsupportedLayer(
                    f"{self._name}: {placed.place!r} was pushed as a file by itself, which no "
                    "engine restores from; put the checkpoint into one image layer"
                )
            plans[layer] = plan
        return plans

    async def _edit_manifest(
        self, document: dict[str, Any], kind: str, written: Mapping[int, Written]
    ) -> None:
        layers = document["layers" if document.get("layers") is not None else "blobs"]
        packed = gzip_type(kind)
        for number, layer in written.items():
            layers[number] = describe(layers[number], layer, packed)
        if self._image.config is None:
            return
        before = await _in_thread(self._image.read_config)
        after = edit_config(before, [layer.digest for layer in self._image.layers], written)
        digest = Digest.of(after)
        document["config"] |= {"digest": str(digest), "size": len(after)}
        document["config"].pop("data", None)
        await self._put(digest, len(after), io.BytesIO(after))

    async def _edit_index(
        self, document: dict[str, Any], served: Manifest, written: Mapping[int, Written]
    ) -> None:
        index = parse_manifest(served.data, served.media_type, self._name)
        if not isinstance(index, ImageIndex):
            raise MalformedError(f"{self._name} is no index any more")
        number = 0
        for at, entry in enumerate(index.entries):
            if entry.is_manifest:
                await self._copy_manifest(entry.digest)
                continue
            if number in written:
                before = document["manifests"][at]
                document["manifests"][at] = describe(before, written[number], "")
            number += 1

    async def _copy_manifest(self, digest: Digest, depth: int = 1) -> None:
        """Write a manifest that a containerd checkpoint points at, with all that is below it."""
        if self._image.source is None or depth > _DEPTH_MOST:
            raise MalformedError(f"{self._name}: indexes within indexes, {depth} deep")
        served = await _in_thread(self._image.source.manifest, str(digest))
        parsed = parse_manifest(served.data, served.media_type, f"{self._name}: {digest}")
        if isinstance(parsed, ImageIndex):
            for entry in parsed.entries:
                if entry.is_manifest:
                    await self._copy_manifest(entry.digest, depth + 1)
                else:
                    await self._put_as_it_is(entry.descriptor)
        else:
            for each in (*parsed.layers, *filter(None, (parsed.config,))):
                await self._put_as_it_is(each)
        await _in_thread(self._target.put_manifest, served.data, parsed.media_type, None)

    async def _put(self, digest: Digest, size_bytes: int, file: BinaryIO) -> None:
        def opened() -> BinaryIO:
            file.seek(0)
            return file

        await _in_thread(self._target.put_blob, digest, size_bytes, opened)

    async def _put_as_it_is(self, descriptor: LayerDescriptor) -> None:
        """See to it that a blob of the real image is there; it is fetched only if it is not."""
        digest = descriptor.digest
        if digest is None:
            raise MalformedError(f"{self._name}: a blob without a digest")

        def opened() -> BinaryIO:
            return trio.from_thread.run(self._fetch, digest, descriptor.size_bytes)

        await _in_thread(self._target.put_blob, digest, descriptor.size_bytes, opened)

    async def _fetch(self, digest: Digest, size_bytes: int) -> BinaryIO:
        """Return a file with a whole blob of the real image, proven."""
        if self._image.source is None:
            raise MalformedError(f"{self._name}: a blob without a source")
        desk = self._checkpoint.desk
        file = self._spool()
        sink = _FileSink(file, digest)
        await desk.fetcher.fetch(
            self._image.source.blob(digest, size_bytes),
            ByteRange(0, size_bytes),
            sink,
            limiter=desk.lanes.limiter(Lane.DEMAND),
            why="copy",
        )
        sink.check(f"{self._name}: blob {digest}")
        file.seek(0)
        return file

    def _spool(self) -> BinaryIO:
        """Return a nameless file: in the cache's directory, or in memory if the cache is there."""
        directory = self._checkpoint.desk.config.cache.directory
        try:
            if directory is None:
                file: BinaryIO = os.fdopen(os.memfd_create(_MEMFD), "w+b")
            else:
                file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - on the stack
        except OSError as error:
            raise LazyfsError(f"no room to write a layer in: {error.strerror}") from error
        return self._stack.enter_context(file)


class _FileSink:
    """Takes a blob as it comes, and hashes it."""

    def __init__(self, file: BinaryIO, digest: Digest) -> None:
        self._file = file
        self._digest = digest
        self._hasher = digest.hasher()
        self._buffer = bytearray(_BUFFER_BYTES)

    def space(self) -> memoryview:
        return memoryview(self._buffer)

    def advance(self, count: int) -> None:
        with memoryview(self._buffer) as view:
            self._hasher.update(view[:count])
            try:
                self._file.write(view[:count])
            except OSError as error:
                raise LazyfsError(f"a blob cannot be kept: {error.strerror}") from error

    def check(self, what: str) -> None:
        if self._hasher.hexdigest() != self._digest.hex:
            raise IntegrityError(f"{what} does not match its digest")


def _reader_of(layer: OpenedLayer) -> Callable[[Entry], Reader]:
    return lambda entry: layer.reader(entry.content_start, entry.size_bytes)


async def _in_thread(action: Callable[..., _T], *arguments: Any) -> _T:
    return await trio.to_thread.run_sync(partial(action, *arguments))

"""From a reference to a tree whose files can be read: all floors below, put together once."""

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import groupby

import trio
from msgspec.structs import replace

from lazyfs.checkpoint import image as images
from lazyfs.checkpoint.attached import TraceSearch
from lazyfs.checkpoint.criu import is_pages
from lazyfs.checkpoint.desk import Desk, OpenConfig
from lazyfs.checkpoint.engines import origin_of
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.images import ImagesDirectory, chain, find_at_once, find_images
from lazyfs.checkpoint.opened_layer import OpenedLayer
from lazyfs.checkpoint.opening import Ztocs, open_layer
from lazyfs.checkpoint.overlay import drop_whiteouts, lay_over
from lazyfs.checkpoint.placed import PlacedLayer
from lazyfs.checkpoint.plan import Plan
from lazyfs.checkpoint.reference import Reference, parse_reference
from lazyfs.checkpoint.referrals import TRACE_TYPE, ask_who_refers, trusts_referrers
from lazyfs.checkpoint.trace import Trace
from lazyfs.checkpoint.tree import Filling, Node, Tree, path_of
from lazyfs.checkpoint.trust import insist_on_digest, insist_on_proof
from lazyfs.checkpoint.unpacked import Unpacker
from lazyfs.checkpoint.walker import fill_tree
from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import at_once
from lazyfs.content.model import Reader
from lazyfs.ground.counters import Counters
from lazyfs.ground.data import Data
from lazyfs.ground.errors import (
    CONDEMNED,
    LazyfsError,
    MalformedError,
    NotACheckpoint,
    UnsupportedLayer,
    raise_sole_error,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import Entry, EntryType
from lazyfs.transport.retry import Fetcher

log = logging.getLogger(__name__)

_STEP_BYTES = MIB

Job = Callable[[], Awaitable[None]]


class OpenedCheckpoint:
    """A checkpoint that is being read. From `open_checkpoint`."""

    def __init__(self, image: ResolvedImage, desk: Desk, *, by_digest: bool) -> None:
        """Begin without layers. `by_digest`: the image was asked for by its digest."""
        self.image = image
        self.by_digest = by_digest
        self.desk = desk
        self.counters = desk.counters
        self.layers: list[OpenedLayer] = []
        """By their numbers; those of the image, and archives within it that are looked into."""
        self.image_layers: list[OpenedLayer] = []
        self.tree = Tree()
        self.kept: dict[Node, Node] = {}
        """Images directories of earlier layers that a later one builds on, by its link."""
        self.grafts: dict[Node, Node] = {}
        """Directories to be shown in place of `parent` links."""
        self.images: ImagesDirectory | None = None
        self._pages: dict[Node, ByteRange] = {}
        self.trace: Trace | None = None
        """What a workload needed of this image, as far as anybody has said (`trace_known`)."""
        self.trace_source = ""
        """Where that was had: "file", or the digest of what is attached to the image."""
        self.trace_bytes = 0
        """How much was needed, as it says."""
        self.trace_known = trio.Event()
        """Set once it is known whether there is a trace; never waited for by a mount."""
        self.plan: Plan | None = None
        """What is fetched before anybody asks, once that is known (`plan_known`)."""
        self.plan_known = trio.Event()
        self.stub: str | None = None
        """The stub that was asked for, if this is what it stands for."""
        self.poison: LazyfsError | None = None
        self.condemned = trio.Event()
        """Set when there is a `poison`: nothing is served any more."""
        self._jobs, self._jobs_to_do = trio.open_memory_channel[Job](math.inf)

    @property
    def reference(self) -> str:
        """What was opened, pinned by digest where it has one."""
        return self.image.reference

    @property
    def images_directory(self) -> str | None:
        """Path of CRIU's images directory; None if there is none, or it has not come yet."""
        return path_of(self.images.node) if self.images is not None else None

    @property
    def parents(self) -> tuple[str, ...]:
        """Paths of the images directories that it builds on, from the nearest on."""
        return tuple(path_of(node) for node in self.images.parents) if self.images else ()

    def grafts_of(self, view: str) -> dict[Node, Node]:
        """Return the directories to be shown in place of `parent` links, as they come to be known.

        In the view of the whole image a link that leads somewhere there stays a link.
        """
        return self.grafts if view == "criu" else self.kept

    def reader(self, node: Node) -> Reader:
        """Return a reader of a file of the tree."""
        family = self._pages_around(node)
        return self.layers[node.layer].reader(node.content_start, node.size_bytes, family)

    def _pages_around(self, node: Node) -> ByteRange | None:
        """Return where the pages files lie that an eager restore reads along with a pages file.

        Tasks are restored side by side, each from its own (CRIU, `criu/pagemap.c`).
        """
        if node.parent is None or node.exact or not is_pages(node.name):
            return None
        known = self._pages.get(node.parent)
        if known is None or not node.parent.is_complete:
            pages = [
                each.file
                for each in node.parent.children.values()
                if is_pages(each.name) and each.size_bytes and each.layer == node.layer
            ]
            known = ByteRange(
                min((each.content_start for each in pages), default=0),
                max((each.content_start + each.size_bytes for each in pages), default=0),
            )
            self._pages[node.parent] = known
        return known

    async def find(self, path: str) -> Node | None:
        """Return the node at `path`, once it can be told whether there is one.

        Raises:
            LazyfsError: it cannot be told.
        """
        while (node := self.tree.find(path)) is None:
            filling = self.tree.root.filling
            if filling is None or filling.ended:
                if filling is not None:
                    await filling.wait_end()
                return None
            await filling.wait()
        return node

    async def complete(self) -> None:
        """Come back when all names are there; of a stream, when all of it is.

        Raises:
            LazyfsError: they could not be had.
        """
        if self.tree.root.filling is not None:
            await self.tree.root.filling.wait_end()
            await self.layers[0].wait_end()

    async def read_file(self, path: str, limit_bytes: int) -> bytes:
        """Return a small file whole.

        Raises:
            NotACheckpoint: there is no such file.
            MalformedError: it is larger than `limit_bytes`.
            IntegrityError, FetchError, SourceError: it cannot be read.
        """
        node = await self._file(path)
        if node.size_bytes > limit_bytes:
            raise MalformedError(
                f"{path!r} is {node.size_bytes} bytes; at most {limit_bytes} are believed"
            )
        return bytes(await self.reader(node).read(0, node.size_bytes))

    async def stream_file(self, path: str) -> AsyncIterator[Data]:
        """Yield a file's bytes in order, fetched ahead."""
        node = await self._file(path)
        reader = self.reader(node)
        for offset in range(0, node.size_bytes, _STEP_BYTES):
            yield await reader.read(offset, _STEP_BYTES)

    async def prefetch(self, paths: Iterable[str]) -> None:
        """Fetch files at once, neighbours in one request; names that are not there are not."""
        found = [self.tree.find(path) for path in paths]
        nodes = [node for node in found if node is not None and node.type is EntryType.FILE]
        nodes.sort(key=lambda node: node.layer)
        jobs = []
        for layer, members in groupby(nodes, key=lambda node: node.layer):
            ranges = [
                ByteRange(node.content_start, node.content_start + node.size_bytes)
                for node in members
                if node.size_bytes
            ]
            jobs.append(partial(self.layers[layer].prefetch, ranges))
        if jobs:
            await at_once(jobs)

    async def prove(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Prove every layer whose chunks do not prove themselves.

        Raises:
            IntegrityError: one is not what its digest promises.
            FetchError, SourceError: it could not be had.
        """
        for layer in list(self.layers):
            await layer.prove(on_progress)

    def condemn(self, error: LazyfsError) -> None:
        """Serve nothing more of any layer."""
        if self.poison is None:
            self.poison = error
            self.condemned.set()
        for layer in self.layers:
            layer.content.condemn(error, guilty=False)

    def raise_if_condemned(self) -> None:
        """Raise the error of a verification that has failed, if any has."""
        if self.poison is not None:
            raise self.poison
        for layer in self.image_layers:
            layer.content.raise_if_condemned()

    def do(self, job: Job) -> None:
        """Have something done beside the readers, for as long as the checkpoint is open."""
        self._jobs.send_nowait(job)

    def add_layer(self, layer: OpenedLayer, *, of_image: bool = True) -> int:
        """Take a layer in, and run what it needs; return its number, for `Node.layer`.

        Where one `of_image` is found to be wrong, nothing of the whole checkpoint is served any
        more. An archive within the checkpoint is what it is: bytes that the image promised.
        """
        self.layers.append(layer)
        self.do(layer.run)
        self.do(layer.leave_note)
        if layer.memory is not None:
            self.do(layer.remember)
        if of_image:
            self.image_layers.append(layer)
            self.do(partial(self._watch, layer))
        if self.poison is not None:
            layer.content.condemn(self.poison, guilty=False)
        return len(self.layers) - 1

    async def run_jobs(self) -> None:
        """Do what is given to `do`; for ever."""
        async with trio.open_nursery() as nursery:
            async for job in self._jobs_to_do:
                nursery.start_soon(_guarded, job)

    async def save(self) -> None:
        """Keep for later mounts what told how the image is to be read."""
        await trio.to_thread.run_sync(self.image.save)
        for layer in self.image_layers:
            await layer.save()

    async def leave(self) -> None:
        """Keep what there is to keep, now that nobody reads any more."""
        await trio.to_thread.run_sync(self.image.save)
        for layer in self.layers:
            await layer.leave()

    def close(self) -> None:
        """Let go of what the layers hold."""
        for layer in self.layers:
            layer.content.close()

    async def _watch(self, layer: OpenedLayer) -> None:
        """After one failed proof nothing of the whole checkpoint is served."""
        await layer.content.condemned.wait()
        error = layer.content.poison
        if error is not None:
            self.condemn(error)

    async def _file(self, path: str) -> Node:
        node = await self.find(path)
        if node is None:
            raise NotACheckpoint(f"there is no {path!r} in {self.reference}")
        if node.type is not EntryType.FILE:
            raise NotACheckpoint(f"{path!r} in {self.reference} is a {node.type.value}, no file")
        return node


@asynccontextmanager
async def open_checkpoint(
    reference: str,
    config: OpenConfig,
    counters: Counters | None = None,
    *,
    unpack: bool = False,
    look_at: Callable[[ResolvedImage], None] = lambda image: None,
) -> AsyncIterator[OpenedCheckpoint]:
    """Resolve `reference`, open its layers, find its images directory.

    What reads ahead, decodes and unpacks runs until the exit. `unpack`: archives within the
    checkpoint are directories too. `look_at` is told the image before its layers are opened, and
    may raise. Stubs are what they are; `follow.py` goes on from them.

    Raises:
        UsageError: the reference is none.
        SourceError: the image cannot be had.
        NotACheckpoint, UnsupportedLayer, MalformedError: it is nothing that can be shown.
        IntegrityError: bytes contradict their digest.
    """
    parsed = parse_reference(reference)
    image, counters = await _resolve(parsed, reference, config, counters)
    if counters.journal is not None:
        counters.journal.mark("resolved", time.monotonic())
    name = image.reference.partition("@")[0]
    by_digest = getattr(parsed, "digest", None) is not None
    trusts = trusts_referrers(config.referrers, by_digest=by_digest)
    fetcher = Fetcher(config.transport, counters)
    desk = Desk(config, fetcher, Lanes(config.content), name, trusts)
    checkpoint = OpenedCheckpoint(image, desk, by_digest=by_digest)
    try:
        look_at(image)
        if config.content.verify == "strict":
            insist_on_digest(checkpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(checkpoint.run_jobs)
            if config.trace == "auto":
                ask_who_refers(image, config.cache.documents, trusts_referrers=trusts)
            checkpoint.do(partial(_find_trace, checkpoint))
            with _named(image.reference):
                await _open_layers(checkpoint, unpack=unpack)
            if config.content.verify == "strict":
                insist_on_proof(checkpoint)
            if config.content.proves_first:
                await checkpoint.prove(config.on_proof)
            checkpoint.do(checkpoint.save)
            yield checkpoint
            await checkpoint.leave()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise_sole_error(group)
    finally:
        checkpoint.close()
        fetcher.close()
        image.close()


async def _resolve(
    parsed: Reference, reference: str, config: OpenConfig, counters: Counters | None
) -> tuple[ResolvedImage, Counters]:
    """Return the image, by whoever is at it already, and the counters of what it costs."""
    coming = config.ahead.take(reference) if config.ahead is not None else None
    if coming is not None and config.ahead is not None:
        counters = counters if counters is not None else config.ahead.counters
        image = await trio.to_thread.run_sync(coming.result, abandon_on_cancel=True)
    else:
        counters = counters if counters is not None else Counters()
        early = (TRACE_TYPE,) if config.trace == "auto" else ()
        resolve = partial(images.resolve, documents=config.cache.documents, early=early)
        image = await trio.to_thread.run_sync(
            resolve, parsed, config.transport, counters, abandon_on_cancel=True
        )
    return image, counters


async def _find_trace(checkpoint: OpenedCheckpoint) -> None:
    """Look for a trace beside the opening of layers, which does not wait for it."""
    image, config = checkpoint.image, checkpoint.desk.config
    search = TraceSearch(image, config, by_digest=checkpoint.by_digest)
    try:
        found = await search.find()
        if found is not None:
            checkpoint.trace, checkpoint.trace_source, checkpoint.trace_bytes = found
    finally:
        checkpoint.trace_known.set()
    await search.freshen()


async def _open_layers(checkpoint: OpenedCheckpoint, *, unpack: bool) -> None:
    placed = await _placed(checkpoint.image)
    ordinary = [item for item in placed if item.kind != "diff"]
    ztocs = Ztocs(checkpoint.image, referrers=checkpoint.desk.trusts_referrers)
    opened: dict[int, OpenedLayer] = {}

    async def open_one(number: int, item: PlacedLayer) -> None:
        opened[number] = await open_layer(checkpoint.image, item, ztocs, checkpoint.desk)

    try:
        await at_once([partial(open_one, *each) for each in enumerate(ordinary)])
    except UnsupportedLayer as error:
        raise await _explained(checkpoint.image, error) from error
    for number in range(len(ordinary)):
        checkpoint.add_layer(opened[number])
    unpacker = Unpacker(checkpoint, [item for item in placed if item.kind == "diff"])
    attach = unpacker.attach if unpack else None
    if len(ordinary) == 1 and opened[0].is_stream:
        await _open_stream(checkpoint, opened[0], attach)
    else:
        await _open_at_random(checkpoint, attach)


async def _open_at_random(checkpoint: OpenedCheckpoint, attach: Callable[[], None] | None) -> None:
    """Find all names of all layers, and lay these over each other."""
    layers = checkpoint.layers[:]
    await at_once([layer.walk for layer in layers])
    for number, layer in enumerate(layers):
        tree = Tree(map(_mover(layer.placed), layer.walker.entries), layer=number)
        if number == 0:
            checkpoint.tree = tree
            if len(layers) > 1:
                drop_whiteouts(tree.root)
        else:
            checkpoint.kept |= lay_over(checkpoint.tree, tree)
    _find_images(checkpoint)
    if attach is not None:
        attach()


async def _open_stream(
    checkpoint: OpenedCheckpoint,
    layer: OpenedLayer,
    attach: Callable[[], None] | None,
) -> None:
    """Open the only layer, whose names come as it is decoded; wait for the images directory."""
    filling = Filling()
    tree = checkpoint.tree = Tree(filling=filling)
    move = _mover(layer.placed)

    async def fill() -> None:
        try:
            await fill_tree(layer.walker, lambda batch: tree.add(map(move, batch)), filling)
            _find_images(checkpoint)
            if attach is not None:
                attach()
        except LazyfsError as error:
            error = _with_name(checkpoint.reference, error)
            if checkpoint.images is not None:  # else there is no mount yet that could serve it
                if layer.content.poison is None:  # else that has been said
                    log.critical("%s" + CONDEMNED, error)
                checkpoint.condemn(error)
            filling.end(error)
            return
        except Exception:
            filling.end(LazyfsError(f"{checkpoint.reference}: its names cannot be read"))
            raise
        filling.end()

    checkpoint.do(fill)
    while not filling.ended:
        node = find_at_once(tree)
        if node is not None:
            checkpoint.images = ImagesDirectory(node, (), {})
            return
        await filling.wait()
    await filling.wait_end()  # which raises what was found to be wrong


def _find_images(checkpoint: OpenedCheckpoint) -> None:
    """Find the images directory, now that all names are there, and the chain of its parents."""
    known = checkpoint.images
    node = known.node if known is not None else find_images(checkpoint.tree, checkpoint.kept)
    if node is not None:
        checkpoint.images = chain(node, checkpoint.kept)
        checkpoint.grafts.update(checkpoint.images.grafts)


def _mover(placed: PlacedLayer) -> Callable[[Entry], Entry]:
    """Return what puts an entry where its layer belongs."""
    place = placed.place if placed.kind == "layer" else ""
    if not place:
        return lambda entry: entry

    def move(entry: Entry) -> Entry:
        path = f"{place}/{entry.path}" if entry.path else place
        link_of = f"{place}/{entry.link_of}" if entry.link_of else ""
        return replace(entry, path=path, link_of=link_of)

    return move


async def _placed(image: ResolvedImage) -> list[PlacedLayer]:
    try:
        return list(image.placed_layers())
    except UnsupportedLayer as error:
        raise await _explained(image, error) from error


async def _explained(image: ResolvedImage, error: UnsupportedLayer) -> LazyfsError:
    """Return the error for a layer that cannot be read: perhaps it is no checkpoint at all."""
    media_types = [item.media_type for item in image.layers]
    if origin_of(image.annotations, {}, media_types, ()).recognised_by is not None:
        return error
    if image.source is None:
        return NotACheckpoint(f"{image.reference} is no checkpoint archive: {error}")
    described = await trio.to_thread.run_sync(image.describe)
    message = f"{image.reference} does not look like a checkpoint: it is {described}"
    if not image.artifact_type:
        message += f". If it is one all the same: {error}"
    return NotACheckpoint(message)


@contextmanager
def _named(reference: str) -> Iterator[None]:
    """Say of which image it is that a format finds fault with the bytes."""
    try:
        yield
    except (MalformedError, UnsupportedLayer) as error:
        raise _with_name(reference, error) from error


def _with_name(reference: str, error: LazyfsError) -> LazyfsError:
    if isinstance(error, MalformedError | UnsupportedLayer) and reference not in str(error):
        return type(error)(f"{reference}: {error}")
    return error


async def _guarded(job: Job) -> None:
    """Do a job; a bug in it must not end the mount."""
    try:
        await job()
    except Exception:
        log.exception("something beside the readers failed: please report this")

"""Archives within a checkpoint, shown as directories of what is in them.

The changes that a container made to its image are a tar in the checkpoint, `rootfs-diff.tar`, with
`deleted.files` beside it, or a layer of its own. Shown as a directory whose whiteouts are
overlayfs' own it can be laid over the image as it is: nothing is unpacked or copied, and bytes are
fetched as they are read. Volumes and /dev/shm are tars as well.

A directory is filled when somebody first looks into it. Plain tars lie within their layer, and
their files are stretches of it; compressed ones are decoded from their start.

Source: checkpointctl, `lib/metadata.go` (the names); Podman,
`pkg/checkpoint/crutils/checkpoint_restore_utils.go` (`deleted.files`: a JSON list of paths);
containerd, whose rootfs-diff.tar is an OCI layer, gzip and whiteouts and all.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import trio
from msgspec.structs import replace

from lazyfs.checkpoint.opened_layer import OpenedLayer
from lazyfs.checkpoint.opening import Ztocs, find_index, open_layer
from lazyfs.checkpoint.overlay import WHITEOUT_PREFIX, as_overlay, put_whiteout
from lazyfs.checkpoint.placed import PlacedLayer
from lazyfs.checkpoint.tree import Filling, Node, Tree
from lazyfs.checkpoint.walker import Walker, at_last, fill_tree
from lazyfs.content.model import Reader
from lazyfs.ground.counters import Counters
from lazyfs.ground.errors import LazyfsError, MalformedError, NotACheckpoint
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import HEAD_BYTES, Entry, EntryType, LayerDescriptor
from lazyfs.layers.names import entry_path
from lazyfs.layers.tar import looks_like_tar, walk_tar
from lazyfs.transport.blob import Sink
from lazyfs.transport.retry import Fetcher

if TYPE_CHECKING:
    from lazyfs.checkpoint.opened import OpenedCheckpoint

log = logging.getLogger(__name__)

ROOTFS_DIFF = "rootfs-diff.tar"
DELETED_FILES = "deleted.files"
DEVSHM = "devshm-checkpoint.tar"
VOLUMES = "volumes"
_SUFFIX = ".tar"
_DELETED_MOST_BYTES = 64 * MIB
_DELETED_MOST = 1_000_000
_UNTYPED = "application/x-tar"
_OVERLAY_XATTRS = ("trusted.overlay.", "user.overlay.")
"""What overlayfs keeps for itself: an archive has no say in how its files are laid over others."""

_Fill: TypeAlias = Callable[[Node, Filling], Awaitable[None]]


class Unpacker:
    """Shows the archives of one checkpoint as directories."""

    def __init__(self, checkpoint: "OpenedCheckpoint", diffs: Sequence[PlacedLayer]) -> None:
        """`diffs`: layers that hold a container's files, each a directory of its own."""
        self._checkpoint = checkpoint
        self._diffs = diffs

    def attach(self) -> None:
        """Put a directory beside each archive; all names of the checkpoint must be there."""
        top = self._top()
        for name in (ROOTFS_DIFF, DEVSHM):
            self._attach_file(top, name)
        volumes = top.children.get(VOLUMES)
        if volumes is not None:
            for name in list(volumes.children):
                self._attach_file(volumes, name)
        for item in self._diffs:
            self._directory(top, item.place, partial(self._fill_from_layer, item))

    def _top(self) -> Node:
        """Return the directory in which the engine's own files lie."""
        root = self._checkpoint.tree.root
        images = self._checkpoint.images
        if images is None or images.node.parent is None:
            return root
        return images.node.parent

    def _attach_file(self, parent: Node, name: str) -> None:
        archive = parent.children.get(name)
        if archive is None or archive.type is not EntryType.FILE or not name.endswith(_SUFFIX):
            return
        deleted = parent.children.get(DELETED_FILES) if name == ROOTFS_DIFF else None
        self._directory(
            parent, name.removesuffix(_SUFFIX), partial(self._fill_from_file, archive, deleted)
        )

    def _directory(self, parent: Node, name: str, fill: _Fill) -> None:
        if name in ("", ".", "..") or name in parent.children:
            return
        node = Node(name, EntryType.DIRECTORY, parent=parent, exact=True)
        filling = Filling(lambda: self._checkpoint.do(partial(_told, fill, node, filling)))
        node.filling = filling
        parent.children[name] = node

    async def _fill_from_layer(self, item: PlacedLayer, node: Node, filling: Filling) -> None:
        checkpoint = self._checkpoint
        ztocs = Ztocs(checkpoint.image, referrers=checkpoint.desk.trusts_referrers)
        layer = await at_last(
            partial(open_layer, checkpoint.image, item, ztocs, checkpoint.desk), filling
        )
        number = checkpoint.add_layer(layer)
        if checkpoint.desk.config.content.proves_first:
            await at_last(layer.prove, filling)
        elif layer.completion is not None:
            checkpoint.do(layer.completion.run)
        place = _Place(node, number, filling)
        await fill_tree(layer.walker, place.add, filling)
        place.hide(())

    async def _fill_from_file(
        self, archive: Node, deleted: Node | None, node: Node, filling: Filling
    ) -> None:
        """Fill a directory from an archive; one that is compressed is decoded as a layer is."""
        checkpoint = self._checkpoint
        gone = await at_last(partial(self._deleted, deleted), filling)
        look = partial(self._look, archive)
        wanted = [ByteRange(0, min(HEAD_BYTES, archive.size_bytes))]
        (head,) = await at_last(partial(look, wanted), filling)
        is_layer = archive.name == ROOTFS_DIFF
        place = _Place(node, archive.layer, filling, archive.content_start, is_layer=is_layer)
        if looks_like_tar(head):
            entries: list[Entry] = []
            walk = walk_tar(archive.size_bytes, entries, head=head)
            await fill_tree(Walker(walk, entries, look), place.add, filling)
        elif head:
            blob = _FileBlob(archive, checkpoint.reader(archive))
            described = LayerDescriptor(_UNTYPED, None, archive.size_bytes, {})
            # What it fetches is counted where it is fetched.
            settings = checkpoint.desk.config.transport
            desk = replace(checkpoint.desk, fetcher=Fetcher(settings, Counters()))
            index = await at_last(partial(find_index, blob, described, head, desk), filling)
            layer = OpenedLayer(PlacedLayer(described, "", "diff"), index, blob, desk)
            place = _Place(node, checkpoint.add_layer(layer, of_image=False), filling)
            await fill_tree(layer.walker, place.add, filling)
        place.hide(gone)

    async def _look(self, archive: Node, wanted: Sequence[ByteRange]) -> list[bytes]:
        """Return ranges of an archive that lies in a layer."""
        start = archive.content_start
        moved = [ByteRange(start + item.start, start + item.stop) for item in wanted]
        found = await self._checkpoint.layers[archive.layer].look(moved)
        return [data[: item.size_bytes] for data, item in zip(found, wanted, strict=True)]

    async def _deleted(self, node: Node | None) -> list[str]:
        if node is None:
            return []
        if node.size_bytes > _DELETED_MOST_BYTES:
            raise MalformedError(f"{DELETED_FILES} of {node.size_bytes} bytes is not believed")
        data = await self._checkpoint.reader(node).read(0, node.size_bytes)
        try:
            paths = msgspec.json.decode(data, type=list[str]) if len(data) else []
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MalformedError(f"{DELETED_FILES} is no list of paths: {error}") from None
        if len(paths) > _DELETED_MOST:
            raise MalformedError(f"{DELETED_FILES} lists {len(paths)} paths")
        return [entry_path(path) for path in paths]


class _Place:
    """A directory that is filled with a container's files."""

    def __init__(
        self,
        root: Node,
        layer: int,
        filling: Filling,
        shift_bytes: int = 0,
        *,
        is_layer: bool = True,
    ) -> None:
        """The files' bytes are in `layer`, `shift_bytes` behind where their entries say.

        `is_layer`: whiteouts are whiteouts, and not just names.
        """
        self._tree = Tree(layer=layer, exact=True, root=root, filling=filling)
        self._shift_bytes = shift_bytes
        self._is_layer = is_layer
        self._whiteouts: list[tuple[str, str]] = []

    def add(self, entries: Sequence[Entry]) -> None:
        """Take entries in; whiteouts are kept for later."""
        for entry in entries:
            above, _, name = entry.path.rpartition("/")
            if self._is_layer and name.startswith(WHITEOUT_PREFIX):
                self._whiteouts.append((above, name))
                continue
            xattrs = tuple(
                (key, value) for key, value in entry.xattrs if not key.startswith(_OVERLAY_XATTRS)
            )
            start = entry.content_start + self._shift_bytes
            self._tree.add((replace(entry, content_start=start, xattrs=xattrs),))

    def hide(self, paths: Sequence[str]) -> None:
        """Hide what whiteouts and `paths` name of the image below, once all names are there.

        Raises:
            MalformedError: a whiteout lies below something that is no directory.
        """
        hiding = [(self._tree.directory(above), name) for above, name in self._whiteouts]
        for directory, name in hiding:
            as_overlay(directory, name)
        for path in sorted(paths):
            above, _, name = path.rpartition("/")
            if name and not self._is_hidden(above):
                put_whiteout(self._tree.directory(above), name)

    def _is_hidden(self, path: str) -> bool:
        """Whether something that is no directory stands in the way to `path`."""
        node = self._tree.root
        for name in path.split("/") if path else ():
            child = node.children.get(name)
            if child is None or child.type is not EntryType.DIRECTORY:
                return child is not None
            node = child
        return False


class _FileBlob:
    """A file of a layer as a blob, so that what is compressed within it is decoded like a layer.

    Read in worker threads; the file's own reader does the fetching, on the trio thread.
    """

    def __init__(self, node: Node, reader: Reader) -> None:
        self._node = node
        self._reader = reader
        self._token = trio.lowlevel.current_trio_token()

    @property
    def name(self) -> str:
        return self._node.name

    @property
    def size_bytes(self) -> int:
        return self._node.size_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        start = byte_range.start
        while start < byte_range.stop:
            wanted_bytes = min(MIB, byte_range.stop - start)
            data = memoryview(
                trio.from_thread.run(self._reader.read, start, wanted_bytes, trio_token=self._token)
            )
            start += len(data)
            while data:
                room = sink.space()
                count = min(len(room), len(data))
                room[:count] = data[:count]
                room.release()
                sink.advance(count)
                data = data[count:]

    def close(self) -> None:
        """Nothing is open."""


async def _told(fill: _Fill, node: Node, filling: Filling) -> None:
    """Fill a directory; whatever keeps it from being filled is told to who looks into it."""
    try:
        await fill(node, filling)
    except LazyfsError as error:
        filling.end(error)
        log.warning("%s cannot be shown as a directory: %s", node.name, error)
    except BaseException:
        filling.end(NotACheckpoint(f"{node.name} cannot be shown as a directory"))
        raise
    else:
        filling.end()

"""The names that a layer shows: entries folded into a tree, which may grow while it is looked at.

What the entries say last holds, as when a tar is unpacked. What could lead out of the tree or
act on the host is not shown: devices, FIFOs and sockets, links that climb above the layer's
root; suid, sgid and sticky bits are dropped. Nothing ever passes through a symlink: an entry
below one is refused.

A tree of a *container's files* (`exact`) is not for the host but for the container: there modes,
links and FIFOs are as they were.

A tree whose entries are still on their way has a `Filling`; whoever misses a name waits for it.
A name that somebody has been shown may not change its meaning any more.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

import msgspec
import trio

from lazyfs.ground.errors import LazyfsError, MalformedError
from lazyfs.layers.model import Entry, EntryType

log = logging.getLogger(__name__)

_NODES_MOST = 200_000
"""A checkpoint has hundreds; a hostile index must not fill memory with implied directories."""
_EXACT_NODES_MOST = 2_000_000
_HIDDEN_TOLD_MOST = 8
_PERMISSIONS = 0o777
_EXACT_PERMISSIONS = 0o7777
_IMPLIED_DIRECTORY_MODE = 0o755
_IMPLIED_MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700, "proc": 0o555, "sys": 0o555}
"""Of a container's directories that an archive only implies: what they are in every base image."""


class Filling:
    """Names that are still on their way. On the trio thread."""

    def __init__(self, begin: Callable[[], None] | None = None) -> None:
        """`begin` is called when somebody first waits; None: they come by themselves."""
        self.ended = False
        self.error: LazyfsError | None = None
        self._begin = begin
        self._news = trio.lowlevel.ParkingLot()
        self._asked = trio.Event()

    async def wait(self) -> None:
        """Come back when there may be new names, or there will be no more.

        Raises:
            LazyfsError: there will be no more, since they could not be had.
        """
        if self._begin is not None:
            begin, self._begin = self._begin, None
            begin()
        self._asked.set()
        if not self.ended:
            await self._news.park()
        if self.error is not None:
            raise self.error

    def fail(self, error: LazyfsError) -> None:
        """Say that nothing comes for now: who waits hears why, who comes later waits again."""
        self.error = error
        self._news.unpark_all()

    async def rest(self, longest_s: float) -> None:
        """After `fail`: come back when somebody waits again, or after so long."""
        self._asked = trio.Event()
        with trio.move_on_after(longest_s):
            await self._asked.wait()

    async def wait_end(self) -> None:
        """Come back when all names are there; raises as `wait`."""
        while not self.ended:
            await self.wait()
        if self.error is not None:
            raise self.error

    def news(self) -> None:
        """Say that names have come."""
        self.error = None
        self._news.unpark_all()

    def end(self, error: LazyfsError | None = None) -> None:
        """Say that no more will come, and why, if some are missing."""
        self.ended = True
        self.error = error
        self._news.unpark_all()


class Node(msgspec.Struct, eq=False):
    """A name in the tree. Hard links of one file are nodes with the same `content_start`."""

    name: str
    type: EntryType
    mode: int = _IMPLIED_DIRECTORY_MODE
    """Permission bits as archived."""
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    layer: int = 0
    """Which of the checkpoint's layers holds its bytes, from `content_start` on."""
    content_start: int = 0
    symlink_target: str = ""
    xattrs: tuple[tuple[str, bytes], ...] = ()
    children: dict[str, "Node"] = msgspec.field(default_factory=dict)
    parent: "Node | None" = None
    original: "Node | None" = None
    """For a hard link, the node that it is a link to."""
    link_count: int = 1
    """Of a file: how many names it has."""
    climbs: bool = False
    """A link that leads out of the layer: never shown."""
    exact: bool = False
    """One of a container's files."""
    filling: Filling | None = None
    """Of a directory: more names may come."""
    seen: bool = False
    """Somebody has been shown it: it must stay what it is."""

    @property
    def is_complete(self) -> bool:
        """Whether all names of a directory are there."""
        return self.filling is None or self.filling.ended

    @property
    def file(self) -> "Node":
        """The node that stands for the file: of hard links, the first."""
        node = self
        while node.original is not None:
            node = node.original
        return node


class Tree:
    """All names of one layer, or of several, one over the other."""

    def __init__(
        self,
        entries: Iterable[Entry] = (),
        *,
        layer: int = 0,
        exact: bool = False,
        root: Node | None = None,
        filling: Filling | None = None,
    ) -> None:
        """Fold the entries, in their order, into a new root or into the directory `root`.

        Raises:
            MalformedError: an entry lies below something that is no directory; too many names.
        """
        self.root = root if root is not None else Node("", EntryType.DIRECTORY, exact=exact)
        if filling is not None:
            self.root.filling = filling
        self._layer = layer
        self._exact = exact
        self._filling = filling
        self._count = 1
        self._hidden = 0
        self.add(entries)

    def add(self, entries: Iterable[Entry]) -> None:
        """Fold more entries.

        Raises:
            MalformedError: as the constructor; or a name that was shown is given away.
        """
        for entry in entries:
            if self._is_kept(entry):
                self._add(entry)
            else:
                self._remove(entry.path)

    def directory(self, path: str) -> Node:
        """Return the directory at `path`, made if need be.

        Raises:
            MalformedError: something on the way is no directory.
        """
        node = self.root
        for part in path.split("/") if path else ():
            child = node.children.get(part)
            if child is None:
                child = self._put(node, Node(part, EntryType.DIRECTORY))
                if self._exact:
                    child.mode = _IMPLIED_MODES.get(path_of(child, self.root), child.mode)
            if child.type is not EntryType.DIRECTORY:
                raise MalformedError(
                    f"a layer entry in {path!r} lies below {part!r}, which is no directory"
                )
            node = child
        return node

    def find(self, path: str) -> Node | None:
        """Return the node at `path`, if it has come; "" is the root. Follows no links."""
        node: Node | None = self.root
        for name in path.split("/") if path else ():
            node = node.children.get(name) if node is not None else None
        return None if node is None or node.climbs else node

    def walk(self, node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
        """Yield what lies below `node`, depth first and by name, with paths below `path`."""
        stack = [(path, node)]
        while stack:
            where, current = stack.pop()
            if current is not node:
                yield where, current
            prefix = f"{where}/" if where else ""
            for name in sorted(current.children, reverse=True):
                if not current.children[name].climbs:
                    stack.append((prefix + name, current.children[name]))

    def _is_kept(self, entry: Entry) -> bool:
        if entry.type is EntryType.OTHER or (entry.type is EntryType.FIFO and not self._exact):
            self._tell_hidden("%r is a device, FIFO or socket", entry.path)
            return False
        return True

    def _tell_hidden(self, why: str, *names: str) -> None:
        """Tell what is not shown; of many, the first ones."""
        self._hidden += 1
        level = logging.WARNING if self._hidden <= _HIDDEN_TOLD_MOST else logging.INFO
        log.log(level, f"not shown: {why}", *names)
        if self._hidden == _HIDDEN_TOLD_MOST:
            log.warning("not shown: whatever else is of that kind (-v tells it)")

    def _add(self, entry: Entry) -> None:
        if not entry.path:
            self._update_directory(self.root, entry)
            return
        above, _, name = entry.path.rpartition("/")
        parent = self.directory(above)
        existing = parent.children.get(name)
        if (
            entry.type is EntryType.DIRECTORY
            and existing is not None
            and existing.type is EntryType.DIRECTORY
        ):
            self._update_directory(existing, entry)
            return
        self._put(parent, self._node(name, entry))

    def _node(self, name: str, entry: Entry) -> Node:
        original = self.find(entry.link_of) if entry.link_of else None
        if original is not None and original.content_start != entry.content_start:
            original = None  # its name was given to another file meanwhile
        climbs = (
            entry.type is EntryType.SYMLINK
            and not self._exact
            and _climbs_out(entry.path, entry.symlink_target)
        )
        if climbs:
            self._tell_hidden(
                "the link %r -> %r leaves the image", entry.path, entry.symlink_target
            )
        return Node(
            name=name,
            type=entry.type,
            mode=entry.mode & (_EXACT_PERMISSIONS if self._exact else _PERMISSIONS),
            uid=entry.uid,
            gid=entry.gid,
            size_bytes=entry.size_bytes,
            mtime_ns=entry.mtime_ns,
            content_start=entry.content_start,
            symlink_target=entry.symlink_target,
            xattrs=entry.xattrs if self._exact else (),
            original=original,
            climbs=climbs,
        )

    def _put(self, parent: Node, node: Node) -> Node:
        self._drop(parent, node.name)
        node.parent = parent
        node.layer = self._layer
        node.exact = self._exact
        if node.type is EntryType.DIRECTORY:
            node.filling = self._filling
        if node.original is not None:
            node.file.link_count += 1
        parent.children[node.name] = node
        self._count += 1
        if self._count > (_EXACT_NODES_MOST if self._exact else _NODES_MOST):
            raise MalformedError(f"the layer has more than {self._count - 1} names")
        return node

    def _drop(self, parent: Node, name: str) -> None:
        """Forget what something else takes the place of."""
        gone = parent.children.get(name)
        if gone is None:
            return
        if gone.seen:
            raise MalformedError(
                f"the layer has two entries called {name!r} in one directory, and the first has "
                "been shown already: unpack and pack it anew"
            )
        gone.file.link_count -= 1
        del parent.children[name]

    def _remove(self, path: str) -> None:
        above, _, name = path.rpartition("/")
        parent = self.find(above)
        if parent is not None:
            self._drop(parent, name)

    def _update_directory(self, node: Node, entry: Entry) -> None:
        if entry.type is not EntryType.DIRECTORY:
            raise MalformedError("the layer's root is not a directory")
        node.mode = entry.mode & (_EXACT_PERMISSIONS if self._exact else _PERMISSIONS)
        node.uid, node.gid, node.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        if self._exact:
            node.xattrs = entry.xattrs


def path_of(node: Node, root: Node | None = None) -> str:
    """Return a node's path from `root`, or from the root of its tree."""
    names: list[str] = []
    while node.parent is not None and node is not root:
        names.append(node.name)
        node = node.parent
    return "/".join(reversed(names))


def _climbs_out(path: str, target: str) -> bool:
    """Whether a link's target lies, by its words alone, above the layer's root."""
    if target.startswith("/"):
        return True
    depth = path.count("/")
    for part in target.split("/"):
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return True
    return False

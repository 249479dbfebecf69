"""The names that a layer shows: entries folded into a tree, and a view of it by inode.

What the entries say last holds, as when a tar is unpacked. What could lead out of the tree or
act on the host is not shown: devices, FIFOs and sockets, links that climb above the layer's
root; suid, sgid and sticky bits are dropped. Nothing ever passes through a symlink: an entry
below one is refused.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lazyfs.ground.errors import MalformedError
from lazyfs.layers.model import Entry, EntryType

log = logging.getLogger(__name__)

_NODES_MOST = 200_000
"""A checkpoint has hundreds; a hostile index must not fill memory with implied directories."""
_PERMISSIONS = 0o777
_IMPLIED_DIRECTORY_MODE = 0o755
_LINKS_MOST = 40
"""The kernel gives up (ELOOP) after so many."""
_STEPS_MOST = 10_000_000
"""Names that following all links of an image may take; an honest image needs some thousand."""


@dataclass(eq=False, slots=True)
class Node:
    """A name in the tree. Hard links of one file are nodes with the same `content_start`."""

    name: str
    type: EntryType
    mode: int = _IMPLIED_DIRECTORY_MODE
    """Permission bits as archived."""
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    mtime_ns: int = 0
    content_start: int = 0
    symlink_target: str = ""
    children: dict[str, "Node"] = field(default_factory=dict)
    original: "Node | None" = None
    """For a hard link, the node that it is a link to."""


class Tree:
    """All names of one layer."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Fold the entries, in their order.

        Raises:
            MalformedError: an entry lies below something that is no directory; too many names.
        """
        self.root = Node("", EntryType.DIRECTORY)
        self._count = 1
        for entry in entries:
            if _is_shown(entry):
                self._add(entry)
            else:
                self._remove(entry.path)

    def find(self, path: str) -> Node | None:
        """Return the node at `path`; "" is the root. Follows no links."""
        node: Node | None = self.root
        for name in path.split("/") if path else ():
            node = node.children.get(name) if node is not None else None
        return node

    def walk(self, node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
        """Yield what lies below `node`, depth first and by name, with paths below `path`."""
        stack = [(path, node)]
        while stack:
            where, current = stack.pop()
            if current is not node:
                yield where, current
            prefix = f"{where}/" if where else ""
            for name in sorted(current.children, reverse=True):
                stack.append((prefix + name, current.children[name]))

    def _add(self, entry: Entry) -> None:
        if not entry.path:
            self._update_directory(self.root, entry)
            return
        *above, name = entry.path.split("/")
        parent = self.root
        for part in above:
            child = parent.children.get(part)
            if child is None:
                child = parent.children[part] = self._count_in(Node(part, EntryType.DIRECTORY))
            if child.type is not EntryType.DIRECTORY:
                raise MalformedError(
                    f"layer entry {entry.path!r} lies below {part!r}, which is no directory"
                )
            parent = child
        existing = parent.children.get(name)
        if (
            entry.type is EntryType.DIRECTORY
            and existing is not None
            and existing.type is EntryType.DIRECTORY
        ):
            self._update_directory(existing, entry)
            return
        original = self.find(entry.link_of) if entry.link_of else None
        if original is not None and original.content_start != entry.content_start:
            original = None  # its name was given to another file meanwhile
        node = Node(
            name=name,
            type=entry.type,
            mode=entry.mode & _PERMISSIONS,
            uid=entry.uid,
            gid=entry.gid,
            size_bytes=entry.size_bytes,
            mtime_ns=entry.mtime_ns,
            content_start=entry.content_start,
            symlink_target=entry.symlink_target,
            original=original,
        )
        parent.children[name] = self._count_in(node)

    def _remove(self, path: str) -> None:
        """Forget what an entry that is not shown takes the place of."""
        above, _, name = path.rpartition("/")
        parent = self.find(above)
        if parent is not None:
            parent.children.pop(name, None)

    def _count_in(self, node: Node) -> Node:
        self._count += 1
        if self._count > _NODES_MOST:
            raise MalformedError(f"the layer has more than {_NODES_MOST} names")
        return node

    @staticmethod
    def _update_directory(node: Node, entry: Entry) -> None:
        if entry.type is not EntryType.DIRECTORY:
            raise MalformedError("the layer's root is not a directory")
        node.mode = entry.mode & _PERMISSIONS
        node.uid, node.gid, node.mtime_ns = entry.uid, entry.gid, entry.mtime_ns


class View:
    """A part of a tree by inode number: 1 is its root; hard links share a number.

    Its root is where the kernel would go on to the host, so here links are followed to the end:
    one that leads out, through whatever other links, is not in the view.
    """

    def __init__(self, tree: Tree, root: Node) -> None:
        """Number everything below `root`."""
        self.nodes = [root]
        self.links = [0]
        self._inodes: dict[int, int] = {id(root): 1}
        paths = _Paths(root)
        for path, node in tree.walk(root):
            if node.type is EntryType.SYMLINK and paths.leaves(path, node.symlink_target):
                log.warning("not shown: the link %r -> %r leaves it", path, node.symlink_target)
                continue
            original = node
            while original.original is not None:
                original = original.original
            inode = self._inodes.get(id(original))
            if inode is None:
                self.nodes.append(original)
                self.links.append(0)
                inode = len(self.nodes)
                self._inodes[id(original)] = inode
            self._inodes[id(node)] = inode
            self.links[inode - 1] += 1
        for index, node in enumerate(self.nodes):
            if node.type is EntryType.DIRECTORY:
                below = node.children.values()
                self.links[index] = 2 + sum(child.type is EntryType.DIRECTORY for child in below)
        self.size_bytes = sum(node.size_bytes for node in self.nodes)

    def node(self, inode: int) -> Node:
        """Return what has this number."""
        return self.nodes[inode - 1]

    def find(self, parent_inode: int, name: str) -> int | None:
        """Return the number of a name in a directory, if it is there."""
        child = self.node(parent_inode).children.get(name)
        return None if child is None else self._inodes.get(id(child))

    def listing(self, inode: int) -> list[tuple[str, int]]:
        """Return the names in a directory, sorted, with their numbers."""
        children = self.node(inode).children
        found = [(name, self._inodes.get(id(children[name]))) for name in sorted(children)]
        return [(name, number) for name, number in found if number is not None]


class _Paths:
    """Follows paths as the kernel does (path_resolution(7)), up to where they would go astray."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._steps_left = _STEPS_MOST

    def leaves(self, path: str, target: str) -> bool:
        """Whether the target of the link at `path` leads above the root, or cannot be told."""
        way = [self._root]
        for name in path.split("/")[:-1]:
            way.append(way[-1].children[name])
        ahead = target.split("/")[::-1]
        links_left = _LINKS_MOST
        absolute = target.startswith("/")
        while ahead and not absolute:
            if not (self._steps_left and links_left):
                return True
            self._steps_left -= 1
            name = ahead.pop()
            child = None if name in ("", ".", "..") else way[-1].children.get(name)
            if name == "..":
                way.pop()
                if not way:
                    return True
            elif child is not None and child.type is EntryType.SYMLINK:
                links_left -= 1
                ahead += child.symlink_target.split("/")[::-1]
                absolute = child.symlink_target.startswith("/")
            elif child is not None:
                way.append(child)
            elif name not in ("", "."):
                return False
        return absolute


def _is_shown(entry: Entry) -> bool:
    if entry.type is EntryType.OTHER:
        log.warning("not shown: %r is a device, FIFO or socket", entry.path)
        return False
    if entry.type is EntryType.SYMLINK and _climbs_out(entry):
        log.warning("not shown: the link %r -> %r leaves the image", *_names(entry))
        return False
    return True


def _names(entry: Entry) -> tuple[str, str]:
    return entry.path, entry.symlink_target


def _climbs_out(entry: Entry) -> bool:
    """Whether a link's target lies, by its words alone, above the layer's root."""
    if entry.symlink_target.startswith("/"):
        return True
    depth = entry.path.count("/")
    for part in entry.symlink_target.split("/"):
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return True
    return False

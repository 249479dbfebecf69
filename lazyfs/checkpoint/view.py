"""A part of a tree by inode number, as the kernel sees it.

Numbers are given as names are first asked for: 1 is the view's root, hard links share one. A
name that is not there is only said to be absent when the directory is complete; till then whoever
asks waits.

The view's root is where the kernel would go on to the host, so here links are followed to the
end: one that leads out, through whatever other links, is not in the view. Links of a container's
files are not for the host, and are as they are. So is what stands for memory in a stub: CRIU would
take what is not there for empty.
"""

import logging
from collections.abc import Mapping

from lazyfs.checkpoint.criu import is_left_out, is_pages
from lazyfs.checkpoint.tree import Node
from lazyfs.ground.errors import MalformedError
from lazyfs.layers.model import EntryType

log = logging.getLogger(__name__)

_LINKS_MOST = 40
"""The kernel gives up (ELOOP) after so many."""
_STEPS_MOST = 10_000_000
"""Names that following all links of an image may take; an honest image needs some thousand."""


class View:
    """What of a tree is shown, and under which numbers."""

    def __init__(self, root: Node, grafts: Mapping[Node, Node] | None = None) -> None:
        """Show `root` and what lies below; in place of a node of `grafts`, another.

        `grafts` may grow until the directories that they lie in are complete.
        """
        self._grafts = grafts if grafts is not None else {}
        self._numbers: dict[Node, int] = {}
        self._hidden: set[Node] = set()
        self._paths = _Paths(root)
        self.nodes: list[Node] = []
        """By number, from 1 on."""
        self._number(root)

    def node(self, inode: int) -> Node:
        """Return what has this number."""
        return self.nodes[inode - 1]

    async def lookup(self, parent_inode: int, name: str) -> int | None:
        """Return the number of a name in a directory, or None if it is not there.

        A checkpoint only if the directory is not complete yet.

        Raises:
            LazyfsError: that cannot be told, since the names could not be had.
            MalformedError: it is a pages file, and not to be shown: CRIU would go on with zeros in
                the place of shared memory if it were told that there is none.
        """
        parent = self.node(parent_inode)
        while True:
            child = parent.children.get(name)
            if child is not None:
                number = await self._shown(child)
                if number is None and is_pages(name):
                    raise MalformedError(f"{name!r} is a link out of the checkpoint: no memory")
                return number
            if parent.filling is None:
                return None
            if parent.filling.ended:
                await parent.filling.wait_end()  # raises, if names are missing
                return None
            await parent.filling.wait()

    async def listing(self, inode: int) -> list[tuple[str, int]]:
        """Return the names in a directory, sorted, with their numbers; raises as `lookup`."""
        parent = self.node(inode)
        if parent.filling is not None:
            await parent.filling.wait_end()
        found = [
            (name, await self._shown(parent.children[name])) for name in sorted(parent.children)
        ]
        return [(name, number) for name, number in found if number is not None]

    async def xattrs(self, inode: int, *, of_overlay: bool = False) -> dict[str, bytes]:
        """Return the extended attributes of something.

        `of_overlay`: those that hide what lies below a directory are wanted too, which only all
        names together tell; overlayfs itself asks for none of the top of what it lays over.

        Raises:
            LazyfsError: that cannot be told.
        """
        node = self.node(inode)
        is_inside = node.exact and node.parent is not None and node.parent.exact
        if of_overlay and is_inside and node.filling is not None:
            await node.filling.wait_end()
        return dict(node.xattrs)

    def links(self, inode: int) -> int:
        """How many names something has; 1 for a directory that cannot tell yet."""
        node = self.node(inode)
        if node.type is not EntryType.DIRECTORY:
            return node.link_count
        if not node.is_complete:
            return 1
        return 2 + sum(child.type is EntryType.DIRECTORY for child in node.children.values())

    def is_settled(self, inode: int) -> bool:
        """Whether what is told of something will not change: names may come, and hard links.

        CRIU's own files are taken to have none: else each read of them would have the kernel ask
        whether they are as they were.
        """
        node = self.node(inode)
        may_be_linked = node.exact and node.parent is not None and not node.parent.is_complete
        return node.is_complete and not may_be_linked

    @property
    def size_bytes(self) -> int:
        """Of the files that have been asked for."""
        return sum(node.size_bytes for node in self.nodes)

    async def _shown(self, node: Node) -> int | None:
        is_link = node.type is EntryType.SYMLINK and not node.exact
        if is_link and node.parent is not None and node.parent.filling is not None:
            await node.parent.filling.wait_end()  # before that nobody knows what it stands for
        node = self._grafts.get(node, node)
        if node.climbs or node in self._hidden:
            return None
        known = self._numbers.get(node.file)
        if known is not None:
            node.seen = True
            return known
        if self._is_astray(node):
            log.warning("not shown: the link %r -> %r leaves it", node.name, node.symlink_target)
            self._hidden.add(node)
            return None
        node.seen = True
        return self._number(node.file)

    def _is_astray(self, node: Node) -> bool:
        """Whether something is a link that leads out of the view, or may."""
        if node.type is not EntryType.SYMLINK or node.exact:
            return False
        return not is_left_out(node.name, node.symlink_target) and self._paths.leaves(node)

    def _number(self, node: Node) -> int:
        node.seen = True
        self.nodes.append(node)
        self._numbers[node] = len(self.nodes)
        return len(self.nodes)


class _Paths:
    """Follows paths as the kernel does (path_resolution(7)), up to where they would go astray."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._steps_left = _STEPS_MOST

    def leaves(self, link: Node) -> bool:
        """Whether a link's target leads above the root, or cannot be told."""
        way = self._way_to(link.parent)
        if not way:
            return True
        ahead = link.symlink_target.split("/")[::-1]
        links_left = _LINKS_MOST
        absolute = link.symlink_target.startswith("/")
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
            elif child is not None and child.exact:
                return True  # a container's own links lead anywhere, and may not have come yet
            elif child is not None:
                way.append(child)
            elif name not in ("", "."):
                return False
        return absolute

    def _way_to(self, node: Node | None) -> list[Node]:
        """Return the nodes from the root to `node`; nothing if it is not below."""
        way: list[Node] = []
        while node is not None:
            way.append(node)
            if node is self._root:
                return way[::-1]
            node = node.parent
        return []

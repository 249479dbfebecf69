"""Which directory of a checkpoint CRIU wants, and which ones that one builds on.

An incremental checkpoint leaves memory where an earlier one has it, and names that by `parent`, a
symbolic link in its images directory (CRIU, `criu/image.c:open_parent`). A mount shows what the
link stands for as a directory of that name, so CRIU finds its parents wherever the root of the
view is. Anything that would make CRIU fail late, or restore zeros, is refused here.
"""

from collections.abc import Mapping

import msgspec

from lazyfs.checkpoint.criu import INVENTORY, PARENT
from lazyfs.checkpoint.overlay import resolve_directory
from lazyfs.checkpoint.tree import Node, Tree, path_of
from lazyfs.ground.errors import MalformedError
from lazyfs.layers.model import EntryType

_PARENTS_MOST = 1000
_FIRST_NAMES = ("checkpoint", "")
"""As Podman, CRI-O and containerd name it, and as containerd's `ctr` and a bare directory have
it: found there, it need not be looked for any further."""


class ImagesDirectory(msgspec.Struct, frozen=True):
    """The images directory, and its parents from the nearest on."""

    node: Node
    parents: tuple[Node, ...]
    grafts: Mapping[Node, Node]
    """For each `parent` link on the way, the directory to be shown in its place."""

    @property
    def layer(self) -> int:
        """Which layer holds its inventory."""
        return self.node.children[INVENTORY].layer


def find_at_once(tree: Tree) -> Node | None:
    """Return the images directory if it is where it usually is, though names may still come."""
    for path in _FIRST_NAMES:
        node = tree.find(path)
        if node is not None and _has_inventory(node):
            return node
    return None


def find_images(tree: Tree, kept: Mapping[Node, Node]) -> Node | None:
    """Return CRIU's images directory, of a chain its head; None if there is none.

    Of several `checkpoint`, then the one nearest to the root, then the first by name.
    `kept`: what `overlay.lay_over` kept aside.
    """
    found = [
        (path, node)
        for path, node in (("", tree.root), *tree.walk(tree.root))
        if node.type is EntryType.DIRECTORY and _has_inventory(node)
    ]
    parents = {_parent_of(node, kept) for _, node in found}
    heads = [(path, node) for path, node in found if node not in parents] or found
    return min(heads, key=lambda item: _preference(item[0]), default=("", None))[1]


def chain(head: Node, kept: Mapping[Node, Node]) -> ImagesDirectory:
    """Follow the parents of an images directory whose names are all there.

    Raises:
        MalformedError: a parent is not in the checkpoint, or the chain comes back to itself.
    """
    parents: list[Node] = []
    grafts: dict[Node, Node] = {}
    node = head
    while (link := node.children.get(PARENT)) is not None:
        where = f"{path_of(node) or '.'}/{PARENT}"
        if link.type is EntryType.DIRECTORY:
            parent: Node | None = link
        elif link.type is EntryType.SYMLINK:
            parent = _parent_of(node, kept)
        else:
            raise MalformedError(f"{where} should be a link to a directory and is a file")
        if parent is None:
            raise MalformedError(
                f"the checkpoint builds on an earlier one that is not in it: {where} -> "
                f"{link.symlink_target[:200]!r} leads nowhere. Without its parent it cannot be "
                "restored: put both into one image"
            )
        if parent is head or parent in parents:
            raise MalformedError(f"{where} closes a circle: no checkpoint is its own parent")
        if len(parents) >= _PARENTS_MOST:
            raise MalformedError(f"more than {_PARENTS_MOST} checkpoints build on each other")
        if link is not parent:
            grafts[link] = parent
        parents.append(parent)
        node = parent
    return ImagesDirectory(head, tuple(parents), grafts)


def _parent_of(node: Node, kept: Mapping[Node, Node]) -> Node | None:
    link = node.children.get(PARENT)
    if link is None or link.type is not EntryType.SYMLINK:
        return None
    return kept.get(link) or resolve_directory(node, link.symlink_target)


def _has_inventory(node: Node) -> bool:
    inventory = node.children.get(INVENTORY)
    return inventory is not None and inventory.type is EntryType.FILE


def _preference(path: str) -> tuple[bool, int, str]:
    return (path != _FIRST_NAMES[0], path.count("/") + 1 if path else 0, path)

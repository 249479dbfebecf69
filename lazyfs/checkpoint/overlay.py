"""Layers, one over the other, by OCI's rules.

A whiteout `.wh.NAME` hides NAME of the layers below, `.wh..wh..opq` all that they have in that
directory. In the first layer there is nothing to hide: whiteouts are just not shown.

A later layer whose images directory names a `parent` that cannot be in its own layer, and lies
where an earlier one has an images directory, does not replace that: it builds on it (one layer
for each pre-dump, as proposed on image-spec issue 962).

Source: OCI image-spec, layer.md, "Whiteouts"; overlayfs' own form of them: the kernel's
Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
"""

from collections.abc import Iterator

from lazyfs.checkpoint.criu import INVENTORY, PARENT
from lazyfs.checkpoint.tree import Node, Tree
from lazyfs.layers.model import EntryType

WHITEOUT_PREFIX = ".wh."
OPAQUE = ".wh..wh..opq"
OPAQUE_XATTRS = (("trusted.overlay.opaque", b"y"), ("user.overlay.opaque", b"y"))


def lay_over(lower: Tree, upper: Tree) -> dict[Node, Node]:
    """Put `upper` over `lower`, which becomes both; return what was kept aside.

    That is, for a `parent` link of `upper`, the images directory of `lower` that it stands for.
    """
    kept: dict[Node, Node] = {}
    _merge(lower.root, upper.root, kept)
    return kept


def drop_whiteouts(root: Node) -> None:
    """Remove the whiteouts of what lies over nothing."""
    for directory in list(_directories(root)):
        for name in [name for name in directory.children if name.startswith(WHITEOUT_PREFIX)]:
            del directory.children[name]


def as_overlay(directory: Node, name: str) -> None:
    """Put into a directory of a container's files what the whiteout `name` means to overlayfs."""
    if name == OPAQUE:
        _make_opaque(directory)
    elif name.removeprefix(WHITEOUT_PREFIX) not in ("", ".", ".."):
        put_whiteout(directory, name.removeprefix(WHITEOUT_PREFIX))


def put_whiteout(parent: Node, name: str) -> None:
    """Hide `name` in what lies below; what the directory has of that name itself stays.

    A directory then shows nothing of one below: that was removed, and this one made in its place.
    """
    existing = parent.children.get(name)
    if existing is None:
        parent.children[name] = Node(
            name, EntryType.WHITEOUT, mode=0, parent=parent, exact=True, layer=parent.layer
        )
    elif existing.type is EntryType.DIRECTORY:
        _make_opaque(existing)


def _make_opaque(directory: Node) -> None:
    directory.xattrs = tuple({**dict(directory.xattrs), **dict(OPAQUE_XATTRS)}.items())


def _merge(lower: Node, upper: Node, kept: dict[Node, Node]) -> None:
    pairs = [(lower, upper)]
    while pairs:
        below, above = pairs.pop()
        hidden = {name for name in above.children if name.startswith(WHITEOUT_PREFIX)}
        if OPAQUE in hidden:
            below.children.clear()
        for name in hidden:
            below.children.pop(name.removeprefix(WHITEOUT_PREFIX), None)
        link = _builds_on(below, above)
        if link is not None:
            kept[link] = _moved_aside(below)
        for name in above.children.keys() - hidden:
            node, existing = above.children[name], below.children.get(name)
            if node.type is not EntryType.DIRECTORY:
                _put(below, node)
            elif existing is not None and existing.type is EntryType.DIRECTORY:
                pairs.append((existing, node))
            else:
                _put(below, node)
                drop_whiteouts(node)
        below.mode, below.uid, below.gid = above.mode, above.uid, above.gid
        below.mtime_ns, below.xattrs = above.mtime_ns, above.xattrs


def _put(parent: Node, node: Node) -> None:
    node.parent = parent
    parent.children[node.name] = node


def _moved_aside(directory: Node) -> Node:
    """Empty a directory, and return one that has what it had."""
    aside = Node(directory.name, EntryType.DIRECTORY, directory.mode, directory.uid, directory.gid)
    aside.parent = directory.parent
    for child in directory.children.values():
        _put(aside, child)
    directory.children = {}
    return aside


def _builds_on(lower: Node, upper: Node) -> Node | None:
    """Return the `parent` link of `upper` if what it means can only be `lower`."""
    link = upper.children.get(PARENT)
    if link is None or link.type is not EntryType.SYMLINK:
        return None
    if INVENTORY not in upper.children or INVENTORY not in lower.children:
        return None
    for own in (upper, lower):  # it may name a directory that either of them has
        found = resolve_directory(own, link.symlink_target)
        if found is not None and found is not own:
            return None
    return link


def resolve_directory(start: Node, target: str) -> Node | None:
    """Return the directory that a link's target names, as far as `start`'s own tree goes.

    No other link may lie on the way.
    """
    if target.startswith("/"):
        return None
    node: Node | None = start
    for part in target.split("/"):
        if node is None or node.type is not EntryType.DIRECTORY:
            return None
        if part == "..":
            node = node.parent
        elif part not in ("", "."):
            node = node.children.get(part)
    return node if node is not None and node.type is EntryType.DIRECTORY else None


def _directories(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack += [child for child in node.children.values() if child.type is EntryType.DIRECTORY]

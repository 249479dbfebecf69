"""Layers over each other, and checkpoints that build on each other."""

import pytest
import trio
import trio.testing

from lazyfs.checkpoint.images import chain, find_at_once, find_images
from lazyfs.checkpoint.overlay import as_overlay, drop_whiteouts, lay_over, put_whiteout
from lazyfs.checkpoint.tree import Filling, Node, Tree, path_of
from lazyfs.checkpoint.view import View
from lazyfs.ground.errors import MalformedError
from lazyfs.layers.model import Entry, EntryType
from tests.checkpoint.test_tree import directory, file, link, paths, shown

Grafts = dict[Node, Node]


def laid(*layers: list[Entry]) -> tuple[Tree, Grafts]:
    first, *later = (Tree(entries, layer=number) for number, entries in enumerate(layers))
    kept: Grafts = {}
    drop_whiteouts(first.root)
    for tree in later:
        kept |= lay_over(first, tree)
    return first, kept


# -- whiteouts ----------------------------------------------------------------------------------


def test_later_layers_hide_and_replace() -> None:
    tree, _ = laid(
        [file("a/one", 1), file("a/two", 1), file("b/x"), file("c/y"), directory("d", 0o700)],
        [file("a/.wh.one"), file("b/.wh..wh..opq"), file("b/z"), file(".wh.c"), file("a/two", 2)],
        [directory("d", 0o711), file("c", 3)],
    )
    assert paths(tree) == ["a", "a/two", "b", "b/z", "c", "d"]
    two, d = tree.find("a/two"), tree.find("d")
    assert two is not None
    assert d is not None
    assert (two.size_bytes, two.layer, d.mode) == (2, 1, 0o711)


def test_a_whiteout_hides_nothing_of_its_own_layer() -> None:
    tree, _ = laid([file("a/x", 1)], [file("a/x", 2), file("a/.wh.x")])
    assert paths(tree) == ["a", "a/x"]


def test_whiteouts_of_the_first_layer_are_not_shown() -> None:
    tree, _ = laid([file("a/.wh.x"), file("a/.wh..wh..opq"), file("a/y")], [])
    assert paths(tree) == ["a", "a/y"]


def test_a_file_may_take_a_directorys_place_and_back() -> None:
    tree, _ = laid([file("a/b/c"), file("d")], [file("a/b"), file("d/e")])
    assert paths(tree) == ["a", "a/b", "d", "d/e"]


def test_a_containers_whiteouts_become_overlayfs_own() -> None:
    tree = Tree([file("etc/kept"), directory("var")], exact=True)
    as_overlay(tree.directory("etc"), ".wh.gone")
    as_overlay(tree.directory("etc"), ".wh.kept")
    as_overlay(tree.directory("var"), ".wh..wh..opq")
    put_whiteout(tree.directory("new"), "x")
    kinds = {path: node.type for path, node in tree.walk(tree.root)}
    assert kinds["etc/gone"] is kinds["new/x"] is EntryType.WHITEOUT
    assert kinds["etc/kept"] is EntryType.FILE
    assert dict(tree.directory("var").xattrs) == {
        "trusted.overlay.opaque": b"y",
        "user.overlay.opaque": b"y",
    }


# -- parents ------------------------------------------------------------------------------------


def images(path: str, parent: str | None = None) -> list[Entry]:
    prefix = f"{path}/" if path else ""
    made = [directory(path), file(f"{prefix}inventory.img"), file(f"{prefix}pages-1.img")]
    return made + ([link(f"{prefix}parent", parent)] if parent is not None else [])


PODMAN = images("checkpoint", "../pre-checkpoint") + images("pre-checkpoint")


async def test_a_parent_is_a_directory_in_the_default_view() -> None:
    tree, kept = laid(PODMAN)
    head = find_images(tree, kept)
    assert head is not None
    found = chain(head, kept)
    assert [path_of(node) for node in (found.node, *found.parents)] == [
        "checkpoint",
        "pre-checkpoint",
    ]
    assert await shown(View(head, found.grafts)) == [
        "inventory.img",
        "pages-1.img",
        "parent",
        "parent/inventory.img",
        "parent/pages-1.img",
    ]
    whole = await shown(View(tree.root, kept))
    assert "checkpoint/parent" in whole
    assert "checkpoint/parent/inventory.img" not in whole


async def test_a_layer_for_each_pre_dump() -> None:
    """Each layer has its images at one place, and `parent` can only mean the layer below."""
    tree, kept = laid(images(""), images("", "../1"), images("", "../2"))
    head = find_images(tree, kept)
    assert head is tree.root
    found = chain(head, kept)
    assert len(found.parents) == 2
    view = View(head, found.grafts)
    seen = await shown(view)
    assert "parent/parent/pages-1.img" in seen
    assert not any(path.startswith("parent/parent/parent") for path in seen)
    layers = []
    for path in ("pages-1.img", "parent/pages-1.img", "parent/parent/pages-1.img"):
        inode: int | None = 1
        for name in path.split("/"):
            inode = await view.lookup(inode or 0, name)
        layers.append(view.node(inode or 0).layer)
    assert layers == [2, 1, 0]
    assert "parent/parent/pages-1.img" in await shown(View(tree.root, kept))


async def test_a_layer_for_each_pre_dump_in_directories_of_their_own() -> None:
    tree, kept = laid(images("1"), images("2", "../1"), images("3", "../2"))
    assert not kept
    head = find_images(tree, kept)
    assert head is tree.find("3")
    assert head is not None
    assert [path_of(node) for node in chain(head, kept).parents] == ["2", "1"]


async def test_a_parent_in_a_lower_layer_is_what_it_says() -> None:
    """A layer may bring a new checkpoint only, and build on what an earlier layer has beside it."""
    tree, kept = laid(
        [*images("checkpoint"), file("checkpoint/core-1.img"), *images("pre-checkpoint")],
        images("checkpoint", "../pre-checkpoint"),
    )
    assert not kept
    head = find_images(tree, kept)
    assert head is not None
    found = chain(head, kept)
    assert [path_of(node) for node in found.parents] == ["pre-checkpoint"]
    assert "core-1.img" in head.children


def test_deep_directories_are_laid_over_each_other() -> None:
    deep = "/".join("d" for _ in range(1500))
    tree, _ = laid([file(f"{deep}/a")], [file(f"{deep}/b")])
    node = tree.find(deep)
    assert node is not None
    assert sorted(node.children) == ["a", "b"]


def test_whiteouts_in_new_directories_are_not_shown() -> None:
    tree, _ = laid([file("a")], [file("new/.wh..wh..opq"), file("new/sub/.wh.x"), file("new/y")])
    assert paths(tree) == ["a", "new", "new/sub", "new/y"]


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_whiteouts_of_nothing_hide_nothing(name: str) -> None:
    tree = Tree([file("a/b")], exact=True)
    as_overlay(tree.directory("a"), name)
    assert paths(tree) == ["a", "a/b"]


def test_a_layer_without_a_parent_replaces() -> None:
    tree, kept = laid(images("checkpoint"), images("checkpoint"))
    assert not kept
    head = find_images(tree, kept)
    assert head is not None
    assert chain(head, kept).parents == ()


@pytest.mark.parametrize(
    "entries",
    [
        images("a", "../b") + images("b", "../a"),
        images("a", "."),
        images("a", "../b") + images("b", "../c") + images("c", "../b"),
    ],
)
def test_circles_are_refused(entries: list[Entry]) -> None:
    tree, kept = laid(entries)
    head = find_images(tree, kept)
    assert head is not None
    with pytest.raises(MalformedError, match="circle"):
        chain(head, kept)


@pytest.mark.parametrize("target", ["../gone", "/var/lib/1", "../../x", "pages-1.img", "a/b"])
def test_a_parent_that_is_not_there_is_refused(target: str) -> None:
    tree, kept = laid(images("checkpoint", target))
    head = find_images(tree, kept)
    assert head is not None
    with pytest.raises(MalformedError, match="builds on an earlier one that is not in it"):
        chain(head, kept)


def test_a_parent_that_is_a_file_is_refused() -> None:
    tree, kept = laid([*images("checkpoint"), file("checkpoint/parent")])
    head = find_images(tree, kept)
    assert head is not None
    with pytest.raises(MalformedError, match="is a file"):
        chain(head, kept)


# -- which directory ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "path"),
    [
        ([file("a/inventory.img"), file("checkpoint/inventory.img")], "checkpoint"),
        ([file("x/y/inventory.img"), file("z/inventory.img")], "z"),
        ([file("b/inventory.img"), file("a/inventory.img")], "a"),
        ([file("a/inventory.img"), file("inventory.img")], ""),
        ([directory("checkpoint/inventory.img"), file("b/inventory.img")], "b"),
    ],
)
def test_the_images_directory(entries: list[Entry], path: str) -> None:
    tree, kept = laid(entries)
    assert find_images(tree, kept) is tree.find(path)


def test_there_may_be_none() -> None:
    tree, kept = laid([file("a/b")])
    assert find_images(tree, kept) is None
    assert find_at_once(tree) is None


async def test_a_parent_that_comes_late_is_still_a_directory(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """In a stream: `parent` lies behind the pages, and is looked for before it is known."""
    filling = Filling()
    tree = Tree(PODMAN[:3], filling=filling)
    head = tree.find("checkpoint")
    assert head is not None
    grafts: Grafts = {}
    view = View(head, grafts)
    found: list[int | None] = []

    async def look() -> None:
        found.append(await view.lookup(1, "parent"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        tree.add(PODMAN[3:])
        filling.news()
        await trio.testing.wait_all_tasks_blocked()
        assert not found
        grafts |= chain(head, {}).grafts
        filling.end()
    (number,) = found
    assert number is not None
    assert view.node(number).type is EntryType.DIRECTORY

"""Entries folded into a tree, and what of it a view shows under which numbers."""

import logging
from collections.abc import Iterator

import pytest

from lazyfs.checkpoint.tree import Tree, View
from lazyfs.ground.errors import MalformedError
from lazyfs.layers.model import Entry, EntryType


def file(path: str, size_bytes: int = 1, content_start: int = 0, **more: object) -> Entry:
    given = {"mode": 0o644, "size_bytes": size_bytes, "content_start": content_start, **more}
    return Entry(path, EntryType.FILE, **given)  # type: ignore[arg-type]


def directory(path: str, mode: int = 0o755, **more: int) -> Entry:
    return Entry(path, EntryType.DIRECTORY, mode, **more)


def link(path: str, target: str) -> Entry:
    return Entry(path, EntryType.SYMLINK, 0o777, symlink_target=target)


def paths(tree: Tree) -> list[str]:
    return [path for path, _ in tree.walk(tree.root)]


def shown(view: View, inode: int = 1, path: str = "") -> Iterator[str]:
    """Go through a view as the kernel does."""
    for name, number in view.listing(inode):
        assert view.find(inode, name) == number
        yield path + name
        if view.node(number).type is EntryType.DIRECTORY:
            yield from shown(view, number, f"{path}{name}/")


def view_of(entries: list[Entry], root: str = "") -> View:
    tree = Tree(entries)
    node = tree.find(root)
    assert node is not None
    return View(tree, node)


# -- the tree -----------------------------------------------------------------------------------


def test_directories_that_nobody_named_are_there() -> None:
    tree = Tree([file("a/b/c")])
    assert paths(tree) == ["a", "a/b", "a/b/c"]
    found = tree.find("a/b")
    assert found is not None
    assert (found.type, found.mode, found.mtime_ns) == (EntryType.DIRECTORY, 0o755, 0)


def test_a_directory_named_later_keeps_what_is_in_it() -> None:
    tree = Tree([file("a/b"), directory("a", 0o4750, uid=5, mtime_ns=9)])
    found = tree.find("a")
    assert found is not None
    assert (found.mode, found.uid, found.mtime_ns) == (0o750, 5, 9)
    assert paths(tree) == ["a", "a/b"]


def test_the_root_has_attributes_too() -> None:
    tree = Tree([directory("", 0o1711, gid=4)])
    assert (tree.root.mode, tree.root.gid) == (0o711, 4)
    with pytest.raises(MalformedError, match="root is not a directory"):
        Tree([file("")])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (file("a", 1), file("a", 2)),
        (file("a"), link("a", "b")),
        (directory("a"), file("a")),
        (link("a", "b"), directory("a")),
    ],
)
def test_the_last_of_a_name_holds(first: Entry, second: Entry) -> None:
    tree = Tree([first, second])
    found = tree.find("a")
    assert found is not None
    assert (found.type, found.size_bytes) == (second.type, second.size_bytes)


@pytest.mark.parametrize("below", [file("a"), link("a", "b")])
def test_below_a_directory_only(below: Entry) -> None:
    with pytest.raises(MalformedError, match="'a/x' lies below 'a', which is no directory"):
        Tree([directory("b"), below, file("a/x")])


def test_a_name_that_is_not_there() -> None:
    tree = Tree([file("a/b"), link("l", "a")])
    for path in ("x", "a/x", "a/b/c", "l/b", "/a", "a/", "a//b", "../a", "."):
        assert tree.find(path) is None
    assert tree.find("") is tree.root


def test_the_walk_is_by_name_depth_first() -> None:
    tree = Tree([file("b"), file("a/z"), file("a/c/d"), file("a.x"), file("A")])
    assert paths(tree) == ["A", "a", "a/c", "a/c/d", "a/z", "a.x", "b"]
    found = tree.find("a")
    assert found is not None
    assert [path for path, _ in tree.walk(found, "from")] == ["from/c", "from/c/d", "from/z"]


@pytest.mark.parametrize("target", ["/etc/passwd", "/", "..", "../x", "x/../..", "a/../../b"])
def test_links_that_climb_are_not_in_it(target: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert paths(Tree([link("l", target), file("a")])) == ["a"]
    assert f"'l' -> {target!r}" in caplog.text


def test_devices_are_not_in_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert paths(Tree([Entry("dev/null", EntryType.OTHER, 0o666), file("a")])) == ["a"]
    assert "'dev/null' is a device, FIFO or socket" in caplog.text


# -- the view -----------------------------------------------------------------------------------


def test_a_view_of_a_part() -> None:
    entries = [file("a/b/c", 5), file("a/d", 7), file("e", 100)]
    view = view_of(entries, "a")
    assert list(shown(view)) == ["b", "b/c", "d"]
    assert view.size_bytes == 12
    assert view.find(1, "e") is None
    assert view.find(1, "..") is None


def test_links_are_counted_as_on_a_local_disk() -> None:
    view = view_of([file("a/b/c/f"), file("a/b/g"), directory("a/d")])
    counts = {path: view.links[_number(view, path) - 1] for path in ("a", "a/b", "a/b/c", "a/b/g")}
    assert counts == {"a": 4, "a/b": 3, "a/b/c": 2, "a/b/g": 1}
    assert view.links[0] == 3


def _number(view: View, path: str) -> int:
    inode = 1
    for name in path.split("/"):
        found = view.find(inode, name)
        assert found is not None, path
        inode = found
    return inode


HARD = [
    file("a/one", 3, 10),
    file("a/two", 3, 10, link_of="a/one"),
    file("b/three", 3, 10, link_of="a/one"),
]


def test_hard_links_share_a_number() -> None:
    view = view_of(HARD)
    numbers = {_number(view, path) for path in ("a/one", "a/two", "b/three")}
    (number,) = numbers
    assert view.links[number - 1] == 3
    assert view.size_bytes == 3, "counted once"


def test_hard_links_of_what_is_outside() -> None:
    view = view_of(HARD, "b")
    number = _number(view, "three")
    assert (view.links[number - 1], view.node(number).size_bytes) == (1, 3)


def test_a_hard_link_keeps_the_file_whose_name_was_given_away() -> None:
    view = view_of([file("one", 3, 10), file("two", 3, 10, link_of="one"), file("one", 4, 20)])
    one, two = view.node(_number(view, "one")), view.node(_number(view, "two"))
    assert (one.content_start, two.content_start) == (20, 10)
    assert view.links[_number(view, "two") - 1] == 1


@pytest.mark.parametrize(
    ("links", "hidden"),
    [
        ({"in/l": "../out"}, {"in/l"}),
        ({"in/l": "sub/../../out"}, {"in/l"}),
        ({"in/sub/up": "..", "in/l": "sub/up/../out"}, {"in/l"}),
        ({"in/sub/up": "..", "in/l": "sub/up/sub/up/f"}, set()),
        ({"in/a": "b", "in/b": "sub/up", "in/sub/up": "../../out"}, {"in/a", "in/b", "in/sub/up"}),
        ({"in/a": "b", "in/b": "a"}, {"in/a", "in/b"}),
        ({"in/a": "nowhere/../../../x"}, {"in/a"}),
        ({"in/sub/l": "../f", "in/sub/m": "./..//sub/./l"}, set()),
        ({"in/l": "f/../../out"}, {"in/l"}),
    ],
    ids=lambda value: ", ".join(value.values()) if isinstance(value, dict) else "",
)
def test_no_link_leads_out_of_a_view(links: dict[str, str], hidden: set[str]) -> None:
    entries = [file("in/f"), file("in/sub/g"), file("out"), file("x")]
    view = view_of(entries + [link(*each) for each in links.items()], "in")
    seen = {"in/" + path for path in shown(view)}
    assert seen == {"in/f", "in/sub", "in/sub/g", *links} - hidden
    for path in hidden:
        parent, _, name = path.removeprefix("in/").rpartition("/")
        assert view.find(_number(view, parent) if parent else 1, name) is None


def test_following_links_has_an_end() -> None:
    """An image may not keep a mount busy for hours with links on links."""
    long = "./" * 2000
    chain = [link(f"l{at}", f"{long}l{at + 1}") for at in range(38)]
    many = [link(f"m{at}", "l0") for at in range(3000)]
    view = view_of([*chain, *many, file("f")])
    assert _number(view, "f")
    assert len(view.nodes) < 3000


def test_a_device_in_the_place_of_a_file_hides_it() -> None:
    tree = Tree(
        [
            Entry("a/b", EntryType.FILE, 0o644, size_bytes=3),
            Entry("a/b", EntryType.OTHER, 0o644),
        ]
    )
    assert tree.find("a/b") is None
    assert tree.find("a") is not None

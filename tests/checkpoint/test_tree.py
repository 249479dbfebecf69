"""Entries folded into a tree, and what of it a view shows under which numbers."""

import logging

import pytest
import trio
import trio.testing

from lazyfs.checkpoint.tree import Filling, Node, Tree
from lazyfs.checkpoint.view import View
from lazyfs.ground.errors import FetchError, MalformedError
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


async def shown(view: View, inode: int = 1, path: str = "") -> list[str]:
    """Go through a view as the kernel does."""
    found = []
    for name, number in await view.listing(inode):
        assert await view.lookup(inode, name) == number
        found.append(path + name)
        if view.node(number).type is EntryType.DIRECTORY:
            found += await shown(view, number, f"{path}{name}/")
    return found


def view_of(entries: list[Entry], root: str = "") -> View:
    tree = Tree(entries)
    node = tree.find(root)
    assert node is not None
    return View(node)


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
    with pytest.raises(MalformedError, match="in 'a' lies below 'a', which is no directory"):
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


def test_of_many_names_that_are_not_in_it_the_first_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert paths(Tree([link(f"l{number}", "/etc") for number in range(500)])) == []
    assert len(caplog.records) == 9
    assert "'l7' -> '/etc'" in caplog.text
    assert caplog.messages[-1] == "not shown: whatever else is of that kind (-v tells it)"


# -- the view -----------------------------------------------------------------------------------


async def test_a_view_of_a_part() -> None:
    entries = [file("a/b/c", 5), file("a/d", 7), file("e", 100)]
    view = view_of(entries, "a")
    assert await shown(view) == ["b", "b/c", "d"]
    assert view.size_bytes == 12
    assert await view.lookup(1, "e") is None
    assert await view.lookup(1, "..") is None


async def test_links_are_counted_as_on_a_local_disk() -> None:
    view = view_of([file("a/b/c/f"), file("a/b/g"), directory("a/d")])
    counts = {
        path: view.links(await _number(view, path)) for path in ("a", "a/b", "a/b/c", "a/b/g")
    }
    assert counts == {"a": 4, "a/b": 3, "a/b/c": 2, "a/b/g": 1}
    assert view.links(1) == 3


async def _number(view: View, path: str) -> int:
    inode = 1
    for name in path.split("/"):
        found = await view.lookup(inode, name)
        assert found is not None, path
        inode = found
    return inode


HARD = [
    file("a/one", 3, 10),
    file("a/two", 3, 10, link_of="a/one"),
    file("b/three", 3, 10, link_of="a/one"),
]


async def test_hard_links_share_a_number() -> None:
    view = view_of(HARD)
    numbers = {await _number(view, path) for path in ("a/one", "a/two", "b/three")}
    (number,) = numbers
    assert view.links(number) == 3
    assert view.size_bytes == 3, "counted once"


async def test_hard_links_of_what_is_outside() -> None:
    view = view_of(HARD, "b")
    number = await _number(view, "three")
    assert (view.links(number), view.node(number).size_bytes) == (3, 3)


async def test_a_hard_link_keeps_the_file_whose_name_was_given_away() -> None:
    view = view_of([file("one", 3, 10), file("two", 3, 10, link_of="one"), file("one", 4, 20)])
    one, two = view.node(await _number(view, "one")), view.node(await _number(view, "two"))
    assert (one.content_start, two.content_start) == (20, 10)
    assert view.links(await _number(view, "two")) == 1


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
async def test_no_link_leads_out_of_a_view(links: dict[str, str], hidden: set[str]) -> None:
    entries = [file("in/f"), file("in/sub/g"), file("out"), file("x")]
    view = view_of(entries + [link(*each) for each in links.items()], "in")
    seen = {"in/" + path for path in await shown(view)}
    assert seen == {"in/f", "in/sub", "in/sub/g", *links} - hidden
    for path in hidden:
        parent, _, name = path.removeprefix("in/").rpartition("/")
        assert await view.lookup(await _number(view, parent) if parent else 1, name) is None


async def test_the_links_of_a_stub_are_shown_though_they_lead_nowhere() -> None:
    """CRIU takes a pages file that is not there for an empty one, and goes on with zeros."""
    links = {"pages-1.img": "pages-1.img/not-in-this-stub", "x": "x/not-in-this-stub"}
    links["pages-2.img"] = "pages-1.img/not-in-this-stub"
    view = view_of([link(*each) for each in links.items()])
    assert await shown(view) == ["pages-1.img"]


@pytest.mark.parametrize("target", ["/memory", "../memory", "pages-1.img"])
async def test_a_pages_file_that_leads_out_is_an_error_not_an_absent_one(target: str) -> None:
    view = view_of([link("pages-1.img", target), link("other", target)])
    assert await shown(view) == []
    assert await view.lookup(1, "other") is None
    with pytest.raises(MalformedError, match="out of the checkpoint"):
        await view.lookup(1, "pages-1.img")


async def test_following_links_has_an_end() -> None:
    """An image may not keep a mount busy for hours with links on links."""
    long = "./" * 2000
    chain = [link(f"l{at}", f"{long}l{at + 1}") for at in range(38)]
    many = [link(f"m{at}", "l0") for at in range(3000)]
    view = view_of([*chain, *many, file("f")])
    assert await _number(view, "f")
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


# -- a container's files, and names that still come ---------------------------------------------


def test_a_containers_files_are_as_they_were() -> None:
    entries = [
        Entry("bin/su", EntryType.FILE, 0o4755, xattrs=(("security.capability", b"1"),)),
        link("etc/l", "/usr/lib"),
        Entry("run/f", EntryType.FIFO, 0o600),
        file("tmp/x"),
        file("root/.bashrc"),
        file("opt/tmp/x"),
    ]
    tree = Tree(entries, exact=True)
    modes = {path: node.mode for path, node in tree.walk(tree.root)}
    assert modes["bin/su"] == 0o4755
    assert (modes["tmp"], modes["root"], modes["opt/tmp"]) == (0o1777, 0o700, 0o755)
    assert {"etc/l", "run/f"} <= modes.keys()
    assert [node.xattrs for path, node in tree.walk(tree.root) if path == "bin/su"] == [
        (("security.capability", b"1"),)
    ]


async def test_who_misses_a_name_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    filling = Filling()
    tree = Tree([file("a/one")], filling=filling)
    view = View(tree.root)
    found: dict[str, object] = {}

    async def look(path: str) -> None:
        inode: int | None = 1
        for name in path.split("/"):
            inode = await view.lookup(inode or 0, name)
            if inode is None:
                break
        found[path] = inode

    async with trio.open_nursery() as nursery:
        for path in ("a/one", "a/two", "b/c", "nowhere"):
            nursery.start_soon(look, path)
        await trio.testing.wait_all_tasks_blocked()
        assert list(found) == ["a/one"]
        tree.add([file("a/two")])
        filling.news()
        await trio.testing.wait_all_tasks_blocked()
        assert set(found) == {"a/one", "a/two"}
        tree.add([file("b/c")])
        filling.end()
    assert found["b/c"]
    assert found["nowhere"] is None
    assert await shown(view) == ["a", "a/one", "a/two", "b", "b/c"]


async def test_names_that_cannot_be_had_are_an_error_and_not_absent() -> None:
    filling = Filling()
    tree = Tree([file("here")], filling=filling)
    view = View(tree.root)
    filling.end(FetchError("gone", transient=False))
    assert await view.lookup(1, "here")
    with pytest.raises(FetchError):
        await view.lookup(1, "there")
    with pytest.raises(FetchError):
        await view.listing(1)


async def test_a_source_that_recovers_ends_no_filling(
    autojump_clock: trio.testing.MockClock,
) -> None:
    filling = Filling()
    tree = Tree(filling=filling)
    view = View(tree.root)
    errors: list[str] = []

    async def look() -> None:
        try:
            await view.lookup(1, "late")
        except FetchError as error:
            errors.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        filling.fail(FetchError("down", transient=True))
    assert errors == ["down"]
    tree.add([file("late")])
    filling.news()
    assert await view.lookup(1, "late")


async def test_a_name_that_was_shown_stays_what_it_is() -> None:
    tree = Tree([file("a"), file("b")], filling=Filling())
    view = View(tree.root)
    assert await view.lookup(1, "a")
    tree.add([file("b", 9)])
    with pytest.raises(MalformedError, match="two entries called 'a'"):
        tree.add([file("a", 9)])


async def test_every_name_of_a_file_that_was_shown_stays() -> None:
    entries = [file("a", 3, 10), file("b", 3, 10, link_of="a")]
    tree = Tree(entries, filling=Filling())
    view = View(tree.root)
    assert await view.lookup(1, "a") == await view.lookup(1, "b")
    with pytest.raises(MalformedError, match="two entries called 'b'"):
        tree.add([file("b", 9)])


async def test_no_link_leads_through_a_containers_files() -> None:
    tree = Tree([link("l", "rootfs-diff/evil/passwd"), file("f")])
    root = Node("rootfs-diff", EntryType.DIRECTORY, parent=tree.root, exact=True)
    tree.root.children["rootfs-diff"] = root
    view = View(tree.root)
    assert await view.lookup(1, "l") is None
    assert await view.lookup(1, "rootfs-diff")


async def test_a_link_is_shown_when_it_is_known_where_it_leads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    filling = Filling()
    tree = Tree([link("in/l", "sub/up/../x"), directory("in/sub")], filling=filling)
    root = tree.find("in")
    assert root is not None
    view = View(root)
    found: list[int | None] = []

    async def look() -> None:
        found.append(await view.lookup(1, "l"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        assert not found
        tree.add([link("in/sub/up", "..")])
        filling.end()
    assert found == [None]

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.ground.errors import MalformedError
from lazyfs.layers.names import decode_name, entry_path, link_target


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("checkpoint/pages-1.img", "checkpoint/pages-1.img"),
        ("./checkpoint/", "checkpoint"),
        (".//checkpoint", "checkpoint"),
        ("/./../x"[:3] + "x", "x"),
        ("/etc/passwd", "etc/passwd"),
        ("a/./b", "a/b"),
        ("a/.", "a"),
        (".", ""),
        ("./", ""),
        ("/", ""),
        ("", ""),
        ("..a/b..", "..a/b.."),
        (".hidden", ".hidden"),
        ("x" * 255, "x" * 255),
    ],
)
def test_names_are_normalised(name: str, path: str) -> None:
    assert entry_path(name) == path


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../a",
        "a/../b",
        "./..",
        "a/..",
        "a//b",
        "a\0b",
        "x" * 256,
        "é" * 128,
        "/".join(["y" * 200] * 21),
        "\ud800",
    ],
)
def test_names_that_lead_astray_are_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        entry_path(name)


def test_bytes_that_are_not_utf8_come_back() -> None:
    assert (
        entry_path(decode_name(b"a/\xff\xfe")).encode("utf-8", "surrogateescape") == b"a/\xff\xfe"
    )


@pytest.mark.parametrize("target", ["", "a\0", "x" * 4097])
def test_symlink_targets_that_cannot_be_are_refused(target: str) -> None:
    with pytest.raises(MalformedError):
        link_target(target, "link")


@settings(deadline=None)
@given(st.text())
def test_a_path_is_normal_or_refused(name: str) -> None:
    try:
        path = entry_path(name)
    except MalformedError:
        return
    assert path == "" or not {"", ".", ".."} & set(path.split("/"))
    assert entry_path(path) == path

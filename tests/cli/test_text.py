import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.cli.text import human_bytes, plural, printable


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (102_348, "99.9 KiB"),
        (102_400, "100 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (216 * 1024**2, "216 MiB"),
        (1024**7, "1024 EiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("checkpoint/pages-1.img", "checkpoint/pages-1.img"),
        ("naïve café", "naïve café"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("right\u202eleft", "right\\u202eleft"),
        (b"\xff\x80".decode(errors="surrogateescape"), "\\xff\\x80"),
        ("\ud800", "\\ud800"),
    ],
)
def test_names_that_do_things_to_terminals(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_printed_can_be(text: str) -> None:
    assert printable(text).isprintable()
    printable(text).encode()


def test_plurals() -> None:
    assert [plural(count, "file") for count in (0, 1, 2)] == ["0 files", "1 file", "2 files"]

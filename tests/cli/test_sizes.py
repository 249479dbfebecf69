"""Sizes and ages as people write them, and as they must not."""

import click
import pytest

from lazyfs.cli.sizes import Seconds, age, size, size_or_share
from lazyfs.ground.settings import Limit


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1K", 1024),
        ("1k", 1024),
        ("10G", 10 << 30),
        ("10 GiB", 10 << 30),
        ("512MiB", 512 << 20),
        ("512MB", 512_000_000),
        ("1.5T", 3 << 39),
        (" 2M ", 2 << 20),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count
    assert size_or_share(text) == Limit(count)


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "10X", "10Gi", "1e9", "1,5G", "10 G B", "10GG", "0x10", "٣G", "9999P"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        size(text)
    with pytest.raises(click.BadParameter):
        size_or_share(text)


def test_shares() -> None:
    assert size_or_share("20%") == Limit(percent=20)
    assert size_or_share("12.5 %").of(1000) == 125
    assert size_or_share(Limit(7)) == Limit(7)


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "%", "5%%"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(click.BadParameter):
        size_or_share(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1.5w", 907200)],
)
def test_ages(text: str, seconds: float) -> None:
    assert age(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "7y", "7d12h"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(click.BadParameter):
        age(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-1", "soon"])
def test_no_seconds(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Seconds(min=0).convert(text, None, None)


def test_seconds() -> None:
    assert Seconds(min=0).convert("0.5", None, None) == 0.5
    assert Seconds(min=0).convert("0", None, None) == 0

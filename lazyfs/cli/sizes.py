"""Sizes and ages on a command line: "10G", "512MiB", "20%", "7d"."""

import math
import re
from typing import Any

import click

from lazyfs.ground.settings import Limit

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGTP])(i?B)?|B)?", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?) ?%", re.ASCII)
_AGE = re.compile(r"(\d+(?:\.\d+)?) ?([smhdw])", re.ASCII)
_AGE_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE_MOST_BYTES = 1 << 60


class Seconds(click.FloatRange):
    """A number of seconds, which neither `nan` nor `inf` is, though Python takes them for one."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; `click.BadParameter` if it is none, or out of range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return number


def size(text: str) -> int:
    """Return bytes: K, M, G, T and P count by 1024, as do KiB and so on; KB, MB, … by 1000.

    Raises:
        click.BadParameter: it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is no size: want 10G, 512MiB, 20000000, …")
    number, letter, rest = found.groups()
    base = 1000 if (rest or "").upper() == "B" else 1024
    count = int(float(number) * base ** (" KMGTP".index(letter.upper()) if letter else 0))
    if count > _SIZE_MOST_BYTES:
        raise click.BadParameter(f"{text!r} is more than anybody has")
    return count


def size_or_share(value: str | Limit) -> Limit:
    """Return a limit of so many bytes, or of so many percent.

    Raises:
        click.BadParameter: it is neither.
    """
    if isinstance(value, Limit):  # a default
        return value
    found = _PERCENT.fullmatch(value.strip())
    if found is None:
        return Limit(size(value))
    percent = float(found[1])
    if not 0 < percent <= 100:
        raise click.BadParameter(f"{value!r}: want more than 0% and at most 100%")
    return Limit(percent=percent)


def age(text: str) -> float:
    """Return the seconds of a stretch of time.

    Raises:
        click.BadParameter: it is none.
    """
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is no age: want 7d, 12h, 30m, 90s or 2w")
    return float(found[1]) * _AGE_S[found[2]]

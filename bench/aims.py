"""What lazyfs aims at, what came out, and what tells why where an aim was missed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]

_OURS = "lazyfs uncompressed, "
_CHUNKED = "lazyfs zstd:chunked, "
_PROFILE = (
    ("mount_s", "mounted or pulled, s"),
    ("criu_s", "criu restore, s"),
    ("resumed_s", "resumed, by its own account, s"),
    ("own_home_s", "all home, by its own account, s"),
    ("loop_fetched_bytes", "fetched by the first loop, MB"),
    ("loop_requests", "requests by then"),
    ("loop_waits", "reads that waited"),
    ("loop_faults", "faults"),
    ("loop_cpu_s", "lazyfs's CPU by then, s"),
    ("cpu_s", "lazyfs's CPU in all, s"),
    ("fetched_bytes", "fetched in all, MB"),
)


@dataclass(frozen=True)
class Conditions:
    """Under which a case was measured."""

    size_mib: int
    pattern: str
    link: str
    at_once: int

    def __str__(self) -> str:
        crowd = f", {self.at_once} at once" if self.at_once > 1 else ""
        return f"{self.size_mib} MiB {self.pattern}, {self.link}{crowd}"


@dataclass(frozen=True)
class Aim:
    """So many seconds at most, or so many times what another way took."""

    way: str
    key: str
    limit: float
    of: tuple[str, str] | None = None
    """The other way, and its key: with it the limit is a ratio."""
    words: str = ""


@dataclass(frozen=True)
class Verdict:
    """An aim, and what came out."""

    aim: Aim
    value: float
    """In seconds, or a ratio: as the aim's limit."""

    @property
    def met(self) -> bool:
        """Whether it is met."""
        return self.value <= self.aim.limit

    def as_json(self) -> dict[str, Any]:
        """Return it for whoever computes with it."""
        aim = self.aim
        told = {"way": aim.way, "what": aim.words, "limit": aim.limit, "measured": self.value}
        return told | {"met": self.met}


def aims_of(conditions: Conditions) -> list[Aim]:
    """Return the aims that hold under some conditions, those of crowds excepted."""
    found = []
    shaped = conditions.link == "1gbit"
    if shaped and conditions.size_mib == 1024:
        for ours in (_OURS, _CHUNKED):
            loops = [("lazy, trace", 1.0), ("lazy, attached trace", 1.0), ("lazy, no trace", 1.6)]
            loops.append(("warm, lazy", 0.6))
            found += [
                Aim(ours + way, "first_loop_s", limit, None, "first loop, s")
                for way, limit in loops
            ]
    if shaped and conditions.size_mib >= 1024:
        for ours, form in ((_OURS, "uncompressed"), (_CHUNKED, "zstd:chunked")):
            link = (f"link, {form}", "link_s")
            for way in ("lazy, trace", "lazy, attached trace", "lazy, no trace", "eager"):
                words = "home and proven, x link time"
                found.append(Aim(ours + way, "done_s", 1.1, link, words))
    for ours in (_OURS, _CHUNKED):
        disk = ("local disk, eager", "first_loop_s")
        found.append(Aim(ours + "warm, eager", "first_loop_s", 1.3, disk, "x local disk, eager"))
        disk = ("local disk, criu lazy-pages", "first_loop_s")
        words = "x local disk, criu lazy-pages"
        found.append(Aim(ours + "warm, lazy", "first_loop_s", 1.3, disk, words))
    return found


def crowd_aims() -> list[Aim]:
    """Return what is aimed at with several at once: of one alone."""
    found = []
    for way in ("warm, lazy", "warm, eager", "warm, lazy, standby"):
        alone = (_OURS + way, "first_loop_s")
        found.append(Aim(alone[0], "first_loop_s", 1.5, alone, "the last of them, x one alone"))
    return found


def judge(aims: Sequence[Aim], rows: Rows, others: Rows) -> list[Verdict]:
    """Compare medians with aims; what has not been measured is left out.

    `others`: where the ways are that aims compare with.
    """
    found = []
    for aim in aims:
        value = middle(rows.get(aim.way, ()), aim.key)
        base = middle(others.get(aim.of[0], ()), aim.of[1]) if aim.of else 1.0
        if value is not None and base:
            found.append(Verdict(aim, value / base))
    return found


def middle(rows: Sequence[Row], key: str) -> float | None:
    """Return the median of what was measured; None if nothing was."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return median(values) if values else None


def table(
    conditions: Conditions,
    rows: Rows,
    verdicts: Sequence[Verdict] = (),
    link_s: float | None = None,
    alone: Rows | None = None,
) -> Table:
    """Put medians, spreads and verdicts into a table.

    `alone`: of several at once, what one alone took.
    """
    alone = alone or {}
    title = f"{conditions}"
    if link_s is not None:
        title += f"; the link needs {link_s:.2f} s for the uncompressed layer"
    made = Table(title=title, title_justify="left")
    made.add_column("way")
    columns = (
        "first loop, s",
        "least - most",
        "x link",
        "x local",
        "x alone",
        "home, s",
        "proven, s",
    )
    for column in (*columns, "MB by the loop"):
        made.add_column(column, justify="right")
    made.add_column("aims")
    local_s = middle(rows.get("local disk, eager", ()), "first_loop_s")
    for way, measured in rows.items():
        told = [str(row.get("failed") or row.get("gave_up")) for row in measured]
        if all("failed" in row or "gave_up" in row for row in measured):
            why = told[0].partition("\n")[0] if told else "not measured"
            made.add_row(way, "-", *[""] * 7, escape(why))
            continue
        loops = [float(row["first_loop_s"]) for row in measured if "first_loop_s" in row]
        if not loops:
            made.add_row(way, _seconds(middle(measured, "link_s")), *[""] * 7, "")
            continue
        loop_s = median(loops)
        alone_s = middle(alone.get(way, ()), "first_loop_s")
        fetched = middle(measured, "loop_fetched_bytes")
        if fetched is None:
            fetched = middle(measured, "fetched_bytes")
        made.add_row(
            way,
            _seconds(loop_s),
            f"{min(loops):.2f} - {max(loops):.2f}",
            f"{loop_s / link_s:.2f}" if link_s else "",
            f"{loop_s / local_s:.2f}" if local_s else "",
            f"{loop_s / alone_s:.2f}" if alone_s else "",
            _seconds(middle(measured, "home_s")),
            _seconds(middle(measured, "done_s")),
            f"{fetched / 1e6:,.0f}" if fetched is not None else "",
            _told([each for each in verdicts if each.aim.way == way]),
        )
    return made


def profile(rows: Rows, verdicts: Sequence[Verdict]) -> Table | None:
    """Say what tells why aims were missed; None if none was."""
    ways = list(dict.fromkeys(each.aim.way for each in verdicts if not each.met))
    if not ways:
        return None
    made = Table(title="where the time went, of ways that missed an aim", title_justify="left")
    made.add_column("")
    for way in ways:
        made.add_column(way, justify="right")
    for key, words in _PROFILE:
        values = [middle(rows[way], key) for way in ways]
        if any(value is not None for value in values):
            made.add_row(words, *(_value(key, value) for value in values))
    return made


def _told(verdicts: Sequence[Verdict]) -> str:
    lines = []
    for each in verdicts:
        colour, word = ("green", "met") if each.met else ("red", "MISSED")
        limit = f"{each.aim.words}: {each.value:.2f}, aim {each.aim.limit:g}"
        lines.append(f"[{colour}]{word}[/{colour}] {limit}")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _value(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key.endswith("_bytes"):
        return f"{value / 1e6:,.1f}"
    return f"{value:.2f}" if key.endswith("_s") else f"{value:,.0f}"

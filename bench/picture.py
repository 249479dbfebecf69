"""A picture of what `peers.py` measured: bars of seconds, a panel for each case.

Drawn by matplotlib, which is loaded here and nowhere else.
"""

import argparse
import json
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from aims import Conditions, middle

_LOOP, _HOME, _OURS = "#7a8ca3", "#d5dbe3", "#1f6f50"
_LINK = "#b0413e"
_WIDTH_IN, _BAR_IN, _HEAD_IN = 11.0, 0.24, 0.9


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the cases that have anything, in the format that the file's name asks for."""
    pyplot: Any = import_module("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    cases = [case for case in result["cases"] if _bars(case)]
    if not cases:
        return
    heights = [_HEAD_IN + _BAR_IN * len(_bars(case)) for case in cases]
    figure, panels = pyplot.subplots(
        len(cases),
        squeeze=False,
        figsize=(_WIDTH_IN, sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for case, (panel,) in zip(cases, panels, strict=True):
        _draw_case(case, panel)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    print(f"{file} written")


def _bars(case: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return what is drawn: a way, its first loop, and when all memory was home and proven."""
    found = []
    for way, rows in case["rows"].items():
        loop_s = middle(rows, "first_loop_s")
        if loop_s is not None:
            home_s = middle(rows, "done_s") or middle(rows, "home_s") or loop_s
            found.append((way, loop_s, home_s))
    return found


def _draw_case(case: dict[str, Any], panel: Any) -> None:
    bars = _bars(case)
    names = [way for way, _, _ in bars]
    links_s = _links_s(case)
    end_s = _end_s(bars, max(links_s.values(), default=0.0))
    places = _places(names)
    colours = [_OURS if way.startswith("lazyfs") else _LOOP for way in names]
    homes_s = [min(home_s, end_s) for _, _, home_s in bars]
    loops_s = [min(loop_s, end_s) for _, loop_s, _ in bars]
    panel.barh(places, homes_s, color=_HOME, height=0.85, label="all memory home and proven")
    for (name, seconds), style in zip(links_s.items(), ("-", "--"), strict=False):
        panel.axvline(seconds, color=_LINK, linewidth=0.9, linestyle=style, label=name)
    panel.barh(places, loops_s, color=colours, height=0.6)
    for place, (_, loop_s, home_s) in zip(places, bars, strict=True):
        is_cut = loop_s > end_s
        panel.text(
            end_s if is_cut else loop_s,
            place,
            f"{loop_s:.2f}, cut off here " if is_cut else f" {loop_s:.2f}",
            va="center",
            ha="right" if is_cut else "left",
            color="white" if is_cut else "black",
            fontsize=8,
        )
        if home_s > end_s and not is_cut:
            panel.text(
                end_s, place, f"{home_s:.1f}, cut off here ", va="center", ha="right", fontsize=8
            )
    panel.set_yticks(places, names)
    panel.set_ylim(places[-1] + 0.7, places[0] - 0.7)
    panel.set_xlim(0, end_s)
    conditions = Conditions(case["size_mib"], case["pattern"], case["link"], case["at_once"])
    panel.set_title(f"{conditions}: seconds to the first loop", loc="left", fontsize=10)
    panel.set_xlabel("seconds since the restore was asked for (medians)", fontsize=8, loc="left")
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.legend(fontsize=8, loc="lower right", framealpha=1)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _links_s(case: dict[str, Any]) -> dict[str, float]:
    """Return what the bytes alone take by a shaped link, by what is said of it."""
    if case["link"] == "unshaped":
        return {}
    found = {}
    for layer in ("uncompressed", "zstd:chunked"):
        link_s = middle(case["rows"].get(f"link, {layer}", ()), "link_s")
        if link_s is not None:
            found[f"the link alone, {layer}"] = link_s
    return found


def _end_s(bars: list[tuple[str, float, float]], link_s: float) -> float:
    """Return where the axis ends: a way that is far behind all others is cut off."""
    longest_s = sorted(home_s for _, _, home_s in bars)
    usual_s = max(longest_s[int(0.95 * (len(bars) - 1))], link_s)
    return 1.05 * (longest_s[-1] if longest_s[-1] < 2 * usual_s else usual_s)


def _places(names: list[str]) -> list[float]:
    """Return where bars stand: half a bar's room between others' and ours, warm and not."""
    places = [0.0]
    for before, name in pairwise(names):
        places.append(places[-1] + (1.0 if _group(before) == _group(name) else 1.5))
    return places


def _group(name: str) -> tuple[str, bool]:
    return name.replace(",", " ").split()[0], "warm" in name


def main() -> None:
    """Draw anew what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of peers.py")
    parser.add_argument("file", type=Path, help="a picture: .svg, .png")
    options = parser.parse_args()
    draw(json.loads(options.results.read_text()), options.file)


if __name__ == "__main__":
    main()

"""A picture of what `peers.py` measured: bars of seconds, a panel for each case.

Drawn by matplotlib, which is loaded here and nowhere else.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from aims import Conditions, middle

_LOOP, _HOME, _OURS = "#7a8ca3", "#d5dbe3", "#1f6f50"
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
    colours = [_OURS if way.startswith("lazyfs") else _LOOP for way in names]
    panel.barh(
        names, [home for _, _, home in bars], color=_HOME, label="all memory home and proven"
    )
    panel.barh(names, [loop for _, loop, _ in bars], color=colours, height=0.55)
    for at, (_, loop_s, _) in enumerate(bars):
        panel.text(loop_s, at, f" {loop_s:.2f}", va="center", fontsize=8)
    link_s = middle(case["rows"].get("link, uncompressed", ()), "link_s")
    if link_s is not None and case["link"] != "unshaped":
        panel.axvline(link_s, color="#b0413e", linewidth=0.8, label="the link alone, uncompressed")
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    conditions = Conditions(case["size_mib"], case["pattern"], case["link"], case["at_once"])
    panel.set_title(f"{conditions}: seconds to the first loop", loc="left", fontsize=10)
    panel.tick_params(labelsize=8)
    panel.legend(fontsize=7, loc="lower right")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)

"""What all figures of the report have in common: axes, letters, and how text of a trace gets in.

Imports plotly, as its neighbours `timeline.py`, `maps.py` and `figures.py` do, and nobody else.
plotly.js reads some HTML in its labels: names are escaped, so that they are only names.
"""

import sys
from collections.abc import Sequence
from html import escape
from typing import Any

from lazyfs.ground.errors import UsageError
from lazyfs.ground.printable import printable
from lazyfs.report import style

try:
    import plotly.graph_objects as go
except ModuleNotFoundError as error:
    raise UsageError(
        "there is no page: it is drawn with plotly, which is not here; where lazyfs is: "
        f"{sys.executable} -m pip install plotly"
    ) from error

__all__ = ["LEFT_PX", "axis", "figure", "go", "heading", "in_seconds", "moment_line", "safe"]

LEFT_PX = 64
"""Left of the axes, in all figures: what happened at one time is at one place."""
_RIGHT_PX = 16
_TEXT_MOST = 200


def safe(text: str) -> str:
    """Return a name of the trace's as it may stand in a label."""
    shown = printable(text)
    return escape(shown if len(shown) <= _TEXT_MOST else shown[: _TEXT_MOST - 1] + "…")


def in_seconds(milliseconds: float) -> float:
    """Return seconds, to the hundredth of a millisecond: a page need not hold more."""
    return round(milliseconds / 1000, 5)


def axis(**settings: Any) -> dict[str, Any]:
    """Return an axis as all are, with what is its own."""
    return {
        "showgrid": True,
        "gridcolor": style.FAINT,
        "gridwidth": 1,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "tickfont": {"size": 11, "color": style.QUIET},
        "automargin": False,
        **settings,
    }


def figure(height_px: int, *, top_px: int = 28, bottom_px: int = 40, **layout: Any) -> Any:
    """Return an empty figure."""
    made = go.Figure()
    made.update_layout(
        template="none",
        height=height_px,
        margin={"l": LEFT_PX, "r": _RIGHT_PX, "t": top_px, "b": bottom_px, "pad": 5},
        font={"family": style.FONT, "size": 12, "color": style.INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        barmode="overlay",
        hovermode="closest",
        hoverlabel={
            "bgcolor": style.PAPER,
            "bordercolor": style.QUIET,
            "font": {"family": style.FONT, "size": 12, "color": style.INK},
            "align": "left",
        },
        legend={
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 11, "color": style.QUIET},
            "itemwidth": 30,
            "traceorder": "normal",
        },
        **layout,
    )
    return made


def heading(text: str, y: float) -> dict[str, Any]:
    """Return the label of a row, above its upper left corner; `y` is in parts of the paper."""
    return {
        "text": text,
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": y,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11, "color": style.QUIET},
    }


def moment_line(at_ms: float, *, strong: bool = False, upright: bool = True) -> dict[str, Any]:
    """Return a line through the figure at a moment; level where time goes up."""
    line = {
        "color": style.INK if strong else style.QUIET,
        "width": 1.4 if strong else 1,
        "dash": "solid" if strong else "dot",
    }
    at_s = in_seconds(at_ms)
    if upright:
        place = {"x0": at_s, "x1": at_s, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    else:
        place = {"x0": 0, "x1": 1, "y0": at_s, "y1": at_s, "xref": "paper", "yref": "y"}
    return {"type": "line", "line": line, "layer": "above", **place}


def points(strokes: Sequence[tuple[float, float, float, float]]) -> tuple[list[Any], list[Any]]:
    """Return the x and y of a line that is lifted after each stroke (x0, x1, y0, y1)."""
    xs: list[Any] = []
    ys: list[Any] = []
    for x0, x1, y0, y1 in strokes:
        xs += [x0, x1, None]
        ys += [y0, y1, None]
    return xs, ys

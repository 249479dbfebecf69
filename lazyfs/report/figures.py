"""Needed against fetched, over time and by file."""

from collections.abc import Sequence
from typing import Any

from lazyfs.ground.words import human_bytes, plural
from lazyfs.report import style
from lazyfs.report.analysis import Analysis, FileFates
from lazyfs.report.bins import cumulative, edges
from lazyfs.report.drawing import axis, figure, go, in_seconds, moment_line, safe
from lazyfs.report.timeline import viewed_ms

_FILES_MOST = 10
_MIB = 1 << 20
_LABEL_MOST = 34
_SMALLEST = 300
"""A file of which less than so small a part of the largest is told is told with others."""


def amounts(analysis: Analysis) -> Any:
    """Draw how much was needed, had come and was fetched, over time."""
    view_ms = viewed_ms(analysis)
    moments = edges(view_ms, analysis.length_ms, 300)
    fates = [fate for file in analysis.files for fate in file.fates]
    needed = [(fate.needed_ms, fate.size_bytes) for fate in fates if fate.needed_ms is not None]
    came = [(fate.arrived_ms, fate.size_bytes) for fate in fates if fate.arrived_ms is not None]
    lines: list[tuple[str, Sequence[float], str]] = [
        ("fetched, over the link", [analysis.flow.at(at_ms) for at_ms in moments], style.DEMAND),
        ("came, unpacked", cumulative(came, moments), style.COMPLETION),
        ("needed", cumulative(needed, moments), style.IN_TIME),
    ]
    made = figure(300, bottom_px=64)
    inside = [values[sum(at_ms <= view_ms for at_ms in moments) - 1] for _, values, _ in lines]
    made.update_layout(
        xaxis=axis(range=[0, in_seconds(view_ms)], ticksuffix=" s", nticks=12),
        yaxis=axis(range=[0, max(*inside, 1) / _MIB * 1.05], ticksuffix=" MiB", nticks=6),
        hovermode="x unified",
        legend={"y": -0.17, "yanchor": "top"},
        shapes=[moment_line(analysis.end_ms, strong=True)] if analysis.has_end else [],
    )
    for name, values, colour in lines:
        if values[-1]:
            made.add_trace(
                go.Scatter(
                    x=[in_seconds(at_ms) for at_ms in moments],
                    y=[round(value / _MIB, 3) for value in values],
                    name=name,
                    line={"color": colour, "width": 2},
                    mode="lines",
                    hovertemplate="%{y:.1f} MiB " + name + "<extra></extra>",
                )
            )
    return made


def by_file(analysis: Analysis) -> Any:
    """Draw what became of each file's bytes by the end mark."""
    ordered = sorted(analysis.files, key=_told_bytes, reverse=True)
    least = _told_bytes(ordered[0]) / _SMALLEST if ordered else 0
    shown = [file for file in ordered[:_FILES_MOST] if _told_bytes(file) >= least]
    rest = ordered[len(shown) :]
    rows = [
        (_label(file.path), file.needed_bytes, file.late_bytes, file.spare_bytes) for file in shown
    ]
    if rest:
        rows.append(
            (
                plural(len(rest), "file") + " more" if shown else plural(len(rest), "file"),
                sum(file.needed_bytes for file in rest),
                sum(file.late_bytes for file in rest),
                sum(file.spare_bytes for file in rest),
            )
        )
    made = figure(len(rows) * 26 + 100, bottom_px=64)
    names = [name for name, *_ in rows]
    kinds = (
        ("needed, and here in time", [needed - late for _, needed, late, _ in rows], style.IN_TIME),
        ("needed before it came", [late for _, _, late, _ in rows], style.LATE),
        ("came, not asked for", [spare for *_, spare in rows], style.SPARE),
    )
    for name, values, colour in kinds:
        made.add_trace(
            go.Bar(
                orientation="h",
                name=name,
                y=list(range(len(rows))),
                x=[value / _MIB for value in values],
                width=0.66,
                marker={"color": colour, "line": {"width": 0}},
                hoverinfo="text",
                hovertext=[
                    f"<b>{row}</b><br>{human_bytes(value)} {name}"
                    for row, value in zip(names, values, strict=True)
                ],
                textposition="none",
            )
        )
    made.update_layout(
        barmode="stack",
        xaxis=axis(ticksuffix=" MiB", nticks=10, rangemode="tozero"),
        yaxis=axis(
            tickvals=list(range(len(rows))),
            ticktext=names,
            range=[len(rows) - 0.5, -0.5],
            fixedrange=True,
            showgrid=False,
            tickfont={"size": 12, "color": style.INK},
        ),
        margin={"l": 200},
        legend={"y": -44 / (len(rows) * 26 + 8), "yanchor": "top"},
    )
    return made


def _told_bytes(file: FileFates) -> int:
    return file.needed_bytes + file.spare_bytes


def _label(path: str) -> str:
    return safe(path if len(path) <= _LABEL_MOST else "…" + path[1 - _LABEL_MOST :])

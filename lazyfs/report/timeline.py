"""The restore along its time: what was at work, who waited, what was fetched, how fast it came."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lazyfs.checkpoint.trace import Fetch
from lazyfs.ground.words import human_bytes, plural
from lazyfs.report import style
from lazyfs.report.analysis import CRIU, FAULT, START, Analysis
from lazyfs.report.bins import Bar, Item, Packed, edges, packed, rates
from lazyfs.report.drawing import axis, figure, go, heading, in_seconds, moment_line, safe
from lazyfs.report.spans import Flow
from lazyfs.report.words import brief, seconds, why

VIEWED = 1.25
"""What is shown first: so much of the time until the end mark."""
_WAIT_LANES = 8
_FETCH_LANES = 24
_PHASE_LANES = 6
_STALLS_MOST = 150
_MARKS_MOST = 12
_EDGES = ("began", "opening", "resolved", "opened", "restore started")
"""Marks that are where phases end, and not drawn."""
_LANE_PX = 13
_GAP_PX = 30
_RATE_PX = 120
_PLOT_PX = 1000
_LETTER_PX = 6
_BINS = 240
_MEGA = 1_000_000


def viewed_ms(analysis: Analysis) -> float:
    """Return how much of the time is looked at first."""
    return min(analysis.length_ms, analysis.end_ms * VIEWED) or 1.0


def timeline(analysis: Analysis) -> Any:
    """Draw it."""
    view_ms = viewed_ms(analysis)
    phases = packed(_phases(analysis), view_ms, _PHASE_LANES)
    waits = packed(_waits(analysis), view_ms, _WAIT_LANES)
    fetches = packed(_fetches(analysis), view_ms, _FETCH_LANES)
    rows = [
        ("start and CRIU", max(1, phases.lanes) * (_LANE_PX + 5)),
        ("waiting", (max(1, waits.lanes) + 1) * _LANE_PX),
        ("fetches under way", max(2, fetches.lanes) * _LANE_PX),
        ("over the link, MB/s", _RATE_PX),
    ]
    drawn_px = sum(px for _, px in rows) + _GAP_PX * (len(rows) - 1)
    made = figure(drawn_px + 70 + 40, top_px=70, bottom_px=40)
    top = 1.0
    places = []
    for name, px in rows:
        places.append((name, top - px / drawn_px, top))
        top -= (px + _GAP_PX) / drawn_px
    _set_axes(made, places, (phases, waits, fetches), view_ms)
    _add_phases(made, analysis, phases)
    _add_waits(made, analysis, waits)
    _add_fetches(made, analysis, fetches)
    _add_rates(made, analysis, view_ms)
    marks, labels = _marks(analysis, view_ms, drawn_px)
    made.update_layout(
        shapes=[*_shaded(analysis, places), *marks],
        annotations=[*(heading(name, high) for name, _, high in places), *labels],
        legend={"y": 0, "yanchor": "top", "yref": "paper", "x": 1, "xanchor": "right"},
    )
    made.update_layout(legend={"y": -30 / drawn_px})
    return made


def _set_axes(
    made: Any,
    places: Sequence[tuple[str, float, float]],
    lanes: Sequence[Packed],
    view_ms: float,
) -> None:
    settings: dict[str, Any] = {
        "xaxis": axis(
            range=[0, in_seconds(view_ms)],
            anchor="y4",
            ticksuffix=" s",
            nticks=12,
            rangemode="nonnegative",
        )
    }
    for number, (_, low, high) in enumerate(places, start=1):
        own: dict[str, Any] = {"domain": [max(0.0, low), high], "anchor": "x", "fixedrange": True}
        if number <= len(lanes):
            least = 1.5 if number == 2 else 0.5
            own |= {
                "range": [max(1, lanes[number - 1].lanes) - 0.5, -least],
                "showticklabels": False,
                "showgrid": False,
            }
        else:
            own |= {"rangemode": "tozero", "nticks": 4}
        settings[f"yaxis{number}" if number > 1 else "yaxis"] = axis(**own)
    made.update_layout(**settings)


def _phases(analysis: Analysis) -> list[Item]:
    return [
        Item(
            phase.began_ms,
            phase.ended_ms,
            next((kind for kind in (START, CRIU) if phase.name.startswith(kind)), "other"),
            0,
            index,
        )
        for index, phase in enumerate(analysis.phases)
    ]


def _waits(analysis: Analysis) -> list[Item]:
    return [
        Item(
            wait.read.began_ms,
            wait.read.ended_ms,
            "fault waits" if wait.read.kind == FAULT else "read waits",
            wait.read.size_bytes,
            index,
        )
        for index, wait in enumerate(analysis.waits)
    ]


def _fetches(analysis: Analysis) -> list[Item]:
    return [
        Item(
            fetch.began_ms,
            max(fetch.began_ms, fetch.ended_ms),
            fetch.why if fetch.why in style.LANES else "other",
            fetch.stop - fetch.start,
            index,
        )
        for index, fetch in enumerate(analysis.recording.fetches)
    ]


def _bars(
    bars: Sequence[Bar], texts: Sequence[str], name: str, colour: str, axis_name: str, **more: Any
) -> Any:
    return go.Bar(
        orientation="h",
        name=name,
        y=[bar.lane for bar in bars],
        base=[in_seconds(bar.began_ms) for bar in bars],
        x=[in_seconds(bar.ended_ms - bar.began_ms) for bar in bars],
        width=0.74,
        yaxis=axis_name,
        marker={"color": colour, "line": {"width": 0}},
        hoverinfo="text",
        hovertext=texts,
        textposition="none",
        **more,
    )


def _add_phases(made: Any, analysis: Analysis, lanes: Packed) -> None:
    colours = ((START, style.START), (CRIU, style.CRIU), ("other", style.RUNNING))
    for kind, colour in colours:
        bars = [bar for bar in lanes.bars if bar.kind == kind]
        names = [_phase_name(analysis, bar) for bar in bars]
        texts = [
            f"<b>{name}</b><br>{seconds(bar.began_ms)}, {brief(bar.busy_ms)}"
            for name, bar in zip(names, bars, strict=True)
        ]
        if bars:
            trace = _bars(bars, texts, kind, colour, "y", showlegend=False)
            widths = [bar.ended_ms - bar.began_ms for bar in bars]
            shown = [
                name if len(name) * _LETTER_PX < _PLOT_PX * width_ms / viewed_ms(analysis) else ""
                for name, width_ms in zip(names, widths, strict=True)
            ]
            trace.update(
                text=shown,
                textposition="inside",
                insidetextanchor="start",
                constraintext="none",
                textfont={"size": 10, "color": style.INK if kind == "other" else style.PAPER},
                textangle=0,
            )
            made.add_trace(trace)


def _phase_name(analysis: Analysis, bar: Bar) -> str:
    name = analysis.phases[bar.number].name
    text = safe(name.removeprefix(CRIU).removeprefix(START).lstrip(": ") or name)
    return text if bar.things == 1 else f"{text} and {bar.things - 1} more"


def _add_waits(made: Any, analysis: Analysis, lanes: Packed) -> None:
    for kind, colour in (("fault waits", style.IN_TIME), ("read waits", style.CRIU)):
        bars = [bar for bar in lanes.bars if bar.kind == kind]
        if bars:
            texts = [_wait_text(analysis, bar) for bar in bars]
            made.add_trace(_bars(bars, texts, kind, colour, "y2"))
    stalls = packed(
        [Item(*stall, "stall", 0, index) for index, stall in enumerate(analysis.stalls)],
        viewed_ms(analysis),
        1,
    ).bars
    if stalls:
        bars = [bar._replace(lane=-1) for bar in stalls]
        texts = [
            f"<b>stall</b>: {brief(bar.busy_ms)} in which somebody waited<br>and no byte came"
            for bar in bars
        ]
        made.add_trace(_bars(bars, texts, "stall: nothing comes", style.LATE, "y2"))


def _wait_text(analysis: Analysis, bar: Bar) -> str:
    thing = "fault" if bar.kind.startswith(FAULT) else "read"
    if bar.things > 1:
        return (
            f"<b>{plural(bar.things, thing)}</b> from {seconds(bar.began_ms)} on"
            f"<br>{human_bytes(bar.size_bytes)}, {brief(bar.busy_ms)} of waiting"
        )
    wait = analysis.waits[bar.number]
    read = wait.read
    reasons = safe(why(wait)).replace("; ", "<br>")
    return (
        f"<b>{thing} waits {brief(wait.waited_ms)}</b> at {seconds(read.began_ms)}"
        f"<br>{safe(analysis.trace.files[read.file].path)}"
        f"<br>{human_bytes(read.size_bytes)} at {read.offset:#x}<br>{reasons}"
    )


def _add_fetches(made: Any, analysis: Analysis, lanes: Packed) -> None:
    fetches = analysis.recording.fetches
    for kind, colour in (*style.LANES.items(), ("other", style.OTHER)):
        bars = [bar for bar in lanes.bars if bar.kind == kind]
        if not bars:
            continue
        texts = [_fetch_text(analysis, bar) for bar in bars]
        made.add_trace(
            _bars(bars, texts, kind, colour, "y3", opacity=0.35, legendgroup=kind, showlegend=False)
        )
        came = [
            bar._replace(
                began_ms=min(max(fetches[bar.number].first_ms, bar.began_ms), bar.ended_ms)
            )
            if bar.things == 1
            else bar
            for bar in bars
        ]
        made.add_trace(_bars(came, texts, kind, colour, "y3", legendgroup=kind))


def _fetch_text(analysis: Analysis, bar: Bar) -> str:
    if bar.things > 1:
        return (
            f"<b>{plural(bar.things, 'fetch', 'fetches')}</b> ({bar.kind})"
            f"<br>{human_bytes(bar.size_bytes)} from {seconds(bar.began_ms)}"
            f" to {seconds(bar.ended_ms)}"
        )
    fetch: Fetch = analysis.recording.fetches[bar.number]
    digest = safe(analysis.trace.layers[fetch.layer].digest[:19] or "no digest")
    attempts = f"<br>{fetch.attempts} attempts" if fetch.attempts > 1 else ""
    return (
        f"<b>{human_bytes(bar.size_bytes)}</b> ({safe(fetch.why)}) at {seconds(fetch.began_ms)}"
        f"<br>first byte after {brief(max(0.0, fetch.first_ms - fetch.began_ms))}, "
        f"done after {brief(bar.busy_ms)}"
        f"<br>layer {fetch.layer} ({digest}), bytes {fetch.start} to {fetch.stop}{attempts}"
    )


def _add_rates(made: Any, analysis: Analysis, view_ms: float) -> None:
    moments = edges(view_ms, analysis.length_ms, _BINS)
    lanes: dict[str, list[tuple[float, float, int]]] = {}
    for fetch in analysis.recording.fetches:
        first_ms = max(fetch.first_ms, fetch.began_ms)
        name = fetch.why if fetch.why in style.LANES else "other"
        lot = (first_ms, max(fetch.ended_ms, first_ms), fetch.stop - fetch.start)
        lanes.setdefault(name, []).append(lot)
    for name, colour in (*style.LANES.items(), ("other", style.OTHER)):
        if name not in lanes:
            continue
        values = [round(value / _MEGA, 2) for value in rates(Flow(lanes[name]), moments)]
        made.add_trace(
            go.Scatter(
                x=[in_seconds(moment) for moment in moments],
                y=[*values, 0.0],
                name=name,
                legendgroup=name,
                showlegend=False,
                stackgroup="link",
                line={"width": 0, "shape": "hv", "color": colour},
                fillcolor=colour,
                yaxis="y4",
                hovertemplate="%{y:.0f} MB/s " + name + "<extra></extra>",
            )
        )


def _shaded(analysis: Analysis, places: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Return the longest stalls, behind the rows from the waiting on down."""
    longest = sorted(analysis.stalls, key=lambda stall: -stall.length_ms)[:_STALLS_MOST]
    least_ms = viewed_ms(analysis) / 400
    return [
        {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": in_seconds(stall.began_ms),
            "x1": in_seconds(stall.ended_ms),
            "y0": 0,
            "y1": places[1][2],
            "fillcolor": style.LATE,
            "opacity": 0.09,
            "line": {"width": 0},
            "layer": "below",
        }
        for stall in longest
        if stall.length_ms >= least_ms
    ]


def _marks(
    analysis: Analysis, view_ms: float, drawn_px: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return lines and labels, those near each other above each other."""
    marks = [mark for mark in analysis.marks if mark.name not in _EDGES][:_MARKS_MOST]
    until = [mark for mark in analysis.marks if mark.at_ms == analysis.end_ms][:1]
    shown = sorted({*marks, *until}, key=lambda mark: mark.at_ms)
    levels = [0] * len(shown)
    for number, (before, after) in enumerate(pairwise(shown), start=1):
        if after.at_ms - before.at_ms < view_ms / 8:
            levels[number] = (levels[number - 1] + 1) % 3
    lines = [moment_line(mark.at_ms, strong=mark.name == "until") for mark in shown]
    labels = [
        {
            "text": f"{safe(mark.name)} {seconds(mark.at_ms)}",
            "x": in_seconds(mark.at_ms),
            "xref": "x",
            "y": 1 + (16 + 14 * level) / drawn_px,
            "yref": "paper",
            "xanchor": "right" if mark.at_ms > 0.85 * view_ms else "left",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": style.INK if mark.name == "until" else style.QUIET},
        }
        for mark, level in zip(shown, levels, strict=True)
    ]
    return lines, labels

"""The address map of a file: which ranges were needed when, and when they came."""

from typing import Any

from lazyfs.ground.words import human_bytes
from lazyfs.report import style
from lazyfs.report.analysis import Analysis, FileFates
from lazyfs.report.bins import AddressMap, Stroke, address_map, edges
from lazyfs.report.drawing import axis, figure, go, heading, in_seconds, moment_line, points
from lazyfs.report.timeline import viewed_ms
from lazyfs.report.words import seconds

FILES_MOST = 6
"""So many files are drawn; what is in the others is in the sums."""
_SMALL_BYTES = 256 * 1024
_ROWS = 150
_MIB = 1 << 20
_HEIGHT_PX = 400
_BANDS = {"needed": (0.905, 0.965), "came": (0.775, 0.835)}
_BELOW = 0.74
_BEFORE = 0.06


def mapped(analysis: Analysis) -> list[FileFates]:
    """Return the files that are drawn, those of which most was needed first."""
    large = [file for file in analysis.files if file.size_bytes >= _SMALL_BYTES]
    return (large or list(analysis.files))[:FILES_MOST]


def map_of(analysis: Analysis, file: FileFates) -> Any:
    """Draw a file."""
    moments = edges(viewed_ms(analysis), analysis.length_ms, _ROWS)
    grid = address_map(file, moments)
    made = figure(_HEIGHT_PX, top_px=26, bottom_px=56)
    bands = ("needed", "came") if analysis.recording.arrivals else ("needed",)
    high = _BELOW if len(bands) > 1 else _BANDS["came"][0]
    suffix = " MiB"
    made.update_layout(
        xaxis=axis(
            range=[0, file.size_bytes / _MIB or 1], anchor="y", ticksuffix=suffix, nticks=12
        ),
        yaxis=axis(
            domain=[0, high],
            range=[in_seconds(_first_ms(file)), in_seconds(viewed_ms(analysis))],
            ticksuffix=" s",
            nticks=7,
        ),
        shapes=[moment_line(analysis.end_ms, strong=True, upright=False)]
        if analysis.has_end
        else [],
        legend={"y": -34 / (_HEIGHT_PX - 82), "yanchor": "top"},
        annotations=[heading(f"first {name}", _BANDS[name][1]) for name in bands],
    )
    for number, name in enumerate(bands, start=2):
        made.add_trace(_band(analysis, file, grid, name, f"y{number}"))
        made.update_layout(
            {
                f"yaxis{number}": axis(
                    domain=_BANDS[name],
                    anchor="x",
                    fixedrange=True,
                    showticklabels=False,
                    showgrid=False,
                )
            }
        )
    _add_strokes(made, grid)
    return made


def _first_ms(file: FileFates) -> float:
    """Return a moment before anything happened to a file, but not long before."""
    moments = [
        at_ms
        for fate in file.fates
        for at_ms in (fate.needed_ms, fate.arrived_ms)
        if at_ms is not None
    ]
    first_ms, last_ms = min(moments, default=0.0), max(moments, default=0.0)
    return max(0.0, first_ms - (last_ms - first_ms) * _BEFORE)


def _band(analysis: Analysis, file: FileFates, grid: AddressMap, name: str, axis_name: str) -> Any:
    times = [column.needed_ms if name == "needed" else column.arrived_ms for column in grid.columns]
    sizes = [
        column.needed_bytes if name == "needed" else column.arrived_bytes for column in grid.columns
    ]
    texts = [
        ""
        if time_ms is None
        else f"<b>{human_bytes(round(index * grid.column_bytes))}</b> and on: "
        f"{human_bytes(size)} {name}, first at {seconds(time_ms)}"
        for index, (time_ms, size) in enumerate(zip(times, sizes, strict=True))
    ]
    width_mib = grid.column_bytes / _MIB
    return go.Heatmap(
        z=[[None if time_ms is None else in_seconds(time_ms) for time_ms in times]],
        x0=width_mib / 2,
        dx=width_mib,
        y=[0],
        yaxis=axis_name,
        zmin=in_seconds(_first_ms(file)),
        zmax=in_seconds(viewed_ms(analysis)),
        colorscale=style.TIME_SCALE,
        showscale=False,
        hoverinfo="text",
        hovertext=[texts],
        hoverongaps=False,
    )


def _add_strokes(made: Any, grid: AddressMap) -> None:
    kinds = (
        ("came", grid.arrivals, style.COMPLETION, 3, "came at %{y:.2f} s"),
        ("needed, and here", grid.in_time, style.IN_TIME, 4, "needed at %{y:.2f} s"),
        ("needed before it came", grid.late, style.LATE, 2, "%{y:.3f} s"),
    )
    for name, strokes, colour, width, text in kinds:
        if not strokes:
            continue
        xs, ys = points([_placed(stroke) for stroke in strokes])
        made.add_trace(
            go.Scatter(
                x=xs,
                y=ys,
                mode="lines",
                name=name,
                line={"color": colour, "width": width},
                connectgaps=False,
                hovertemplate=f"{name}<br>%{{x:.1f}} MiB, {text}<extra></extra>",
            )
        )


def _placed(stroke: Stroke) -> tuple[float, float, float, float]:
    return (
        round(stroke.start / _MIB, 4),
        round(stroke.stop / _MIB, 4),
        in_seconds(stroke.began_ms),
        in_seconds(stroke.ended_ms),
    )

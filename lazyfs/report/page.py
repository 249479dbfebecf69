"""The report as one HTML page that asks nobody for anything.

plotly.js is in the page, compressed: the browser unpacks it (DecompressionStream, in all browsers
since 2023), which makes a page of 2 MB of one of 5. What comes from the trace is escaped, in HTML
and in the JSON that the figures are; and were something forgotten, the page's own policy
(Content Security Policy Level 3) lets no script run but the two whose hashes it names, and no
address be asked.
"""

import base64
import gzip
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from html import escape
from typing import Any

import msgspec

from lazyfs.ground.printable import printable
from lazyfs.ground.words import human_bytes, plural
from lazyfs.report import words
from lazyfs.report.analysis import FAULT, Analysis
from lazyfs.report.figures import amounts, by_file
from lazyfs.report.maps import FILES_MOST, map_of, mapped
from lazyfs.report.style import CAUSES, CRIU, FAINT, FONT, IN_TIME, INK, LATE, QUIET, RUNNING, START
from lazyfs.report.timeline import timeline
from lazyfs.report.waits import Wait

SLOWEST_MOST = 20
_UNIT = re.compile(r"([0-9]) (m?s|[KMGTPE]iB|B|MB/s)\b")
_LATEST_S = 1 << 33
"""A moment after it, in 2242, is none at which anybody recorded."""
_CONFIG = {
    "displayModeBar": False,
    "responsive": True,
    "showTips": False,
    "doubleClick": "reset+autosize",
}

_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: {INK}; font: 15px/1.5 {FONT};
  -webkit-font-smoothing: antialiased; }}
main {{ max-width: 1160px; margin: 0 auto; padding: 40px 28px 72px; }}
header p {{ margin: 0; color: {QUIET}; font-size: 13px; overflow-wrap: anywhere; }}
h1 {{ font-size: 26px; line-height: 1.3; font-weight: 600; letter-spacing: -0.01em;
  margin: 6px 0 0; overflow-wrap: anywhere; }}
h1 small {{ display: block; font-size: 16px; line-height: 1.5; font-weight: 400; margin-top: 6px;
  letter-spacing: 0; max-width: 62em; }}
h2 {{ font-size: 17px; font-weight: 600; margin: 52px 0 2px; }}
h3 {{ font-size: 14px; font-weight: 600; margin: 24px 0 0; overflow-wrap: anywhere; }}
h3 span {{ font-weight: 400; color: {QUIET}; }}
p.note {{ margin: 6px 0 10px; color: {QUIET}; font-size: 13.5px; max-width: 68em; }}
.shares {{ display: flex; height: 14px; margin: 22px 0 6px; border-radius: 3px; overflow: hidden;
  gap: 1px; }}
.keys {{ display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 13px; color: {QUIET}; }}
.keys i {{ display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin-right: 7px; }}
.keys b {{ color: {INK}; font-weight: 600; font-variant-numeric: tabular-nums; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr));
  gap: 18px 20px; margin: 30px 0 0; padding: 18px 0; border: solid {FAINT};
  border-width: 1px 0; }}
dt {{ font-size: 12.5px; color: {QUIET}; }}
dd {{ margin: 0; font-size: 21px; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; white-space: nowrap; }}
dd span {{ display: block; font-size: 12px; line-height: 1.4; font-weight: 400; color: {QUIET};
  white-space: normal; }}
.chart {{ margin: 4px 0 0; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; margin-top: 22px; }}
th {{ text-align: left; font-weight: 400; color: {QUIET}; font-size: 12.5px; }}
th, td {{ padding: 6px 14px 6px 0; border-bottom: 1px solid {FAINT}; vertical-align: top; }}
td.n, th.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
td.p {{ overflow-wrap: anywhere; min-width: 14em; }}
td.w {{ min-width: 20em; }}
td.w b {{ font-weight: 600; }}
tr.after td {{ color: {QUIET}; }}
ol {{ margin: 8px 0 0; padding-left: 1.3em; max-width: 62em; }}
li {{ margin: 6px 0; }}
code {{ font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  background: #f2f5f8; padding: 1px 5px; border-radius: 3px; }}
footer {{ margin-top: 56px; color: {QUIET}; font-size: 12.5px; overflow-wrap: anywhere; }}
.warn {{ color: {LATE}; }}
@media (max-width: 700px) {{ main {{ padding: 24px 14px 48px; }} h1 {{ font-size: 22px; }} }}
@media print {{ main {{ max-width: none; }} }}
"""

_SCRIPT = """
"use strict";
(async () => {
  const packed = document.getElementById("plotly").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = JSON.parse(document.getElementById("config").textContent);
  for (const [id, figure] of Object.entries(figures)) {
    await Plotly.newPlot(id, figure.data, figure.layout, config);
    await new Promise((done) => setTimeout(done));
  }
  document.documentElement.dataset.drawn = Object.keys(figures).length;
})().catch((error) => {
  const told = document.getElementById("failed");
  told.hidden = false;
  told.textContent = "The charts could not be drawn: " + error;
});
"""


def page(analysis: Analysis, *, version: str = "") -> str:
    """Return the page. `version` is of lazyfs, for the footer."""
    library, packed = _plotly()
    figures: dict[str, Any] = {}
    body = "\n".join(_body(analysis, figures, version))
    encoded = ",".join(f"{_json(name)}:{_json_of(figure)}" for name, figure in figures.items())
    title = analysis.recording.reference or analysis.trace.workload or "trace"
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src {_hashed(_SCRIPT)} {library}; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}: where the seconds went</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="config">{_json(_CONFIG)}</script>
<script type="application/json" id="figures">{{{encoded}}}</script>
<script type="text/plain" id="plotly">{packed}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


@cache
def _plotly() -> tuple[str, str]:
    """Return plotly.js as a source of a script may name it, and as it is in the page."""
    from plotly.offline import get_plotlyjs

    text = str(get_plotlyjs())
    packed = base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
    return _hashed(text), packed


def _hashed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    """Return a text as HTML, a number on one line with its unit."""
    return _UNIT.sub("\\1&nbsp;\\2", escape(printable(text)))


def _json(value: object) -> str:
    return _inert(msgspec.json.encode(value).decode())


def _json_of(figure: Any) -> str:
    return _inert(str(figure.to_json(validate=False, engine="json")))


def _inert(text: str) -> str:
    """Return JSON that ends no script and begins no comment, whatever its strings hold."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _body(analysis: Analysis, figures: dict[str, Any], version: str) -> Iterator[str]:
    yield from _head(analysis)
    yield '<p id="failed" class="warn" hidden></p>'
    yield '<noscript><p class="warn">The charts need JavaScript; nothing is fetched.</p></noscript>'
    if analysis.has_recording:
        yield _section(
            "When",
            "Time runs to the right; drag to look closer, double-click to go back, and once more "
            "for all of it. Pale is a fetch before its first byte.",
        )
        yield _chart("timeline", timeline(analysis), figures)
    yield from _maps(analysis, figures)
    if analysis.has_recording:
        yield _section(
            "Needed against fetched",
            "What was needed and what came are as unpacked; what was fetched is as it lies in the "
            "blob. Zeros that a blob leaves out need not come. By file: what had become of it at "
            "the end mark.",
        )
        yield _chart("amounts", amounts(analysis), figures)
        yield _chart("files", by_file(analysis), figures)
        yield from _slowest(analysis)
        yield from _hints(analysis)
    yield from _footer(analysis, version)


def _head(analysis: Analysis) -> Iterator[str]:
    recording, trace = analysis.recording, analysis.trace
    began = ""
    if 0 < recording.began_at_s < _LATEST_S:
        began = datetime.fromtimestamp(recording.began_at_s, UTC).strftime("%-d %B %Y, %H:%M UTC")
    about = [recording.reference, trace.workload, recording.way, began]
    yield "<header>"
    yield f"<p>{' · '.join(_text(item) for item in about if item)}</p>"
    spent = words.spent_on(analysis) if analysis.has_recording else ""
    said = [f"{spent}." if spent else "", f"Until: {trace.until}." if trace.until else ""]
    small = f"<small>{_text(' '.join(filter(None, said)))}</small>" if any(said) else ""
    yield f"<h1>{_text(words.headline(analysis))}{small}</h1>"
    if recording.dropped:
        yield f'<p class="warn">{_text(words.too_many(analysis))}</p>'
    if analysis.has_recording:
        yield from _budget(analysis)
    if note := words.circumstances(analysis):
        yield f'<p class="note">{_text(note)}</p>'
    yield "<dl>"
    for figure in words.figures(analysis):
        note = f"<span>{_text(figure.note)}</span>" if figure.note else ""
        yield f"<div><dt>{_text(figure.name)}</dt><dd>{_text(figure.value)}{note}</dd></div>"
    yield "</dl></header>"


def _budget(analysis: Analysis) -> Iterator[str]:
    budget = analysis.budget
    parts = [
        ("until the mount answered", budget.start_ms, START),
        ("CRIU", budget.criu_ms, CRIU),
        ("waiting", budget.waiting_ms, IN_TIME),
        ("other work", budget.rest_ms, RUNNING),
    ]
    yield from _shares(parts)


def _shares(parts: Sequence[tuple[str, float, str]]) -> Iterator[str]:
    """Yield a bar of times, each as long as its share, and what its colours mean."""
    parts = [part for part in parts if part[1] > 0]
    whole_ms = sum(time_ms for _, time_ms, _ in parts)
    yield '<div class="shares">'
    for name, time_ms, colour in parts:
        share = 100 * time_ms / whole_ms
        yield (
            f'<div style="width:{share:.2f}%;background:{colour}" '
            f'title="{name}: {words.brief(time_ms)}"></div>'
        )
    yield '</div><div class="keys">'
    for name, time_ms, colour in parts:
        yield (
            f'<span><i style="background:{colour}"></i>{name} <b>{words.brief(time_ms)}</b></span>'
        )
    yield "</div>"


def _section(title: str, note: str) -> str:
    return f'<h2>{title}</h2>\n<p class="note">{note}</p>'


def _chart(name: str, figure: Any, figures: dict[str, Any]) -> str:
    figures[name] = figure
    return f'<div class="chart" id="{name}" style="height:{figure.layout.height}px"></div>'


def _maps(analysis: Analysis, figures: dict[str, Any]) -> Iterator[str]:
    files = mapped(analysis)
    if not files:
        return
    came = analysis.has_recording and analysis.recording.arrivals
    note = "Each file from its start to its end. "
    note += (
        "In the bands, dark is early and pale late. Below, time goes up: where the line of what "
        "was needed is red, it reaches from when it was needed to when it came."
        if came
        else "When it was needed: dark is early; below, time goes up."
    )
    yield _section("Where", note)
    for number, file in enumerate(files):
        late = f", {human_bytes(file.late_bytes)} of it before it came" if file.late_bytes else ""
        yield (
            f"<h3>{_text(file.path)} <span>{human_bytes(file.size_bytes)}; "
            f"{human_bytes(file.needed_bytes)} needed{late}</span></h3>"
        )
        yield _chart(f"map{number}", map_of(analysis, file), figures)
    others = len(analysis.files) - len(files)
    if others and len(files) == FILES_MOST:
        yield f'<p class="note">{plural(others, "file")} more, of which less was needed.</p>'


def _slowest(analysis: Analysis) -> Iterator[str]:
    slowest = analysis.slowest[:SLOWEST_MOST]
    yield _section(
        "The longest waits, and why",
        "Which fetch brought what is found by its time: likely, not certain. The bar is all "
        "waiting until the end mark, by what it was for.",
    )
    if not slowest:
        yield "<p>Nobody waited.</p>"
        return
    times = zip(analysis.causes._fields, analysis.causes, strict=True)
    yield from _shares([(words.CAUSE_NAMES[name], ms, CAUSES[name]) for name, ms in times])
    yield '<div class="wide"><table><thead><tr><th class="n">waited</th><th class="n">at</th>'
    yield '<th></th><th>file</th><th class="n">offset</th><th class="n">size</th><th>why</th>'
    yield "</tr></thead><tbody>"
    for wait in slowest:
        yield _row(analysis, wait)
    yield "</tbody></table></div>"
    if any(wait.read.began_ms >= analysis.end_ms for wait in slowest):
        yield '<p class="note">Grey: after the end mark; nothing was held up by it.</p>'


def _row(analysis: Analysis, wait: Wait) -> str:
    read = wait.read
    after = ' class="after"' if read.began_ms >= analysis.end_ms else ""
    return (
        f'<tr{after}><td class="n">{words.brief(wait.waited_ms)}</td>'
        f'<td class="n">{words.seconds(read.began_ms)}</td>'
        f"<td>{'fault' if read.kind == FAULT else 'read'}</td>"
        f'<td class="p">{_text(analysis.trace.files[read.file].path)}</td>'
        f'<td class="n">{human_bytes(read.offset)}</td>'
        f'<td class="n">{human_bytes(read.size_bytes)}</td>'
        f'<td class="w"><b>{words.main_cause(wait)}</b>: {_text(words.why(wait))}</td></tr>'
    )


def _hints(analysis: Analysis) -> Iterator[str]:
    found = words.hints(analysis)
    if not found:
        return
    yield "<h2>What to do next</h2>"
    yield "<ol>" + "".join(f"<li>{_with_code(hint)}</li>" for hint in found) + "</ol>"


def _with_code(text: str) -> str:
    """Return a text of ours, what is between backquotes as code."""
    parts: Iterable[str] = _text(text).split("`")
    return "".join(
        f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts)
    )


def _footer(analysis: Analysis, version: str) -> Iterator[str]:
    trace = analysis.trace
    layers = "; ".join(
        f"layer {number}: {layer.digest or 'no digest'}, {human_bytes(layer.size_bytes)}"
        for number, layer in enumerate(trace.layers[:4])
    )
    made = f"Recorded by {trace.made_by}. " if trace.made_by else ""
    drawn = f"Drawn by lazyfs {version}." if version else ""
    yield f"<footer><p>{_text(made + drawn)}<br>{_text(layers)}</p></footer>"

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings

from lazyfs.checkpoint.trace import Mark, Phase, Recording, Trace, dump_trace, parse_trace
from lazyfs.report.analysis import analyse
from lazyfs.report.page import page
from tests.report.recordings import lazy_restore
from tests.report.recordings_at_random import traces

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--\u2028'\"&"
VOID = {"meta", "link", "br"}


class Elements(HTMLParser):
    """What a browser would find, and that all of it is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: dict[str, str] = {}
        self.data: dict[str, str] = {}
        self._open: list[str] = []
        self._at = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        named = {name: value or "" for name, value in attrs}
        self.attributes += named.items()
        if "id" in named:
            self.ids[named["id"]] = tag
        if tag not in VOID:
            self._open.append(tag)
            self._at = named.get("id", tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._at = ""

    def handle_data(self, data: str) -> None:
        self.data[self._at] = self.data.get(self._at, "") + data


@pytest.fixture(scope="module")
def text() -> str:
    return page(analyse(lazy_restore(256)), version="1.0")


def figures_of(text: str) -> dict[str, dict[str, list[dict[str, object]]]]:
    found: dict[str, dict[str, list[dict[str, object]]]] = json.loads(
        Elements(text).data["figures"]
    )
    return found


def test_a_page_has_a_place_for_each_figure(text: str) -> None:
    elements = Elements(text)
    figures = figures_of(text)
    assert list(figures) == ["timeline", "map0", "amounts", "files"]
    assert all(elements.ids[name] == "div" for name in figures)
    assert elements.names.count("tr") == 1 + min(20, len(analyse(lazy_restore(256)).waits))
    assert elements.names.count("h1") == 1
    assert "First response after" in text
    assert "lazyfs trace push REF FILE" in text


def test_a_page_asks_nobody_for_anything(text: str) -> None:
    elements = Elements(text)
    assert {value for name, value in elements.attributes if name in ("src", "href")} == {"data:,"}
    assert "url(" not in elements.data["style"]
    (policy,) = [value for name, value in elements.attributes if "default-src" in value]
    assert policy.startswith("default-src 'none'; ")
    for part in policy.split("; "):
        assert not re.search(r"https?:|\*|unsafe-eval|connect-src", part)
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_no_script_may_run_but_the_two_that_the_page_names(text: str) -> None:
    library = gzip.decompress(base64.b64decode(re.findall(r'id="plotly">([^<]*)<', text)[0]))
    assert b"plotly.js v" in library[:200]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [hashlib.sha256(each).digest() for each in (script.encode(), library)]
    allowed = re.findall(r"'sha256-([^']*)'", text)
    assert allowed == [base64.b64encode(each).decode() for each in hashes]
    assert len(text) < 2_500_000


def test_names_of_the_trace_s_are_only_text(text: str) -> None:
    honest = lazy_restore(64)
    assert honest.recording is not None
    recording = honest.recording
    hostile = parse_trace(
        dump_trace(
            Trace(
                workload=HOSTILE,
                made_by=HOSTILE,
                until=HOSTILE,
                layers=[type(honest.layers[0])(HOSTILE, honest.layers[0].size_bytes)],
                files=[type(file)(HOSTILE, 0, file.size_bytes) for file in honest.files],
                needs=honest.needs,
                recording=Recording(
                    reference=HOSTILE,
                    way=HOSTILE,
                    reads=recording.reads,
                    fetches=[
                        type(fetch)(
                            fetch.layer,
                            fetch.start,
                            fetch.stop,
                            fetch.began_ms,
                            fetch.first_ms,
                            fetch.ended_ms,
                            HOSTILE,
                            1,
                        )
                        for fetch in recording.fetches
                    ],
                    arrivals=recording.arrivals,
                    phases=[Phase(HOSTILE, 0.0, 100.0)],
                    marks=[Mark(HOSTILE, 10.0), Mark("until", 900.0)],
                ),
            )
        ),
        "hostile",
    )
    made = page(analyse(hostile))
    assert set(Elements(made).names) <= set(Elements(text).names)
    assert "<img" not in made.lower()
    assert made.count("<script") == made.count("</script") == 4
    strings: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)
        elif isinstance(value, str):
            strings.append(value)

    walk(figures_of(made))
    assert any("alert(2)" in each for each in strings)
    assert not any(re.search(r"<(?!/?b>|br>|extra>|/extra>)", each) for each in strings)


@given(traces())
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_parses_becomes_a_page(trace: Trace) -> None:
    made = page(analyse(trace))
    assert set(figures_of(made)) <= {"timeline", "amounts", "files"} | {f"map{n}" for n in range(6)}


def test_a_hint_has_only_its_map() -> None:
    made = page(analyse(lazy_restore(64).hint()))
    assert list(figures_of(made)) == ["map0"]
    assert "needed within" in made


def test_a_trace_of_nothing_is_a_page_too() -> None:
    assert figures_of(page(analyse(Trace()))) == {}
    assert "timeline" in figures_of(page(analyse(Trace(recording=Recording()))))

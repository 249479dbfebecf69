import json
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.checkpoint.trace import (
    FILES_MOST,
    HINT_LIMIT_BYTES,
    LAYERS_MOST,
    Arrival,
    Fetch,
    Mark,
    Need,
    Phase,
    Read,
    Recording,
    Trace,
    TracedFile,
    TracedLayer,
    dump_trace,
    parse_hint,
    parse_trace,
)
from lazyfs.ground.errors import MalformedError

PAGES_BYTES = 1 << 20
SMALL = Trace(
    workload="first request",
    made_by="lazyfs 0",
    until="port 8080 answered",
    layers=[TracedLayer("sha256:" + "1" * 64, 2 << 20)],
    files=[
        TracedFile("checkpoint/pages-2.img", 0, 500),
        TracedFile("checkpoint/pages-1.img", 0, PAGES_BYTES),
    ],
    needs=[Need(1, 8192, 4096, 1.5), Need(1, 0, 8192, 2.25)],
    recording=Recording(
        reference="r.example/a@sha256:0",
        began_at_s=1.5e9,
        length_ms=10.0,
        way="lazy pages",
        reads=[Read(1, 8192, 4096, 1.5, 3.0, "fault", waited=True)],
        fetches=[Fetch(0, 0, 100, 1.5, 2.0, 2.5, "demand", 1)],
        arrivals=[Arrival(0, 0, 500, 2.0)],
        phases=[Phase("mount", 0.0, 1.0)],
        marks=[Mark("until", 10.0)],
        dropped=1,
        figures={"requests": 3, "lazy_pages": None},
    ),
)

counts = st.integers(0, 1 << 40)
moments = st.floats(0, 1e9)
texts = st.text(max_size=8)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    layers = draw(st.lists(st.builds(TracedLayer, texts, counts), min_size=1, max_size=3))
    of = st.integers(0, len(layers) - 1)
    files = draw(st.lists(st.builds(TracedFile, texts, of, counts), min_size=1, max_size=3))

    @st.composite
    def ranges(draw: st.DrawFn) -> tuple[int, int, int]:
        number = draw(st.integers(0, len(files) - 1))
        start, stop = sorted(draw(st.tuples(*[st.integers(0, files[number].size_bytes)] * 2)))
        return number, start, stop - start

    needs = [Need(*each, draw(moments)) for each in draw(st.lists(ranges(), max_size=4))]
    reads = [Read(*each, 0.0, 1.0, "read", False) for each in draw(st.lists(ranges(), max_size=4))]
    arrivals = [Arrival(*each, draw(moments)) for each in draw(st.lists(ranges(), max_size=4))]
    recording = Recording(reads=reads, arrivals=arrivals, phases=[Phase(draw(texts), 0.0, 1.0)])
    return Trace(
        workload=draw(texts),
        layers=layers,
        files=files,
        needs=needs,
        recording=draw(st.sampled_from([recording, None])),
    )


def packed(document: Any) -> bytes:
    return zstandard.compress(json.dumps(document).encode())


def with_(**changes: Any) -> bytes:
    return packed(msgspec.to_builtins(SMALL) | changes)


@given(traces())
def test_what_is_written_is_read(trace: Trace) -> None:
    assert parse_trace(dump_trace(trace), "it") == trace


@given(traces())
def test_a_hint_is_what_was_needed_and_nothing_else(trace: Trace) -> None:
    hint = trace.hint()
    assert hint.recording is None
    assert parse_hint(dump_trace(hint), "it") == parse_trace(dump_trace(hint), "it") == hint

    def named(of: Trace) -> list[tuple[TracedFile, int, int, float]]:
        return [(of.files[n.file], n.offset, n.size_bytes, n.at_ms) for n in of.needs]

    assert named(hint) == named(trace)
    assert {file.path for file in hint.files} == {file.path for file, *_ in named(trace)}


@given(st.one_of(st.binary(max_size=200), st.text().map(lambda t: zstandard.compress(t.encode()))))
def test_any_bytes_are_a_trace_or_malformed(data: bytes) -> None:
    for parse in (parse_trace, parse_hint):
        try:
            assert isinstance(parse(data, "it"), Trace)
        except MalformedError as error:
            assert str(error).startswith("it ")


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from(sorted(msgspec.to_builtins(SMALL))), values)
def test_any_part_may_be_anything(key: str, value: Any) -> None:
    for parse in (parse_trace, parse_hint):
        try:
            trace = parse(with_(**{key: value}), "it")
        except MalformedError:
            continue
        for part in (trace.needs, trace.recording.reads if trace.recording else []):
            for item in part:
                assert item.offset + item.size_bytes <= trace.files[item.file].size_bytes


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is no trace"),
        (dump_trace(SMALL)[:-9], "is no trace"),
        (with_(version=2), "of version 2"),
        (with_(layers=[]), "of a layer that it does not name"),
        (with_(files=[]), "of a file that it does not name"),
        (with_(needs=[[1, PAGES_BYTES - 1, 2, 0.0]]), "beyond the end of 'checkpoint/pages-1.img'"),
        (with_(needs=[[1, 0, -1, 0.0]]), "is no trace"),
        (with_(needs=[[1, 1 << 62, 1 << 63, 0.0]]), "is no trace"),
        (with_(workload="x" * 5000), "is no trace"),
        (with_(layers=[["", 0]] * (LAYERS_MOST + 1)), "is no trace"),
        (with_(layers=[{"digest": "", "size_bytes": 0}] * (LAYERS_MOST + 1)), "layers; at most"),
        (
            with_(files=[{"path": "", "layer": 0, "size_bytes": 0}] * (FILES_MOST + 1), needs=[]),
            "files; at most",
        ),
        (with_(recording={"fetches": [[1, 0, 1, 0, 0, 0, "", 1]]}), "cannot have been"),
        (with_(recording={"fetches": [[0, 2, 1, 0, 0, 0, "", 1]]}), "cannot have been"),
        (with_(recording={"arrivals": [[0, 0, 501, 0]]}), "beyond the end"),
    ],
)
def test_what_cannot_be_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        parse_trace(data, "it")


def test_what_a_later_writer_adds_is_passed_over() -> None:
    assert parse_trace(with_(later={"a": [1]}), "it") == SMALL


def test_a_hint_with_a_recording_is_read_without_it() -> None:
    assert parse_hint(dump_trace(SMALL), "it") == msgspec.structs.replace(SMALL, recording=None)
    assert parse_hint(with_(recording=["no", "recording"]), "it").recording is None


def test_a_stranger_is_believed_less() -> None:
    bomb = zstandard.compress(b" " * (17 << 20))
    with pytest.raises(MalformedError, match="larger than is believed"):
        parse_hint(bomb, "it")
    with pytest.raises(MalformedError, match="larger than is believed"):
        parse_hint(bytes(HINT_LIMIT_BYTES + 1), "it")
    needs = [[0, 0, 0, 0]] * 500_001
    with pytest.raises(MalformedError, match="needs; at most"):
        parse_hint(with_(needs=needs, recording=None), "it")


def test_a_frame_that_wants_a_large_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = writer.compress(b"{}") + writer.flush()
    with pytest.raises(MalformedError, match="is no trace"):
        parse_hint(data, "it")


def test_the_bytes_that_were_needed_are_counted() -> None:
    assert SMALL.needed_bytes == 12288

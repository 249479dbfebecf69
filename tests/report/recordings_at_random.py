"""Traces that parse, and make no sense: what a report has to bear."""

from hypothesis import strategies as st

from lazyfs.checkpoint.trace import (
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
)

SIZES = (0, 4096, 100_000, 1 << 40)
MOMENTS = st.one_of(
    st.integers(0, 5000).map(float), st.floats(0, 1e12, allow_nan=False, allow_infinity=False)
)
NAMES = st.one_of(
    st.sampled_from(["mounted", "restore started", "restored", "until", "criu: fork", "lazyfs: x"]),
    st.text(max_size=20),
)
KINDS = st.sampled_from(["fault", "read", "</script><b>"])
LANES = st.sampled_from(["demand", "readahead", "completion", "index", "<img src=x>"])


@st.composite
def _ranges(draw: st.DrawFn, counts: int) -> tuple[int, int, int]:
    file = draw(st.integers(0, counts - 1))
    start = draw(st.integers(0, SIZES[file]))
    return file, start, draw(st.integers(0, SIZES[file] - start))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    ranges = _ranges(len(SIZES))
    recording = Recording(
        reference=draw(st.text(max_size=40)),
        began_at_s=draw(st.floats(-1e300, 1e300)),
        length_ms=draw(MOMENTS),
        way=draw(st.text(max_size=20)),
        reads=[
            Read(*each, began_ms, ended_ms, kind, waited)
            for each, began_ms, ended_ms, kind, waited in draw(
                st.lists(st.tuples(ranges, MOMENTS, MOMENTS, KINDS, st.booleans()), max_size=12)
            )
        ],
        fetches=[
            Fetch(layer, start, start + size, *moments, why, attempts)
            for layer, start, size, moments, why, attempts in draw(
                st.lists(
                    st.tuples(
                        st.integers(0, 1),
                        st.integers(0, 1 << 50),
                        st.integers(0, 1 << 40),
                        st.tuples(MOMENTS, MOMENTS, MOMENTS),
                        LANES,
                        st.integers(0, 3),
                    ),
                    max_size=12,
                )
            )
        ],
        arrivals=[
            Arrival(*each, at_ms)
            for each, at_ms in draw(st.lists(st.tuples(ranges, MOMENTS), max_size=12))
        ],
        phases=[
            Phase(*each) for each in draw(st.lists(st.tuples(NAMES, MOMENTS, MOMENTS), max_size=6))
        ],
        marks=[Mark(*each) for each in draw(st.lists(st.tuples(NAMES, MOMENTS), max_size=6))],
        dropped=draw(st.integers(0, 2)),
    )
    return Trace(
        workload=draw(st.text(max_size=10)),
        until=draw(st.text(max_size=10)),
        layers=[TracedLayer("sha256:" + "0" * 64, 1 << 30), TracedLayer("", 0)],
        files=[TracedFile(f"a/{number}", number % 2, size) for number, size in enumerate(SIZES)],
        needs=[
            Need(*each, at_ms)
            for each, at_ms in draw(st.lists(st.tuples(ranges, MOMENTS), max_size=12))
        ],
        recording=draw(st.sampled_from([recording, None])),
    )

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.trace import Need, TracedFile, TracedLayer, dump_trace, parse_trace
from lazyfs.ground.journal import EVENTS_MOST, ArrivalNote, FetchNote, Journal, ReadNote, Steps
from lazyfs.recording import About, Layout, Located, Wanted, needs_of, trace_of

PAGE = 4096


def wanted(*pages: tuple[int, float], file: int = 0) -> list[Wanted]:
    return [Wanted(file, number * PAGE, PAGE, at_ms) for number, at_ms in pages]


reads = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(0, 12), st.floats(0, 9)),
    max_size=30,
)


@given(reads)
def test_needs_cover_exactly_what_was_wanted_each_byte_once_in_order(
    steps: list[tuple[int, int, int, float]],
) -> None:
    now_ms, items = 0.0, []
    for file, start, size_bytes, pause_ms in steps:
        now_ms += pause_ms
        items.append(Wanted(file, start, size_bytes, now_ms))
    needs, too_many = needs_of(items)
    assert too_many == 0
    first: dict[tuple[int, int], float] = {}
    for item in items:
        for byte in range(item.offset, item.offset + item.size_bytes):
            first.setdefault((item.file, byte), item.at_ms)
    seen: dict[tuple[int, int], float] = {}
    for need in needs:
        assert need.size_bytes > 0
        for byte in range(need.offset, need.offset + need.size_bytes):
            assert (need.file, byte) not in seen
            seen[need.file, byte] = need.at_ms
    assert seen.keys() == first.keys()
    for key, at_ms in seen.items():
        assert first[key] - 5 <= at_ms <= first[key]
    assert [need.at_ms for need in needs] == sorted(need.at_ms for need in needs)


def test_neighbours_that_are_wanted_at_once_are_one() -> None:
    needs, _ = needs_of(wanted((3, 1), (4, 2), (2, 3), (9, 4), (5, 5)))
    assert needs == [Need(0, 2 * PAGE, 4 * PAGE, 1), Need(0, 9 * PAGE, PAGE, 4)]


def test_what_closes_a_gap_makes_one_of_three() -> None:
    needs, _ = needs_of(wanted((1, 1), (7, 1), (3, 2), (2, 3)))
    assert needs == [Need(0, PAGE, 3 * PAGE, 1), Need(0, 7 * PAGE, PAGE, 1)]


def test_a_neighbour_that_is_wanted_later_is_a_need_of_its_own() -> None:
    needs, _ = needs_of(wanted((3, 1), (4, 7)))
    assert [need.size_bytes for need in needs] == [PAGE, PAGE]


def test_files_are_apart() -> None:
    needs, _ = needs_of([*wanted((3, 1)), *wanted((4, 1), file=1)])
    assert len(needs) == 2


def test_where_there_are_too_many_more_are_made_one_and_then_the_last_left_out() -> None:
    slowly = [(number, 100.0 * number) for number in range(20)]
    assert needs_of(wanted(*slowly), most=1) == ([Need(0, 0, 20 * PAGE, 0.0)], 0)
    apart = [(2 * number, float(number)) for number in range(20)]
    needs, too_many = needs_of(wanted(*apart), most=5)
    assert (len(needs), too_many) == (5, 15)
    assert needs[-1].offset == 8 * PAGE


LAYOUT = Layout(
    [TracedLayer("sha256:0", 1000), TracedLayer("", 50)],
    {"layer 0": 0, "layer 1": 1},
    {
        "a/pages-1.img": Located(0, 4096, 3 * PAGE),
        "a/pages-2.img": Located(0, 4096 + 3 * PAGE, 100),
        "a/link": Located(0, 4096, 3 * PAGE),
        "b": Located(1, 0, 10),
        "empty": Located(0, 4096, 0),
    },
)


def noted() -> Journal:
    journal = Journal()
    journal.mark("began", 100.0)
    journal.mark("opening", 100.25)
    journal.mark("resolved", 100.5)
    journal.note_read(ReadNote("a/pages-2.img", 0, PAGE, 101.0, 101.5, is_fault=False, waited=True))
    journal.note_read(
        ReadNote("a/pages-1.img", PAGE, PAGE, 100.9, 101.6, is_fault=True, waited=False)
    )
    journal.note_read(ReadNote("gone", 0, PAGE, 101.0, 101.5, is_fault=False, waited=True))
    journal.note_read(ReadNote("b", 0, 10, 109.0, 109.5, is_fault=False, waited=True))
    journal.note_fetch(FetchNote("layer 0", 5, 50, 101.0, 101.1, 101.2, "demand", 2))
    journal.note_fetch(FetchNote("the index of something", 5, 50, 101.0, 101.1, 101.2, "", 2))
    journal.note_arrival(ArrivalNote("layer 0", 0, 4096 + 3 * PAGE + 60, 101.2))
    journal.note_arrival(ArrivalNote("layer 1", 2, 10, 101.3))
    journal.note_arrival(ArrivalNote("elsewhere", 2, 10, 101.3))
    return journal


def test_a_trace_is_made_of_what_was_noted() -> None:
    about = About(workload="w", until="2 s", began_s=100.0, ended_s=102.0, figures={"requests": 3})
    trace = trace_of(noted(), LAYOUT, about)
    assert parse_trace(dump_trace(trace), "it") == trace
    assert trace.files == [
        TracedFile("a/pages-1.img", 0, 3 * PAGE),
        TracedFile("a/pages-2.img", 0, 100),
        TracedFile("b", 1, 10),
    ]
    assert trace.needs == [Need(0, PAGE, PAGE, 900.0), Need(1, 0, 100, 1000.0)]
    assert (trace.workload, trace.until, trace.layers[0].digest) == ("w", "2 s", "sha256:0")
    recording = trace.recording
    assert recording is not None
    assert [(read.file, read.kind, read.waited) for read in recording.reads] == [
        (0, "fault", False),
        (1, "read", True),
    ]
    assert [(each.file, each.offset, each.size_bytes) for each in recording.arrivals] == [
        (0, 0, 3 * PAGE),
        (1, 0, 60),
        (2, 2, 8),
    ]
    (fetch,) = recording.fetches
    assert (fetch.layer, fetch.first_ms, fetch.attempts) == (0, 1100.0, 2)
    assert [(phase.name, phase.ended_ms) for phase in recording.phases] == [
        ("lazyfs: start", 250.0),
        ("lazyfs: find the image", 500.0),
    ]
    assert recording.dropped == 1
    assert recording.length_ms == 2000.0


def test_a_hint_names_no_file_that_only_came() -> None:
    trace = trace_of(noted(), LAYOUT, About(began_s=100.0, ended_s=102.0))
    assert [file.path for file in trace.hint().files] == ["a/pages-1.img", "a/pages-2.img"]


def test_a_journal_holds_so_much_and_counts_the_rest() -> None:
    journal = Journal()
    note = ReadNote("a", 0, 1, 0.0, 0.0, is_fault=False, waited=False)
    for _ in range(EVENTS_MOST + 3):
        journal.note_read(note)
    assert (len(journal.reads), journal.dropped) == (EVENTS_MOST, 3)
    journal.end()
    journal.mark("late", 1.0)
    assert (journal.marks, journal.dropped) == ([], 3)


def test_a_stream_is_noted_in_steps() -> None:
    journal = Journal()
    steps = Steps(journal, "layer 0")
    for position in (10, 300_000, 300_100, 600_000, 600_050):
        steps.up_to(position)
    steps.up_to(600_050, at_least_bytes=1)
    steps.up_to(600_050, at_least_bytes=1)
    spans = [(note.start, note.stop) for note in journal.arrivals]
    assert spans == [(0, 300_000), (300_000, 600_000), (600_000, 600_050)]


def test_what_a_person_gave_need_not_be_utf_8() -> None:
    about = About(reference="oci:/caf\udce9", workload="\udcff", until="\udcff" * 5000)
    trace = trace_of(noted(), LAYOUT, about)
    assert parse_trace(dump_trace(trace), "it") == trace
    assert trace.recording is not None
    assert trace.recording.reference == "oci:/caf\\xe9"

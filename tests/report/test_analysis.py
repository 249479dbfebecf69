from hypothesis import HealthCheck, given, settings
from pytest import approx

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
    dump_trace,
    parse_trace,
)
from lazyfs.report.analysis import analyse, phases_by
from lazyfs.report.waits import Wait
from tests.report.recordings import lazy_restore
from tests.report.recordings_at_random import traces

KIB = 1024
LAYERS = [TracedLayer("sha256:" + "ab" * 32, 1000 * KIB)]
FILES = [TracedFile("checkpoint/pages-1.img", 0, 900 * KIB)]


def trace(**recording: object) -> Trace:
    return Trace(layers=LAYERS, files=FILES, recording=Recording(**recording))  # type: ignore[arg-type]


def only_wait(**recording: object) -> Wait:
    (wait,) = analyse(trace(**recording)).waits
    return wait


@given(traces())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_whatever_parses_adds_up(given_trace: Trace) -> None:
    found = analyse(parse_trace(dump_trace(given_trace), "it"))
    budget = found.budget
    assert min(budget.start_ms, budget.criu_ms, budget.waiting_ms, budget.rest_ms) >= 0
    assert budget.all_ms == approx(found.end_ms, rel=1e-6, abs=1e-3)
    assert found.end_ms <= found.length_ms
    for wait in found.waits:
        assert min(wait.causes) >= 0
        assert wait.causes.all_ms == approx(wait.waited_ms, rel=1e-6, abs=1e-3)
        assert wait.behind_bytes >= 0
    for file in found.files:
        assert 0 <= file.late_bytes <= file.needed_bytes <= file.size_bytes
        assert file.needed_bytes + file.spare_bytes <= file.size_bytes
        assert file.arrived_bytes <= file.size_bytes
        assert all(fate.start < fate.stop for fate in file.fates)
    whole = found.fetched_in_all_bytes
    assert found.fetched_bytes <= whole + 1e-6 * whole + 1
    assert all(span.length_ms > 0 for span in (*found.waiting, *found.stalls))
    assert found.receiving_ms <= found.end_ms + 1e-3


def test_each_moment_until_the_end_mark_is_spent_on_one_thing() -> None:
    found = analyse(
        trace(
            length_ms=900.0,
            reads=[
                Read(0, 0, KIB, 90.0, 120.0, "read", True),
                Read(0, KIB, KIB, 250.0, 300.0, "fault", True),
                Read(0, KIB, KIB, 280.0, 310.0, "fault", True),
                Read(0, KIB, KIB, 400.0, 401.0, "fault", False),
            ],
            marks=[
                Mark("mounted", 100.0),
                Mark("restore started", 150.0),
                Mark("restored", 260.0),
                Mark("until", 500.0),
            ],
        )
    )
    budget = found.budget
    assert (budget.start_ms, budget.waiting_ms) == (100.0, 20.0 + 60.0)
    assert budget.criu_ms == 100.0
    assert budget.rest_ms == approx(500.0 - 100.0 - 80.0 - 100.0)
    assert found.has_end
    assert (found.read_count, found.fault_count) == (1, 3)


def test_without_marks_the_phases_tell_and_the_recording_ends_it() -> None:
    found = analyse(
        trace(
            length_ms=300.0,
            phases=[
                Phase("lazyfs: mount", 0.0, 50.0),
                Phase("criu: fork", 60.0, 80.0),
                Phase("until the first answer", 80.0, 300.0),
            ],
        )
    )
    assert not found.has_end
    assert (found.end_ms, found.budget.start_ms, found.budget.criu_ms) == (300.0, 50.0, 20.0)


def test_what_was_needed_when_is_told_by_the_reads_where_there_are_any() -> None:
    """Needs that touch were made one: it begins when the first of them did."""
    one = Trace(
        layers=LAYERS,
        files=FILES,
        needs=[Need(0, 0, 8 * KIB, 10.0)],
        recording=Recording(
            reads=[
                Read(0, 0, 4 * KIB, 10.0, 12.0, "fault", True),
                Read(0, 4 * KIB, 4 * KIB, 14.0, 15.0, "fault", False),
            ],
            arrivals=[Arrival(0, 0, 8 * KIB, 12.0)],
        ),
    )
    (file,) = analyse(one).files
    assert (file.needed_bytes, file.late_bytes) == (8 * KIB, 4 * KIB)
    hinted = analyse(one.hint())
    assert (hinted.needed_bytes, hinted.has_recording) == (8 * KIB, False)


def test_what_came_after_a_fault_that_did_not_wait_was_not_needed_by_it() -> None:
    """A fault is noted with its window, of which it takes what is there."""
    found = analyse(
        trace(
            reads=[
                Read(0, 0, 16 * KIB, 20.0, 21.0, "fault", False),
                Read(0, 12 * KIB, 4 * KIB, 30.0, 50.0, "fault", True),
            ],
            arrivals=[Arrival(0, 0, 4 * KIB, 10.0), Arrival(0, 8 * KIB, 20 * KIB, 45.0)],
            length_ms=50.0,
        )
    )
    (file,) = found.files
    needed = [(fate.start, fate.stop, fate.needed_ms) for fate in file.fates if fate.needed_ms]
    assert needed == [(0, 4096, 20.0), (4096, 8192, 20.0), (12 * KIB, 16 * KIB, 30.0)]
    assert file.late_bytes == 4 * KIB


def test_bytes_that_came_before_the_end_and_were_not_needed_are_spare() -> None:
    found = analyse(
        trace(
            reads=[Read(0, 0, 10 * KIB, 20.0, 21.0, "read", False)],
            arrivals=[Arrival(0, 0, 30 * KIB, 10.0), Arrival(0, 100 * KIB, 50 * KIB, 90.0)],
            marks=[Mark("until", 50.0)],
        )
    )
    (file,) = found.files
    assert (file.needed_bytes, file.late_bytes, file.spare_bytes) == (10 * KIB, 0, 20 * KIB)
    assert (file.arrived_bytes, found.arrived_bytes) == (80 * KIB, 30 * KIB)


def test_a_fetch_that_was_begun_for_a_read_explains_all_of_its_wait() -> None:
    wait = only_wait(
        reads=[Read(0, 0, KIB, 100.0, 150.0, "fault", True)],
        fetches=[
            Fetch(0, 900 * KIB, 901 * KIB, 50.0, 60.0, 61.0, "readahead", 1),
            Fetch(0, 0, 64 * KIB, 103.0, 113.0, 140.0, "demand", 1),
        ],
        arrivals=[Arrival(0, 0, 64 * KIB, 144.0)],
    )
    assert wait.asked
    assert wait.fetch is not None
    assert wait.fetch.why == "demand"
    assert wait.causes == approx((3.0, 0.0, 10.0, 27.0, 4.0, 6.0, 0.0))


def test_an_answer_that_comes_behind_others_is_told_from_a_round_trip() -> None:
    wait = only_wait(
        reads=[Read(0, 0, KIB, 100.0, 200.0, "fault", True)],
        fetches=[
            Fetch(0, 100 * KIB, 800 * KIB, 90.0, 100.0, 190.0, "readahead", 1),
            Fetch(0, 0, 8 * KIB, 100.0, 190.0, 200.0, "demand", 1),
        ],
        arrivals=[Arrival(0, 0, 8 * KIB, 200.0)],
    )
    assert (wait.causes.behind_ms, wait.causes.first_byte_ms) == approx((80.0, 10.0))
    assert wait.behind_bytes == approx(700 * KIB, rel=0.01)


def test_a_slow_answer_on_an_idle_link_is_a_round_trip() -> None:
    wait = only_wait(
        reads=[Read(0, 0, KIB, 100.0, 200.0, "fault", True)],
        fetches=[
            Fetch(0, 100 * KIB, 800 * KIB, 0.0, 10.0, 90.0, "readahead", 1),
            Fetch(0, 0, 8 * KIB, 100.0, 190.0, 200.0, "demand", 2),
        ],
        arrivals=[Arrival(0, 0, 8 * KIB, 200.0)],
    )
    assert (wait.causes.behind_ms, wait.causes.first_byte_ms) == (0.0, 90.0)


def test_what_was_on_its_way_already_was_not_asked_for() -> None:
    wait = only_wait(
        reads=[Read(0, 0, KIB, 100.0, 131.0, "read", True)],
        fetches=[Fetch(0, 0, 640 * KIB, 80.0, 90.0, 128.0, "readahead", 1)],
        arrivals=[Arrival(0, 0, 640 * KIB, 130.0)],
    )
    assert not wait.asked
    assert wait.causes == approx((0.0, 0.0, 0.0, 28.0, 2.0, 1.0, 0.0))


def test_a_wait_that_no_fetch_explains_is_unknown() -> None:
    wait = only_wait(reads=[Read(0, 0, KIB, 100.0, 131.0, "read", True)])
    assert (wait.fetch, wait.causes.unknown_ms) == (None, 31.0)
    wait = only_wait(
        reads=[Read(0, 0, KIB, 100.0, 131.0, "read", True)],
        arrivals=[Arrival(0, 0, KIB, 130.0)],
    )
    assert (wait.fetch, wait.causes.unknown_ms, wait.causes.answering_ms) == (None, 30.0, 1.0)


def test_a_stall_is_when_somebody_waits_and_nothing_comes() -> None:
    found = analyse(
        trace(
            reads=[Read(0, 0, KIB, 100.0, 200.0, "read", True)],
            fetches=[Fetch(0, 0, KIB, 100.0, 140.0, 150.0, "demand", 1)],
        )
    )
    assert [tuple(stall) for stall in found.stalls] == [(100.0, 140.0), (150.0, 200.0)]
    assert found.receiving_ms == 10.0


def test_criu_s_log_is_laid_where_the_mount_was_asked_for_the_inventory() -> None:
    log = b"(0.000000) Version: 4.1.1\n(0.010000) Forking task with 7 pid\n(0.030000) x\n"
    files = [TracedFile("checkpoint/inventory.img", 0, 90)]
    mount = Trace(
        layers=LAYERS,
        files=files,
        recording=Recording(reads=[Read(0, 0, 90, 400.0, 401.0, "read", False)]),
    )
    phases = phases_by(log, mount)
    assert [(phase.name, phase.began_ms) for phase in phases] == [
        ("criu: look at the kernel", 400.0),
        ("criu: fork", 410.0),
    ]
    assert analyse(mount, phases).budget.criu_ms == approx(30.0)
    assert phases_by(b"nothing of the kind", mount) == []
    told = Recording(phases=[Phase("criu: fork", 0.0, 1.0)])
    assert len(analyse(Trace(recording=told), phases).phases) == 1


def test_a_restore_of_a_gigabyte_is_analysed() -> None:
    found = analyse(lazy_restore(1024))
    assert found.needed_bytes > 40 << 20
    assert found.waits
    assert found.causes.unknown_ms == 0
    assert found.budget.all_ms == approx(found.end_ms)

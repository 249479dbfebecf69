import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.criu_phases import length_ms, phases_of

LOG = """(00.000000) CRIU run id = c768e5e6
(00.000068) Version: 4.1.1 (gitid 0)
(00.026809) Reading image tree
(00.028716) Forking task with 2900 pid (flags 0x8000)
(00.030175)   2900: Restoring namespaces 2900 flags 0x8000
(00.030190)   2900: Preparing info about shared resources
(00.031030)   2900: vma 0x400000 0x401000
(00.031034)   2900: vma 0x401000 0x485000
(00.080410)   2900: nr_restored_pages: 6161
(00.084345)   2900: Forking task with 2901 pid (flags 0x0)
(00.189745)   2901: nr_restored_pages: 5541
(00.262138)   2900: Restoring resources
(00.262181)   2900: Opening fdinfo-s
(00.262385)   2901: Restoring resources
(00.290129)   2901: Restore via sigreturn
(00.290659) pie: 2901: Switched to the restorer 2901
(00.292328) net: Unlock network
(00.298299) Restore finished successfully. Tasks resumed.
(00.298301) Writing stats
"""
"""Lines of a real one, of three processes."""


def test_phases_follow_each_other_without_a_gap() -> None:
    phases = phases_of(LOG)
    assert [phase.name.removeprefix("criu: ") for phase in phases] == [
        "look at the kernel",
        "read the images",
        "fork",
        "namespaces",
        "what tasks share",
        "map memory",
        "children",
        "resources",
        "files",
        "memory into its place",
        "resume",
    ]
    assert phases[0].began_ms == 0
    ends = [phase.ended_ms for phase in phases]
    assert [phase.began_ms for phase in phases[1:]] == ends[:-1]
    assert (phases[5].began_ms, phases[5].ended_ms, ends[-1]) == (31.03, 80.41, 298.299)


def test_they_are_told_by_the_clock_of_who_asks() -> None:
    assert [phase.began_ms for phase in phases_of(LOG, 1000.0)[:2]] == [1000.0, 1026.809]
    assert length_ms(LOG) == pytest.approx(298.301)


def test_a_log_that_ends_early_ends_its_last_phase() -> None:
    failed = LOG.partition("(00.292328)")[0] + "(06.794361) Error (criu/cr-restore.c:1258): 5\n"
    last = phases_of(failed)[-1]
    assert (last.name, last.ended_ms) == ("criu: memory into its place", 6794.361)


def test_from_a_hundred_seconds_on_a_digit_is_missing() -> None:
    assert length_ms("(100.12345) Reading image tree\n") == pytest.approx(100_123.45)


def test_something_else_has_no_phases() -> None:
    assert phases_of("hello\n(x) Reading image tree\n Reading image tree\n") == []
    assert length_ms("") == 0


@given(st.lists(st.sampled_from(LOG.splitlines()), max_size=30), st.text(max_size=40))
def test_whatever_the_lines_phases_are_in_order(lines: list[str], junk: str) -> None:
    phases = phases_of("\n".join([*lines, junk]))
    moments = [moment for phase in phases for moment in (phase.began_ms, phase.ended_ms)]
    assert moments == sorted(moments)
    assert len({phase.name for phase in phases}) == len(phases)

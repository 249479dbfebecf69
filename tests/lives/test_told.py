"""The state of mounts: kept, bounded, as metrics, and in words for a person."""

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lazyfs.activity import Activity
from lazyfs.asking import Known
from lazyfs.cli import status_text
from lazyfs.ground.counters import Counters
from lazyfs.metrics import exposition
from lazyfs.status import bounded

GIB = 1 << 30
_ASKED_FOR = "the digest asked for"
REFERENCE = "registry.example/checkpoints/web@sha256:" + "19d1" * 16


def told(**more: Any) -> dict[str, Any]:
    layer = {"digest": "sha256:" + "ab" * 32, "format": "tar", "proof": "layer"}
    return {
        "reference": REFERENCE,
        "directory": "/mnt/web",
        "view": "criu",
        "pid": 4711,
        "version": "1.0",
        "mounted_at": "2026-01-02T03:04:05+00:00",
        "state": "serving",
        "layer_format": "tar",
        "layer_bytes": GIB,
        "content_bytes": GIB,
        "here_bytes": GIB // 4,
        "proven_bytes": 0,
        "safe_offline": False,
        "safe_unmount": False,
        "open_files": 2,
        "open_directories": 1,
        "reads_waiting": 0,
        "longest_wait_s": 0.0,
        "reading": [],
        "fetches": [],
        "places": [],
        "completion": None,
        "failed": None,
        "last_error": None,
        "last_error_at": None,
        "layers": [{**layer, "blob_proven": False}],
        "trust": [{"what": "manifest", "proven_by": _ASKED_FOR, "when": "before it is parsed"}],
        **Counters().snapshot(),
        "warnings": [],
        **more,
    }


LAZILY = {
    "state": "transferring",
    "failed": None,
    "failures": 2,
    "last_failure": "no more",
    "restores": 3,
    "tasks": 1,
    "missing_bytes": GIB // 2,
    "faults": 40,
    "faults_fetched": 7,
    "faults_zero": 1,
    "bytes_faulted": 5,
    "bytes_background": 6,
}


def known(number: int = 0, state: Any = "serving", **more: Any) -> Known:
    if state in ("dead", "stuck", "silent"):
        return Known(f"/mnt/{number}", REFERENCE, state, {})
    return Known(f"/mnt/{number}", REFERENCE, state, told(**more))


def text_of(mount: Known) -> str:
    return "\n".join(f"{fact.label}: {fact.text}" for fact in status_text.facts(mount))


# -- what goes on -------------------------------------------------------------------------------


def test_reads_under_way_are_told_oldest_first() -> None:
    activity = Activity()
    activity.opened(1, "pages-1.img", 77)
    numbers = [activity.read_begins(1, at, 10) for at in range(40)]
    assert activity.reads_waiting == 40
    assert [each.offset for each in activity.reading()] == list(range(32))
    assert activity.longest_wait_s >= 0
    activity.released(1)
    activity.read_ends(numbers[0])
    first = next(activity.reading())
    assert (first.path, first.opened_by_pid, first.offset) == ("", 0, 1)
    for number in numbers[1:]:
        activity.read_ends(number)
    assert list(activity.reading()) == []
    assert activity.longest_wait_s == 0


def test_who_holds_what() -> None:
    activity = Activity()
    assert activity.is_unused
    activity.opened(1, "a", 1)
    activity.opened(2, "a", 1)
    assert (activity.open_files, activity.is_unused) == (2, False)
    activity.released(1)
    activity.released(2)
    activity.open_directories += 1
    assert not activity.is_unused


# -- as JSON and metrics ------------------------------------------------------------------------


def test_it_fits_into_an_attribute() -> None:
    many = told(warnings=["w" * 500] * 200, layers=[{"digest": "d" * 300}] * 64, fetches=["f"] * 9)
    text = bounded(many, 65536)
    assert len(text) <= 65536
    shown = json.loads(text)
    assert set(shown) == set(many)
    assert shown["here_bytes"] == GIB // 4
    assert 0 < len(shown["warnings"]) <= 200
    assert json.loads(bounded(told(), 65536)) == told()


def test_metrics_follow_prometheus_conventions() -> None:
    places = [{"name": "m.example", "failures": 3, "lied": False}]
    text = exposition(told(requests=5, places=places, content_bytes=None)).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {each.name: each.value for family in families.values() for each in family.samples}
    assert values["lazyfs_source_requests_total"] == 5
    assert values["lazyfs_here_bytes"] == GIB // 4
    assert "lazyfs_content_bytes" not in values, "not known yet"
    assert values["lazyfs_place_failures"] == 3
    assert families["lazyfs_mount_info"].samples[0].labels["reference"] == REFERENCE
    assert values["lazyfs_mounted_timestamp_seconds"] == 1767323045
    for name, family in families.items():
        assert family.documentation, name
        for sample in family.samples:
            assert len(sample.labels) <= 5
            if family.type == "counter":
                assert sample.name.endswith("_total")


def test_every_counter_is_a_metric() -> None:
    text = exposition(told()).decode()
    assert text.count("_total ") >= len(Counters().snapshot())


def test_lazy_pages_are_metrics_where_there_are_any() -> None:
    assert "lazyfs_lazy" not in exposition(told(lazy_pages=None)).decode()
    text = exposition(told(lazy_pages=LAZILY)).decode()
    values = {
        each.name: each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }
    assert values["lazyfs_lazy_missing_bytes"] == GIB // 2
    assert values["lazyfs_lazy_restores_failed_total"] == 2
    assert values["lazyfs_lazy_faults_fetched_total"] == 7


# -- for people ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_line_a_mount_without_a_terminal(count: int) -> None:
    lines = list(status_text.plain([known(number) for number in range(count)]))
    assert len(lines) == count
    for line in lines:
        assert line.split("\t")[1:] == ["serving", f"{GIB // 4}", f"{GIB}", "-", "3", REFERENCE]


@pytest.mark.parametrize("count", [1, 50])
def test_a_table_fits_80_columns(
    count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    everything = [known(number) for number in range(count)]
    status_text.print_list([*everything, known(99, "dead"), known(98, "stuck")])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[1 : count + 1]] == [f"/mnt/{n}" for n in range(count)]
    assert "/mnt/99: its daemon has ended; mount again, or clear it away:" in " ".join(lines)


def test_all_about_one() -> None:
    mount = known(
        reading=[{"path": "p", "offset": 4096, "size_bytes": 4096, "waits_s": 2.25}],
        reads_waiting=3,
        fetches=[
            {
                "blob": "b",
                "byte_range": {"start": 1, "stop": 9},
                "place": "m.example",
                "attempts": 2,
                "since_s": 3.0,
                "silent_s": 1.0,
                "last_error": "reset",
            }
        ],
        places=[
            {"name": "m.example", "failures": 1, "last_error": "gone", "resting": True},
            {"name": "r.example", "failures": 0, "lied": True, "first_byte_ms": 7.5},
        ],
        completion={"state": "running", "done_bytes": 1, "all_bytes": 2},
        last_error="read answered with an error: gone",
        last_error_at="2026-01-02T03:04:06+00:00",
        failed_reads=1,
        warnings=["the kernel is older"],
        cache_write_errors=4,
    )
    text = text_of(mount)
    for line in (
        "Here: 256 MiB of 1.0 GiB (25%), 0 B of it proven",
        "Layer: sha256:abababababab… as tar, not proven yet",
        "Proof of manifest: the digest asked for; before it is parsed",
        "Unmount: busy: 2 files and 1 directory held open",
        "Waiting: p: 4.0 KiB at 4096, for 2.2 s",
        "Waiting: and 2 more reads",
        "Fetching: b, bytes 1 to 9 from m.example, for 3.0 s, silent for 1.0 s, 2 attempts; reset",
        "Place: m.example, rests: others are asked first, 1 attempt failed, the last: gone",
        "Place: r.example, answers after 7.5 ms, gave wrong bytes: it is asked no more",
        "Completing: 50% done",
        "Failed: 1 read answered with an error",
        "Last error: read answered with an error: gone (2026-01-02T03:04:06+00:00)",
        "May not restore: the kernel is older",
        "Cache: 4 chunks were not kept: no room, or its disk refused",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("state", ["dead", "stuck", "silent"])
def test_one_of_which_little_is_known(state: str) -> None:
    lines = text_of(known(7, state)).splitlines()
    assert lines[0] == "Mount: /mnt/7"
    assert lines[1].startswith(f"State: {state}: ")
    assert len(lines) == 3


def test_a_daemon_that_lies_hurts_no_terminal() -> None:
    """Another user's, or another version's: whatever it tells is shown or left out."""
    wrong = {"layers": [1, {}], "reading": [{}], "places": {}}
    nasty = dict.fromkeys(told(), "\x1b[2J") | wrong
    for lie in (nasty, dict.fromkeys(told()), {"layers": {"a": 1}}, told(content_bytes=0)):
        mount = Known("/mnt/\x1b", "r\n", "serving", lie)
        assert "\x1b" not in text_of(mount)
        assert len(list(status_text.plain([mount]))) == 1
        status_text.print_list([mount])
        status_text.print_detail(mount)


def test_how_it_is_with_the_memory_of_those_who_are_restored() -> None:
    assert "Memory" not in text_of(known(lazy_pages=None))
    text = text_of(known(lazy_pages=LAZILY))
    assert "Memory: transferring, 1 task without 512 MiB; 40 faults, 7 of them for" in text
    assert "Memory: 2 restores failed, the last one: no more" in text

"""`lazyfs restore --record` with real CRIU: what a workload touched, and little beside."""

import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed import Testbed
from testbed.process import wait_until

from lazyfs.checkpoint.trace import Trace, parse_trace
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.lazily import lazily, restored, served, wait_home
from tests.real.mounts import lazyfs
from tests.real.restoring import Restorer, alive

pytestmark = [pytest.mark.real, pytest.mark.timeout(180), pytest.mark.usefixtures("adopting")]

MIB = 1 << 20
SIZE_MIB = 64
PERCENT = 10


both = pytest.mark.parametrize("dumped", ["regions", "scattered"], indirect=True)
regions = pytest.mark.parametrize("dumped", ["regions"], indirect=True)
scattered = pytest.mark.parametrize("dumped", ["scattered"], indirect=True)


@pytest.fixture(scope="module")
def dumped(testbed: Testbed, shelf: Path, request: pytest.FixtureRequest) -> Checkpoint:
    options = {"size_mib": SIZE_MIB, "percent": PERCENT, "interval_ms": 20}
    return checkpoint(testbed, shelf / request.param, pattern=request.param, **options)


@pytest.fixture
def restorer(testbed: Testbed, work: Path, dumped: Checkpoint) -> Iterator[Restorer]:
    dumped.rewind()
    restorer = Restorer(testbed, work)
    yield restorer
    restorer.assert_nothing_is_left()


def read_trace(file: Path) -> Trace:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    return parse_trace(file.read_bytes(), "it")


def pages_needed(trace: Trace) -> int:
    return sum(need.size_bytes for need in trace.needs if "pages-" in trace.files[need.file].path)


def faults(trace: Trace) -> int:
    assert trace.recording is not None
    return sum(read.kind == "fault" for read in trace.recording.reads)


def assert_is_working_set(trace: Trace) -> None:
    needed = pages_needed(trace)
    assert PERCENT * SIZE_MIB * MIB // 100 <= needed <= 3 * PERCENT * SIZE_MIB * MIB // 100


def loops_more(dumped: Checkpoint, count: int) -> str:
    """Return a command that succeeds once the workload has done so many loops."""
    before = len(dumped.status.events("loop"))
    return f"exec:sh -c 'test $(grep -c ^loop {dumped.status.path}) -ge {before + count}'"


@both
def test_a_restore_tells_what_was_needed_until_a_command_succeeds(
    dumped: Checkpoint, restorer: Restorer
) -> None:
    file = restorer.work / "a.trace"
    started_s = time.time()
    until = loops_more(dumped, 2)
    ended = restorer.run(
        str(dumped.layer), "--json", "--record", file, "--until", until, "--work-dir", "criu"
    )
    assert (ended.code, ended.err) == (0, ""), ended
    with alive(ended.told["pid"], dumped, started_s) as process:
        dumped.before.assert_goes_on(process)
    trace = read_trace(file)
    assert ended.told["trace"] == {
        "file": str(file),
        "until": "sh succeeded",
        "needed_bytes": trace.needed_bytes,
        "error": None,
    }
    assert_is_working_set(trace)
    recording = trace.recording
    assert recording is not None
    assert (recording.way, recording.dropped) == ("lazy pages", 0)
    at_ms = {mark.name: mark.at_ms for mark in recording.marks}
    assert at_ms["mounted"] <= at_ms["restore started"] <= at_ms["restored"] <= at_ms["until"]
    assert at_ms["until"] == recording.length_ms
    phases = {phase.name: phase for phase in recording.phases}
    assert "criu: map memory" in phases
    for name, phase in phases.items():
        if name.startswith("criu: "):
            assert at_ms["restore started"] <= phase.began_ms <= phase.ended_ms
            assert phase.ended_ms <= at_ms["restored"] + 50
    faults = [read for read in recording.reads if read.kind == "fault"]
    assert len(faults) >= 16
    assert {"checkpoint/inventory.img", "checkpoint/pstree.img"} <= {
        trace.files[read.file].path for read in recording.reads if read.kind == "read"
    }


@regions
@pytest.mark.parametrize("lazy", [(), ("--lazy-pages",)], ids=["eager", "lazy pages"])
def test_a_restore_as_usual_tells_what_went_on_and_is_no_hint(
    dumped: Checkpoint, restorer: Restorer, lazy: tuple[str, ...]
) -> None:
    file = restorer.work / "a.trace"
    started_s = time.time()
    options = ("--json", "--as-usual", "--record", file, "--until", loops_more(dumped, 1))
    ended = restorer.run(str(dumped.layer), *lazy, *options)
    assert (ended.code, ended.err) == (0, ""), ended
    with alive(ended.told["pid"], dumped, started_s) as process:
        dumped.before.assert_goes_on(process)
    trace = read_trace(file)
    assert trace.is_partial
    recording = trace.recording
    assert recording is not None
    assert recording.way == (lazy[0][2:].replace("-", " ") if lazy else "eager")
    if not lazy:
        assert pages_needed(trace) >= SIZE_MIB * MIB
    came_bytes = sum(arrival.size_bytes for arrival in recording.arrivals)
    assert came_bytes >= pages_needed(trace)


@regions
def test_what_was_recorded_is_what_the_next_restore_does_not_wait_for(
    store: Store, dumped: Checkpoint, restorer: Restorer
) -> None:
    reference = f"{store.address}/{store.push('recorded', dumped)}"

    def restore(file: Path, *options: str) -> Trace:
        dumped.rewind()
        started_s = time.time()
        recording = ("--record", file, "--until", loops_more(dumped, 1))
        ended = restorer.run(reference, "--json", "--cache=memory", *recording, *options)
        assert (ended.code, ended.err) == (0, ""), ended
        with alive(ended.told["pid"], dumped, started_s) as process:
            dumped.before.assert_goes_on(process)
        return read_trace(file)

    first = restore(restorer.work / "first.trace")
    assert first.layers[0].digest.startswith("sha256:")
    pushed = lazyfs("trace", "push", "--plain-http", reference, restorer.work / "first.trace")
    assert pushed.returncode == 0, pushed
    again = restore(restorer.work / "again.trace", "--lazy-pages", "--as-usual")
    assert faults(again) < faults(first) / 2


@regions
def test_a_process_that_ends_ends_its_recording(dumped: Checkpoint, restorer: Restorer) -> None:
    file = restorer.work / "a.trace"
    process = restorer.start(restorer.words(str(dumped.layer), "--record", file, "--until", "600"))
    dumped.status.wait_loop(time.time())
    os.kill(dumped.root_pid, signal.SIGKILL)
    ended = restorer.wait(process)
    assert ended.code == 0, ended
    assert read_trace(file).until == "the process ended"


@regions
def test_a_restore_that_is_interrupted_leaves_what_was_recorded(
    dumped: Checkpoint, restorer: Restorer
) -> None:
    file = restorer.work / "a.trace"
    words = restorer.words(str(dumped.layer), "--record", file, "--until", "600")
    process = restorer.start(words)
    wait_until(
        lambda: "recording what is needed" in (restorer.work / "err").read_text(), "it runs", 60
    )
    dumped.status.wait_loop(time.time())
    process.terminate()
    ended = restorer.wait(process)
    assert ended.code == 128 + 15, ended
    trace = read_trace(file)
    assert trace.until == "the restore failed"
    assert pages_needed(trace) > MIB
    assert f"{file}" in ended.err


@scattered
def test_a_mount_records_a_restore_and_brings_the_rest_when_that_is_over(
    dumped: Checkpoint, work: Path
) -> None:
    file, flag = work / "a.trace", work / "flag"
    options = ("--record", str(file), "--until", f"exec:test -e {flag}")
    with (
        served(str(dumped.layer), work, *options) as (mount, criu),
        restored(dumped, mount, criu) as process,
    ):
        process.wait_first_loop()
        told = lazily(mount)
        assert told["bytes_background"] == 0
        assert told["missing_bytes"] > SIZE_MIB * MIB // 2
        flag.touch()
        wait_home(mount)
        assert process.memory_hash() == dumped.before.hashes
    trace = read_trace(file)
    assert_is_working_set(trace)
    assert trace.recording is not None
    marks = [mark.name for mark in trace.recording.marks]
    assert marks[-3:] == ["mounted", "restored", "until"]

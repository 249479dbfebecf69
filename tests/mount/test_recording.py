"""`lazyfs mount --record`: what was needed of a mount, and when that is over."""

import os
import signal
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.checkpoint.trace import Trace, parse_trace
from tests.faults import FaultServer
from tests.images import Member
from tests.mount.mounting import Mounts, command, is_alive, lazyfs, read_at, wait_until
from tests.mount.published import (
    FEW,
    LAYERS,
    MIB,
    checkpoint_files,
    publish,
    publish_many,
    some_bytes,
    write_layout,
)

FILES = checkpoint_files(3 * MIB)
PAGES = "checkpoint/pages-1.img"
SMALL = "checkpoint/mm-1.img"
ENDED = "the mount ended"


@pytest.fixture
def local(tmp_path: Path) -> str:
    return write_layout(tmp_path / "layout", LAYERS["zstd:chunked"](FILES))


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A filesystem with hardly any room."""
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def read_trace(file: Path) -> Trace:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    return parse_trace(file.read_bytes(), "it")


def needed(trace: Trace) -> dict[str, int]:
    found: dict[str, int] = {}
    for need in trace.needs:
        path = trace.files[need.file].path
        found[path] = found.get(path, 0) + need.size_bytes
    return found


@pytest.mark.parametrize("kind", FEW)
def test_what_was_read_is_what_was_needed(
    mounts: Mounts, server: FaultServer, tmp_path: Path, kind: str
) -> None:
    layer = LAYERS[kind](FILES)
    file = tmp_path / "cat.trace"
    mount = mounts.mount(publish(server, layer), "--record", file)
    assert (mount / "pages-1.img").read_bytes() == FILES[PAGES]
    assert (mount / "mm-1.img").read_bytes() == FILES[SMALL]
    assert not file.exists()
    assert mount.umount().code == 0
    mount.wait_end()
    trace = read_trace(file)
    assert trace.until == ENDED
    assert trace.layers[0].digest == layer.digest
    assert needed(trace) == {PAGES: len(FILES[PAGES]), SMALL: len(FILES[SMALL])}
    recording = trace.recording
    assert recording is not None
    assert recording.reference.endswith(mount.said.out.split()[1].partition("@")[2])
    marks = [mark.name for mark in recording.marks]
    assert marks == ["began", "opening", "resolved", "opened", "mounted", "until"]
    moments = [mark.at_ms for mark in recording.marks]
    assert moments == sorted(moments)
    came = [each for each in recording.arrivals if trace.files[each.file].path == PAGES]
    assert sum(each.size_bytes for each in came) >= len(FILES[PAGES])
    assert sum(each.stop - each.start for each in recording.fetches) >= 3 * MIB
    for fetch in recording.fetches:
        assert fetch.began_ms <= fetch.first_ms <= fetch.ended_ms
    for read in recording.reads:
        assert (read.kind, read.began_ms <= read.ended_ms) == ("read", True)
    assert recording.figures["reads"] == len(recording.reads)
    assert recording.dropped == 0


@pytest.mark.parametrize("kind", ["tar", "gzip"])
def test_of_several_layers_each_file_is_of_the_one_that_it_was_read_from(
    mounts: Mounts, server: FaultServer, tmp_path: Path, kind: str
) -> None:
    """What a later layer has replaced, hard links, and the directory that `parent` leads to."""
    replaced, linked, parents = (some_bytes(300_000, seed) for seed in (1, 2, 3))
    images = [
        Member(name.replace("checkpoint", "new"), data)
        for name, data in checkpoint_files(50_000).items()
    ]
    lower = LAYERS[kind](
        [
            *images,
            Member("new/parent", type=tarfile.SYMTYPE, link="../old"),
            Member("new/replaced.img", some_bytes(200_000, 9)),
            Member("new/one.img", linked),
            Member("new/two.img", type=tarfile.LNKTYPE, link="new/one.img"),
            Member("old/inventory.img", b"x"),
            Member("old/pages-1.img", parents),
        ]
    )
    upper = LAYERS[kind]([Member("new/replaced.img", replaced)])
    file = tmp_path / "a.trace"
    mount = mounts.mount(publish_many(server, [lower, upper]), "--record", file)
    assert (mount / "replaced.img").read_bytes() == replaced
    assert (mount / "two.img").read_bytes() == linked
    assert (mount / "parent" / "pages-1.img").read_bytes() == parents
    assert mount.umount().code == 0
    mount.wait_end()
    trace = read_trace(file)
    assert needed(trace) == dict.fromkeys(
        ["new/replaced.img", "new/one.img", "old/pages-1.img"], 300_000
    )
    layers = {each.path: trace.layers[each.layer].digest for each in trace.files}
    assert layers["new/replaced.img"] == upper.digest
    assert layers["new/one.img"] == layers["old/pages-1.img"] == lower.digest
    assert trace.recording is not None
    assert trace.recording.dropped == 0


def test_it_is_over_when_a_command_says_so(mounts: Mounts, local: str, tmp_path: Path) -> None:
    file, flag = tmp_path / "a.trace", tmp_path / "flag"
    mount = mounts.mount(local, "--record", file, "--until", f"exec:test -e {flag}")
    said = f"recording what is needed (until exec:test -e {flag}): {file}\n"
    assert mount.said.err == said
    read_at(mount / "mm-1.img", 0, 100)
    assert not file.exists()
    flag.touch()
    wait_until(file.exists, "the trace is written")
    trace = read_trace(file)
    assert trace.until == "test succeeded"
    assert needed(trace) == {SMALL: len(FILES[SMALL])}
    (mount / "pages-1.img").read_bytes()
    assert mount.umount().code == 0
    assert read_trace(file) == trace
    wait_until(lambda: not mounts.processes(), "the watcher has gone")


def test_a_mount_that_stays_in_the_foreground_records(
    mounts: Mounts, local: str, tmp_path: Path
) -> None:
    file, directory = tmp_path / "a.trace", tmp_path / "mnt"
    directory.mkdir()
    options = mounts.options("--foreground", "--record", file, "--until", "600")
    words = command("mount", *options, local, directory)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("mounted ")
        read_at(directory / "mm-1.img", 0, 100)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert read_trace(file).until == ENDED
    wait_until(lambda: not mounts.processes(), "the watcher has gone")


def test_a_mount_that_is_ended_by_a_signal_leaves_its_trace(
    mounts: Mounts, local: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.trace"
    file.write_bytes(b"an old one")
    mount = mounts.mount(local, "--record", file, "--until", "600")
    read_at(mount / "mm-1.img", 0, 100)
    mount.signal(signal.SIGTERM)
    mount.wait_end()
    assert needed(read_trace(file)) == {SMALL: len(FILES[SMALL])}


def test_one_that_is_recorded_as_usual_is_no_hint(
    mounts: Mounts, local: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.trace"
    mount = mounts.mount(local, "--record", file, "--as-usual")
    read_at(mount / "mm-1.img", 0, 100)
    assert mount.umount().code == 0
    mount.wait_end()
    trace = read_trace(file)
    assert (trace.is_partial, needed(trace)) == (True, {SMALL: len(FILES[SMALL])})
    done = lazyfs("trace", "push", *mounts.options(), local, file)
    assert (done.code, "--as-usual" in done.err) == (2, True), done


def test_one_that_is_killed_leaves_what_was_there(
    mounts: Mounts, local: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.trace"
    file.write_bytes(b"an old one")
    mount = mounts.mount(local, "--record", file, "--until", "600")
    read_at(mount / "mm-1.img", 0, 100)
    mount.signal(signal.SIGKILL)
    mount.wait_end()
    wait_until(lambda: not mounts.processes(), "the watcher has gone")
    assert file.read_bytes() == b"an old one"


def test_of_what_nobody_has_read_there_is_no_trace(
    mounts: Mounts, local: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.trace"
    mount = mounts.mount(local, "--record", file)
    assert mount.umount().code == 0
    assert not file.exists()
    assert "nothing was read" in mounts.log()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--record", "no/such/trace"], "cannot be written: No such file"),
        (["--record", "."], "is a directory"),
        (["--record", "a.trace", "--until", "soon"], "it is one of port:"),
        (["--until", "5"], "are for --record"),
        (["--as-usual"], "are for --record"),
    ],
)
def test_what_cannot_be_recorded_is_told_before_anything_is_mounted(
    mounts: Mounts, local: str, tmp_path: Path, options: list[str], why: str
) -> None:
    done = mounts.refuse(local, *options, cwd=tmp_path)
    assert (done.code, why in done.err) == (2, True), done
    assert not (tmp_path / "a.trace").exists()
    assert not mounts.processes()


def test_a_disk_that_is_full_is_told_before(mounts: Mounts, local: str, full: Path) -> None:
    (full / "large").write_bytes(bytes(100 * 1024))
    done = mounts.refuse(local, "--record", full / "a.trace")
    assert (done.code, "No space left" in done.err) == (2, True), done
    assert os.listdir(full) == ["large"]


def test_a_disk_that_has_become_full_costs_the_trace_and_nothing_else(
    mounts: Mounts, local: str, full: Path
) -> None:
    mounts.expect_log("a.trace cannot be written: No space left")
    mount = mounts.mount(local, "--record", full / "a.trace")
    read_at(mount / "mm-1.img", 0, 100)
    (full / "large").write_bytes(bytes(128 * 1024))
    assert mount.umount().code == 0
    mount.wait_end()
    assert not is_alive(mount.pid)
    assert os.listdir(full) == ["large"]

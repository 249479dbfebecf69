"""The recording of one mount: when it is written, and what is left of it then."""

import time
from pathlib import Path

import pytest

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.opened import open_checkpoint
from lazyfs.checkpoint.trace import parse_trace
from lazyfs.content.cache import Cache
from lazyfs.ground.journal import ReadNote
from lazyfs.ground.settings import ContentSettings
from lazyfs.recorder import Recorder
from lazyfs.trace_file import RecordConfig
from tests.images import tar_layer, zstd_chunked
from tests.mount.published import write_layout
from tests.transport.gather import QUICK

CONFIG = OpenConfig(Cache.memory(), QUICK, ContentSettings())
PATH = "checkpoint/inventory.img"


@pytest.mark.parametrize("is_read", [True, False])
async def test_what_was_noted_is_let_go_of_once_it_is_over(tmp_path: Path, is_read: bool) -> None:
    """A daemon may live for months after it."""
    file = tmp_path / "a.trace"
    reference = write_layout(tmp_path / "layout", zstd_chunked({PATH: b"x" * 100}))
    recorder = Recorder(RecordConfig(file, began_s=time.monotonic()))
    ended = []
    recorder.on_end = lambda: ended.append(True)
    async with open_checkpoint(reference, CONFIG, recorder.counters(CONFIG)) as checkpoint:
        journal = recorder.journal
        recorder.opened(checkpoint, dict)
        await recorder.mounted()
        now_s = time.monotonic()
        note = ReadNote(PATH, 0, 100, now_s, now_s, is_fault=False, waited=False)
        if is_read:
            journal.note_read(note)
        written = await recorder.finish("it was enough")
        assert (written["error"] is None) is is_read is file.exists()
        journal.note_read(note)
        assert await checkpoint.read_file(PATH, 100) == b"x" * 100
        assert [journal.reads, journal.fetches, journal.arrivals, journal.marks] == [[]] * 4
        assert await recorder.finish("once more") == written
    assert ended == [True]
    if is_read:
        assert parse_trace(file.read_bytes(), "it").until == "it was enough"


async def test_files_whose_names_no_trace_can_hold_cost_no_recording(tmp_path: Path) -> None:
    file = tmp_path / "a.trace"
    odd = ["rootfs/caf\udce9", "rootfs/\udcff/a"]
    layer = tar_layer({PATH: b"x" * 100, **dict.fromkeys(odd, b"y" * 100)})
    reference = write_layout(tmp_path / "layout", layer)
    recorder = Recorder(RecordConfig(file, began_s=time.monotonic()))
    async with open_checkpoint(reference, CONFIG, recorder.counters(CONFIG)) as checkpoint:
        recorder.opened(checkpoint, dict)
        await recorder.mounted()
        for path in (PATH, *odd):
            assert await checkpoint.read_file(path, 100)
            now_s = time.monotonic()
            recorder.journal.note_read(
                ReadNote(path, 0, 100, now_s, now_s, is_fault=False, waited=False)
            )
        written = await recorder.finish("it was enough")
    assert written["error"] is None
    trace = parse_trace(file.read_bytes(), "it")
    assert [each.path for each in trace.files] == [PATH]
    assert trace.recording is not None
    assert trace.recording.dropped == len(odd)


async def test_figures_that_cannot_be_had_do_not_end_the_mount(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = write_layout(tmp_path / "layout", zstd_chunked({PATH: b"x" * 100}))
    recorder = Recorder(RecordConfig(tmp_path / "a.trace", began_s=time.monotonic()))

    def figures() -> dict[str, object]:
        raise RuntimeError("a bug")

    async with open_checkpoint(reference, CONFIG, recorder.counters(CONFIG)) as checkpoint:
        recorder.opened(checkpoint, figures)
        await recorder.mounted()
        now_s = time.monotonic()
        recorder.journal.note_read(ReadNote(PATH, 0, 9, now_s, now_s, False, False))
        written = await recorder.finish("it was enough")
    assert "a bug" in written["error"]
    assert "please report this" in caplog.text

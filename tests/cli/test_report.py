"""`lazyfs report`: what it writes, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs.checkpoint.trace import dump_trace
from lazyfs.cli.main import run
from tests.report.recordings import lazy_restore


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "web.trace"
    path.write_bytes(dump_trace(lazy_restore(64)))
    return path


def test_the_page_lies_beside_the_trace_and_the_terminal_has_the_words(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(trace)]) == 0
    page = trace.with_suffix(".html")
    assert page.read_text().startswith("<!DOCTYPE html>")
    out = capsys.readouterr().out
    assert out.startswith("First response after 1.27 s (port 8080 answered): 0.38 s until ")
    assert "longest waits:" in out
    assert out.rstrip().splitlines()[-1].startswith(f"{page}: ")


def test_a_page_that_is_there_is_replaced(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("an old one")
    assert run(["report", str(trace), "-o", str(page)]) == 0
    assert "First response" in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "web.trace"]


def test_a_trace_is_not_replaced_by_its_page(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It cannot be had again."""
    odd = trace.rename(tmp_path / "web.html")
    before = odd.read_bytes()
    for options in ([], ["-o", str(odd)], ["-o", f"{tmp_path}/../{tmp_path.name}/web.html"]):
        assert run(["report", str(odd), *options]) == 2
        assert "take the place of" in capsys.readouterr().err
    assert odd.read_bytes() == before


def test_to_standard_output_goes_the_page_alone(
    trace: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run(["report", str(trace), "-o", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert out.startswith(b"<!DOCTYPE html>")
    assert out.endswith(b"</html>\n")
    assert err.startswith(b"First response")


def test_what_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.trace").write_text("no")
    assert run(["report", str(tmp_path / "no.trace")]) == 4
    assert "no.trace is no trace" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "none.trace")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_told(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(trace), "-o", str(tmp_path / "none" / "x.html")]) == 1
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_criu_s_log_gives_its_phases(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = lazy_restore(64)
    assert recorded.recording is not None
    recorded.recording.phases.clear()
    recorded.recording.marks[:] = [
        mark for mark in recorded.recording.marks if mark.name == "until"
    ]
    trace.write_bytes(dump_trace(recorded))
    log = tmp_path / "restore.log"
    log.write_text("(0.000000) Version: 4.1.1\n(0.100000) Forking task with 7 pid\n(0.300000) x\n")
    assert run(["report", str(trace), "--criu-log", str(log)]) == 0
    assert " CRIU" in capsys.readouterr().out
    assert '"fork"' in trace.with_suffix(".html").read_text()
    log.write_text("another log")
    assert run(["report", str(trace), "--criu-log", str(log)]) == 2
    assert "is no log of a restore by CRIU" in capsys.readouterr().err


def test_names_of_a_trace_s_move_no_cursor(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = lazy_restore(64)
    hostile = type(recorded)(
        layers=recorded.layers,
        files=[type(file)("\x1b[2J\n", 0, file.size_bytes) for file in recorded.files],
        until="\x1b]0;x\x07",
        recording=recorded.recording,
    )
    trace.write_bytes(dump_trace(hostile))
    assert run(["report", str(trace)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_without_plotly_it_says_what_to_install(trace: Path) -> None:
    program = (
        "import sys; sys.modules['plotly'] = None; "
        "from lazyfs.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(trace)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{sys.executable} -m pip install plotly" in done.stderr
    assert "longest waits:" in done.stdout
    assert "Traceback" not in done.stderr
    assert not trace.with_suffix(".html").exists()

"""What `lazyfs restore` tells a person at a terminal."""

import pytest

from lazyfs.cli.main import run
from lazyfs.cli.restore import Bar

_TO_ITS_BEGINNING = "\r\x1b[2K"


def test_lines_stand_above_the_bar_and_not_behind_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes what captures for a terminal
    monkeypatch.setenv("TERM", "xterm")
    bar = Bar()
    with bar:
        bar.tell({"event": "progress", "pages_bytes": 1000, "read_bytes": 500})
        bar.tell({"event": "resumed", "pid": 7, "after_s": 0.5})
        bar.tell({"event": "progress", "pages_bytes": 1000, "read_bytes": 1000})
        bar.tell({"event": "home", "after_s": 1.0})
        bar.tell({"event": "end", "exit_code": 0, "fetched_bytes": 0})
    said = capsys.readouterr().err
    assert "pages arriving" in said
    for line in ("resumed as process 7 after 0.50 s\n", "all pages home after 1.00 s\n"):
        before, found, _ = said.partition(line)
        assert found and before.endswith(_TO_ITS_BEGINNING), repr(before[-80:])
    assert said.endswith("done: fetched 0 B\n")


def test_the_end_tells_whether_a_trace_was_followed(capsys: pytest.CaptureFixture[str]) -> None:
    trace = {"source": "file", "workload": "", "needed_bytes": 3 << 20}
    with Bar() as bar:
        end = {"event": "end", "exit_code": 0, "fetched_bytes": 5 << 20, "followed_trace": trace}
        bar.tell(end)
    assert capsys.readouterr().err == "done: fetched 5.0 MiB; followed a trace of 3.0 MiB\n"


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            ["--criu", "/nowhere/criu"],
            "there is no program /nowhere/criu: install it, or name it by",
        ),
        (["--runtime", "no-such-runc", "--bundle", ".", "--id", "web"], "--runtime"),
    ],
)
def test_a_program_that_is_missing_is_told_before_anything_is_asked(
    options: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["restore", "127.0.0.1:1/nobody/answers:1", "--force", *options]) == 2
    assert advice in capsys.readouterr().err

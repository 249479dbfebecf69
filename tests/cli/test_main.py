import logging
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

import lazyfs
from lazyfs.cli.main import COMMANDS, cli, report, run
from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
    NotACheckpoint,
    SourceError,
    UnsupportedLayer,
    UsageError,
)

LAZYFS = [sys.executable, "-m", "lazyfs"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What `-v` did to the logger is undone, and so is the handler."""
    logger = logging.getLogger("lazyfs")
    yield
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LazyfsError("x"), 1),
        (UsageError("x"), 2),
        (SourceError("x"), 3),
        (FetchError("x", transient=True), 3),
        (NotACheckpoint("x"), 4),
        (UnsupportedLayer("x"), 4),
        (MalformedError("x"), 4),
        (IntegrityError("x"), 5),
    ],
)
def test_exit_codes(error: LazyfsError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == code
    assert capsys.readouterr().err == "lazyfs: x\n"


def test_a_group_is_told_by_its_gravest(capsys: pytest.CaptureFixture[str]) -> None:
    inner = ExceptionGroup("n", [SourceError("gone"), IntegrityError("changed")])
    assert report(ExceptionGroup("n", [LazyfsError("other"), inner])) == 5
    assert capsys.readouterr().err == "lazyfs: changed\n"


def test_a_bug_asks_to_be_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(ExceptionGroup("n", [SourceError("gone"), KeyError("k")])) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("lazyfs: this is a bug in lazyfs: KeyError: 'k'")
    assert "-v" in printed
    assert "Traceback" not in printed


def test_a_bug_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("lazyfs").setLevel(logging.INFO)
    assert report(KeyError("k")) == 1
    assert "KeyError: 'k'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), BaseExceptionGroup("n", [LazyfsError("x"), KeyboardInterrupt()])],
)
def test_interrupted(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["ls"], ["cat", "ref"], ["--frob"], ["completion", "tcsh"]],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Usage: lazyfs")


def test_a_reference_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ls", "UPPER CASE"]) == 2
    assert capsys.readouterr().err.startswith("lazyfs: ")


def test_a_bare_command_gets_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"lazyfs {lazyfs.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(200).rstrip(".") == COMMANDS[name].summary.rstrip(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Usage: lazyfs {name}")
    assert max(map(len, printed.splitlines())) <= 80


def test_the_help_of_all_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], {"trio", "rich", "requests", "google.protobuf", "pyfuse3"}),
        (["ls", "--help"], {"trio", "rich", "requests", "google.protobuf", "pyfuse3"}),
        (["mount", "--help"], {"rich", "google.protobuf"}),
    ],
)
def test_what_is_imported(arguments: list[str], absent: set[str]) -> None:
    code = (
        "import sys\nfrom lazyfs.cli.main import run\n"
        f"run({arguments})\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not absent & set(done.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert f"_LAZYFS_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_completion_completes() -> None:
    env = {"_LAZYFS_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    for words, wanted in (("lazyfs um", "plain,umount"), ("lazyfs -", "plain,--version")):
        done = subprocess.run(
            LAZYFS, env={**env, "COMP_WORDS": words}, check=True, capture_output=True, text=True
        )
        assert wanted in done.stdout.splitlines()


@pytest.mark.parametrize("arguments", ["completion fish", "--help", "mount --help"])
def test_a_closed_pipe_is_no_news(arguments: str) -> None:
    script = f"{sys.executable} -m lazyfs {arguments} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


@pytest.mark.parametrize("arguments", ["completion fish", "--help", "mount --help", "--version"])
def test_output_that_a_full_disk_does_not_take_is_told(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*LAZYFS, *arguments.split()], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == "lazyfs: cannot write the output: No space left on device\n"
    assert done.returncode == 1


def test_descriptors_that_the_caller_has_closed_are_nobody_elses() -> None:
    """Nor is it a bug that there is nothing to print to."""
    program = " ".join(LAZYFS)
    script = f"{program} completion fish >&- && {program} --version <&- && {program} mount 2>&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == f"lazyfs {lazyfs.__version__}\n"

"""`lazyfs cache`: what is listed, removed and compared, and what is said about it."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lazyfs.cli.main import run
from tests.shelves import CHUNK, layers_in, put_layer, using

MIB = 1 << 20
LAZYFS = [sys.executable, "-m", "lazyfs"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three layers: used a month, a day and an hour ago."""
    directory = tmp_path / "cache"
    now_s = time.time()
    for number, age_s in enumerate((30 * 86400, 86400 + 60, 3600 + 60)):
        absent = frozenset({0, 1}) if number == 1 else frozenset[int]()
        put_layer(directory, bytes([number + 1]) * MIB, now_s - age_s, absent=absent)
    directory.chmod(0o700)
    return directory


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def run_here(*arguments: str | Path) -> Done:
    """Run a command in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = run([*map(str, arguments)])
    return Done(code, out.getvalue(), err.getvalue())


def homes(cache: Path) -> list[Path]:
    """The layers, by age."""
    return sorted(layers_in(cache), key=lambda home: (home / "used").stat().st_mtime)


def digest_of(home: Path) -> str:
    return home.name.partition(".")[0].replace("-", ":")


def lazyfs(*arguments: str | Path) -> Done:
    return run_here("cache", *arguments)


def listed(cache: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert run(["cache", "ls", "--json", f"--cache-dir={cache}", *options]) == 0
    return json.loads(capsys.readouterr().out)


def terminal(*arguments: str | Path) -> tuple[int, str]:
    """Run a command on a terminal of 80 columns; return its exit code, and what it wrote."""
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [*LAZYFS, *map(str, arguments)],
        stdout=writing,
        stderr=writing,
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb"},
    )
    os.close(writing)
    out = b""
    try:
        while piece := os.read(reading, 65536):
            out += piece
    except OSError:  # Linux: the other end is closed
        pass
    os.close(reading)
    return process.wait(), out.decode().replace("\r\n", "\n")


# -- ls ------------------------------------------------------------------------------------------


def test_ls_lists_the_latest_used_last(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oldest, middle, latest = homes(cache)
    with using(latest):
        found = listed(cache, capsys, "--cache-size=5M")
    assert [row["digest"] for row in found["layers"]] == [
        digest_of(home) for home in (oldest, middle, latest)
    ]
    first, second, third = found["layers"]
    assert first["format"] == "tar"
    assert first["path"] == str(oldest)
    assert first["content_bytes"] == first["here_bytes"] == MIB
    assert second["here_bytes"] == MIB // 2
    assert second["disk_bytes"] < first["disk_bytes"]
    assert (first["used_by"], third["used_by"]) == ([], [os.getpid()])
    assert not first["blob_proven"]
    assert not first["chunks_proven"]
    assert found["directory"] == str(cache)
    assert found["limit_bytes"] == 5 * MIB
    assert found["used_bytes"] == sum(row["disk_bytes"] for row in found["layers"])
    assert found["free_bytes"] > 0
    assert (found["growing_bytes"], found["left_bytes"]) == (0, 0)


def test_ls_in_a_pipe_is_for_cut_and_awk(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "ls", f"--cache-dir={cache}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    columns = lines[1].split("\t")
    assert columns[0] == digest_of(homes(cache)[1])
    assert columns[1] == "tar"
    assert columns[3:7] == [str(MIB // 2), str(MIB), "-", "0"]
    assert columns[7].endswith("+00:00")


def test_ls_on_a_terminal_fits_it(cache: Path) -> None:
    left = cache / "incoming/left"
    left.mkdir(parents=True)
    (left / "content").write_bytes(bytes(MIB))
    with using(homes(cache)[2]) as _:
        code, out = terminal("cache", "ls", f"--cache-dir={cache}", "--cache-size=50G")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == [
        "LAYER",
        "FORMAT",
        "ON",
        "DISK",
        "HERE",
        "PROVEN",
        "IN",
        "USE",
        "LAST",
        "USED",
    ]
    assert lines[1].split() == [
        digest_of(homes(cache)[0])[:19],
        *["tar", "1.0", "MiB", "100%", "-", "-", "30", "days", "ago"],
    ]
    assert "50%" in lines[2]
    assert "1 mount" in lines[3]
    assert max(map(len, lines[:4])) <= 80
    assert f"{cache}: 3 layers, 3.5 MiB of at most 50.0 GiB; " in lines[4]
    assert lines[5] == "1.0 MiB of that were left unfinished: `lazyfs cache prune`"


def test_ls_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(tmp_path / "none", capsys)["layers"] == []
    code, out = terminal("cache", "ls", f"--cache-dir={tmp_path}/none")
    assert (code, out.count("\n")) == (0, 1)
    assert ": 0 layers, 0 B of at most " in out
    assert not (tmp_path / "none").exists()


# -- prune ---------------------------------------------------------------------------------------


def test_prune_by_itself_removes_what_nobody_will_ever_use(cache: Path) -> None:
    left = cache / "incoming/left"
    left.mkdir(parents=True)
    (left / "content").write_bytes(bytes(MIB))
    before = homes(cache)
    done = lazyfs("prune", f"--cache-dir={cache}")
    assert done.out == "removed 1.0 MiB that were left unfinished\nfreed 1.0 MiB\n"
    assert (done.code, done.err) == (0, "")
    assert homes(cache) == before
    assert not left.exists()


def test_prune_by_itself_holds_to_the_size(cache: Path) -> None:
    before = homes(cache)
    assert lazyfs("prune", f"--cache-dir={cache}", "--cache-size=2M").code == 0
    assert homes(cache) == before[1:]


def test_prune_all_leaves_what_is_in_use(cache: Path) -> None:
    middle = homes(cache)[1]
    with using(middle):
        done = lazyfs("prune", "--all", f"--cache-dir={cache}")
    assert done.code == 0
    assert homes(cache) == [middle]
    assert f"in use: {digest_of(middle)[:19]} (tar, 5" in done.out
    assert done.out.count("removed ") == 2
    assert done.out.endswith("freed 2.0 MiB\n")


def test_prune_older_than(cache: Path) -> None:
    before = homes(cache)
    assert lazyfs("prune", "--older-than=7d", f"--cache-dir={cache}").code == 0
    assert homes(cache) == before[1:]
    assert lazyfs("prune", "--older-than=12h", f"--cache-dir={cache}").code == 0
    assert homes(cache) == before[2:]


def test_prune_to_a_size(cache: Path) -> None:
    before = homes(cache)
    assert lazyfs("prune", "--to-size=2M", f"--cache-dir={cache}").code == 0
    assert homes(cache) == before[1:]
    with using(before[2]):
        done = lazyfs("prune", "--to-size=0", f"--cache-dir={cache}")
    assert (done.code, done.err) == (1, "lazyfs: what is left is in use\n")
    assert homes(cache) == before[2:]


def test_prune_what_is_named(cache: Path) -> None:
    before = homes(cache)
    digest = digest_of(before[0])
    assert lazyfs("prune", digest, f"--cache-dir={cache}").code == 0
    assert homes(cache) == before[1:]
    short = digest_of(before[1])[7:15]
    with using(before[1]):
        assert lazyfs("prune", short, f"--cache-dir={cache}").code == 1
    assert lazyfs("prune", short, f"--cache-dir={cache}").code == 0
    assert homes(cache) == before[2:]
    for unknown in (digest, "sha256:", "zz", "f" * 64):
        done = lazyfs("prune", unknown, f"--cache-dir={cache}")
        assert done.code == 2
        assert "is no layer in the cache: `lazyfs cache ls` lists them" in done.err


@pytest.mark.parametrize("options", [["--all"], ["--older-than=1s"], ["--to-size=0"]])
def test_a_dry_run_removes_nothing(cache: Path, options: list[str]) -> None:
    (cache / "incoming/left").mkdir(parents=True)
    (cache / "incoming/left/content").write_bytes(bytes(MIB))
    before = homes(cache)
    with using(before[1]):
        done = lazyfs("prune", "--dry-run", *options, f"--cache-dir={cache}")
    assert homes(cache) == before
    assert (cache / "incoming/left").exists()
    assert done.out.count("would remove") == 3
    assert done.out.count("in use: ") == 1
    assert done.out.endswith("would free 3.0 MiB\n")


def test_prune_wants_one_way(cache: Path) -> None:
    done = lazyfs("prune", "--all", "--to-size=1G", f"--cache-dir={cache}")
    assert (done.code, done.out) == (2, "")
    assert "choose one" in done.err
    assert lazyfs("prune", "--older-than=soon", f"--cache-dir={cache}").code == 2
    assert len(homes(cache)) == 3


def test_prune_of_nothing(tmp_path: Path) -> None:
    done = lazyfs("prune", "--all", f"--cache-dir={tmp_path}/none")
    assert (done.code, done.out, done.err) == (0, "", "")


# -- verify --------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)


def test_verify_finds_all_as_it_was(cache: Path) -> None:
    done = lazyfs("verify", f"--cache-dir={cache}")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith("(tar): 1.0 MiB in 4 chunks, as stored, as its digest promises")
    assert lines[1].endswith("(tar): 512 KiB in 2 chunks, as stored")


def test_verify_finds_damage_and_drops_it(cache: Path) -> None:
    oldest, _, latest = homes(cache)
    flip(oldest / "content", CHUNK + 1)
    flip(latest / "content", 0)
    with using(latest):
        done = lazyfs("verify", f"--cache-dir={cache}")
    assert done.code == 5
    lines = done.out.splitlines()
    assert "1 place of it damaged; dropped, and fetched anew by the next mount" in lines[0]
    assert "left alone: a mount is using it, or it cannot be written" in lines[2]
    assert lazyfs("verify", digest_of(oldest), f"--cache-dir={cache}").code == 0
    done = lazyfs("verify", "--json", digest_of(latest), f"--cache-dir={cache}")
    assert done.code == 5
    found = json.loads(done.out)
    assert found["damaged_chunks"] == 1
    (row,) = found["layers"]
    assert row["damaged"] == [{"start": 0, "stop": CHUNK}]
    assert row["dropped"]
    assert (row["checked_chunks"], row["checked_bytes"]) == (4, MIB)
    assert (row["digest_matches"], row["unknown"]) == (None, None)


def test_verify_shows_progress_on_a_terminal(cache: Path) -> None:
    code, out = terminal("cache", "verify", f"--cache-dir={cache}")
    assert code == 0
    assert "verifying 2.5 MiB" in out
    assert "as its digest promises" in out


def test_verify_says_what_it_cannot_know(tmp_path: Path) -> None:
    put_layer(tmp_path, b"x" * 1000, tag="zstd-chunked-1-" + "a" * 64)
    done = lazyfs("verify", f"--cache-dir={tmp_path}")
    assert done.code == 0
    assert "(zstd:chunked): not compared: nothing here tells" in done.out


# -- whose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["ls"], ["prune", "--all"], ["verify"]])
def test_a_cache_that_others_may_write_to_is_refused(cache: Path, words: list[str]) -> None:
    cache.chmod(0o777)
    done = lazyfs(*words, f"--cache-dir={cache}")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"lazyfs: {cache} cannot be the cache, which holds secrets: others may write to it; "
        "`chmod 700` keeps them out\n"
    )
    assert len(layers_in(cache)) == 3


def test_opening_a_checkpoint_refuses_it_too(cache: Path) -> None:
    cache.chmod(0o770)
    sample = Path(__file__).parents[2] / "contrib/demo/sample"
    for command in (["ls"], ["inspect"]):
        words = [*command, f"oci:{sample}", f"--cache-dir={cache}"]
        done = run_here(*words)
        assert (done.code, done.out) == (2, "")
        assert "others may write to it" in done.err
        memory = run_here(*words, "--cache=memory")
        assert memory.code == 0, "it is not used then"


def test_in_memory_nothing_is_written_at_all(tmp_path: Path) -> None:
    sample = Path(__file__).parents[2] / "contrib/demo/sample"
    done = run_here("inspect", f"oci:{sample}", f"--cache-dir={tmp_path}/c", "--cache=memory")
    assert done.code == 0, done
    assert not (tmp_path / "c").exists()

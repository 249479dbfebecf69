"""The gate's script, as CRIU runs it: by its path, with two variables in its environment."""

import os
import select
import subprocess
from pathlib import Path

import pytest

from lazyfs.ground.errors import LazyfsError
from lazyfs.restore.gate import CONFIG_VARIABLE, Gate


def script_of(gate: Gate) -> str:
    config = Path(gate.environment[CONFIG_VARIABLE]).read_text()
    (line,) = [line for line in config.splitlines() if line.startswith("action-script ")]
    return line.split(" ", 1)[1].strip('"')


def run(script: str, action: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "CRTOOLS_SCRIPT_ACTION": action, "CRTOOLS_INIT_PID": "4711"}
    return subprocess.Popen([script], env=environment, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("may_live", [True, False])
def test_criu_is_given_the_answer(may_live: bool) -> None:
    with Gate() as gate:
        asking = run(script_of(gate), "post-restore")
        assert select.select([gate], [], [], 20)[0]
        gate.answer(may_live=may_live)
        assert (asking.wait(20) == 0) is may_live
        assert (gate.asked, gate.root_pid) == (True, 4711)


def test_nothing_is_asked_at_other_moments() -> None:
    with Gate() as gate:
        assert run(script_of(gate), "pre-restore").wait(20) == 0
        assert not gate.asked
        assert not select.select([gate], [], [], 0)[0]


def test_nobody_passes_where_nobody_answers() -> None:
    with Gate() as gate:
        script = script_of(gate)
        asking = run(script, "post-restore")
        assert select.select([gate], [], [], 20)[0]
        kept = Path(script).read_bytes()
    assert asking.wait(20) != 0
    assert not Path(script).exists()
    assert b"/proc/" in kept


def test_the_users_own_configuration_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.conf").write_text("tcp-established\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "mine.conf"))
    with Gate(("ghost-limit 2M",)) as gate:
        lines = Path(gate.environment[CONFIG_VARIABLE]).read_text().splitlines()
    assert lines[0] == "tcp-established"
    assert "ghost-limit 2M" in lines
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "none.conf"))
    with pytest.raises(LazyfsError, match=r"none\.conf"):
        Gate()


def test_what_a_killed_keeper_has_left_is_cleared_away_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, young, other = (tmp_path / f"lazyfs-gate-{name}" for name in ("left", "young", "other"))
    for each in (left, young):
        each.mkdir(mode=0o700)
    other.symlink_to(tmp_path)
    os.utime(left, (1, 1))
    with Gate() as living:
        os.utime(living.home, (1, 1))
        with Gate():
            assert not left.exists()
            assert young.exists()
            assert other.is_symlink()
            assert Path(living.home).exists()

"""The kept corpus and the seeds through every target; then each is fuzzed for a second."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lazyfs.ground.errors import LazyfsError
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_kept_input_gives_a_value_or_a_declared_error(name: str) -> None:
    kept = sorted((CORPUS / name).iterdir()) if (CORPUS / name).is_dir() else []
    for data in [b"", *seeds().get(name, []), *(path.read_bytes() for path in kept)]:
        with suppress(LazyfsError):
            TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_new_input_gives_a_value_or_a_declared_error(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="no wheel for this Python or machine")
    (tmp_path / "new").mkdir()
    options = ["-max_total_time=1", "-timeout=20", "-rss_limit_mb=2048", "-max_len=65536"]
    command = [sys.executable, "-m", "tests.fuzz", name, *options, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*command, str(tmp_path / "new")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

"""What a standby has imported ahead, and what else is true of a process from which others come."""

import os
import subprocess
import sys
from pathlib import Path

from tests.images import tar_layer, zstd_chunked
from tests.mount.published import checkpoint_files, write_layout

CLIENT = ("socket", "signal", "json", "contextlib", "dataclasses", "typing", "pathlib", "re")


def python(program: str, *words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_who_asks_a_standby_imports_next_to_nothing() -> None:
    """Beside what the interpreter itself, and how lazyfs is installed, import."""
    program = (
        "import sys; before = set(sys.modules); import lazyfs.standby.client; "
        f"print(*(set({CLIENT}) & sys.modules.keys() - before))"
    )
    assert python(program).split() == []


def test_commands_import_nothing_more(tmp_path: Path) -> None:
    """Else every child of a standby did it anew."""
    files = checkpoint_files(1 << 20)
    layouts = [
        write_layout(tmp_path / name, layer)
        for name, layer in (("zstd", zstd_chunked(files)), ("tar", tar_layer(files)))
    ]
    program = """
import os, sys
from lazyfs.standby.preload import Preloaded
Preloaded()
from lazyfs.cli.main import run
from lazyfs.mount import serve_mount
before, out = set(sys.modules), os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for layout in sys.argv[2:]:
    for words in (["ls"], ["warm"], ["inspect", "--check"], ["inspect", "--json"]):
        code = run([*words, "--cache-dir", sys.argv[1], layout])
        assert code == 0 or "--check" in words, (words, code)
run(["status"])
run(["mount", "--nope"])
sys.stdout.flush()
os.dup2(out, 1)
print(*(set(sys.modules) - before))
"""
    assert python(program, tmp_path / "cache", *layouts).split() == []


def test_it_has_one_thread_and_sees_that_lazyfs_has_changed(tmp_path: Path) -> None:
    program = """
import os, sys, threading
from pathlib import Path
sys.path.append(sys.argv[1])
import lazyfs.standby
lazyfs.standby.__path__.append(sys.argv[1])
import lazyfs.standby.added
from lazyfs.standby.preload import Preloaded
loaded = Preloaded()
print(threading.active_count(), loaded.is_current(), end=" ")
os.utime(lazyfs.standby.added.__file__)
print(loaded.is_current())
"""
    (tmp_path / "added.py").write_text("")
    os.utime(tmp_path / "added.py", (1, 1))
    assert python(program, tmp_path).split() == ["1", "True", "False"]

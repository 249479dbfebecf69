"""`lazyfs-runtime` where it could be installed, and a runtime that notes how it is called."""

import shutil
import subprocess
import sys
from pathlib import Path

_CLONE = Path(__file__).resolve().parents[2]
SCRIPT = _CLONE / "contrib/runtime/lazyfs-runtime"
SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]

_NOTING = """\
#!/bin/sh
while read -r line; do echo "$line"; done </proc/$$/status >"$NOTES/status"
for what in cmdline environ; do cat /proc/$$/$what >"$NOTES/$what"; done
ls -l /proc/$$/fd >"$NOTES/descriptors"
pwd >"$NOTES/directory"
umask >"$NOTES/umask"
[ "${READS:-}" ] && cat >"$NOTES/input"
[ "${SIGNAL:-}" ] && kill -s "$SIGNAL" $$
exit "${CODE:-0}"
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_noting_runtime(path: Path) -> Path:
    """A runtime that writes down to $NOTES all that a program can see of how it was started."""
    return write_program(path, _NOTING)


def write_speaking_runtime(path: Path) -> Path:
    """A runtime that says which one it is, and its arguments."""
    return write_program(path, f'#!/bin/sh\nprintf \'%s\\n\' "{path}" "$@"\n')


def install(directory: Path, name: str = "lazyfs-runtime") -> Path:
    """Put the script and `lazyfs` into a directory, as pip does; return the script's path."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCRIPT, directory / name)
    if not (directory / "lazyfs").exists():
        start = f'PYTHONPATH={_CLONE} exec {sys.executable} -m lazyfs "$@"'
        write_program(directory / "lazyfs", f"#!/bin/sh\n{start}\n")
    return directory / name


def shell_words(shell: str) -> list[str]:
    return [shell, "sh"] if shell == "busybox" else [shell]


def says(words: list[str | Path], **options: object) -> list[str]:
    """Return the lines that a command prints."""
    done = subprocess.run(words, capture_output=True, check=False, timeout=60, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return list(done.stdout.decode(errors="surrogateescape").splitlines())

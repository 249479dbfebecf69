"""What lazyfs-runtime costs an engine that restores no stub: the wrapper against the bare runtime.

    .venv/bin/python bench/passthrough.py [--pairs 200] [--json FILE]

Runs `runc --version`, `runc state` of a container that is not there, and a `restore` of a
checkpoint that is no stub (which fails at once), with and without the wrapper: pairs, of which each
begins the other way round than the one before. What counts is the median difference of the pairs.
The runtime is the testbed's runc; where that does not run on this machine, /bin/true.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import REPOSITORY, machine, write_json

_SCRIPT = REPOSITORY / "contrib" / "runtime" / "lazyfs-runtime"
_CASES = {
    "--version": ["--version"],
    "state": ["--root", "/nowhere", "state", "none"],
    "restore": ["--root", "/nowhere", "restore", "--image-path", "/nowhere", "--detach", "none"],
}
_WARM = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runtime, name = _runtime(Path(folder))
        wrapper = Path(folder) / "lazyfs-runc"
        shutil.copy(_SCRIPT, wrapper)
        environ = {**os.environ, "PATH": f"{runtime.parent}:{os.environ['PATH']}"}
        rows = {
            case: _measure(words, runtime, wrapper, environ, options.pairs)
            for case, words in _CASES.items()
        }
    print(f"{name}, {options.pairs} pairs, milliseconds (median)\n")
    print(f"{'':12}{'bare':>10}{'wrapped':>10}{'more':>10}")
    for case, row in rows.items():
        print(f"{case:12}{row['bare_ms']:10.2f}{row['wrapped_ms']:10.2f}{row['more_ms']:10.2f}")
    shell = os.path.realpath("/bin/sh")
    write_json(options.json, {**machine(), "runtime": name, "shell": shell, "cases": rows})


def _runtime(folder: Path) -> tuple[Path, str]:
    """Return a program called runc, and what it is."""
    from testbed import Testbed, TestbedMissing

    place = folder / "usr" / "runc"
    place.parent.mkdir()
    try:
        testbed = Testbed.locate()
    except TestbedMissing:
        place.symlink_to("/bin/true")
        return place, "/bin/true"
    root = testbed.root
    loader = root / "lib64/ld-linux-x86-64.so.2"
    words = [str(loader), "--library-path", str(root / "usr/lib/x86_64-linux-gnu")]
    real = shutil.which("runc") or str(root / "usr/sbin/runc")
    tried = subprocess.run([real, "--version"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        place.symlink_to(real)
        return place, tried.stdout.splitlines()[0]
    shown = subprocess.run([*words, real, "--version"], capture_output=True, text=True, check=True)
    program = _program(folder, [*words, real])
    place.symlink_to(program)
    return place, shown.stdout.splitlines()[0]


def _program(folder: Path, words: Sequence[str]) -> Path:
    """Make a program of a command: the least that starts it, in C."""
    source = folder / "start.c"
    listed = ", ".join(f'"{word}"' for word in words)
    source.write_text(
        "#include <string.h>\n#include <unistd.h>\n"
        "int main(int argc, char **argv) {\n"
        f"    char *words[{len(words)} + argc];\n"
        f"    char *first[] = {{{listed}}};\n"
        "    memcpy(words, first, sizeof first);\n"
        f"    memcpy(words + {len(words)}, argv + 1, argc * sizeof *argv);\n"
        "    return execv(words[0], words);\n}\n"
    )
    program = folder / "start"
    subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
    return program


def _measure(
    words: Sequence[str], bare: Path, wrapper: Path, environ: Mapping[str, str], pairs: int
) -> dict[str, Any]:
    took: dict[Path, list[float]] = {bare: [], wrapper: []}
    for count in range(pairs + _WARM):
        order = (bare, wrapper) if count % 2 else (wrapper, bare)
        for program in order:
            began_s = time.perf_counter()
            subprocess.run(
                [program, *words],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            took[program].append((time.perf_counter() - began_s) * 1000)
    differences = [
        wrapped - plain
        for plain, wrapped in zip(took[bare][_WARM:], took[wrapper][_WARM:], strict=True)
    ]
    quarters = statistics.quantiles(differences, n=4)
    return {
        "bare_ms": statistics.median(took[bare][_WARM:]),
        "wrapped_ms": statistics.median(took[wrapper][_WARM:]),
        "more_ms": statistics.median(differences),
        "more_quartiles_ms": [quarters[0], quarters[2]],
        "pairs": pairs,
    }


if __name__ == "__main__":
    main()

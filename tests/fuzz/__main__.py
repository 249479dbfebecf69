"""Fuzz one target, or `all` of them one after the other; see the package."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    name, *options = sys.argv[1:] or [""]
    if name == "all":
        return max(fuzz(each, options, quiet=True) for each in TARGETS)
    if name in TARGETS:
        return fuzz(name, options, quiet=False)
    print(f"usage: python -m tests.fuzz TARGET|all [libFuzzer's options]\n{' '.join(TARGETS)}")
    return 2


def fuzz(name: str, options: list[str], *, quiet: bool) -> int:
    """Fuzz a target in a process of its own, which libFuzzer ends.

    What is new goes to the first directory among the options, or else to the kept corpus.
    """
    kept = CORPUS / name
    if all(option.startswith("-") for option in options):
        kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for number, data in enumerate(seeds().get(name, [])):
            (Path(directory) / str(number)).write_bytes(data)
        directories = [str(kept)] if kept.is_dir() else []
        command = [sys.executable, "-m", "tests.fuzz.once", name, *options, *directories, directory]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            command, env=environment, capture_output=quiet, text=True, check=False
        )
    if quiet:
        told = [line for line in done.stderr.splitlines() if "\tDONE" in line or " DONE " in line]
        print(f"{name}: {told[-1] if told else 'nothing was run'}", flush=True)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-5000:], sep="\n", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

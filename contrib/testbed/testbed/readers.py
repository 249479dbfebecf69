"""Processes that read random places of mounts, and compare what they get with the truth.

A reader is a process of its own: it may hang with the mount that it reads, and the kernel sees it
as it sees CRIU. Every read is compared, a short one as far as it goes; errors are counted by
name. What was read is often dropped from the kernel's cache, so that the next read asks again.

    with Readers(3, seed=1) as readers:
        readers.add(mount_directory, unpacked_directory)
        ...
        readers.drop(mount_directory)      # nothing of it is open any more
        print(readers.tally())

This file is also the program that runs in them; a line of JSON on its standard input is a
command, and is answered by a line that has its whole account so far.
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

_SIZES = (1, 100, 4096, 4096, 16 << 10, 128 << 10, 1 << 20, 3 << 20)
_SWEEP_BYTES = 1 << 20
_WRONG_MOST = 20


@dataclass
class Tally:
    """What was read, and what came of it."""

    reads: int = 0
    bytes_read: int = 0
    """That were right."""
    errors: Counter[str] = field(default_factory=Counter)
    """Reads that ended with an error, by its name."""
    wrong_bytes: int = 0
    wrong: list[str] = field(default_factory=list)
    """Where; the first of them."""

    def add(self, other: Tally) -> None:
        """Add what others have done."""
        self.reads += other.reads
        self.bytes_read += other.bytes_read
        self.errors += other.errors
        self.wrong_bytes += other.wrong_bytes
        self.wrong = (self.wrong + other.wrong)[:_WRONG_MOST]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "reads": self.reads,
            "bytes_read": self.bytes_read,
            "errors": dict(self.errors),
            "wrong_bytes": self.wrong_bytes,
            "wrong": self.wrong,
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """Return what `as_json` was made of."""
        return cls(**(plain | {"errors": Counter(plain["errors"])}))

    def read(self, there: int, truth: int, offset: int, size: int, name: str) -> None:
        """Read a place from both, whole, and compare."""
        self.reads += 1
        done = 0
        while done < size:
            try:
                got = os.pread(there, size - done, offset + done)
            except OSError as error:
                self.errors[errno.errorcode.get(error.errno or 0, "?")] += 1
                return
            expected = os.pread(truth, len(got) or size - done, offset + done)
            if got != expected:
                self._note_wrong(got, expected, offset + done, name)
                return
            if not got:
                return
            self.bytes_read += len(got)
            done += len(got)

    def failed(self, error: OSError) -> None:
        """Count an error of something else than a read."""
        self.errors[errno.errorcode.get(error.errno or 0, "?")] += 1

    def _note_wrong(self, got: bytes, expected: bytes, at: int, name: str) -> None:
        pairs = zip(got, expected, strict=False)
        wrong = [index for index, (one, other) in enumerate(pairs) if one != other]
        self.wrong_bytes += len(wrong) or abs(len(got) - len(expected))
        if len(self.wrong) < _WRONG_MOST:
            first = wrong[0] if wrong else min(len(got), len(expected))
            self.wrong.append(
                f"{name} at {at + first}: {len(wrong)} of {len(got)} bytes are wrong, "
                f"{len(expected)} were expected"
            )


def sweep(mount: Path, truth: Path, tally: Tally) -> None:
    """Read every file from its start to its end, in the order of their names."""
    for name in sorted(path.name for path in truth.iterdir()):
        try:
            _sweep_file(mount / name, truth / name, tally)
        except OSError as error:
            tally.failed(error)


def _sweep_file(path: Path, true_path: Path, tally: Tally) -> None:
    with ExitStack() as files:
        there = os.open(path, os.O_RDONLY)
        files.callback(os.close, there)
        truth = os.open(true_path, os.O_RDONLY)
        files.callback(os.close, truth)
        size = os.fstat(truth).st_size
        if os.fstat(there).st_size != size:
            tally.wrong_bytes += 1
            tally.wrong.append(f"{path}: {os.fstat(there).st_size} bytes, not {size}")
        for offset in range(0, size, _SWEEP_BYTES):
            length = min(_SWEEP_BYTES, size - offset)
            tally.read(there, truth, offset, length, str(path))


class Readers:
    """Processes that read; a context manager, in which they live."""

    def __init__(self, count: int, *, seed: int) -> None:
        """Start nobody yet."""
        self._count = count
        self._seed = seed
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        from .guard import watch

        for number in range(self._count):
            command = [sys.executable, "-I", "-S", __file__, str(self._seed * 1000 + number)]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            watch(process.pid)
            self._processes.append(process)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from .guard import forget

        for process in self._processes:
            process.kill()
            process.communicate()
            forget(process.pid)

    def add(self, mount: Path, truth: Path) -> None:
        """Read there too from now on."""
        self._tell({"do": "add", "mount": str(mount), "truth": str(truth)})

    def drop(self, mount: Path, timeout_s: float = 120) -> None:
        """Read there no more; nothing of it is open when this returns."""
        self._tell({"do": "drop", "mount": str(mount)}, timeout_s)

    def tally(self, timeout_s: float = 120) -> Tally:
        """Return what all of them have done so far."""
        total = Tally()
        for answer in self._tell({"do": "tell"}, timeout_s):
            total.add(answer)
        return total

    def begin_sweep(self, mount: Path, truth: Path) -> None:
        """Have each read all of a mount, once, in order; `end_sweep` must follow."""
        self._send({"do": "sweep", "mount": str(mount), "truth": str(truth)})

    def end_sweep(self, timeout_s: float = 120) -> Tally:
        """Wait for the end of a sweep, and return what all have done so far."""
        total = Tally()
        for answer in self._answers(timeout_s):
            total.add(answer)
        return total

    def sweep(self, mount: Path, truth: Path, timeout_s: float = 120) -> Tally:
        """Sweep, and return what all have done so far."""
        self.begin_sweep(mount, truth)
        return self.end_sweep(timeout_s)

    def _tell(self, command: dict[str, str], timeout_s: float = 120) -> list[Tally]:
        self._send(command)
        return self._answers(timeout_s)

    def _send(self, command: dict[str, str]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()

    def _answers(self, timeout_s: float) -> list[Tally]:
        from .errors import TestbedError

        until_s = time.monotonic() + timeout_s
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            left_s = max(0.0, until_s - time.monotonic())
            if not select.select([process.stdout], [], [], left_s)[0]:
                raise TestbedError(f"reader {process.pid} hangs: no answer in {timeout_s:g} s")
            answers.append(Tally.from_json(json.loads(process.stdout.readline())))
        return answers


class _Loop:
    """What runs in a reader's process."""

    def __init__(self, seed: int, commands: IO[str]) -> None:
        self._random = random.Random(seed)
        self._commands = commands
        self._places: dict[str, tuple[Path, Path, list[str], list[int]]] = {}
        self._tally = Tally()

    def run(self) -> None:
        while True:
            timeout_s = 0.0 if self._places else None
            if select.select([self._commands], [], [], timeout_s)[0]:
                line = self._commands.readline()
                if not line:
                    return
                self._obey(json.loads(line))
                print(json.dumps(self._tally.as_json()), flush=True)
            else:
                self._read()

    def _obey(self, command: dict[str, str]) -> None:
        match command["do"]:
            case "add":
                truth = Path(command["truth"])
                names = sorted(path.name for path in truth.iterdir())
                sizes = [(truth / name).stat().st_size for name in names]
                place = (Path(command["mount"]), truth, names, sizes)
                self._places[command["mount"]] = place
            case "drop":
                self._places.pop(command["mount"], None)
            case "sweep":
                sweep(Path(command["mount"]), Path(command["truth"]), self._tally)

    def _read(self) -> None:
        mount, truth, names, sizes = self._random.choice(list(self._places.values()))
        by_size: Sequence[int] | None = sizes if self._random.random() < 0.7 else None
        index = self._random.choices(range(len(names)), by_size)[0]
        name, size = names[index], sizes[index]
        offset = self._random.randrange(size + 1)
        length = min(self._random.choice(_SIZES), size - offset)
        with ExitStack() as files:
            try:
                there = os.open(mount / name, os.O_RDONLY)
            except OSError as error:
                self._tally.failed(error)
                return
            files.callback(os.close, there)
            true = os.open(truth / name, os.O_RDONLY)
            files.callback(os.close, true)
            self._tally.read(there, true, offset, length, str(mount / name))
            if self._random.random() < 0.5:
                with suppress(OSError):
                    os.posix_fadvise(there, 0, 0, os.POSIX_FADV_DONTNEED)


def _main(words: Iterable[str]) -> None:
    (seed,) = words
    with open(0, buffering=1, encoding="utf-8", closefd=False) as commands:
        _Loop(int(seed), commands).run()


if __name__ == "__main__":
    _main(sys.argv[1:])

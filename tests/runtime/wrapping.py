"""The wrapper before a fake runtime, a stub that it restores, and all that is left of it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lazyfs.checkpoint.stub import MARKER, Stub, write_stub
from tests.faults import FaultServer, digest_of
from tests.mount.published import LAYERS, checkpoint_files, manifest_of, publish
from tests.runtime.scripts import install, write_program

FAKE = Path(__file__).with_name("fake_runtime.py")
ID = "f00dfeedf00dfeedf00dfeed"
TIMEOUT_S = 60.0


class Wrapped:
    """A bundle whose images directory is a stub's, and the wrapper to restore it."""

    def __init__(self, server: FaultServer, directory: Path, kind: str = "zstd:chunked") -> None:
        self.server = server
        self.files = checkpoint_files(pages_bytes=2 << 20)
        self.layer = LAYERS[kind](self.files)
        publish(server, self.layer)
        digest = digest_of(json.dumps(manifest_of(self.layer)).encode())
        self.reference = f"{server.host}/{server.repository}@{digest}"
        self.directory = directory
        self.state = directory / "state"
        self.state.mkdir(parents=True)
        self.bundle = directory / "bundle"
        self.images = self.bundle / "checkpoint"
        self.images.mkdir(parents=True)
        self.script = install(directory / "bin", "lazyfs-runc")
        self.runtime = write_program(
            directory / "usr/runc", f'#!/bin/sh\nexec {sys.executable} -I {FAKE} "$@"\n'
        )
        self.log = self.bundle / "oci-log"
        self.own_log = directory / "runtime.log"
        self.pid_file = self.bundle / "pid"
        self.words = ["--root", "/run/fake", "--log-format=json", "--log", str(self.log), "restore"]
        self.words += ["--bundle", str(self.bundle), "--pid-file", str(self.pid_file)]
        self.words += ["--detach", "--image-path", str(self.images)]
        self.words += ["--work-path", str(self.bundle), "--tcp-established", ID]
        self.configure()
        self.mark()

    def configure(self, text: str = "deadline = 3") -> None:
        logged = f'[log]\nfile = "{self.own_log}"\nlevel = "debug"\n'
        cache = f'cache-dir = "{self.directory / "cache"}"\n'
        (self.directory / "runtime.toml").write_text(f"{cache}{text}\n{logged}")

    def mark(self, **more: object) -> None:
        stub = Stub(reference=self.reference, **more)  # type: ignore[arg-type]
        (self.images / MARKER).write_bytes(write_stub(stub))

    def spoil(self) -> None:
        """Have the registry serve one byte of the memory wrong."""
        path = f"/v2/{self.server.repository}/blobs/{self.layer.digest}"
        resource = self.server.resources[path]
        body = bytearray(resource.body)
        body[len(body) // 2] ^= 1
        self.server.resources[path] = replace(resource, body=bytes(body))

    def environ(self, mode: str = "") -> dict[str, str]:
        return {
            **os.environ,
            "LAZYFS_REAL_RUNTIME": str(self.runtime),
            "LAZYFS_RUNTIME_CONFIG": str(self.directory / "runtime.toml"),
            "LAZYFS_RUN_DIR": str(self.directory / "run"),
            "FAKE_STATE": str(self.state),
            "FAKE_MODE": mode,
        }

    def start(self, mode: str = "", words: list[str] | None = None) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [self.script, *(self.words if words is None else words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environ(mode),
            cwd=self.directory,
        )

    def run(self, mode: str = "", words: list[str] | None = None) -> "tuple[int, str]":
        """Return the exit code, and what was said on standard error."""
        with self.start(mode, words) as process:
            out, error = process.communicate(timeout=TIMEOUT_S)
        assert out == b""
        return process.returncode, error.decode()

    def calls(self, command: str) -> list[list[str]]:
        path = self.state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [words for words in map(json.loads, lines) if command in words]

    @property
    def sums(self) -> Mapping[str, str]:
        """What the runtime has read."""
        return dict(json.loads((self.state / "sums").read_text()))

    @property
    def right_sums(self) -> Mapping[str, str]:
        return {
            name.removeprefix("checkpoint/"): hashlib.sha256(data).hexdigest()
            for name, data in self.files.items()
            if name.startswith("checkpoint/")
        }

    def container(self) -> int | None:
        """The container's process, if it lives."""
        with suppress(OSError, ValueError):
            pid = int((self.state / "container").read_text())
            text = Path(f"/proc/{pid}/stat").read_text()
            return pid if text.rpartition(")")[2].split()[0] != "Z" else None
        return None

    def processes(self) -> dict[int, str]:
        """All that was started by the wrapper and lives, but the container."""
        found = {}
        for each in Path("/proc").iterdir():
            with suppress(OSError):
                if (
                    each.name.isdigit()
                    and str(self.state).encode() in (each / "environ").read_bytes()
                ):
                    words = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(each.name)] = words
        found.pop(self.container() or 0, None)
        return found

    def wait_alone(self) -> None:
        wait_until(lambda: not self.processes(), lambda: f"{self.processes()}\n{self.own_words()}")

    def own_words(self) -> str:
        return self.own_log.read_text() if self.own_log.exists() else ""

    def alarms(self) -> list[str]:
        alarming = (" WARNING ", " ERROR ", " CRITICAL ")
        return [line for line in self.own_words().splitlines() if any(a in line for a in alarming)]

    def close(self) -> None:
        for pid in [*self.processes(), self.container()]:
            if pid:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def wait_until(is_so: Callable[[], object], what: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline_s, what()
        time.sleep(0.01)

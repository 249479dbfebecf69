"""What Podman calls its runtime with, step by step, from `run` to `rm`.

    python -m tests.real.engines.podman_calls FILE      writes it anew (contrib/testbed on the path)

tests/data/engines/podman.json is that, and test_podman_calls.py sees that it still is so.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from testbed import Recorder, Registry, Session, Testbed, TestbedError
from testbed.engines import STATUS
from testbed.podman import Podman
from testbed.workload import workload_options

from tests.real.engines.calls import anonymous, portable

_CONFIGURED = '[engine.runtimes]\nrunc = ["{}"]\n'


class _Steps:
    """Podman's commands on one machine, each with the calls that it made."""

    def __init__(self, session: Session, registry: Registry, into: list[dict[str, Any]]) -> None:
        self._recorder = Recorder(session)
        self.podman = Podman(session, registries=[registry.address])
        self.podman.configure(
            "containers.conf.d/50-recorder.conf", _CONFIGURED.format(self._recorder.path)
        )
        self._into = into
        self._known = {registry.address: "registry", session.name: "session"}

    def __call__(self, *words: str) -> None:
        before = len(self._recorder.calls())
        try:
            self.podman(*words)
        except TestbedError:
            failed = True
        else:
            failed = False
        self._learn()
        made = [portable(call, self.podman.session) for call in self._recorder.calls()[before:]]
        step = {"command": ["podman", *words], "failed": failed, "calls": made}
        self._into.append(anonymous(step, self._known))

    def _learn(self) -> None:
        listed = self.podman("ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Names}}")
        for line in listed.splitlines():
            ident, name = line.split()
            self._known[ident] = f"id of {name}"


def record(testbed: Testbed, work: Path) -> list[dict[str, Any]]:
    """Return Podman's commands, on one machine and on another, with the calls that each made."""
    into: list[dict[str, Any]] = []
    name = f"lazyfs-calls-{os.getpid()}"
    with Registry(testbed, work / "registry") as registry:
        base, checkpoint = f"{registry.address}/base:1", f"{registry.address}/checkpoint:1"
        with Session(testbed, [work], name=name) as session:
            step = _Steps(session, registry, into)
            step.podman.push_base(work, base)
            options = workload_options(Path(STATUS), size_mib=8)
            parent = ("--cgroup-parent", f"/{name}")
            step("run", "--detach", "--name", "first", *parent, base, "/workload", *options)
            step("exec", "first", "/bin/busybox", "true")
            step("kill", "--signal", "USR1", "first")
            step("container", "checkpoint", "--create-image", checkpoint, "first")
            step.podman("push", checkpoint)
        with Session(testbed, [work], name=name) as session:
            step = _Steps(session, registry, into)
            step("pull", checkpoint)
            step("container", "restore", checkpoint)
            step("run", "--name", "second", checkpoint)
            step("container", "restore", "--name", "third", "--file-locks", checkpoint)
            step("container", "checkpoint", "first")
            step("container", "restore", "first")
            step("stop", "--time", "1", "first")
            step("rm", "first")
            step("rm", "--force", "--time", "0", "second")
    return into


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lazyfs-calls-") as folder:
        recorded = record(Testbed.locate(), Path(folder))
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=1) + "\n")

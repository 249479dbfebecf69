"""What containerd's shim calls its runtime with, step by step, from `ctr run` to `ctr task rm`.

    python -m tests.real.engines.containerd_calls FILE      writes it anew

tests/data/engines/containerd.json is that, and test_containerd.py sees that it still is so.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from testbed import Containerd, Recorder, Registry, Session, Testbed, TestbedError

from tests.real.engines.calls import anonymous, portable


class _Steps:
    """`ctr`'s commands on one machine, each with the calls that the shims made."""

    def __init__(
        self, containerd: Containerd, recorder: Recorder, registry: str, into: list[dict[str, Any]]
    ) -> None:
        self._containerd, self._recorder, self._into = containerd, recorder, into
        self._known = {registry: "registry", containerd.session.name: "session"}

    def __call__(self, *words: str) -> None:
        before = len(self._recorder.calls())
        try:
            self._containerd.ctr(*words)
        except TestbedError:
            failed = True
        else:
            failed = False
        made = [_settled(call) for call in self._recorder.calls()[before:]]
        made = [portable(call, self._containerd.session) for call in made]
        step = {"command": ["ctr", *words], "failed": failed, "calls": made}
        self._into.append(anonymous(step, self._known))


def _settled(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call without what is there by chance.

    That is the shim's socket as descriptor 3, which the first runtimes inherit on some runs, and
    the number of processors.
    """
    call["descriptors"].pop("3", None)
    call["environ"].pop("GOMAXPROCS")
    return call


def record(testbed: Testbed, work: Path) -> list[dict[str, Any]]:
    """Return `ctr`'s commands, on one machine and on another, with the calls that each led to."""
    into: list[dict[str, Any]] = []
    name = f"lazyfs-calls-{work.name}"
    with Registry(testbed, work / "registry") as registry:
        checkpoint = f"{registry.address}/checkpoint:1"
        with (
            Session(testbed, [work], name=name) as session,
            Containerd(session, work / "first.log") as containerd,
        ):
            recorder = Recorder(session)
            containerd.import_base(work)
            binary = ["--runc-binary", recorder.path]
            containerd.run_workload("first", options=binary, changed=False, size_mib=8)
            step = _Steps(containerd, recorder, registry.address, into)
            step("task", "exec", "--exec-id", "true", "first", "/bin/busybox", "true")
            step("task", "kill", "--signal", "SIGUSR1", "first")
            step("container", "checkpoint", "--image", "--rw", "--task", "first", checkpoint)
            containerd.ctr("image", "push", "--plain-http", checkpoint)
        with (
            Session(testbed, [work], name=name) as session,
            Containerd(session, work / "second.log") as containerd,
        ):
            recorder = Recorder(session)
            containerd.import_base(work)
            step = _Steps(containerd, recorder, registry.address, into)
            step("content", "fetch", "--plain-http", checkpoint)
            step("container", "restore", "--live", "--rw", "first", checkpoint)
            step("task", "kill", "--signal", "SIGKILL", "first")
            step("task", "rm", "--force", "first")
            step("container", "rm", "first")
            Recorder(session, restores_with=3)
            step("container", "restore", "--live", "--rw", "first", checkpoint)
            step("task", "rm", "--force", "first")
    return into


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lazyfs-calls-") as folder:
        recorded = record(Testbed.locate(), Path(folder))
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=1) + "\n")

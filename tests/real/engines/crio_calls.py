"""What CRI-O calls conmon with, and conmon its runtime: a container's run and its restore.

    python -m tests.real.engines.crio_calls FILE      writes it anew

tests/data/engines/crio.json is that, and test_crio.py sees that it still is so. CRI-O's part is
played by `testbed.crio`, from its source; conmon and the runtime are real.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from testbed import CRIO_NAME, Recorder, Registry, Session, Testbed, buildah_image
from testbed.crio import CrioContainer, CrioPod
from testbed.podman import Podman
from testbed.process import run

from tests.real.engines.calls import anonymous, portable


def push_checkpoint(
    session: Session, tree: Path, target: str, name: str = "workload", *options: str
) -> None:
    """Push a checkpoint image as Kubernetes' documentation makes it of the kubelet's archive."""
    archive = tree.with_suffix(".tar")
    run(["tar", "-C", tree, "-cf", archive, *sorted(each.name for each in tree.iterdir())])
    buildah_image(session, archive, target, {CRIO_NAME: name}, *options)


def record(testbed: Testbed, work: Path) -> list[dict[str, Any]]:
    """Return what is asked of a container, on one machine and on another, with the calls made."""
    into: list[dict[str, Any]] = []
    name = f"lazyfs-calls-{work.name}"
    with Registry(testbed, work / "registry") as registry:
        base, checkpoint = f"{registry.address}/base:1", f"{registry.address}/checkpoint:1"
        with Session(testbed, [work], name=name) as session:
            recorder, pod = _pod(session, registry)
            pod.podman.push_base(work, base)
            container = pod.run(base, size_mib=8)
            pod.checkpoint(container, work / "tree", base)
            into.append(_step("run, hash, checkpoint", recorder, container, []))
            push_checkpoint(session, work / "tree", checkpoint)
        with Session(testbed, [work], name=name) as session:
            recorder, pod = _pod(session, registry)
            container = pod.restore(checkpoint)
            restored = [
                "--restore",
                f"/var/lib/containers/storage/overlay-containers/{container.id}",
            ]
            restored[-1] += "/userdata/checkpoint"
            container.remove()
            into.append(_step("restore, remove", recorder, container, restored))
    return into


def _pod(session: Session, registry: Registry) -> tuple[Recorder, CrioPod]:
    recorder = Recorder(session)
    return recorder, CrioPod(Podman(session, registries=[registry.address]), runtime=recorder.path)


def _step(
    what: str, recorder: Recorder, container: CrioContainer, more: list[str]
) -> dict[str, Any]:
    pod = container.pod
    known = {container.id: "id", pod.uid: "pod", pod.session.name: "session"}
    made = [portable(call, pod.session) for call in recorder.calls()]
    step = {"what": what, "conmon": pod.conmon_words(container, more), "calls": made}
    return dict(anonymous(step, known))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="lazyfs-calls-") as folder:
        recorded = record(Testbed.locate(), Path(folder))
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=1) + "\n")

"""Traces in a registry without a referrers API: pushed, listed, found by mounts, replaced."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Layer, Registry, Session, Testbed, push_oci_image, skopeo_copy
from testbed.process import wait_until

from lazyfs.checkpoint.referrals import TRACE_TYPE
from lazyfs.checkpoint.trace import TRACE_BLOB_TYPE, WORKLOAD_KEY, dump_trace
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.mounts import Mount, lazyfs, mounted
from tests.traces import trace_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Image:
    """An image in a registry of the test's own."""

    registry: Registry
    layer: str
    work: Path

    @property
    def reference(self) -> str:
        return f"{self.registry.address}/team/image:1"

    def trace(self, workload: str) -> Path:
        path = self.work / f"{workload}.trace"
        path.write_bytes(dump_trace(trace_of(self.layer, workload=workload, pages_bytes=1 << 40)))
        return path

    def push(self, workload: str, *options: str) -> dict[str, object]:
        words = ("--plain-http", "--json", *options, self.reference, self.trace(workload))
        done = lazyfs("trace", "push", *words)
        assert done.returncode == 0, done.stderr
        report: dict[str, object] = json.loads(done.stdout)
        return report

    def listed(self) -> list[str]:
        done = lazyfs("trace", "list", "--plain-http", "--json", self.reference)
        assert done.returncode == 0, done.stderr
        return [each["workload"] for each in json.loads(done.stdout)["traces"]]


@pytest.fixture(scope="module")
def process(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "process", size_mib=8)


@pytest.fixture
def image(testbed: Testbed, process: Checkpoint, work: Path) -> Iterator[Image]:
    with Registry(testbed, work / "registry", access_log=True) as registry:
        pushed = push_oci_image(registry.address, "team/image", "1", [Layer(process.layer)])
        yield Image(registry, pushed.layers[0].digest, work)


def workload_of(mount: Mount) -> str:
    wait_until(lambda: mount.status()["trace"] is not None, "a trace is found", 20)
    found: str = mount.status()["trace"]["workload"]
    return found


def test_pushed_listed_found_and_replaced(image: Image) -> None:
    assert image.listed() == []
    report = image.push("web")
    assert report["listed_by"] == "tag", "this registry has no API for referrers"
    image.push("job")
    assert image.listed() == ["job", "web"]
    second = image.push("web")
    assert image.listed() == ["web", "job"]
    with mounted(image.reference, image.work / "a", "--workload=web") as mount:
        assert workload_of(mount) == "web"
        assert mount.status()["trace"]["source"] == second["trace"]
        pinned = mount.status()["reference"]
    with mounted(image.reference, image.work / "b") as mount:
        assert workload_of(mount) == "web", "the newest"
    with mounted(pinned, image.work / "c", "--workload=job") as mount:
        assert workload_of(mount) == "job"
    done = lazyfs("trace", "show", "--plain-http", "--workload=job", image.reference)
    assert "Workload: job" in done.stdout
    assert "checkpoint/pages-1.img\t12.0 KiB" in done.stdout


def test_a_layout_that_skopeo_has_copied(testbed: Testbed, image: Image) -> None:
    layout = f"oci:{image.work}/layout:1"
    with Session(testbed, [image.work]) as session:
        skopeo_copy(session, f"docker://{image.reference}", layout, "--preserve-digests")
        done = lazyfs("trace", "push", "--json", layout, image.trace("web"))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["listed_by"] == "index"
        with mounted(layout, image.work / "mounted") as mount:
            assert workload_of(mount) == "web"
        skopeo_copy(session, layout, f"docker://{image.registry.address}/team/again:1")


def test_what_oras_lists_and_what_oras_attaches(testbed: Testbed, image: Image) -> None:
    """Its artifacts name no document in the list: their own manifests do."""
    first = image.push("web")
    job = image.trace("job")
    with Session(testbed, [image.work]) as session:
        discover = ["oras", "discover", "--plain-http", "-o", "json", image.reference]
        (listed,) = json.loads(session.run(discover))["manifests"]
        assert listed["digest"] == first["artifact"]
        assert listed["artifactType"] == TRACE_TYPE
        session.run(
            [
                *("oras", "attach", "--plain-http", "--disable-path-validation"),
                *("--artifact-type", TRACE_TYPE, "--annotation", f"{WORKLOAD_KEY}=job"),
                *(image.reference, f"{job}:{TRACE_BLOB_TYPE}"),
            ]
        )
    assert sorted(image.listed()) == ["job", "web"]
    with mounted(image.reference, image.work / "mounted", "--workload=job") as mount:
        assert workload_of(mount) == "job"

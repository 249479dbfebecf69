"""Stubs of real checkpoints: what engines make of them, and that none comes up without its memory.

By the runtime wrapper they are restored elsewhere (`tests/real/engines`); here nothing helps.
"""

import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from testbed import (
    ContainerdCheckpoint,
    CriuError,
    PodmanCheckpoint,
    Session,
    TestbedError,
    containerd_checkpoint,
    podman_checkpoint,
)
from testbed.containerd import CRIU_TAR, Containerd
from testbed.engines import PODMAN
from testbed.images import get_manifest
from testbed.process import run

from lazyfs.checkpoint.criu import link_for_left_out
from lazyfs.checkpoint.stub import ANNOTATION, MARKER, read_stub
from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.mounts import lazyfs, mounted

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_SAID = "Too many levels of symbolic links"
_BASE = "localhost/testbed-base:latest"


@pytest.fixture(scope="module")
def podman(store: Store, shelf: Path) -> PodmanCheckpoint:
    return podman_checkpoint(
        store.testbed,
        shelf / "podman",
        store.address,
        "stubs/podman",
        formats=["gzip", "zstd:chunked"],
        size_mib=8,
        shared_mib=4,
        children=1,
    )


@pytest.fixture(scope="module")
def stub(podman: PodmanCheckpoint, store: Store, shelf: Path) -> str:
    reference = f"{store.address}/stubs/podman:stub"
    _stub(podman.images["zstd:chunked"].reference, reference, shelf / "cache")
    return reference


def _stub(reference: str, new_reference: str, cache: Path, *options: str) -> dict[str, object]:
    words = ["stub", "--json", "--cache-dir", cache, *options, reference, new_reference]
    done = lazyfs(*words)
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("form", ["gzip", "zstd:chunked"])
def test_all_but_memory_is_as_it_was(
    podman: PodmanCheckpoint, store: Store, work: Path, form: str
) -> None:
    real = podman.images[form]
    report = _stub(real.reference, f"oci:{work}/layout:stub", work / "cache")
    skopeo = [*store.testbed.host_command("skopeo"), "copy", "--insecure-policy"]
    run([*skopeo, f"oci:{work}/layout:stub", f"dir:{work}/copy"])  # compares digests and diff ids
    manifest = json.loads((work / "copy/manifest.json").read_text())
    by_digest = f"{real.reference.rpartition(':')[0]}@{real.digest}"
    assert manifest["annotations"] == {**real.annotations, ANNOTATION: by_digest}
    (layer,) = manifest["layers"]
    tree = work / "tree"
    with tarfile.open(work / "copy" / layer["digest"].partition(":")[2]) as archive:
        archive.extractall(tree, filter="fully_trusted")
    marker = read_stub((tree / "checkpoint" / MARKER).read_bytes())
    assert marker.reference == by_digest
    left_out = {f"checkpoint/{each.name}" for each in marker.pages}
    assert left_out == {
        str(path.relative_to(podman.tree)) for path in podman.tree.glob("checkpoint/pages-*.img")
    }
    assert report["pages_files"] == len(left_out)
    names = {str(path.relative_to(podman.tree)) for path in podman.tree.rglob("*")}
    assert {str(path.relative_to(tree)) for path in tree.rglob("*")} == names | {
        f"checkpoint/{MARKER}"
    }
    for name in names - left_out:
        mine, other = tree / name, podman.tree / name
        assert mine.lstat().st_mode == other.lstat().st_mode, name
        assert int(mine.lstat().st_mtime) == int(other.lstat().st_mtime), name
        if other.is_file():
            assert mine.read_bytes() == other.read_bytes(), name


def test_podman_pulls_it_and_without_the_wrapper_says_why_it_does_not_restore(
    podman: PodmanCheckpoint, store: Store, stub: str, work: Path
) -> None:
    with Session(store.testbed, [work, podman.base_tar.parent]) as session:

        def run_podman(*words: str | Path) -> str:
            return session.run([*PODMAN, *words])

        run_podman("import", "--quiet", podman.base_tar.absolute(), _BASE)
        run_podman("pull", "--quiet", "--tls-verify=false", f"docker://{stub}")
        with pytest.raises(TestbedError, match="criu failed"):
            run_podman("container", "restore", "--name", "again", stub)
        storage = "/var/lib/containers/storage/overlay-containers"
        log = session.run(["sh", "-c", f"cat {storage}/*/userdata/restore.log"])
        assert _SAID in log
        assert run_podman("ps", "--quiet").strip() == ""


def test_skopeo_and_podman_take_it_in_each_of_its_forms(
    podman: PodmanCheckpoint, store: Store, stub: str, work: Path
) -> None:
    real = podman.images["gzip"].reference
    archive = f"oci-archive:{work}/stub.tar"
    report = _stub(real, archive, work / "cache")
    assert report["reference"] == f"{archive}@{_digest_of(report)}"
    with Session(store.testbed, [work]) as session:
        for where in archive, f"docker://{stub}":
            said = session.run(["skopeo", "inspect", "--tls-verify=false", where])
            assert len(json.loads(said)["Layers"]) == 1
        with tarfile.open(work / "stub.tar") as opened:
            largest = max(opened, key=lambda member: member.size)
            opened.extract(largest, work / "layer", filter="data")
        said = session.run(["checkpointctl", "inspect", work / "layer" / largest.name])
        assert "Engine: Podman" in said
        pulled = session.run([*PODMAN, "pull", "--quiet", archive]).strip()
        words = ["image", "inspect", "--format", "{{.Digest}}", pulled]
        assert session.run([*PODMAN, *words]).strip() == _digest_of(report)


def test_containers_storage_is_written_by_skopeo(
    podman: PodmanCheckpoint, store: Store, work: Path
) -> None:
    """What stands for skopeo here is a script that enters the testbed's root."""
    real = podman.images["gzip"].reference
    with Session(store.testbed, [work]) as session:
        entered = " ".join(shlex.quote(word) for word in session.command(["skopeo"]))
        (work / "bin").mkdir()
        (work / "bin/skopeo").write_text(f'#!/bin/sh\nexec {entered} "$@"\n')
        (work / "bin/skopeo").chmod(0o755)
        path = f"{work}/bin:{os.environ['PATH']}"
        name = "containers-storage:localhost/stub:1"
        words = ["stub", "--json", "--cache-dir", str(work / "cache"), real, name]
        done = subprocess.run(
            [sys.executable, "-m", "lazyfs", *words],
            env={**os.environ, "PATH": path, "TMPDIR": str(work)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        digest = _digest_of(json.loads(done.stdout))
        words = ["image", "inspect", "--format", "{{.Digest}}", "localhost/stub:1"]
        assert session.run([*PODMAN, *words]).strip() == digest


def test_a_mount_of_a_stub_is_a_mount_of_what_it_stands_for(
    podman: PodmanCheckpoint, stub: str, work: Path
) -> None:
    with mounted(stub, work) as mount:
        for pages in podman.tree.glob("checkpoint/pages-*.img"):
            assert (mount.directory / pages.name).read_bytes() == pages.read_bytes()
        assert not (mount.directory / MARKER).exists()
        state = mount.status()
    real = podman.images["zstd:chunked"]
    assert state["reference"] == f"{real.reference.rpartition(':')[0]}@{real.digest}"
    assert state["stub"].startswith(f"{stub.rpartition(':')[0]}@sha256:")
    with mounted(stub, work, "--no-follow", "--view=image") as mount:
        assert (mount.directory / "checkpoint" / MARKER).exists()
        with pytest.raises(OSError, match=_SAID):
            (mount.directory / "checkpoint/pages-1.img").open("rb")
        assert mount.status()["stub"] is None


@pytest.fixture(scope="module")
def containerd(store: Store, shelf: Path) -> ContainerdCheckpoint:
    return containerd_checkpoint(
        store.testbed, shelf / "containerd", store.address, "stubs/containerd", size_mib=8
    )


def test_of_containerds_index_one_member_is_another(
    containerd: ContainerdCheckpoint, store: Store, work: Path
) -> None:
    reference = f"{store.address}/stubs/of/containerd:stub"
    _stub(containerd.reference, reference, work / "cache")
    _digest, index = get_manifest(store.address, "stubs/of/containerd", "stub")
    before = {each["mediaType"]: each for each in containerd.index["manifests"]}
    after = {each["mediaType"]: each for each in index["manifests"]}
    changed = [kind for kind in before if before[kind] != after.get(kind)]
    assert (changed, list(before)) == ([CRIU_TAR], list(after))
    stands_for = index["annotations"].pop(ANNOTATION)
    assert index["annotations"] == containerd.index["annotations"]
    shelf = containerd.base_tar.parent
    with (
        Session(store.testbed, [work, shelf]) as session,
        Containerd(session, work / "log") as other,
    ):
        base = containerd.base_tar.with_name("base-image.tar").absolute()
        other.ctr("image", "import", "--base-name", "docker.io/testbed/base", base)
        with pytest.raises(TestbedError, match="unpacking"):  # as of any checkpoint: all is there
            other.ctr("image", "pull", "--plain-http", reference)
        with tarfile.open(fileobj=io.BytesIO(other.blob(after[CRIU_TAR]["digest"]))) as images:
            names = images.getnames()
            marker = images.extractfile(MARKER)
            assert marker is not None
            assert read_stub(marker.read()).reference == stands_for
        assert "inventory.img" in names
        assert stands_for.startswith(f"{store.address}/stubs/containerd@sha256:")
        with pytest.raises(TestbedError, match="criu failed"):
            other.ctr("container", "restore", "--live", "--rw", "again", reference)
        assert "RUNNING" not in other.ctr("task", "ls")


# -- by CRIU itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dumped(store: Store, shelf: Path) -> Checkpoint:
    """Memory of all kinds: of two tasks, and what they share."""
    return checkpoint(store.testbed, shelf / "dump", size_mib=8, shared_mib=4, children=1)


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy-pages"])
def test_criu_brings_nothing_up_whichever_memory_is_left_out(
    dumped: Checkpoint, work: Path, lazy: bool
) -> None:
    """CRIU takes a pages file that is not there for an empty one: shared memory would be zeros."""
    with tarfile.open(dumped.layer) as archive:
        archive.extractall(work / "images", filter="fully_trusted")
    (inventory,) = (work / "images").rglob("inventory.img")
    directory = inventory.parent
    all_pages = sorted(directory.glob("pages-*.img"))
    assert len(all_pages) == 3
    for pages in all_pages:
        kept = pages.rename(directory / "kept")
        pages.symlink_to(link_for_left_out(pages.name))
        with pytest.raises(CriuError, match=_SAID):
            dumped.restore(directory, work / f"restore-{pages.name}", lazy_pages=lazy)
        kept.rename(pages)
    with dumped.restore(directory, work / "restore", lazy_pages=lazy) as restored:
        dumped.before.assert_goes_on(restored)


def _digest_of(report: dict[str, object]) -> str:
    return str(report["reference"]).rpartition("@")[2]

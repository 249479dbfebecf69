"""What engines make of a container: shown as they wrote it, and restored by runc."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import (
    CRIO_NAME,
    ContainerdCheckpoint,
    Layer,
    PodmanCheckpoint,
    Restored,
    Session,
    Status,
    WebServer,
    buildah_image,
    checkpointctl_annotations,
    containerd_checkpoint,
    make_bundle,
    podman_checkpoint,
    push_oci_image,
    runc_restore,
    skopeo_copy,
    write_crio_archive,
)

from tests.real.checkpoints import Before
from tests.real.conftest import Store
from tests.real.corpus import Proof
from tests.real.mounts import Mount, lazyfs, mounted
from tests.real.trees import contents

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_PODMAN_ROOT_MODE, _CONTAINERD_ROOT_MODE = 0o555, 0o755


class Engines:
    """Containers checkpointed by Podman and by containerd, each once."""

    def __init__(self, store: Store, shelf: Path, web: WebServer) -> None:
        """Run and checkpoint them."""
        self.store, self.shelf, self.web = store, shelf, web
        self._made: dict[str, Made] = {}
        self.podman: PodmanCheckpoint = podman_checkpoint(
            store.testbed,
            shelf / "podman",
            store.address,
            "engines/podman",
            formats=["gzip", "zstd", "zstd:chunked"],
            archives=["none", "gzip", "zstd"],
            size_mib=32,
        )
        self.containerd: ContainerdCheckpoint = containerd_checkpoint(
            store.testbed, shelf / "containerd", store.address, "engines/containerd"
        )
        self.crio_tree = shelf / "crio"
        self.crio_archive = shelf / "crio.tar"
        write_crio_archive(self.podman.tree, self.crio_tree, self.crio_archive)

    def made(self, case: "Case") -> "Made":
        """Return what a case is about, made if it is asked for the first time."""
        if case.name not in self._made:
            self._made[case.name] = case.make(self)
        return self._made[case.name]

    def unpacked(self, archive: Path) -> Path:
        """Unpack an archive by tar."""
        tree = self.shelf / f"{archive.name}.tree"
        if not tree.exists():
            tree.mkdir()
            subprocess.run(["tar", "-C", str(tree), "-xf", str(archive)], check=True)
        return tree


@dataclass(frozen=True)
class Made:
    """A checkpoint by an engine."""

    reference: str
    tree: Path
    """What is in it, by other means: checkpoint/, spec.dump, rootfs-diff.tar, …"""
    base_tar: Path
    hashes: tuple[str, ...]
    root_mode: int = _PODMAN_ROOT_MODE


@dataclass(frozen=True)
class Case:
    """One thing that an engine makes, and what lazyfs should find it to be."""

    name: str
    make: Callable[[Engines], Made]
    engine: str
    format: str
    proof: Proof


CASES: list[Case] = []


def _case(
    name: str, engine: str, layer_format: str, proof: Proof
) -> Callable[[Callable[[Engines], Made]], Callable[[Engines], Made]]:
    def add(make: Callable[[Engines], Made]) -> Callable[[Engines], Made]:
        CASES.append(Case(name, make, engine, layer_format, proof))
        return make

    return add


def _podman(engines: Engines, reference: str, tree: Path | None = None) -> Made:
    podman = engines.podman
    return Made(reference, tree or podman.tree, podman.base_tar, podman.hashes)


@_case("podman-gzip", "Podman", "gzip", "layer")
def _podman_gzip(engines: Engines) -> Made:
    return _podman(engines, engines.podman.images["gzip"].reference)


@_case("podman-zstd", "Podman", "zstd", "layer")
def _podman_zstd(engines: Engines) -> Made:
    return _podman(engines, engines.podman.images["zstd"].reference)


@_case("podman-zstd-chunked", "Podman", "zstd:chunked", "chunk")
def _podman_chunked(engines: Engines) -> Made:
    return _podman(engines, engines.podman.images["zstd:chunked"].reference)


@_case("podman-uncompressed", "Podman", "tar", "layer")
def _podman_uncompressed(engines: Engines) -> Made:
    """Podman pushes nothing that is not compressed; skopeo unpacks it, and it is pushed as is."""
    image, directory = engines.podman.images["gzip"], engines.shelf / "plain"
    if not directory.exists():
        with Session(engines.store.testbed, [engines.shelf]) as session:
            source = f"docker://{image.reference}"
            skopeo_copy(session, source, f"dir:{directory}", "--dest-decompress")
    (layer,) = json.loads((directory / "manifest.json").read_text())["layers"]
    push_oci_image(
        engines.store.address,
        "engines/plain",
        "1",
        [Layer(directory / layer["digest"].partition(":")[2])],
        annotations=image.annotations,
    )
    return _podman(engines, f"{engines.store.address}/engines/plain:1")


@_case("podman-export", "Podman", "tar", "none")
def _podman_export(engines: Engines) -> Made:
    archive = engines.podman.archives["none"]
    return _podman(engines, str(archive), engines.unpacked(archive))


@_case("podman-export-gzip", "Podman", "gzip", "none")
def _podman_export_gzip(engines: Engines) -> Made:
    archive = engines.podman.archives["gzip"]
    return _podman(engines, str(archive), engines.unpacked(archive))


@_case("podman-export-zstd", "Podman", "zstd", "none")
def _podman_export_zstd(engines: Engines) -> Made:
    archive = engines.podman.archives["zstd"]
    return _podman(engines, str(archive), engines.unpacked(archive))


@_case("podman-export-zstd-by-url", "Podman", "zstd", "none")
def _podman_export_url(engines: Engines) -> Made:
    archive = engines.podman.archives["zstd"]
    url = f"http://{engines.web.address}/podman/{archive.name}"
    return _podman(engines, url, engines.unpacked(archive))


@_case("crio-archive", "CRI-O", "tar", "none")
def _crio_archive(engines: Engines) -> Made:
    return _podman(engines, str(engines.crio_archive), engines.crio_tree)


@_case("crio-image-by-buildah", "CRI-O", "gzip", "layer")
def _crio_image(engines: Engines) -> Made:
    """As the documentation of Kubernetes' checkpoint API has it done."""
    return _built(engines, "crio", {CRIO_NAME: "workload"})


@_case("crio-image-by-checkpointctl", "CRI-O", "gzip", "layer")
def _checkpointctl_image(engines: Engines) -> Made:
    return _built(engines, "checkpointctl", checkpointctl_annotations(engines.crio_tree))


def _built(engines: Engines, name: str, annotations: dict[str, str]) -> Made:
    target = f"{engines.store.address}/engines/{name}:1"
    with Session(engines.store.testbed, [engines.shelf]) as session:
        buildah_image(session, engines.crio_archive, target, annotations)
    return _podman(engines, target, engines.crio_tree)


def _containerd(engines: Engines, reference: str) -> Made:
    made = engines.containerd
    return Made(reference, made.tree, made.base_tar, made.hashes, _CONTAINERD_ROOT_MODE)


@_case("containerd-index", "containerd", "tar", "layer")
def _containerd_index(engines: Engines) -> Made:
    return _containerd(engines, engines.containerd.reference)


@_case("containerd-cri-archive", "containerd", "tar", "none")
def _containerd_archive(engines: Engines) -> Made:
    return _containerd(engines, str(engines.containerd.archive))


every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
archives = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name != "containerd-index"],
    ids=lambda case: case.name,
)
layered = pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.name.startswith("containerd") or case.name.startswith("podman-export")
    ],
    ids=lambda case: case.name,
)
lazily = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("podman-gzip", "containerd-index")],
    ids=lambda case: case.name,
)


@pytest.fixture(scope="module")
def engines(store: Store, shelf: Path) -> Iterator[Engines]:
    with WebServer.of_folder(store.testbed, shelf / "web", shelf) as web:
        yield Engines(store, shelf, web)


@every_case
def test_it_is_what_the_engine_wrote_and_goes_on(engines: Engines, case: Case, work: Path) -> None:
    made = engines.made(case)
    with mounted(made.reference, work) as mount:
        with _restored(engines.store, mount, made, work) as (before, restored):
            before.assert_goes_on(restored)
        assert contents(mount.directory) == contents(made.tree / "checkpoint")
        state = mount.status()
    assert state["layer_format"] == case.format
    assert state["chunks_proven"] == (case.proof == "chunk")
    assert state["failed_reads"] == 0
    assert state["failed"] is None


@lazily
def test_it_goes_on_with_lazy_pages(engines: Engines, case: Case, work: Path) -> None:
    made = engines.made(case)
    with mounted(made.reference, work) as mount:
        with _restored(engines.store, mount, made, work, lazy=True) as (before, restored):
            before.assert_goes_on(restored)
            restored.wait_lazy_pages()
        assert mount.status()["failed_reads"] == 0


@archives
def test_all_of_the_image_is_the_archive_unpacked(engines: Engines, case: Case, work: Path) -> None:
    """Whatever lazyfs shows besides, all that the engine wrote is there as it was."""
    made = engines.made(case)
    expected = contents(made.tree)
    with mounted(made.reference, work, "--view=image") as mount:
        shown = contents(mount.directory)
        assert mount.status()["failed_reads"] == 0
    assert {path: shown.get(path) for path in expected} == expected


@layered
def test_the_containers_files_can_be_laid_over_its_image(
    engines: Engines, case: Case, work: Path
) -> None:
    """With what it changed, and without what it deleted; nothing is unpacked for that."""
    made = engines.made(case)
    bundle = make_bundle(made.tree, made.base_tar, work / "bundle", root_mode=made.root_mode)
    base, merged = work / "base", work / "merged"
    for folder in base, merged:
        folder.mkdir()
    subprocess.run(["tar", "-C", str(base), "-xf", str(made.base_tar)], check=True)
    with mounted(made.reference, work, "--view=image") as mount:
        lower = f"lowerdir={mount.directory}/rootfs-diff:{base}"
        subprocess.run(["mount", "-t", "overlay", "-o", lower, "none", str(merged)], check=True)
        try:
            shown = contents(merged)
        finally:
            subprocess.run(["umount", str(merged)], check=True)
        assert mount.status()["failed_reads"] == 0
    assert shown == contents(bundle / "rootfs")
    assert "status" in shown
    assert "bin/sh" not in shown
    assert "tmp/old" not in shown


@every_case
def test_inspect_names_the_engine(engines: Engines, case: Case, work: Path) -> None:
    reference = engines.made(case).reference
    done = lazyfs("inspect", "--json", "--plain-http", "--cache-dir", work / "cache", reference)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["origin"]["engine"] == case.engine
    if case.name != "containerd-index":  # which does not say
        assert report["origin"]["container_name"] == "workload"
    kinds = [(layer["format"], layer["proof"]) for layer in report["layers"]]
    assert (case.format, case.proof) in kinds
    (process,) = report["processes"]
    assert (process["command"], process["pid"]) == ("workload", 1)
    if case.engine == "CRI-O":
        assert report["origin"]["pod_name"] == "pod"


@contextmanager
def _restored(
    store: Store, mount: Mount, made: Made, work: Path, *, lazy: bool = False
) -> Iterator[tuple[Before, Restored]]:
    """Restore a container by plain runc from a mount; what it had done is in its status file."""
    bundle = make_bundle(made.tree, made.base_tar, work / "bundle", root_mode=made.root_mode)
    status = Status(bundle / "rootfs/status")
    loops = {event.member: event for event in status.events("loop")}
    images = mount.directory
    with (
        Session(store.testbed, [work]) as session,
        runc_restore(session, images, bundle, work / "runc", lazy_pages=lazy) as restored,
    ):
        yield Before(loops, made.hashes), restored
    shutil.rmtree(bundle)

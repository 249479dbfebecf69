"""Containers that Podman has checkpointed and pushed, each made once, with the stubs of them."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed import get_manifest, skopeo_copy

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, machine

SIZE_MIB, CHILDREN, SHARED_MIB = 48, 1, 4
PLAIN = "uncompressed"
FORMATS = ("gzip", "zstd:chunked", PLAIN)


@dataclass(frozen=True)
class Origin:
    """A container's checkpoint in a registry, in several formats, and its stubs."""

    cgroup: str
    """Where the container was; name the machine so that restores it."""
    runtime: str
    repository: str
    """`host:port/path`."""
    hashes: tuple[str, ...]
    """Of its processes' memory, before the checkpoint."""

    def real(self, form: str) -> str:
        """Return the name of the image."""
        return f"{self.repository}:{form.replace(':', '-')}"

    def stub(self, form: str) -> str:
        """Return the name of its stub."""
        return f"{self.real(form)}-stub"


def origin(
    store: Store, shelf: Path, runtime: str = "runc", formats: Sequence[str] = FORMATS
) -> Origin:
    """Run the workload with Podman, checkpoint it, push it in all formats, and make the stubs."""
    made = Origin(
        f"lazyfs-{shelf.name}-{os.getpid()}", runtime, f"{store.address}/{shelf.name}", ()
    )
    with machine(
        store.testbed, [shelf], [store.address], name=made.cgroup, runtime=runtime
    ) as here:
        base = f"{made.repository}/base:1"
        here.podman.push_base(shelf, base)
        running = here.podman.run_workload(
            base, size_mib=SIZE_MIB, children=CHILDREN, shared_mib=SHARED_MIB
        )
        made = Origin(made.cgroup, runtime, made.repository, running.memory_hash())
        checkpoint_and_push(here, "workload", made, shelf, formats)
    return made


def checkpoint_and_push(
    here: Machine, name: str, to: Origin, shelf: Path, formats: Sequence[str]
) -> None:
    """Checkpoint a container into images in a registry, and make their stubs."""
    image = f"{to.repository}:local"
    here.podman("container", "checkpoint", "--create-image", image, name)
    for form in formats:
        if form == PLAIN:
            _push_plain(here, image, to.real(form), shelf)
        else:
            push = ["--compression-format", form, "--force-compression"]
            here.podman("push", "--quiet", *push, image, f"docker://{to.real(form)}")
        here.stub(to.real(form), to.stub(form))
    here.podman("rmi", "--force", image)


def layer_of(image: str) -> tuple[str, int]:
    """Return the digest and the size of an image's one layer."""
    address, _, name = image.partition("/")
    repository, _, tag = name.rpartition(":")
    _, manifest = get_manifest(address, repository, tag)
    (layer,) = manifest["layers"]
    return layer["digest"], layer["size"]


def _push_plain(here: Machine, image: str, target: str, shelf: Path) -> None:
    """Push an image uncompressed, which Podman itself does not do."""
    folder = shelf / "plain"
    gzipped = f"docker://{target}-gzip"
    here.podman("push", "--quiet", image, gzipped)
    skopeo_copy(here.session, gzipped, f"dir:{folder}", "--dest-decompress")
    skopeo_copy(here.session, f"dir:{folder}", f"docker://{target}", "--preserve-digests")
    shutil.rmtree(folder)

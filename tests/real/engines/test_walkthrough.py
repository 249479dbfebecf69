"""The commands of contrib/kubernetes/README.md between a checkpoint and its restore, as written.

The restore itself, by what CRI-O calls its runtime with, is test_crio.py's.
"""

import json
import re
from pathlib import Path

import pytest
from testbed import Session, get_manifest, portable_lazyfs

from tests.real.conftest import Store

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

CLONE = Path(__file__).parents[3]
README = CLONE / "contrib/kubernetes/README.md"
SAMPLE = CLONE / "contrib/demo/sample"
ARCHIVE = "/var/lib/kubelet/checkpoints/checkpoint-counters_default-counter-2026.tar"
ANNOTATIONS = {
    "io.kubernetes.cri-o.annotations.checkpoint.name": "counter",
    "org.criu.checkpoint.container.name": "counter",
}


def commands(heading: str) -> str:
    """Return what a section of the README has after its prompts, as one script."""
    section = README.read_text().partition(heading)[2].partition("\n**")[0]
    assert section, f"{heading} is not in the README"
    lines = re.findall(r"^    (?:\$ )?(.*)$", section, re.MULTILINE)
    return "\n".join(lines)


def test_an_image_and_its_stub_are_made_of_a_checkpoint_as_the_readme_says(store: Store) -> None:
    script = commands("**2. Make an image of it**") + "\n" + commands("**3. Make the stub**")
    script = script.replace("registry.example", store.address)
    tree = portable_lazyfs(store.testbed)
    with Session(store.testbed, [tree, SAMPLE]) as session:
        insecure = f'[[registry]]\nlocation = "{store.address}"\ninsecure = true\n'
        session.path("/etc/containers/registries.conf").write_text(insecure)
        session.run(["ln", "-s", tree / "bin/lazyfs", "/usr/local/bin/"])
        session.run(["mkdir", "-p", Path(ARCHIVE).parent])
        manifest = json.loads((SAMPLE / "index.json").read_text())["manifests"][0]["digest"]
        described = json.loads((SAMPLE / "blobs" / manifest.replace(":", "/")).read_text())
        layer = SAMPLE / "blobs" / described["layers"][0]["digest"].replace(":", "/")
        session.run(["cp", layer, ARCHIVE])
        session.run(["bash", "-euxc", script], timeout_s=240)
        stub = f"{store.address}/checkpoints/counter:1-stub"
        told = session.run(["lazyfs", "inspect", stub])
    digest, image = get_manifest(store.address, "checkpoints/counter", "1")
    _, stubbed = get_manifest(store.address, "checkpoints/counter", "1-stub")
    for annotations in (image["annotations"], stubbed["annotations"]):
        assert ANNOTATIONS.items() <= annotations.items()
    assert sum(layer["size"] for layer in stubbed["layers"]) < 65_536
    assert digest in told

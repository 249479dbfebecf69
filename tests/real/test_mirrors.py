"""Real registries behind mirror entries: pull-through, one that is killed, one whose disk lies."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import requests
from testbed import Access, Layer, Registry, Testbed, Wan, push_oci_image, skopeo_copy
from testbed.process import wait_until

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.corpus import corpus
from tests.real.mounts import Mount, mounted
from tests.real.trees import contents

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

MOUNTS = 100
LIES = "gave wrong bytes and is asked no more"
AT_ONCE = 10


@pytest.fixture(scope="module")
def process(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "process", size_mib=24)


@dataclass(frozen=True)
class Image:
    """An image in a registry of the test's own, and what is in it."""

    registry: Registry
    name: str
    """`repository:tag`."""
    layer: str
    """The digest of its only layer."""
    layer_bytes: int

    @property
    def reference(self) -> str:
        return f"{self.registry.address}/{self.name}"

    def asked_for(self) -> list[Access]:
        """Return the requests for its layer's bytes that the registry has answered."""
        accesses = self.registry.accesses()
        return [each for each in accesses if self.layer in each.path and each.method == "GET"]


@pytest.fixture
def image(testbed: Testbed, process: Checkpoint, work: Path) -> Iterator[Image]:
    with Registry(testbed, work / "registry", access_log=True) as registry:
        pushed = push_oci_image(registry.address, "team/image", "1", [Layer(process.layer)])
        layer = pushed.layers[0]
        yield Image(registry, "team/image:1", layer.digest, layer.size)


def write_conf(path: Path, registry: Registry, *mirrors: Registry) -> str:
    """Write a registries.conf with these mirrors; return the option that names it."""
    lines = ["[[registry]]", f'location = "{registry.address}"']
    for mirror in mirrors:
        lines += ["[[registry.mirror]]", f'location = "{mirror.address}"']
    path.write_text("\n".join(lines))
    return f"--mirrors={path}"


def has(mirror: Registry, image: Image) -> bool:
    """Whether a mirror serves ranges of the image's layer: a cold one sends everything."""
    url = f"http://{mirror.address}/v2/team/image/blobs/{image.layer}"
    with requests.get(url, headers={"Range": "bytes=0-0"}, stream=True, timeout=20) as reply:
        return reply.status_code == 206


@pytest.mark.timeout(480)
def test_a_hundred_mounts_and_one_fetch_upstream(
    testbed: Testbed, image: Image, process: Checkpoint, work: Path
) -> None:
    """The first mount makes the cache fetch the layer; the other hundred have it from the cache.

    The reference registry's cache does not serve ranges of what it does not have yet: it fetches
    it whole, and passes a second copy to whoever asked, who hangs up.
    """
    expected: dict[str, str] = {}
    with Registry(testbed, work / "cache", upstream=image.registry.address) as cache:
        option = write_conf(work / "registries.conf", image.registry, cache)
        with mounted(image.reference, work / "first", option) as mount:
            expected = contents(mount.directory)
        wait_until(partial(has, cache, image), "the layer in the cache", 60)
        whole = [each for each in image.asked_for() if each.sent_bytes == image.layer_bytes]
        assert [(each.method, each.status) for each in whole] == [("GET", 200)]
        before = len(image.asked_for())

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for seen, fetched in pool.map(
                lambda number: look(image.reference, work / f"mount-{number}", option),
                range(MOUNTS),
            ):
                assert seen == expected
                assert fetched > image.layer_bytes * 0.9, "each has fetched it, from the cache"
        more = sum(each.sent_bytes for each in image.asked_for()[before:])
        assert more < image.layer_bytes, "a slow answer may be asked for twice, elsewhere: no more"


def look(reference: str, home: Path, option: str) -> tuple[dict[str, str], int]:
    """Mount, read everything, unmount; return what was read and how many bytes were fetched."""
    mount = Mount(reference, home, (option,), home / "cache")
    try:
        mount.start()
        seen = contents(mount.directory)
        state = mount.status()
        mount.umount_by_hand()
        assert not mount.alarms()
    finally:
        mount.clear()
    shutil.rmtree(home)
    fetched: int = state["bytes_fetched"]
    return seen, fetched


def test_a_mirror_that_is_killed_in_mid_read_is_left_for_the_registry(
    testbed: Testbed, image: Image, process: Checkpoint, work: Path
) -> None:
    with (
        Wan(testbed, one_way_ms=5, rate_mbit=50) as wan,
        Registry(testbed, work / "mirror", ip=wan.far_ip, enter=wan.enter) as mirror,
    ):
        push_oci_image(mirror.address, "team/image", "1", [Layer(process.layer)])
        option = write_conf(work / "registries.conf", image.registry, mirror)
        with mounted(image.reference, work, option) as mount:
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(contents, mount.directory)
                mount.wait_fetched(image.layer_bytes // 5)
                assert not image.asked_for()
                mirror.kill()
                seen = reading.result(timeout=60)
            state = mount.status()
        assert seen == _unpacked(process, work)
        assert state["failed_reads"] == 0
        assert image.asked_for()
        first, last = state["places"]
        assert first["name"].startswith(mirror.address)
        assert first["failures"] > 0
        assert last["failures"] == 0


def test_a_mirror_whose_disk_lies_is_never_believed(
    testbed: Testbed, store: Store, process: Checkpoint, work: Path
) -> None:
    """Of zstd:chunked each chunk has a digest: what is wrong is had from the registry."""
    (work / "mirror").mkdir()
    with (
        corpus(store, process, work / "corpus") as forms,
        Registry(testbed, work / "registry") as registry,
        Registry(testbed, work / "mirror") as mirror,
    ):
        source = forms.reference("skopeo-zstd-chunked")
        for target in (registry, mirror):
            copied = f"docker://{target.address}/team/image:1"
            skopeo_copy(forms.session, f"docker://{source}", copied)
        changed = [
            flipped(path)
            for path in (work / "mirror/data").rglob("data")
            if path.stat().st_size > 1 << 20
        ]
        assert len(changed) == 1
        option = write_conf(work / "registries.conf", registry, mirror)
        with mounted(f"{registry.address}/team/image:1", work, option, forgiven=(LIES,)) as mount:
            assert contents(mount.directory) == _unpacked(process, work)
            state = mount.status()
            assert LIES in mount.log_text()
    assert (state["failed"], state["failed_reads"]) == (None, 0)
    assert [place["lied"] for place in state["places"]] == [True, False]


def flipped(path: Path) -> Path:
    """Change the byte in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    return path


def _unpacked(process: Checkpoint, work: Path) -> dict[str, str]:
    tree = work / "unpacked"
    tree.mkdir()
    subprocess.run(["tar", "-C", str(tree), "-xf", str(process.layer)], check=True)
    found = contents(tree / "checkpoint")
    shutil.rmtree(tree)
    return found

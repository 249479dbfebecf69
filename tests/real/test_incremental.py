"""Incremental checkpoints: a chain of CRIU's images directories, restored from the last of it."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Layer, Testbed, push_oci_image, split_dump

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.corpus import GZIP_LAYER
from tests.real.mounts import lazyfs, mounted
from tests.real.trees import contents

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

eager_and_lazy = pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy-pages"])


@dataclass(frozen=True)
class Chain:
    """A dump split into several, and how they are packed."""

    names: tuple[str, ...]
    """The images directories, oldest first; each but the first has a link to the one before."""
    one_layer: bool
    gzip: bool = False


CHAINS = {
    "podman": Chain(("pre-checkpoint", "checkpoint"), one_layer=True),
    "podman-gzip": Chain(("pre-checkpoint", "checkpoint"), one_layer=True, gzip=True),
    "layer-per-dump": Chain(("pre-dump-1", "pre-dump-2", "checkpoint"), one_layer=False),
    "layer-per-dump-gzip": Chain(("1", "2", "3"), one_layer=False, gzip=True),
}
"""By name: Podman's `--pre-checkpoint`, and a layer for each dump as image-spec issue 962 has it,
the latter with names of `criu --prev-images-dir`'s documentation too."""

every_chain = pytest.mark.parametrize("name", CHAINS)


class Chains:
    """A dump, and each chain that it is split into when it is first asked for."""

    def __init__(self, store: Store, full: Checkpoint, shelf: Path) -> None:
        """Unpack the dump."""
        self.store, self.checkpoint, self.shelf = store, full, shelf
        self._pushed: dict[str, str] = {}
        self.full = shelf / "full"
        self.full.mkdir()
        tar = ["tar", "-C", str(self.full), "--strip-components=1", "-xf", str(full.layer)]
        subprocess.run(tar, check=True)

    def directories(self, name: str) -> list[Path]:
        """Return the images directories of a chain, oldest first."""
        names = CHAINS[name].names
        base = self.shelf / "-".join(names)
        directories = [base / each for each in names]
        if not base.exists():
            base.mkdir()
            split_dump(self.store.testbed, self.full, directories)
        return directories

    def reference(self, name: str) -> str:
        """Return the reference of a chain, which is pushed if it is asked for the first time."""
        if name not in self._pushed:
            self._pushed[name] = self._push(name)
        return self._pushed[name]

    def _push(self, name: str) -> str:
        chain, base = CHAINS[name], self.directories(name)[0].parent
        packed = [chain.names] if chain.one_layer else [(each,) for each in chain.names]
        layers = [
            _layer(base, names, base / f"{name}-{number}.layer", gzip=chain.gzip)
            for number, names in enumerate(packed)
        ]
        push_oci_image(self.store.address, f"chain/{name}", "1", layers)
        return f"{self.store.address}/chain/{name}:1"


@pytest.fixture(scope="module")
def chains(testbed: Testbed, store: Store, shelf: Path) -> Chains:
    options = {"size_mib": 16, "children": 1, "shared_mib": 8}
    return Chains(store, checkpoint(testbed, shelf / "dump", **options), shelf)


@every_chain
def test_plain_criu_restores_the_chain(chains: Chains, name: str, work: Path) -> None:
    """That is, the splitting is as CRIU would have it."""
    with chains.checkpoint.restore(chains.directories(name)[-1], work / "criu") as restored:
        chains.checkpoint.before.assert_goes_on(restored)


@every_chain
@eager_and_lazy
def test_it_goes_on_from_a_mount(chains: Chains, name: str, lazy: bool, work: Path) -> None:
    with (
        mounted(chains.reference(name), work) as mount,
        chains.checkpoint.restore(mount.directory, work / "criu", lazy_pages=lazy) as restored,
    ):
        chains.checkpoint.before.assert_goes_on(restored)
        restored.wait_lazy_pages()
        state = mount.status()
    assert state["failed_reads"] == 0
    assert state["failed"] is None


@every_chain
def test_parents_are_directories_in_the_view(chains: Chains, name: str, work: Path) -> None:
    with mounted(chains.reference(name), work) as mount:
        assert contents(mount.directory) == _resolved(chains.directories(name))


@every_chain
def test_all_of_the_image_has_the_links(chains: Chains, name: str, work: Path) -> None:
    with mounted(chains.reference(name), work, "--view=image") as mount:
        for directory in chains.directories(name):
            shown = contents(mount.directory / directory.name)
            assert {path: what for path, what in shown.items() if path != "parent"} == {
                path: what for path, what in contents(directory).items() if path != "parent"
            }


def test_a_missing_parent_is_refused(chains: Chains, work: Path) -> None:
    last = chains.directories("layer-per-dump")[-1]
    layer = _layer(last.parent, [last.name], work / "layer.tar")
    _assert_refused(chains, [layer], "parent", work)


def test_a_circle_of_parents_is_refused(chains: Chains, work: Path) -> None:
    """Three layers, and a fourth by which the first dump builds on the last."""
    chains.reference("layer-per-dump")
    directories = chains.directories("layer-per-dump")
    base = directories[0].parent
    layers = [Layer(base / f"layer-per-dump-{number}.layer") for number in range(3)]
    first, last = directories[0].name, directories[-1].name
    (work / "link" / first).mkdir(parents=True)
    (work / "link" / first / "parent").symlink_to(f"../{last}")
    layers.append(_layer(work / "link", [first], work / "link.tar"))
    _assert_refused(chains, layers, "parent", work)


def _assert_refused(chains: Chains, layers: Sequence[Layer], word: str, work: Path) -> None:
    push_oci_image(chains.store.address, "chain/refused", "1", layers)
    (work / "mount").mkdir()
    reference = f"{chains.store.address}/chain/refused:1"
    cache = work / "cache"
    done = lazyfs("mount", "--plain-http", "--cache-dir", cache, reference, work / "mount")
    assert done.returncode in (4, 5), done.stderr
    assert word in done.stderr
    assert not (work / "mount").is_mount()


def _layer(base: Path, names: Sequence[str], target: Path, *, gzip: bool = False) -> Layer:
    words = [
        "tar",
        "-C",
        str(base),
        *(["--use-compress-program=gzip -1"] if gzip else []),
        "-cf",
        str(target),
        *names,
    ]
    subprocess.run(words, check=True)
    return Layer(target, GZIP_LAYER) if gzip else Layer(target)


def _resolved(directories: Sequence[Path]) -> dict[str, str]:
    """Return a chain's contents from its end, each `parent` being the directory it stands for."""
    *earlier, last = directories
    found = contents(last)
    if earlier:
        found["parent"] = "directory"
        found |= {f"parent/{path}": what for path, what in _resolved(earlier).items()}
    return found

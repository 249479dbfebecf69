"""runc by itself, without an engine: `lazyfs-runc restore` of a stub's images directory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import make_bundle, runc_restore
from testbed.engines import write_base

from tests.real.conftest import Store
from tests.real.engines.machines import Machine, assert_goes_on, machine
from tests.real.engines.origins import CHILDREN, Origin

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_FORM = "zstd:chunked"


@dataclass(frozen=True)
class Unpacked:
    """A stub's files, as an engine unpacks them, and a bundle to restore into."""

    here: Machine
    tree: Path
    bundle: Path
    work: Path


@pytest.fixture
def unpacked(store: Store, made: Origin, work: Path) -> Iterator[Unpacked]:
    with machine(store.testbed, [work], [store.address], name=made.cgroup) as here:
        here.podman("pull", "--quiet", made.stub(_FORM))
        mounted = here.podman("image", "mount", made.stub(_FORM))
        here.session.run(["cp", "-a", mounted, work / "tree"])
        here.podman("image", "unmount", made.stub(_FORM))
        write_base(store.testbed, work / "base.tar")
        bundle = make_bundle(work / "tree", work / "base.tar", work / "bundle")
        yield Unpacked(here, work / "tree", bundle, work)


@pytest.mark.parametrize("policy", ["", 'lazy-pages = "always"'], ids=["eager", "lazy-pages"])
def test_a_stub_goes_on_where_its_container_was(
    made: Origin, unpacked: Unpacked, policy: str
) -> None:
    here = unpacked.here
    here.policy(policy)
    with runc_restore(
        here.session,
        unpacked.tree / "checkpoint",
        unpacked.bundle,
        unpacked.work / "criu",
        members=1 + CHILDREN,
        program=here.bin / "lazyfs-runc",
    ) as restored:
        assert_goes_on(restored, restored.started_s, made.hashes)
    here.wait_alone()

"""What contrib/podman tells people to do, done as it is written."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from testbed import Session
from testbed.podman import Podman
from testbed.portable import portable_lazyfs

from tests.real.conftest import Store
from tests.real.engines.machines import Resumed

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_LOG = "/var/cache/lazyfs/log/runtime.log"
_GUIDE = Path(__file__).parents[3] / "contrib/podman/README.md"
_EXAMPLE = "registry.example"
_INSTALLED = "/opt/lazyfs"


@pytest.fixture
def machines(store: Store, work: Path) -> Iterator[tuple[Podman, Podman]]:
    """Two machines with the configuration of the guide, and lazyfs where it says."""
    (configuration,) = (block for block in _blocks() if "[engine.runtimes]" in block)
    target = re.match(r"# /etc/containers/(\S+)\n", configuration)
    assert target
    tree = portable_lazyfs(store.testbed)
    with ExitStack() as stack:

        def machine() -> Podman:
            session = Session(store.testbed, [work, tree], name=f"lazyfs-guide-{os.getpid()}")
            podman = Podman(stack.enter_context(session), registries=[store.address])
            podman.configure(target[1], configuration)
            session.run(["ln", "-s", tree, _INSTALLED])
            session.run(["ln", "-s", f"{_INSTALLED}/bin/lazyfs", "/usr/local/bin/"])
            return podman

        yield machine(), machine()


def test_a_container_goes_on_elsewhere_by_the_guides_four_lines(
    store: Store, machines: tuple[Podman, Podman], work: Path
) -> None:
    here, there = machines
    base = f"{store.address}/guide/base:1"
    here.push_base(work, base)
    hashes = here.run_workload(base, "web").memory_hash()
    (lines,) = (block.splitlines() for block in _blocks() if block.startswith("$ podman"))
    commands = [line.removeprefix("$ ") for line in lines if line]
    assert len(commands) == 4
    for command in commands[:-1]:
        _type(here, command, store)
    began_s = time.time()
    _type(there, commands[-1], store)
    Resumed(there.container("web"), began_s).assert_goes_on(hashes)
    assert "bytes come lazily" in there.session.path(_LOG).read_text()


def _type(podman: Podman, command: str, store: Store) -> None:
    """Run a line of the guide in a shell, with this registry for the guide's."""
    podman.session.run(["sh", "-ec", command.replace(_EXAMPLE, store.address)])


def _blocks() -> list[str]:
    """Return the guide's indented blocks."""
    found = re.findall(r"(?:^    .*\n|^\n)+", _GUIDE.read_text(), re.MULTILINE)
    return [
        re.sub("^    ", "", block, flags=re.MULTILINE).strip() for block in found if block.strip()
    ]

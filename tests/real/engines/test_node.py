"""What the DaemonSet runs on a node, with the portable tree, on a node that is a directory."""

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from testbed import Testbed, portable_lazyfs
from testbed.guard import watch
from testbed.process import run, stop

pytestmark = pytest.mark.real

CLONE = Path(__file__).parents[3]
PROGRAM = CLONE / "contrib/kubernetes/lazyfs-node"
SAMPLE = CLONE / "contrib/demo/sample"


@dataclass
class Node:
    """A node: `root` is what its hostPath volumes are in, `tree` what the image brings."""

    root: Path
    tree: Path
    config: Path
    cache: Path
    lazyfs: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{self.lazyfs.parent}:{os.environ['PATH']}",
            "LAZYFS_HOST": str(self.root),
            "LAZYFS_TREE": str(self.tree),
            "LAZYFS_CONFIG": str(self.config),
            "LAZYFS_CACHE_DIR": str(self.cache),
            **more,
        }

    def run(self, verb: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, verb],
            env=self.environment(**more),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def install(self, **more: str) -> list[str]:
        done = self.run("install", **more)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    @property
    def current(self) -> Path:
        return self.root / "opt/lazyfs/current"

    def versions(self) -> set[str]:
        return {path.name for path in (self.root / "opt/lazyfs/versions").iterdir()}


@pytest.fixture(scope="module")
def tree(testbed: Testbed) -> Path:
    return portable_lazyfs(testbed)


@pytest.fixture
def node(tree: Path, tmp_path: Path) -> Iterator[Node]:
    """A node whose image brings next to nothing, until a test says otherwise."""
    root, config, cache = (tmp_path / name for name in ("root", "config", "cache"))
    for path in (root, config, cache):
        path.mkdir()
    yield Node(root, small_tree(tmp_path, "0.0-x"), config, cache, tree / "bin/lazyfs")
    run(["chmod", "-R", "u+w", tmp_path])


def small_tree(work: Path, version: str, lazyfs: str = "#!/bin/sh\n") -> Path:
    tree = work / "images" / version
    (tree / "bin").mkdir(parents=True)
    (tree / "VERSION").write_text(f"{version}\n")
    for name, text in (("lazyfs", lazyfs), ("held", "#!/bin/sh\nread -r _\n")):
        (tree / "bin" / name).write_text(text)
        (tree / "bin" / name).chmod(0o555)
    for path in (tree / "bin", tree):
        path.chmod(0o555)
    return tree


def test_what_is_installed_runs_from_where_it_is(node: Node, tree: Path, tmp_path: Path) -> None:
    node.tree = tree
    version = (tree / "VERSION").read_text().strip()
    said = node.install()
    assert said == [
        f"lazyfs-node: installed {version}",
        f"lazyfs-node: current is {version}",
    ]
    assert os.readlink(node.current) == f"versions/{version}"
    installed, original = node.current / "bin/lazyfs", tree / "bin/lazyfs"
    assert run([installed, "--version"]) == run([original, "--version"])
    assert node.install() == []
    assert node.versions() == {version}
    assert not (node.root / "etc").exists()
    # The wrapper is the real runtime for all but restores of stubs.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "runc").write_text('#!/bin/sh\nprintf "%s\\n" real "$@"\n')
    (tmp_path / "bin" / "runc").chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LAZYFS_RUNTIME_CONFIG": "/nonexistent"}
    said = run([node.current / "bin/lazyfs-runtime", "state", "a b"], env=environment)
    assert said.splitlines() == ["real", "state", "a b"]


def test_an_upgrade_keeps_what_was_current_and_what_is_in_use(node: Node, tmp_path: Path) -> None:
    trees = [small_tree(tmp_path, f"{number}.0-x") for number in range(1, 5)]
    node.tree = trees[0]
    node.install()
    held = subprocess.Popen([node.current.resolve() / "bin/held"], stdin=subprocess.PIPE)
    watch(held.pid)
    try:
        for tree in trees[1:]:
            node.tree = tree
            node.install()
        assert os.readlink(node.current) == "versions/4.0-x"
        assert node.versions() == {"1.0-x", "3.0-x", "4.0-x"}
        refused = node.run("uninstall")
        assert refused.returncode == 1
    finally:
        stop(held)
    node.tree = trees[1]
    node.install()
    assert node.versions() == {"2.0-x", "4.0-x"}


def test_an_installation_that_was_interrupted_is_made_anew(node: Node) -> None:
    half = node.root / "opt/lazyfs/versions/.9.new/bin"
    half.mkdir(parents=True)
    half.chmod(0o555)
    node.install()
    assert node.versions() == {(node.tree / "VERSION").read_text().strip()}


def test_a_tree_that_does_not_run_here_is_not_made_current(node: Node, tmp_path: Path) -> None:
    node.install()
    before = os.readlink(node.current)
    node.tree = small_tree(tmp_path, "9.9-broken", "#!/bin/sh\nexit 1\n")
    done = node.run("install")
    assert done.returncode == 1
    assert "does not run here" in done.stderr
    assert os.readlink(node.current) == before


@pytest.mark.parametrize(
    ("engine", "folder", "name"),
    [
        ("crio", "etc/crio/crio.conf.d", "50-lazyfs.conf"),
        ("containerd", "etc/containerd/conf.d", "50-lazyfs.toml"),
    ],
)
def test_an_engine_is_told_only_if_asked_for(
    node: Node, engine: str, folder: str, name: str
) -> None:
    (node.root / folder).mkdir(parents=True)
    node.install()
    assert not list((node.root / folder).iterdir())
    said = node.install(LAZYFS_ENGINE=engine)
    assert said == [f"lazyfs-node: wrote /{folder}/{name}"]
    assert "/opt/lazyfs/current/bin/lazyfs-runtime" in (node.root / folder / name).read_text()
    assert node.install(LAZYFS_ENGINE=engine) == []
    (node.root / folder / name).write_text("# an administrator's\n")
    done = node.run("install", LAZYFS_ENGINE=engine)
    assert done.returncode == 1
    assert "was not written by lazyfs-node" in done.stderr
    assert (node.root / folder / name).read_text() == "# an administrator's\n"


def test_an_engine_that_is_not_known_or_not_there_is_an_error(node: Node) -> None:
    for engine, told in (("docker", "it may be crio, containerd"), ("crio", "is crio this node's")):
        done = node.run("install", LAZYFS_ENGINE=engine)
        assert done.returncode == 1
        assert told in done.stderr


def test_the_wrappers_configuration_follows_the_config_map(node: Node) -> None:
    target = node.root / "etc/lazyfs/runtime.toml"
    (node.config / "runtime.toml").write_text('lazy-pages = "always"\n')
    node.install()
    assert target.read_text() == '# Written by lazyfs-node.\nlazy-pages = "always"\n'
    (node.config / "runtime.toml").write_text('lazy-pages = "never"\n')
    node.install()
    assert 'lazy-pages = "never"' in target.read_text()
    (node.config / "runtime.toml").write_text("")
    node.install()
    assert not target.exists()


def test_serving_keeps_the_cache_private_and_what_is_listed_warm(node: Node) -> None:
    (node.config / "warm").write_text(f"# what the shop needs\n\noci:{SAMPLE}\noci:/nonexistent\n")
    node.cache.chmod(0o755)
    process = subprocess.Popen(
        [PROGRAM, "serve"],
        env=node.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    watch(process.pid)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, b"")
        next(line for line in lines if b"not warm: oci:/nonexistent" in line)
        assert stat.S_IMODE(node.cache.stat().st_mode) == 0o700
        listed = run([node.lazyfs, "cache", "ls", "--json"], env=node.environment())
        assert json.loads(listed)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        stop(process)


def test_nothing_is_left_of_what_is_uninstalled(node: Node) -> None:
    for folder in ("etc/crio/crio.conf.d", "etc/containerd/conf.d"):
        (node.root / folder).mkdir(parents=True)
    (node.config / "runtime.toml").write_text('lazy-pages = "always"\n')
    node.install(LAZYFS_ENGINE="crio")
    node.install(LAZYFS_ENGINE="containerd")
    run([node.lazyfs, "warm", f"oci:{SAMPLE}"], env=node.environment())
    done = node.run("uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert not [path for path in node.root.rglob("*") if not path.is_dir() or path.is_symlink()]
    assert not list((node.root / "opt/lazyfs").iterdir())
    listed = run([node.lazyfs, "cache", "ls", "--json"], env=node.environment())
    assert "sha256" not in listed


def test_manifests_are_what_kustomize_makes_of_them(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl")
    for name in ("base", "crio", "containerd", "uninstall"):
        made = run([kubectl, "kustomize", CLONE / "contrib/kubernetes" / name])
        assert made.count("\nkind: ") == 4
        assert ("LAZYFS_ENGINE" in made) == (name in ("crio", "containerd"))

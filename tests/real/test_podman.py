"""A container that real Podman checkpointed into an image, read and restored without a pull."""

import json
import math
import os
import random
import shlex
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from testbed import (
    PodmanCheckpoint,
    Restored,
    Session,
    Status,
    Weather,
    make_bundle,
    podman_checkpoint,
    runc_restore,
)
from testbed.process import run, wait_until

from lazyfs.lazypages.protocol import SOCKET_NAME
from tests.real.checkpoints import Before
from tests.real.conftest import Store
from tests.real.mounts import Mount, lazyfs, mounted
from tests.real.restoring import Restorer, cgroup

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

_READS = 300


@pytest.fixture(scope="module")
def podman(store: Store, shelf: Path) -> PodmanCheckpoint:
    """Two processes with memory of their own and some in common, in each of Podman's formats."""
    return podman_checkpoint(
        store.testbed,
        shelf / "podman",
        store.address,
        "podman",
        formats=["gzip", "zstd", "zstd:chunked"],
        size_mib=32,
        shared_mib=8,
        children=1,
    )


@pytest.fixture
def reference(podman: PodmanCheckpoint) -> str:
    return podman.images["zstd:chunked"].reference


def test_the_mount_is_the_image_unpacked(
    podman: PodmanCheckpoint, reference: str, work: Path
) -> None:
    with mounted(reference, work, "--view=image") as mount:
        mounted_paths, unpacked_paths = _paths(mount.directory), _paths(podman.tree)
        assert set(unpacked_paths) <= set(mounted_paths)
        assert {"rootfs-diff", "devshm-checkpoint"} <= set(mounted_paths)
        for path in unpacked_paths:
            _assert_alike(mount.directory / path, podman.tree / path)
        state = mount.status()
    assert state["chunks_proven"]
    assert state["failed_reads"] == 0


def test_any_read_gives_what_the_unpacked_image_gives(
    podman: PodmanCheckpoint, reference: str, work: Path
) -> None:
    chance, tree = random.Random(2), podman.tree
    with mounted(reference, work, "--view=image") as mount, ExitStack() as files:
        opened = [
            [files.enter_context((base / path).open("rb")) for base in (mount.directory, tree)]
            for path in _paths(tree)
            if (tree / path).is_file()
        ]
        sizes = [os.fstat(theirs.fileno()).st_size for _, theirs in opened]
        often = [math.sqrt(size) + 1 for size in sizes]
        for number in chance.choices(range(len(opened)), often, k=_READS):
            ours, theirs = opened[number]
            offset = chance.randrange(sizes[number] + 2)
            count = chance.choice([1, 511, 4096, 65536, 3 << 20])
            given = os.pread(ours.fileno(), count, offset)
            assert given == os.pread(theirs.fileno(), count, offset), (ours.name, offset, count)
        assert mount.status()["failed_reads"] == 0


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy-pages"])
def test_runc_restores_it(
    podman: PodmanCheckpoint, store: Store, reference: str, work: Path, lazy: bool
) -> None:
    bundle = make_bundle(podman.tree, podman.base_tar, work / "bundle")
    before = _before(bundle, podman)
    with mounted(reference, work) as mount:
        with (
            Session(store.testbed, [work]) as session,
            _restore(session, mount, bundle, podman, lazy=lazy) as restored,
        ):
            before.assert_goes_on(restored)
            restored.wait_lazy_pages()
        state = mount.status()
    assert state["chunks_proven"]
    assert state["failed_reads"] == 0


def test_containers_restored_at_once_from_one_mount_that_serves_their_memory(
    podman: PodmanCheckpoint, store: Store, reference: str, work: Path
) -> None:
    """Each has its own work directory, with a link to the mount's socket."""
    served = work / "served"
    served.mkdir()
    places = [work / str(number) for number in range(3)]
    bundles = []
    for place in places:
        (place / "runc").mkdir(parents=True)
        (place / "runc" / SOCKET_NAME).symlink_to(served / SOCKET_NAME)
        bundles.append(make_bundle(podman.tree, podman.base_tar, place / f"bundle-{place.name}"))
    befores = [_before(bundle, podman) for bundle in bundles]
    with mounted(reference, work, "--lazy-pages", str(served)) as mount:
        with (
            Session(store.testbed, [work]) as session,
            ThreadPoolExecutor(len(places)) as pool,
            ExitStack() as containers,
        ):
            restoring = [
                pool.submit(
                    _restore, session, mount, bundle, podman, lazy=bundle.parent / SOCKET_NAME
                )
                for bundle in bundles
            ]
            restored = [containers.enter_context(each.result()) for each in restoring]
            for before, each in zip(befores, restored, strict=True):
                before.assert_goes_on(each)
            wait_until(lambda: mount.status()["lazy_pages"]["state"] == "home", "all is home", 60)
        told = mount.status()["lazy_pages"]
        assert (told["restores"], told["failed"], told["missing_bytes"]) == (3, None, 0)


def test_a_container_that_misses_memory_dies_with_the_daemon(
    podman: PodmanCheckpoint, store: Store, reference: str, work: Path
) -> None:
    bundle = make_bundle(podman.tree, podman.base_tar, work / "bundle")
    reference = reference.replace(store.address, "{}")
    (work / "runc").mkdir()
    with (
        Weather(store.address, rate_bytes_s=4 << 20) as slow,
        mounted(reference.format(slow.address), work, "--lazy-pages", str(work / "runc")) as mount,
    ):
        with (
            Session(store.testbed, [work]) as session,
            _restore(session, mount, bundle, podman, lazy=work / "runc" / SOCKET_NAME) as restored,
        ):
            assert mount.status()["lazy_pages"]["missing_bytes"] > 0
            before_s = time.time()
            mount.kill()

            def has_died() -> bool:
                shown = session.run(["runc", "list", "--format", "json"])
                return all(each["status"] == "stopped" for each in json.loads(shown) or [])

            wait_until(has_died, "the container has been killed", 30)
            assert not restored.status.events("hash", before_s)
        mount.start()


@pytest.mark.parametrize("lazy", [(), ("--lazy-pages",)], ids=["eager", "lazy-pages"])
def test_lazyfs_has_runc_restore_it(
    podman: PodmanCheckpoint, store: Store, reference: str, work: Path, lazy: tuple[str, ...]
) -> None:
    """On the host: runc by its own ld.so, and CRIU's helpers where it looks for programs."""
    bundle = make_bundle(podman.tree, podman.base_tar, work / "bundle")
    before = _before(bundle, podman)
    runc = shlex.join([*store.testbed.host_command("runc"), "--root", str(work / "runc")])
    restorer = Restorer(store.testbed, work)
    restorer.offer_programs()
    name = f"lazyfs-{os.getpid()}-{work.name}"
    with cgroup(bundle, name):
        words = ["--runtime", runc, "--bundle", bundle, "--id", name, "--json", *lazy]
        started_s = time.time()
        ended = restorer.run(reference, *words)
        assert ended.code == 0, ended
        pid = ended.told["pid"]
        assert ended.told["container"] == name
        status = Status(bundle / "rootfs/status", podman.members)
        ask = partial(os.kill, pid, signal.SIGUSR1)
        delete = partial(run, [*shlex.split(runc), "delete", "--force", name])
        with Restored(started_s, 0.0, status, None, ask, delete, pid) as restored:
            before.assert_goes_on(restored)


def test_five_restored_at_once_from_five_mounts(
    podman: PodmanCheckpoint, store: Store, reference: str, work: Path
) -> None:
    """One image, one cache directory, five daemons; each container has pids of its own."""
    places = [work / str(number) for number in range(5)]
    with ExitStack() as mounts:

        def mount_at(place: Path) -> Mount:
            return mounts.enter_context(mounted(reference, place, cache=work / "cache"))

        with ThreadPoolExecutor(len(places)) as pool:
            served = list(pool.map(mount_at, places))
        bundles = [
            make_bundle(podman.tree, podman.base_tar, place / f"bundle-{place.name}")
            for place in places
        ]
        befores = [_before(bundle, podman) for bundle in bundles]
        with (
            Session(store.testbed, [work]) as session,
            ThreadPoolExecutor(len(places)) as pool,
            ExitStack() as containers,
        ):
            restoring = [
                pool.submit(_restore, session, mount, bundle, podman)
                for mount, bundle in zip(served, bundles, strict=True)
            ]
            restored = [containers.enter_context(each.result()) for each in restoring]
            for before, each in zip(befores, restored, strict=True):
                before.assert_goes_on(each)
        assert [mount.status()["failed_reads"] for mount in served] == [0] * len(served)


def test_inspect_tells_what_it_is(podman: PodmanCheckpoint, reference: str, work: Path) -> None:
    done = lazyfs("inspect", "--json", "--cache-dir", work / "cache", reference)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    said = podman.images["zstd:chunked"].annotations
    promised = "io.podman.annotations.checkpoint."
    assert report["origin"]["engine"] == "Podman"
    assert report["origin"]["engine_version"] == said[promised + "podman.version"]
    assert report["origin"]["container_name"] == "workload"
    assert _criu_number(report["origin"]["criu_version"]) == said[promised + "criu.version"]
    assert report["manifest_digest"] == podman.images["zstd:chunked"].digest
    assert report["layers"][0]["format"] == "zstd:chunked"
    assert report["layers"][0]["proof"] == "chunk"
    assert report["inspection_fetched_bytes"] < report["image_size_bytes"] / 10
    assert report["notes"] == []
    parent, child = report["processes"]
    assert (parent["command"], child["command"]) == ("workload", "workload")
    assert (parent["pid"], child["ppid"]) == (1, 1)
    for process in parent, child:
        assert process["memory_bytes"] >= process["lazy_memory_bytes"] >= 32 << 20


def _restore(
    session: Session,
    mount: Mount,
    bundle: Path,
    podman: PodmanCheckpoint,
    *,
    lazy: bool | Path = False,
) -> Restored:
    return runc_restore(
        session,
        mount.directory,
        bundle,
        bundle.parent / "runc",
        members=podman.members,
        lazy_pages=lazy,
    )


def _before(bundle: Path, podman: PodmanCheckpoint) -> Before:
    """Read how far the processes were, in the container's root filesystem as Podman kept it."""
    status = Status(bundle / "rootfs/status")
    loops = {event.member: event for event in status.events("loop")}
    return Before(loops, podman.hashes)


def _criu_number(version: str) -> str:
    """Write 4.1.1 as CRIU's API and Podman's annotation do: 40101."""
    major, minor, sublevel = [*(int(part) for part in version.split(".")), 0, 0][:3]
    return str(major * 10000 + minor * 100 + sublevel)


def _paths(base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def _assert_alike(ours: Path, theirs: Path) -> None:
    """Compare two files: all bytes and attributes, but that what was archived can be read."""
    mine, other = ours.lstat(), theirs.lstat()
    readable = 0o555 if stat.S_ISDIR(other.st_mode) else 0o444
    assert mine.st_mode == other.st_mode | readable, ours
    assert (mine.st_uid, mine.st_gid) == (other.st_uid, other.st_gid), ours
    assert int(mine.st_mtime) == int(other.st_mtime), ours
    if stat.S_ISLNK(other.st_mode):
        assert ours.readlink() == theirs.readlink(), ours
    elif stat.S_ISREG(other.st_mode):
        assert mine.st_size == other.st_size, ours
        assert ours.read_bytes() == theirs.read_bytes(), ours

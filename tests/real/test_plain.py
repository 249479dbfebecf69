"""A plain CRIU dump, uncompressed, mounted from everywhere it can be and restored by real CRIU."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest
from testbed import Layer, Testbed, Wan, write_oci_layout
from testbed.guard import watch
from testbed.process import last_lines, stop, wait_until
from testbed.registry import free_port

from tests.real.checkpoints import Checkpoint, checkpoint
from tests.real.conftest import Store
from tests.real.mounts import mounted

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

eager_and_lazy = pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy-pages"])


@pytest.fixture(scope="module")
def large(testbed: Testbed, shelf: Path) -> Checkpoint:
    """A process large enough for a slow link to be busy with it for seconds."""
    return checkpoint(testbed, shelf / "large", size_mib=128)


@pytest.fixture(scope="module")
def small(testbed: Testbed, shelf: Path) -> Checkpoint:
    return checkpoint(testbed, shelf / "small", size_mib=64)


@pytest.fixture(
    scope="module",
    params=[
        {"children": 2, "size_mib": 24, "shared_mib": 24},
        {"children": 2, "size_mib": 32, "cow": True},
    ],
    ids=["shared-memory", "copy-on-write"],
)
def family(testbed: Testbed, shelf: Path, request: pytest.FixtureRequest) -> Checkpoint:
    """A process with children, and memory that they have in common."""
    return checkpoint(testbed, Path(mkdtemp(dir=shelf)), **request.param)


@eager_and_lazy
def test_it_goes_on_from_a_registry_far_away(
    store: Store, large: Checkpoint, work: Path, lazy: bool
) -> None:
    image = store.push("far", large)
    with (
        Wan(store.testbed, one_way_ms=5, rate_mbit=200) as wan,
        store.served_at(work / "far", wan) as far,
        mounted(f"{far.address}/{image}", work) as mount,
        large.restore(mount.directory, work / "criu", lazy_pages=lazy) as restored,
    ):
        resumed = mount.status()
        large.before.assert_goes_on(restored)
        restored.wait_lazy_pages()
        ended = mount.status()
    if lazy:
        assert resumed["bytes_fetched"] < large.layer_bytes / 2
    assert ended["failed_reads"] == 0
    assert ended["failed"] is None


@eager_and_lazy
def test_a_family_goes_on(store: Store, family: Checkpoint, work: Path, lazy: bool) -> None:
    image = store.push("family", family)
    with (
        mounted(f"{store.address}/{image}", work) as mount,
        family.restore(mount.directory, work / "criu", lazy_pages=lazy) as restored,
    ):
        family.before.assert_goes_on(restored)
        restored.wait_lazy_pages()
        assert mount.status()["failed_reads"] == 0


def test_verified_in_full_before_anything_is_served(
    store: Store, small: Checkpoint, work: Path
) -> None:
    image = store.push("small", small)
    with mounted(f"{store.address}/{image}", work, "--verify=full") as mount:
        proven = mount.status()
        assert proven["blob_proven"]
        with small.restore(mount.directory, work / "criu") as restored:
            small.before.assert_goes_on(restored)
        restored_from = mount.status()
        assert restored_from["bytes_fetched"] == proven["bytes_fetched"]
        assert restored_from["failed_reads"] == 0


def test_a_second_mount_restores_from_the_cache(
    store: Store, small: Checkpoint, work: Path
) -> None:
    """The manifest is asked for again, nothing else; after that the registry may go.

    If the first mount ended before the last header was here, its digest is not proven yet: the
    second mount says so, and the restore works.
    """
    image = store.push("small", small)
    cache = work / "cache"
    with store.served_at(work / "registry") as registry:
        reference = f"{registry.address}/{image}"
        with (
            mounted(reference, work / "first", cache=cache) as mount,
            small.restore(mount.directory, work / "criu") as restored,
        ):
            small.before.assert_goes_on(restored)
        unproven = ("is not proven yet",)
        with mounted(reference, work / "second", cache=cache, forgiven=unproven) as mount:
            registry.kill()
            with small.restore(mount.directory, work / "criu") as restored:
                small.before.assert_goes_on(restored)
            state = mount.status()
    assert state["bytes_fetched"] < 4096  # no page: only the manifest
    assert state["chunks_from_cache"] > 0
    assert state["cache_refused"] == 0
    assert state["failed_reads"] == 0


def test_from_an_oci_layout(small: Checkpoint, work: Path) -> None:
    write_oci_layout(work / "layout", "1", [Layer(small.layer)])
    _restore_from(f"oci:{work / 'layout'}:1", small, work)


def test_from_an_archive_on_disk(small: Checkpoint, work: Path) -> None:
    _restore_from(str(small.layer), small, work)


def test_from_an_archive_on_a_web_server(testbed: Testbed, small: Checkpoint, work: Path) -> None:
    with _nginx(testbed, work, small.layer.parent) as address:
        _restore_from(f"http://{address}/{small.layer.name}", small, work)


def _restore_from(reference: str, small: Checkpoint, work: Path) -> None:
    with (
        mounted(reference, work) as mount,
        small.restore(mount.directory, work / "criu") as restored,
    ):
        small.before.assert_goes_on(restored)
        assert mount.status()["failed_reads"] == 0


@contextmanager
def _nginx(testbed: Testbed, work: Path, folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP; yields the `host:port`."""
    address = f"127.0.0.1:{free_port()}"
    log = work / "nginx.log"
    config = work / "nginx.conf"
    temporary = " ".join(
        f"{kind}_temp_path {work}/nginx-{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; user root; pid {work}/nginx.pid;\n"
        f"events {{}} http {{ access_log off; {temporary}\n"
        f"server {{ listen {address}; root {folder}; }} }}\n"
    )
    command = [*testbed.host_command("nginx"), "-e", str(log), "-p", str(work), "-c", str(config)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    watch(process.pid)
    try:
        wait_until((work / "nginx.pid").exists, f"nginx; its log:\n{last_lines(log)}", 20)
        yield address
    finally:
        stop(process)

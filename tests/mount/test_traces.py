"""Real mounts and the traces attached to their images: found, remembered, never in the way."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.checkpoint.trace import dump_trace
from tests import faults
from tests.faults import FaultServer, Resource, digest_of
from tests.images import Layer
from tests.mount.mounting import Mount, Mounts, lazyfs, wait_until
from tests.mount.published import (
    LAYERS,
    MIB,
    checkpoint_files,
    manifest_of,
    publish,
    publish_referring,
    tar_layer,
    zstd_chunked,
)
from tests.traces import (
    annotations_of,
    attach,
    attach_trace,
    index_of,
    listed,
    trace_of,
)

FILES = checkpoint_files(2 * MIB)
PAGES = FILES["checkpoint/pages-1.img"]
LAYER = zstd_chunked(FILES)


def subject_of(layer: Layer) -> str:
    return digest_of(json.dumps(manifest_of(layer)).encode())


SUBJECT = subject_of(LAYER)


def found_by(mount: Mount) -> object:
    """Return what the mount says of its trace, once it can tell."""
    wait_until(lambda: mount.status()["trace"] is not None, "a trace is found")
    return mount.status()["trace"]


def looked_for(server: FaultServer) -> int:
    return server.count("/referrers/")


def test_it_is_found_by_a_mount_that_does_not_wait_for_it(
    server: FaultServer, mounts: Mounts
) -> None:
    digest = attach_trace(server, SUBJECT, trace_of(LAYER.digest, workload="web"))
    go = threading.Event()
    server.always("/referrers/", faults.stall(until=go))
    reference = publish(server, LAYER)
    mount = mounts.mount(reference)
    assert mount.status()["trace"] is None
    go.set()
    assert found_by(mount) == {"source": digest, "workload": "web", "needed_bytes": 12 * 1024}
    assert (mount / "pages-1.img").read_bytes() == PAGES
    pinned = mount.status()["reference"]
    mount.umount()
    server.seen.clear()
    mount = mounts.mount(pinned)
    assert found_by(mount) == {"source": digest, "workload": "web", "needed_bytes": 12 * 1024}
    assert looked_for(server) == 0
    assert server.count(digest) == 0


@pytest.mark.parametrize("how", ["off", "file", "other"])
def test_who_is_told_where_it_is_asks_nobody(server: FaultServer, mounts: Mounts, how: str) -> None:
    attach_trace(server, SUBJECT, trace_of(LAYER.digest))
    reference = publish(server, LAYER)
    file = mounts.home / "it"
    layer = LAYER.digest if how == "file" else "sha256:" + "0" * 64
    file.write_bytes(dump_trace(trace_of(layer, workload="mine")))
    if how == "other":
        mounts.expect_log("the trace that was named is of other layers")
    mount = mounts.mount(reference, f"--trace={'off' if how == 'off' else file}")
    if how == "file":
        assert found_by(mount) == {
            "source": "file",
            "workload": "mine",
            "needed_bytes": 12 * 1024,
        }
    assert (mount / "pages-1.img").read_bytes() == PAGES
    assert (mount.status()["trace"] is None) is (how != "file")
    assert looked_for(server) == 0


def test_what_is_no_trace_is_said_before_anything_begins(
    server: FaultServer, mounts: Mounts, tmp_path: Path
) -> None:
    reference = publish(server, LAYER)
    (tmp_path / "it").write_bytes(b"not a trace")
    assert mounts.refuse(reference, f"--trace={tmp_path}/it").code == 4
    assert mounts.refuse(reference, f"--trace={tmp_path}/none").code == 2
    assert mounts.refuse(reference, f"--trace={tmp_path}").code == 2
    for name in ("\x1b", "a" * 1025):
        assert "workload" in mounts.refuse(reference, f"--workload={name}").err
    assert server.seen == []


def test_by_digest_it_is_asked_for_beside_the_manifest_where_that_can_be(
    server: FaultServer, mounts: Mounts
) -> None:
    """With --plain-http it is known what the registry speaks, so both go out at once."""
    attach_trace(server, SUBJECT, trace_of(LAYER.digest))
    publish(server, LAYER)
    asked = threading.Event()

    def answer_after_the_list(exchange: faults.Exchange) -> None:
        assert exchange.wait(30, asked) or asked.is_set()
        faults.behave(exchange)

    def note(exchange: faults.Exchange) -> None:
        asked.set()
        faults.behave(exchange)

    server.always(f"/manifests/{SUBJECT}", answer_after_the_list)
    server.always("/referrers/", note)
    mount = mounts.mount(f"{server.host}/{server.repository}@{SUBJECT}", "--plain-http")
    found_by(mount)
    assert looked_for(server) == 1


def test_one_list_tells_of_soci_and_of_traces(server: FaultServer, mounts: Mounts) -> None:
    layer = LAYERS["soci"](FILES)
    reference = publish_referring(server, layer)
    subject = subject_of(layer)
    path = f"/v2/{server.repository}/referrers/{subject}"
    document = dump_trace(trace_of(layer.digest))
    server.add_blob(document)
    (soci,) = json.loads(server.resources[path].body)["manifests"]
    rows = soci, listed(annotations_of(document))
    server.resources[path] = Resource(index_of(*rows), faults.OCI_INDEX)
    mount = mounts.mount(reference)
    found_by(mount)
    assert mount.status()["layer_format"] == "soci"
    assert looked_for(server) == 1


def endless(exchange: faults.Exchange) -> None:
    exchange.head(200, {"Content-Type": "application/octet-stream"})
    while exchange.wait(0):
        exchange.write(bytes(1 << 20))


def garbage(server: FaultServer) -> None:
    path = f"/v2/{server.repository}/referrers/{SUBJECT}"
    server.resources[path] = Resource(b"<html>" * 100_000)


def of_other_layers(server: FaultServer) -> None:
    attach_trace(server, SUBJECT, trace_of("sha256:" + "0" * 64))


def many(server: FaultServer) -> None:
    document = dump_trace(trace_of("sha256:" + "0" * 64))
    server.add_blob(document)
    rows = [listed(annotations_of(document), str(number).encode()) for number in range(10_000)]
    attach(server, SUBJECT, *rows)


def a_lie_about_its_size(server: FaultServer) -> None:
    document = dump_trace(trace_of(LAYER.digest))
    server.add_blob(document)
    attach(server, SUBJECT, listed({**annotations_of(document), "lazyfs.trace.size": "10"}))


def an_endless_list(server: FaultServer) -> None:
    server.always("/referrers/", endless)


def an_endless_document(server: FaultServer) -> None:
    digest = attach_trace(server, SUBJECT, trace_of(LAYER.digest))
    server.always(f"/blobs/{digest}", endless)


def another_document(server: FaultServer) -> None:
    digest = attach_trace(server, SUBJECT, trace_of(LAYER.digest))
    server.always(f"/blobs/{digest}", faults.corrupt)


def a_document_elsewhere(server: FaultServer) -> None:
    digest = attach_trace(server, SUBJECT, trace_of(LAYER.digest))
    server.always(f"/blobs/{digest}", faults.redirect("http://169.254.169.254/latest/meta-data"))


def silence(server: FaultServer) -> None:
    server.always("/referrers/", faults.stall())


def names_of_no_file(server: FaultServer) -> None:
    """A trace whose files are not there, or are smaller than it says."""
    attach_trace(server, SUBJECT, trace_of(LAYER.digest, pages_bytes=1 << 50))


@pytest.mark.parametrize(
    "hostile",
    [
        garbage,
        of_other_layers,
        many,
        a_lie_about_its_size,
        an_endless_list,
        an_endless_document,
        another_document,
        a_document_elsewhere,
        silence,
        names_of_no_file,
    ],
)
def test_whoever_may_attach_one_can_do_no_harm(
    server: FaultServer, mounts: Mounts, hostile: Callable[[FaultServer], None]
) -> None:
    """No warning is logged (`Mounts`), no byte is another, and the mount comes up all the same."""
    hostile(server)
    began_s = time.monotonic()
    mount = mounts.mount(publish(server, LAYER))
    for name, data in FILES.items():
        if name.startswith("checkpoint/"):
            assert (mount / name.removeprefix("checkpoint/")).read_bytes() == data
    assert time.monotonic() - began_s < 20
    assert mount.umount().code == 0


def test_the_trace_of_a_stub_is_the_real_images(server: FaultServer, mounts: Mounts) -> None:
    digest = attach_trace(server, SUBJECT, trace_of(LAYER.digest))
    publish(server, LAYER, "real")
    real = f"{server.host}/{server.repository}@{SUBJECT}"
    stub = tar_layer({"checkpoint/inventory.img": b"a stub's"})
    server.add_blob(stub.blob)
    server.add_manifest(manifest_of(stub, {"lazyfs.stub.reference": real}), "stub")
    mount = mounts.mount(f"{server.host}/{server.repository}:stub")
    assert mount.status()["stub"] is not None
    trace = found_by(mount)
    assert isinstance(trace, dict)
    assert trace["source"] == digest


def test_what_is_pushed_here_is_followed_here_at_once(server: FaultServer, mounts: Mounts) -> None:
    """Though this machine remembers that there was none."""
    server.writable = True
    publish(server, LAYER)
    pinned = f"{server.host}/{server.repository}@{SUBJECT}"
    mount = mounts.mount(pinned)
    wait_until(lambda: server.count("/manifests/sha256-") > 0, "it was looked for")
    assert mount.umount().code == 0
    file = mounts.home / "it"
    file.write_bytes(dump_trace(trace_of(LAYER.digest)))
    done = lazyfs("trace", "push", f"--cache-dir={mounts.cache_dir}", pinned, file)
    assert done.code == 0, done
    found_by(mounts.mount(pinned))

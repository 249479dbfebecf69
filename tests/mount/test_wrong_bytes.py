"""Bytes that contradict their digest: never read, said in the log, nothing of them kept."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultServer
from tests.images import KEYS, Layer, tar_layer, zstd_chunked
from tests.mount.mounting import Mount, Mounts, error_of, read_at, wait_until
from tests.mount.published import KIB, MIB, checkpoint_files, publish

FILES = checkpoint_files(12 * MIB)
DATA = FILES["checkpoint/pages-1.img"]


def flip(server: FaultServer, layer: Layer, position: int) -> Callable[[], None]:
    """Have the registry serve a blob with one bit turned; return how to turn it back."""
    (resource,) = (item for path, item in server.resources.items() if layer.digest in path)
    wrong = bytearray(layer.blob)
    wrong[position] ^= 1
    resource.body = bytes(wrong)

    def back() -> None:
        resource.body = layer.blob

    return back


def chunk_positions(files: dict[str, bytes]) -> tuple[Layer, list[int]]:
    """Make a zstd:chunked layer; list where the chunks of its pages file begin in the blob."""
    found: list[int] = []

    def look(toc: dict[str, Any]) -> None:
        for entry in toc["entries"]:
            if entry["name"].endswith("pages-1.img"):
                found.append(entry["offset"])

    return zstd_chunked(files, edit=look), found


def everything_fails(mount: Mount) -> bool:
    """Whether nothing can be read any more, not even what the kernel had a copy of."""
    names = {name: os.stat(mount / name).st_size for name in os.listdir(mount.directory)}
    return all(
        error_of(partial(read_at, mount / name, at, 4096)) == "EIO"
        for name, size in names.items()
        for at in range(0, size, 3 * MIB)
    )


def test_a_chunk_with_a_bit_turned(server: FaultServer, mounts: Mounts) -> None:
    layer, positions = chunk_positions(FILES)
    back = flip(server := _registry(server, layer), layer, positions[100] + 20)
    mount = mounts.mount(_name(server))
    chunk = 64 * KIB
    assert read_at(mount / "pages-1.img", 0, 4096) == DATA[:4096]
    mounts.expect_log("CRITICAL .* every read fails from now on")
    mounts.expect_log("ERROR .* read answered with an error: ")
    assert error_of(lambda: read_at(mount / "pages-1.img", 100 * chunk, 4096)) == "EIO"
    wait_until(lambda: everything_fails(mount), "every read fails")
    assert "does not match its digest" in mount.status()["failed"]
    assert mount.status()["failed_reads"] >= 4
    assert mount.umount().code == 0
    back()
    mount = mounts.mount(_name(server))
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert mount.status()["chunks_from_cache"] == 0, "nothing was kept"


def test_a_tar_with_a_bit_turned(server: FaultServer, mounts: Mounts) -> None:
    """Found by the pass in the background; from then on nothing is to be had."""
    layer = tar_layer(FILES)
    back = flip(server := _registry(server, layer), layer, 8 * MIB)
    mounts.expect_log("CRITICAL .* does not match its digest.*; every read fails from now on")
    mounts.expect_log("ERROR .* read answered with an error: ")
    mount = mounts.mount(_name(server))
    wait_until(lambda: mount.status()["failed"] is not None, "the pass has found it")
    assert layer.digest in mount.status()["failed"]
    wait_until(lambda: everything_fails(mount), "every read fails")
    assert mount.umount().code == 0
    back()
    mount = mounts.mount(_name(server))
    assert (mount / "pages-1.img").read_bytes() == DATA
    assert mount.status()["chunks_from_cache"] == 0
    wait_until(lambda: mount.status()["blob_proven"], "it is proven")


@pytest.mark.parametrize("position", [8 * MIB, 100], ids=["data", "a header"])
def test_a_tar_verified_before(server: FaultServer, mounts: Mounts, position: int) -> None:
    layer = tar_layer(FILES)
    flip(_registry(server, layer), layer, position)
    done = mounts.refuse(_name(server), "--verify=full")
    if position == 100:  # a tar that cannot even be walked
        assert done.code in (4, 5)
        return
    assert done.code == 5
    assert f"{layer.digest} does not match its digest: promised {layer.digest}" in done.err
    assert os.listdir(mounts.home / "mnt") == []
    mounts.expect_log("CRITICAL .* does not match its digest")
    marks = list(mounts.cache_dir.glob("layers/*/marks"))
    assert not any(mark for file in marks for mark in file.read_bytes())


def test_a_tar_verified_before_and_found_good(server: FaultServer, mounts: Mounts) -> None:
    layer = tar_layer(FILES)
    publish(server, layer)
    mount = mounts.mount(_name(server), "--verify=full")
    assert mount.status()["blob_proven"]
    assert mount.status()["bytes_fetched"] <= len(layer.blob) + 4 * KIB
    assert (mount / "pages-1.img").read_bytes() == DATA


def test_a_toc_that_is_not_the_promised_one(server: FaultServer, mounts: Mounts) -> None:
    layer = zstd_chunked(FILES)
    position = int(layer.annotations[KEYS + "manifest-position"].split(":")[0])
    flip(_registry(server, layer), layer, position + 30)
    done = mounts.refuse(_name(server))
    assert done.code == 5
    assert "TOC" in done.err or "table of contents" in done.err
    other = f"sha256:{hashlib.sha256(b'another').hexdigest()}"
    annotations = {**layer.annotations, KEYS + "manifest-checksum": other}
    done = mounts.refuse(publish(server, replace(layer, annotations=annotations)))
    assert done.code == 5


def test_a_manifest_that_is_not_the_promised_one(server: FaultServer, mounts: Mounts) -> None:
    reference = publish(server, tar_layer(FILES))
    for path, resource in server.resources.items():
        if "/manifests/" in path:
            resource.body = resource.body.replace(b"checkpoint", b"checkpoinT")
    done = mounts.refuse(reference)
    assert done.code == 5
    assert "manifest" in done.err or reference in done.err


def test_a_blob_of_another_size(server: FaultServer, mounts: Mounts) -> None:
    layer = tar_layer(FILES)
    reference = publish(server, layer)
    (resource,) = (item for path, item in server.resources.items() if layer.digest in path)
    resource.body = layer.blob + bytes(512)
    done = mounts.refuse(reference, "--deadline=1")
    assert done.code in (3, 5)
    assert f"{len(layer.blob) + 512} bytes" in done.err


def test_an_archive_that_is_replaced_under_way(mounts: Mounts, tmp_path: Path) -> None:
    """Without a digest it is at least one file throughout, never two mixed."""
    archive = tmp_path / "checkpoint.tar"
    archive.write_bytes(tar_layer(FILES).blob)
    mount = mounts.mount(str(archive))
    mounts.expect_log("CRITICAL .* was written to since it was opened")
    mounts.expect_log("ERROR .* read answered with an error: ")
    with open(archive, "r+b") as file:
        file.seek(8 * MIB)
        file.write(b"other bytes")
    assert error_of(lambda: read_at(mount / "pages-1.img", 10 * MIB, 4096)) == "EIO"
    assert "mount it anew" in mount.status()["failed"]


def _registry(server: FaultServer, layer: Layer) -> FaultServer:
    publish(server, layer)
    return server


def _name(server: FaultServer) -> str:
    return f"{server.host}/{server.repository}:1"


def test_a_lie_that_led_astray_is_not_kept(server: FaultServer, mounts: Mounts) -> None:
    """A header is wrong on its way here, so there is no mount; the next one asks for it anew."""
    layer = tar_layer(FILES)
    second_header = layer.blob.index(b"ustar", 600) // 512 * 512
    reference = publish(server, layer)
    back = flip(server, layer, second_header + 148)
    said = mounts.refuse(reference)
    assert "tar header" in said.err
    back()
    mount = mounts.mount(reference)
    assert (mount / "pages-1.img").read_bytes() == DATA

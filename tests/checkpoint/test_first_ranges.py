"""What is asked of layers before they are opened: what opening them asks for, and once."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from lazyfs.checkpoint.ahead import Ahead
from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.opened import open_checkpoint
from lazyfs.checkpoint.stub import ANNOTATION
from lazyfs.content.cache import Cache
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.settings import TransportSettings
from tests import faults, images
from tests.faults import OCI_MANIFEST, FaultServer

SETTINGS = TransportSettings(deadline_s=5, backoff_first_s=0.01, backoff_most_s=0.05)
RANDOM = random.Random(5)
FILES: images.Files = {
    "checkpoint/inventory.img": b"inventory",
    "checkpoint/pages-1.img": RANDOM.randbytes(3_000_000),
    "checkpoint/pstree.img": b"pstree",
    "checkpoint/pages-2.img": RANDOM.randbytes(2_000_000),
    "checkpoint/tty.img": b"tty",
}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


def push(server: FaultServer, layer: images.Layer, **more: Any) -> str:
    """Put an image of one layer there; return its reference."""
    described = {
        "mediaType": layer.media_type,
        "digest": server.add_blob(layer.blob),
        "size": len(layer.blob),
        "annotations": dict(layer.annotations),
    }
    config = server.add_blob(b"{}")
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": "application/json", "digest": config, "size": 2},
        "layers": [described],
        **more,
    }
    server.add_manifest(manifest, "1")
    return f"{server.host}/{server.repository}:1"


def ranges(server: FaultServer) -> list[str]:
    """Return what was asked of blobs so far."""
    return [each.headers["Range"] for each in server.seen if "/blobs/" in each.path]


def open_it(reference: str, cache: Cache, *, ahead: bool) -> bytes:
    """Open a checkpoint, with or without asking ahead; return a file between its pages."""

    async def run() -> bytes:
        begun = Ahead(reference, SETTINGS, cache) if ahead else None
        config = OpenConfig(cache, SETTINGS, ahead=begun)
        if begun is not None:
            await trio.to_thread.run_sync(begun.wait)
        async with open_checkpoint(reference, config) as checkpoint:
            return await checkpoint.read_file("checkpoint/pstree.img", 100)

    return trio.run(run)


LAYERS = {
    "tar": images.tar_layer(FILES),
    "zstd:chunked": images.zstd_chunked(FILES),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_mount_asks_for_nothing_else_than_was_foretold(server: FaultServer, name: str) -> None:
    reference = push(server, LAYERS[name])
    assert open_it(reference, Cache.memory(), ahead=False) == b"pstree"
    without = ranges(server)
    server.seen.clear()
    assert open_it(reference, Cache.memory(), ahead=True) == b"pstree"
    assert sorted(ranges(server)) == sorted(without)


@pytest.mark.parametrize("fault", [faults.status(503), faults.status(404), faults.reset(100)])
def test_what_fails_ahead_is_asked_for_as_ever(server: FaultServer, fault: faults.Fault) -> None:
    reference = push(server, LAYERS["tar"])
    server.script("/blobs/", fault)
    assert open_it(reference, Cache.memory(), ahead=True) == b"pstree"


def test_wrong_bytes_ahead_are_no_less_wrong(server: FaultServer) -> None:
    reference = push(server, LAYERS["zstd:chunked"])
    server.script("/blobs/", faults.corrupt)
    with pytest.raises(LazyfsError):
        open_it(reference, Cache.memory(), ahead=True)


def test_nothing_is_asked_of_a_stub_or_of_what_the_cache_has(
    server: FaultServer, tmp_path: Path
) -> None:
    stub = push(server, LAYERS["tar"], annotations={ANNOTATION: json.dumps({})})
    Ahead(stub, SETTINGS, Cache.memory()).wait()
    assert not ranges(server)
    reference = push(server, LAYERS["tar"])
    cache = Cache(tmp_path / "cache")
    assert open_it(reference, cache, ahead=True) == b"pstree"
    server.seen.clear()
    Ahead(reference, SETTINGS, cache).wait()
    assert not ranges(server)

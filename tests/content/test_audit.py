"""Audits of what is kept: damage is found, dropped where nobody uses it, and fetched anew."""

import os
import random
import shutil
from pathlib import Path

import pytest

from lazyfs.content import shelf
from lazyfs.content.audit import Audit, audit, here_bytes, is_proven
from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.chunk_note import leave_note
from lazyfs.content.lanes import Lanes
from lazyfs.content.layer_content import LayerContent
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import KIB, MIB, ContentSettings
from lazyfs.transport.retry import Fetcher
from tests.blobs import MemoryBlob
from tests.images import zstd_chunked
from tests.layers.driving import open_layer
from tests.shelves import CHUNK, layers_in, put_layer, using
from tests.streams import FAST, indexed_stream, kept_in, stream_index, whole_run

DATA = random.Random(1).randbytes(5 * MIB + 12345)


def audit_sole(directory: Path) -> Audit:
    (layer,) = shelf.shelved(directory)
    seen: list[int] = []
    found = audit(directory, layer, seen.append)
    assert sum(seen) == found.checked_bytes
    return found


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 4]), offset)


def test_a_whole_tar_is_proven_by_the_way(tmp_path: Path) -> None:
    put_layer(tmp_path, DATA)
    (layer,) = shelf.shelved(tmp_path)
    assert not is_proven(layer)
    assert here_bytes(layer) == len(DATA)
    found = audit_sole(tmp_path)
    assert not found.is_damaged
    assert found.digest_matches
    assert (found.checked_bytes, found.checked_chunks) == (len(DATA), 21)
    assert is_proven(layer)


def test_a_part_is_compared_as_far_as_it_is_here(tmp_path: Path) -> None:
    home = put_layer(tmp_path, DATA, absent=frozenset({0, 3, 20}))
    found = audit_sole(tmp_path)
    assert not found.is_damaged
    assert found.digest_matches is None
    assert found.checked_chunks == 18
    assert here_bytes(found.layer) == len(DATA) * 18 // 21
    assert not (home / "proven").exists()


def test_damage_is_dropped_and_the_rest_stays(tmp_path: Path) -> None:
    home = put_layer(tmp_path, DATA)
    audit_sole(tmp_path)
    assert (home / "proven").exists()
    disk_bytes = shelf.disk_bytes_of(home)
    flip(home / "content", 3 * CHUNK + 17)
    found = audit_sole(tmp_path)
    assert found.damaged == [ByteRange(3 * CHUNK, 4 * CHUNK)]
    assert found.repaired
    assert found.digest_matches is None
    assert not (home / "proven").exists()
    assert shelf.disk_bytes_of(home) <= disk_bytes - CHUNK, "a hole"
    found = audit_sole(tmp_path)
    assert not found.is_damaged
    assert found.checked_chunks == 20
    with open(home / "content", "rb") as file:
        assert os.pread(file.fileno(), CHUNK, 2 * CHUNK) == DATA[2 * CHUNK : 3 * CHUNK]


def test_damage_that_somebody_may_be_serving_is_left(tmp_path: Path) -> None:
    home = put_layer(tmp_path, DATA)
    flip(home / "content", 5)
    before = (home / "content").read_bytes()
    with using(home):
        found = audit_sole(tmp_path)
        assert found.is_damaged
        assert not found.repaired
        assert (home / "content").read_bytes() == before
    assert audit_sole(tmp_path).repaired
    assert not audit_sole(tmp_path).is_damaged


def test_marks_that_fit_bytes_which_the_digest_does_not_promise(tmp_path: Path) -> None:
    """As no disk does it, but somebody's hand: nothing of it is kept."""
    home = put_layer(tmp_path, DATA)
    other = put_layer(tmp_path, bytes(len(DATA)))
    for name in ("content", "marks"):
        (other / name).rename(home / name)
    shutil.rmtree(other)
    found = audit_sole(tmp_path)
    assert found.digest_matches is False
    assert found.is_damaged
    assert found.repaired
    assert not layers_in(tmp_path)


@pytest.mark.parametrize("name", ["marks", "content"])
def test_torn_files_are_dropped_as_a_whole(tmp_path: Path, name: str) -> None:
    home = put_layer(tmp_path, DATA)
    os.truncate(home / name, 100)
    found = audit_sole(tmp_path)
    assert found.is_damaged
    assert found.repaired
    assert not layers_in(tmp_path)


def test_a_layer_of_which_nothing_has_come_yet_is_not_damaged(tmp_path: Path) -> None:
    """Somebody has just made it, and not come to its marks."""
    home = put_layer(tmp_path, DATA, absent=frozenset(range(21)))
    (home / "marks").unlink()
    found = audit_sole(tmp_path)
    assert (found.is_damaged, found.checked_chunks) == (False, 0)
    assert layers_in(tmp_path) == [home]


def test_a_layer_that_goes_meanwhile_is_nobodys_fault(tmp_path: Path) -> None:
    home = put_layer(tmp_path, DATA)
    (layer,) = shelf.shelved(tmp_path)
    home.rename(tmp_path / "away")
    found = audit(tmp_path, layer, lambda count: None)
    assert found.unknown == "it is gone"
    assert not found.is_damaged


async def test_a_layer_with_a_table_is_compared_by_its_note(tmp_path: Path) -> None:
    """Chunks of many sizes, padding between files, zeros that are never fetched."""
    files = {"a.img": b"a" * 70_001, "z.img": bytes(MIB), "b.img": DATA[: 3 * MIB + 5]}
    layer = zstd_chunked(files)
    index = open_layer(layer)
    chunks, digest = index.chunks, Digest.parse(layer.digest)

    async def read(counters: Counters) -> bytes:
        size = chunks.content_size_bytes
        cache = open_cache_file(Cache(tmp_path), digest, index.cache_tag, size, len(chunks))
        settings = ContentSettings()
        content = LayerContent(
            MemoryBlob(layer.blob),
            chunks,
            cache,
            Lanes(settings),
            Fetcher(FAST, counters),
            settings,
        )
        got = b""
        for number in range(len(chunks)):
            start = chunks.content_start(number)
            got += await content.read(ByteRange(start, start + chunks.content_size(number)))
        content.close()
        return got

    got = await read(Counters())
    found = audit_sole(tmp_path)
    assert found.unknown is not None
    assert "mounting it once" in found.unknown
    (home,) = layers_in(tmp_path)
    leave_note(home, chunks)
    assert here_bytes(found.layer) == chunks.content_size_bytes
    found = audit_sole(tmp_path)
    assert (found.unknown, found.damaged, found.digest_matches) == (None, [], None)
    assert found.checked_chunks == len(chunks) - len(chunks.zero_chunks())
    last = len(chunks) - 1
    flip(home / "content", chunks.content_start(last))
    assert audit_sole(tmp_path).damaged == [
        ByteRange(
            chunks.content_start(last), chunks.content_start(last) + chunks.content_size(last)
        )
    ]
    counters = Counters()
    assert await read(counters) == got
    assert counters.cache_refused == 0, "the audit has dropped it before"
    assert 0 < counters.bytes_fetched < len(layer.blob) // 2


@pytest.mark.parametrize("indexed", [False, True])
async def test_what_a_pass_has_left_is_compared_by_stretches(tmp_path: Path, indexed: bool) -> None:
    """Toy streams have tags and indexes of their own: those are not known, and say so."""
    stream = indexed_stream() if indexed else stream_index()
    await whole_run(tmp_path, DATA, stream)
    (home,) = kept_in(tmp_path)
    found = audit_sole(tmp_path)
    assert found.unknown is not None
    real = home.with_name(home.name.rpartition(".")[0] + ".zstd-stream-1")
    (home / "index").unlink(missing_ok=True)
    home.rename(real)
    if indexed:  # its marks are of other chunks
        assert audit_sole(tmp_path).is_damaged
        return
    found = audit_sole(tmp_path)
    assert (found.unknown, found.checked_bytes) == (None, len(DATA))
    assert not found.is_damaged
    flip(real / "content", 4 * MIB + 5 * KIB)
    found = audit_sole(tmp_path)
    assert found.damaged == [ByteRange(4 * MIB, len(DATA))]
    assert found.repaired
    assert not layers_in(tmp_path), "a stream is good as a whole or not at all"

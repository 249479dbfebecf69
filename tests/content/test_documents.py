"""Small things that are kept whole or not at all, within the cache's bounds."""

import os
import threading
import time
from pathlib import Path

import pytest

from lazyfs.content import janitor, shelf
from lazyfs.content.cache import Cache
from lazyfs.content.documents import is_sound, name_of
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import UsageError
from lazyfs.ground.settings import KIB, MIB, Limit
from tests.shelves import layers_in, put_layer

DIGEST = Digest.of(b"image")
NAME = name_of(DIGEST, "manifest", "host/repository")


@pytest.mark.parametrize("size", [0, 1, 255 * KIB, 256 * KIB, 3 * MIB + 1])
def test_what_was_kept_is_found(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    documents = Cache(tmp_path).documents
    assert documents.find(NAME) is None
    documents.keep(NAME, [data[: size // 2], memoryview(data)[size // 2 :]])
    again = Cache(tmp_path).documents.find(NAME)
    assert again is not None
    assert bytes(again) == data
    assert documents.has(NAME)
    assert is_sound(tmp_path / "documents" / NAME)


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    documents = Cache(tmp_path).documents
    documents.keep(NAME, [memoryview(bytes(MIB))] * 64)
    documents.keep(NAME + "1", [memoryview(bytes(MIB))] * 64 + [b"1"])
    assert documents.has(NAME)
    assert not documents.has(NAME + "1")


def test_in_memory_nothing_is_kept() -> None:
    documents = Cache.memory().documents
    documents.keep(NAME, [b"1"])
    assert documents.find(NAME) is None
    assert not documents.has(NAME)


def test_what_changed_is_dropped_and_what_is_no_document_is_none(tmp_path: Path) -> None:
    documents = Cache(tmp_path).documents
    documents.keep(NAME, [b"as it was"])
    path = tmp_path / "documents" / NAME
    for text in (path.read_bytes()[:-1] + b"!", path.read_bytes()[:-1], b"", b"\n", b"x" * 1000):
        path.write_bytes(text)
        assert not is_sound(path)
        assert documents.find(NAME) is None
        assert not path.exists()
    path.mkdir()
    assert documents.find(NAME) is None
    path.rmdir()
    os.mkfifo(path)
    assert documents.find(NAME) is None  # and nobody waits for a writer


def test_where_there_is_no_room_nothing_is_kept(tmp_path: Path) -> None:
    documents = Cache(tmp_path, Limit(64 * KIB)).documents
    documents.keep(NAME, [bytes(MIB)])
    assert documents.find(NAME) is None
    assert shelf.half_written(tmp_path) == []


def test_a_disk_that_takes_nothing_is_gone_on_without(tmp_path: Path) -> None:
    (tmp_path / "documents").write_text("in the way")
    documents = Cache(tmp_path).documents
    documents.keep(NAME, [b"1"])
    documents.note_use([NAME])
    assert documents.find(NAME) is None


def test_documents_make_room_by_their_last_use(tmp_path: Path) -> None:
    documents = Cache(tmp_path).documents
    names = [name_of(Digest.of(bytes([at])), "index", "here") for at in range(3)]
    for at, name in enumerate(names):
        documents.keep(name, [bytes(8 * KIB)])
        os.utime(tmp_path / "documents" / name, (at + 1, at + 1))
    put_layer(tmp_path, os.urandom(512 * KIB), used_at_s=2.5)
    listed = [each.path.name for each in shelf.documents(tmp_path)]
    assert listed == names
    assert shelf.used_bytes(tmp_path) > 3 * 8 * KIB + 512 * KIB
    assert janitor.make_room(tmp_path, 1) > 0
    assert [each.path.name for each in shelf.documents(tmp_path)] == names[1:]
    assert len(layers_in(tmp_path)) == 1
    janitor.make_room(tmp_path, 100 * KIB)
    assert [each.path.name for each in shelf.documents(tmp_path)] == names[2:]
    assert layers_in(tmp_path) == []
    assert documents.find(names[2]) is not None
    assert shelf.documents(tmp_path)[0].last_used_s > 3


def test_what_a_killed_daemon_was_writing_is_cleared_away(tmp_path: Path) -> None:
    documents = Cache(tmp_path).documents
    documents.keep(NAME, [b"whole"])
    old, new = (tmp_path / "documents" / f"{shelf.NEW}{age}" for age in ("old", "new"))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    long_ago_s = time.time() - 3600
    os.utime(old, (long_ago_s, long_ago_s))
    janitor.remove_leftovers(tmp_path)
    assert not old.exists()
    assert new.exists()
    assert documents.find(NAME) is not None


def test_others_find_all_of_it_or_nothing_while_it_is_written(tmp_path: Path) -> None:
    """And who looks while it is removed, too."""
    found: list[bytes] = []
    ended = threading.Event()

    def look() -> None:
        documents = Cache(tmp_path).documents
        while not ended.is_set():
            data = documents.find(NAME)
            if data is not None:
                found.append(bytes(data))

    reader = threading.Thread(target=look)
    reader.start()
    documents = Cache(tmp_path).documents
    try:
        for at in range(50):
            documents.keep(NAME, [bytes([at]) * (300 * KIB)])
            if at % 5 == 4:
                documents.forget(NAME)
    finally:
        ended.set()
        reader.join()
    assert all(data == data[:1] * (300 * KIB) for data in found)


def test_they_are_as_private_as_all_of_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(0o700)
    Cache(cache).documents.keep(NAME, [b"1"])
    assert (cache / "documents").stat().st_mode & 0o077 == 0
    assert (cache / "documents" / NAME).stat().st_mode & 0o077 == 0
    from lazyfs.content.private_dir import insist_on_private

    (cache / "documents").chmod(0o770)
    with pytest.raises(UsageError, match="others may write"):
        insist_on_private(cache)

"""What an earlier mount was told: by digest only, compared each time, never believed blindly."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.checkpoint.ahead import Ahead
from lazyfs.checkpoint.remembered import IndexMemory, RememberingSource
from lazyfs.content.cache import Cache
from lazyfs.content.documents import Documents, name_of
from lazyfs.content.room import Room
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import SourceError, UsageError
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.blob import Blob
from lazyfs.transport.place import Health
from lazyfs.transport.source import Manifest, Referrers

REPOSITORY = "registry.example/team/web"
OCI = "application/vnd.oci.image.manifest.v1+json"
MANIFEST = json.dumps({"schemaVersion": 2, "layers": []}).encode()
DIGEST = Digest.of(MANIFEST)
CONFIG = b'{"os": "linux"}'


class Registry:
    """A source that counts what it is asked for."""

    name = REPOSITORY

    def __init__(self, data: bytes = MANIFEST) -> None:
        self.data = data
        self.asked: list[str] = []
        self.closed = False

    def manifest(self, reference: str | None) -> Manifest:
        self.asked.append(reference or "latest")
        return Manifest(self.data, OCI, Digest.of(self.data))

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        raise NotImplementedError

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        self.asked.append(str(digest))
        return CONFIG

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        self.asked.append("referrers")
        return Referrers()

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        raise NotImplementedError

    @property
    def is_settled(self) -> bool:
        return True

    def healths(self) -> Sequence[Health]:
        return ()

    def close(self) -> None:
        self.closed = True


def remembering(directory: Path, registry: Registry, name: str = REPOSITORY) -> RememberingSource:
    return RememberingSource(registry, Cache(directory).documents, name)


def test_what_was_saved_is_not_asked_for_again(tmp_path: Path) -> None:
    first = remembering(tmp_path, Registry())
    assert first.manifest("v1").data == MANIFEST
    assert first.read_blob(Digest.of(CONFIG), len(CONFIG)) == CONFIG
    first.save()
    registry = Registry()
    second = remembering(tmp_path, registry)
    assert second.manifest(str(DIGEST)) == Manifest(MANIFEST, OCI, DIGEST)
    assert second.read_blob(Digest.of(CONFIG), len(CONFIG)) == CONFIG
    assert registry.asked == []
    assert second.manifest("v1").data == MANIFEST
    assert second.manifest(None).data == MANIFEST
    assert second.referrers(DIGEST, "any") == []
    assert registry.asked == ["v1", "latest", "referrers"]
    second.close()
    assert registry.closed


def test_nothing_is_kept_before_it_is_saved(tmp_path: Path) -> None:
    remembering(tmp_path, Registry()).manifest(str(DIGEST))
    registry = Registry()
    remembering(tmp_path, registry).manifest(str(DIGEST))
    assert registry.asked == [str(DIGEST)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"{", b'{"schemaVersion": 1}', b"[]"])
def test_what_cannot_be_read_is_not_kept(tmp_path: Path, data: bytes) -> None:
    source = remembering(tmp_path, Registry(data))
    source.manifest("v1")
    source.save()
    assert list(tmp_path.iterdir()) == []


def test_another_repository_is_asked(tmp_path: Path) -> None:
    first = remembering(tmp_path, Registry())
    first.manifest("v1")
    first.save()
    registry = Registry()
    remembering(tmp_path, registry, "registry.example/team/other").manifest(str(DIGEST))
    assert registry.asked == [str(DIGEST)]


@pytest.mark.parametrize("text", [b"", b"\n", b"no line", OCI.encode() + b"\n{}"])
def test_a_document_of_something_else_is_not_believed(tmp_path: Path, text: bytes) -> None:
    documents = Cache(tmp_path).documents
    names = [
        name_of(DIGEST, "manifest", REPOSITORY),
        name_of(Digest.of(CONFIG), "blob", REPOSITORY),
    ]
    for name in names:
        documents.keep(name, [text])
    registry = Registry()
    source = remembering(tmp_path, registry)
    assert source.manifest(str(DIGEST)).data == MANIFEST
    assert source.read_blob(Digest.of(CONFIG), len(CONFIG)) == CONFIG
    assert registry.asked == [str(DIGEST), str(Digest.of(CONFIG))]
    assert not any(documents.has(name) for name in names)
    source.save()
    assert all(documents.has(name) for name in names)


def memory_of(directory: Path) -> IndexMemory:
    memory = IndexMemory(Cache(directory).documents, DIGEST, REPOSITORY)
    memory.load()
    return memory


def test_ranges_are_recalled_as_they_were_asked_for(tmp_path: Path) -> None:
    ranges = [ByteRange(0, 3), ByteRange(90, 92)]
    memory = memory_of(tmp_path)
    assert memory.recall(ranges) is None
    memory.note(ranges, [b"abc", memoryview(b"yz")])
    assert memory.recall(ranges) is None, "what has just been fetched is not asked for"
    memory.save()
    again = memory_of(tmp_path)
    assert not again.used
    assert again.recall([ByteRange(0, 2)]) is None
    assert again.recall([]) is None
    found = again.recall(ranges)
    assert found is not None
    assert list(map(bytes, found)) == [b"abc", b"yz"]
    assert again.used
    again.forget()
    assert again.recall(ranges) is None
    assert memory_of(tmp_path).recall(ranges) is None


def test_what_was_recalled_stays_beside_what_is_new(tmp_path: Path) -> None:
    """Two images may have the same layer, and say differently how it is to be read."""
    first, other = ByteRange(0, 3), ByteRange(7, 9)
    memory = memory_of(tmp_path)
    memory.note([first], [b"abc"])
    memory.save()
    memory = memory_of(tmp_path)
    assert memory.recall([first]) is not None
    memory.note([other], [b"hi"])
    memory.save()
    found = memory_of(tmp_path).recall([first, other])
    assert found is not None
    assert list(map(bytes, found)) == [b"abc", b"hi"]


class Unproven(Documents):
    """Documents that hold whatever they are given."""

    def __init__(self, data: bytes) -> None:
        super().__init__(None, Room())
        self.data = data

    def find(self, name: str) -> bytes:
        return self.data


@given(
    st.one_of(
        st.binary(max_size=200),
        st.tuples(
            st.lists(st.tuples(st.integers(), st.integers()), max_size=4), st.binary(max_size=99)
        ).map(lambda parts: json.dumps(parts[0]).encode() + b"\n" + parts[1]),
    )
)
def test_whatever_a_document_holds_it_is_a_value_or_nothing(data: bytes) -> None:
    memory = IndexMemory(Unproven(data), DIGEST, REPOSITORY)
    memory.load()
    found = memory.recall([ByteRange(0, 1)])
    assert found is None or [len(each) for each in found] == [1]


def test_an_image_is_resolved_ahead_for_who_asks_with_the_same_words(tmp_path: Path) -> None:
    reference = f"oci:{tmp_path}/none"
    ahead = Ahead(reference, TransportSettings(), Cache.memory())
    assert ahead.take("oci:/elsewhere") is None
    coming = ahead.take(reference)
    assert coming is not None
    with pytest.raises(SourceError):
        coming.result(timeout=30)
    assert ahead.take(reference) is None, "it is somebody's already"
    with pytest.raises(UsageError):
        Ahead("docker://", TransportSettings(), Cache.memory())

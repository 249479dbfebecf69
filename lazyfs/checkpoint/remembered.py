"""What an earlier mount was told of an image, so that a later one need not ask: by digest only.

`RememberingSource` stands before a registry: what is named by a digest it gives from the cache,
where it compares it with that digest each time, so the cache has to be trusted in nothing. A tag
is always asked for, and so is who refers to an image: both may have changed. A manifest's media
type, which no digest proves, is a label here as it is where it was served.

`IndexMemory` is for the parts of a layer's blob that say how the layer is to be read: its first
bytes, its table of contents. They are kept once they are proven, by their own digest or with the
whole layer; if they make no sense all the same (the next image may say that they should be
others), they are forgotten and asked for.

Nothing is written before an image was opened: what cannot be used is not worth keeping.
"""

from collections.abc import Sequence
from contextlib import suppress

import msgspec

from lazyfs.checkpoint.manifest import parse_manifest
from lazyfs.content.documents import Documents, name_of
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.blob import Blob
from lazyfs.transport.place import Health
from lazyfs.transport.source import ImageSource, Manifest, Referrers

_LABEL_MOST = 255
_LIST_MOST_BYTES = 64 * 1024


class RememberingSource:
    """See `ImageSource`. Owns the source that it asks."""

    def __init__(self, source: ImageSource, documents: Documents, name: str) -> None:
        """`name`: of the repository, as in the reference: each has documents of its own."""
        self._source = source
        self._documents = documents
        self._repository = name
        self._found: set[str] = set()
        self._new: dict[str, list[Data]] = {}

    @property
    def name(self) -> str:
        """What a person calls it in messages."""
        return self._source.name

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest with this tag or digest. See `ImageSource.manifest`."""
        digest = Digest.parse(reference) if reference is not None and ":" in reference else None
        found = None if digest is None else self._find(digest, "manifest")
        if found is not None and digest is not None:
            label, _, data = bytes(found).partition(b"\n")
            if self._is(digest, data, "manifest"):
                return Manifest(data, label.decode(errors="replace"), digest)
        served = self._source.manifest(reference)
        label = served.media_type.encode(errors="replace")
        if len(label) <= _LABEL_MOST and b"\n" not in label:
            with suppress(LazyfsError):  # else what cannot be read would stay so
                parse_manifest(served.data, served.media_type, self.name)
                self._note(served.digest, "manifest", [label + b"\n", served.data])
        return served

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. See `ImageSource.blob`."""
        return self._source.blob(digest, size_bytes)

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole. See `ImageSource.read_blob`."""
        found = self._find(digest, "blob")
        if found is not None and self._is(digest, found, "blob"):
            return bytes(found)
        data = self._source.read_blob(digest, size_bytes)
        self._note(digest, "blob", [data])
        return data

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        """Return what refers to the manifest. See `ImageSource.referrers`."""
        return self._source.referrers(digest, *artifact_types)

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        """Return what a referrer offers. See `ImageSource.read_offer`."""
        return self._source.read_offer(digest, size_bytes, is_manifest=is_manifest)

    @property
    def is_settled(self) -> bool:
        """As its source. See `ImageSource.is_settled`."""
        return self._source.is_settled

    def healths(self) -> Sequence[Health]:
        """Return how each place has behaved. See `ImageSource.healths`."""
        return self._source.healths()

    def save(self) -> None:
        """Keep what was asked for, and note what was used. Blocks."""
        self._documents.note_use(sorted(self._found))
        while self._new:
            name, pieces = self._new.popitem()
            self._documents.keep(name, pieces)
            self._found.add(name)

    def close(self) -> None:
        """Let go of connections."""
        self._source.close()

    def _find(self, digest: Digest, kind: str) -> Data | None:
        name = name_of(digest, kind, self._repository)
        found = self._documents.find(name)
        if found is not None:
            self._found.add(name)
        return found

    def _is(self, digest: Digest, data: Data, kind: str) -> bool:
        """Whether a document is what its digest promises; if not, it is forgotten."""
        try:
            digest.check(data, "a document in the cache")
        except IntegrityError:
            self._documents.forget(name_of(digest, kind, self._repository))
            return False
        return True

    def _note(self, digest: Digest, kind: str, pieces: list[Data]) -> None:
        self._new[name_of(digest, kind, self._repository)] = pieces


def is_remembered(documents: Documents, digest: Digest, name: str, kind: str = "manifest") -> bool:
    """Whether there is a document of a manifest; it may turn out to be damaged.

    Or of something else that is kept by the manifest's digest: the "trace" (`attached.py`).
    """
    return documents.has(name_of(digest, kind, name))


class IndexMemory:
    """What parts of one blob told an earlier mount, and tell this one."""

    def __init__(self, documents: Documents, digest: Digest, name: str) -> None:
        """Look at nothing yet. `digest`: of the blob. `name`: of the repository."""
        self._documents = documents
        self._name = name_of(digest, "index", name)
        self._known: dict[ByteRange, Data] = {}
        self._asked: dict[ByteRange, Data] = {}
        self._believed: dict[ByteRange, Data] = {}
        self.used = False
        """Whether something that was kept has been believed."""

    def load(self) -> None:
        """Find what an earlier mount has kept. Blocks."""
        found = self._documents.find(self._name)
        self._known = {} if found is None else _unpack(found)

    def recall(self, ranges: Sequence[ByteRange]) -> list[Data] | None:
        """Return what the ranges were, if all are known."""
        if not ranges or not all(each in self._known for each in ranges):
            return None
        self.used = True
        self._believed.update((each, self._known[each]) for each in ranges)
        return [self._known[each] for each in ranges]

    def note(self, ranges: Sequence[ByteRange], replies: Sequence[Data]) -> None:
        """Note what the source has said, to be kept if it turns out to be right."""
        self._asked.update(zip(ranges, replies, strict=True))

    def save(self) -> None:
        """Keep what was asked for, now that it is proven. Blocks; a second time does nothing."""
        asked, self._asked = self._asked, {}
        if asked:
            kept = {**self._believed, **asked}
            listed = msgspec.json.encode([(each.start, each.stop) for each in kept])
            self._documents.keep(self._name, [listed + b"\n", *kept.values()])
        elif self.used:
            self._documents.note_use([self._name])

    def forget(self) -> None:
        """Forget what was kept: it led nowhere. Blocks."""
        self._documents.forget(self._name)
        self._known, self._asked, self._believed, self.used = {}, {}, {}, False


def _unpack(document: Data) -> dict[ByteRange, Data]:
    """Read what `IndexMemory.save` has written; of anything else, nothing."""
    view = memoryview(document)
    found: dict[ByteRange, Data] = {}
    with suppress(msgspec.DecodeError, ValueError):
        end = bytes(view[:_LIST_MOST_BYTES]).index(b"\n")
        at = end + 1
        for start, stop in msgspec.json.decode(view[:end], type=list[tuple[int, int]]):
            if not 0 <= start < stop <= start + len(view) - at:
                return {}
            found[ByteRange(start, stop)] = view[at : at + stop - start]
            at += stop - start
    return found

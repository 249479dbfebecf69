"""Where images are: what a registry and a layout directory have in common.

All of it blocks and is called in worker threads. Manifests and small blobs are retried within
(they are what a mount begins with); a `Blob`'s ranges are `retry.fetch`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from lazyfs.ground.digest import Digest
from lazyfs.transport.blob import Blob
from lazyfs.transport.place import Health

MANIFEST_LIMIT_BYTES = 4 * 1024 * 1024
"""The most that distribution-spec asks a registry to take, and that we read."""


class Manifest(msgspec.Struct, frozen=True):
    """A manifest or an index as it was served, its digest computed and, if asked by it, proven."""

    data: bytes
    media_type: str
    """As the source labels it; the document may say otherwise."""
    digest: Digest
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Of the descriptor that named it, where there was one."""


class ReferrerDescriptor(msgspec.Struct, frozen=True):
    """A manifest that says of itself that it refers to another one."""

    digest: Digest
    media_type: str
    size_bytes: int
    artifact_type: str
    annotations: Mapping[str, str] = msgspec.field(default_factory=dict)


class Referrers(list[ReferrerDescriptor]):
    """What refers to a manifest, in any order; `is_known` says whether that was told."""

    def __init__(self, found: Iterable[ReferrerDescriptor] = (), *, is_known: bool = True) -> None:
        """`is_known`: False if nobody could be asked, and there may be more."""
        super().__init__(found)
        self.is_known = is_known


class ImageSource(Protocol):
    """One repository of a registry, or one layout directory."""

    @property
    def name(self) -> str:
        """What a person calls it in messages."""

    @property
    def is_settled(self) -> bool:
        """Whether two things can be asked at once: it is known what protocol is spoken there."""

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest or index with this tag or digest; None for the source's default.

        Raises:
            SourceError: there is none, it is not to be had, or nothing says which it should be.
            IntegrityError: its bytes are not what the digest promised.
        """

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. Asks nothing of a network yet.

        Raises:
            SourceError: it is known already that there is none.
            IntegrityError: it is known already that it is not as large as promised.
        """

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole, proven by its digest.

        Raises:
            SourceError: it is not to be had.
            MalformedError: it is said to be larger than a manifest may be.
            IntegrityError: its bytes are not what the digest promised.
        """

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        """Return what refers to the manifest with this digest and is of one of the types.

        An offer, never a need: what cannot be had within a few seconds is as good as none, and
        is only logged. Whoever may push can refer: take nothing of it on trust.
        """

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        """Return whole, proven, what a referrer offers: a small blob, or its own manifest.

        As `referrers`, it is given up after a few seconds.

        Raises: as `read_blob`, and a FetchError.
        """

    def healths(self) -> Sequence[Health]:
        """Return how each place has behaved that it asks, in the order of asking.

        Empty for what lies on this machine.
        """

    def close(self) -> None:
        """Let go of connections and descriptors; blobs that it gave are closed too."""

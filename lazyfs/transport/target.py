"""Where an image is written to: what a registry and an OCI layout have in common.

All of it blocks and is called in worker threads. Blobs come before the manifest that names them.
"""

from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Literal, Protocol

from lazyfs.ground.digest import Digest


class Target(Protocol):
    """One repository of a registry, or one layout, that is written to."""

    @property
    def name(self) -> str:
        """What a person calls it in messages."""

    def put_blob(self, digest: Digest, size_bytes: int, open_blob: Callable[[], BinaryIO]) -> None:
        """See to it that the blob is there.

        `open_blob` is called only if it has to be given: it returns a seekable file at its start,
        whose bytes are those of `digest`; it is closed here.

        Raises:
            SourceError: it is not taken.
            IntegrityError: what is there by that digest is something else.
            LazyfsError: it cannot be written.
        """

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> Digest:
        """Write a manifest or an index, under a tag or by its digest alone; return its digest.

        Raises: as `put_blob`.
        """

    def attach(
        self, data: bytes, subject: Digest, entry: Mapping[str, Any], key: str
    ) -> Literal["api", "tag", "index"]:
        """Write a manifest that refers to another one, and see to it that it is found.

        `data`: the manifest, whose blobs are there. `subject`: to what it refers. `entry`: its
        descriptor, as lists of referrers are to have it; there it takes the place of what has its
        artifact type and the same annotation `key`, of the same subject. Returns who lists it: the
        registry's API, an index under the fallback tag, or a layout's index.

        Raises: as `put_blob`.
        """

    def close(self) -> None:
        """Let go of connections."""

"""Where an image is written to: what a registry and an OCI layout have in common.

All of it blocks and is called in worker threads. Blobs come before the manifest that names them.
"""

from collections.abc import Callable
from typing import BinaryIO, Protocol

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

    def close(self) -> None:
        """Let go of connections."""

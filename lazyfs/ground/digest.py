"""Digests as OCI writes them: `algorithm:hex`.

Source: OCI image-spec, descriptor.md, "Digests": sha256 must, sha512 may be supported.
"""

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple, Self

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError, MalformedError

if TYPE_CHECKING:
    from hashlib import _Hash

_HEX_LENGTH = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+")


class Digest(NamedTuple):
    """An algorithm that we can compute and the value it must give."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `sha256:…` or `sha512:…`.

        Raises:
            MalformedError: another algorithm, or not as many hex digits as it has.
        """
        algorithm, _, value = text.partition(":")
        length = _HEX_LENGTH.get(algorithm)
        if length is None or len(value) != length or not _HEX.fullmatch(value):
            raise MalformedError(
                f"{text[:200]!r} is not a digest: want sha256:<64 hex> or sha512:<128 hex>"
            )
        return cls(algorithm, value)

    @classmethod
    def of(cls, data: Data) -> Self:
        """Compute the sha256 digest of `data`."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def hasher(self) -> "_Hash":
        """Return a fresh hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def check(self, data: Data, what: str) -> None:
        """Compare `data` with this digest.

        Raises:
            IntegrityError: they differ; the message begins with `what`.
        """
        hasher = self.hasher()
        hasher.update(data)
        if hasher.hexdigest() != self.hex:
            raise IntegrityError(
                f"{what} does not match its digest: promised {self}, "
                f"received {self.algorithm}:{hasher.hexdigest()}"
            )

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

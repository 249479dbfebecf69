"""The mark of a chunk: a seeded 64-bit xxh3 of its bytes, by which they are known again.

xxh3 is quick and no defence against somebody who may choose the bytes: without a seed that he
does not know, a source could give a chunk, and for its proof another one with the same mark. So
each cache has a seed of its own, in `DIR/seed`, which leaves the machine in no form. Where it is
lost, all marks are wrong, and what the cache holds is fetched anew.
"""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

import xxhash

from lazyfs.ground.data import Data

SEED_NAME = "seed"
_SEED_BYTES = 8


class Marker:
    """Marks bytes by one seed."""

    def __init__(self, seed: int | None = None) -> None:
        """None: a seed that nobody else will ever know."""
        self._seed = secrets.randbits(8 * _SEED_BYTES) if seed is None else seed

    def of(self, data: Data) -> int:
        """Return the mark of bytes; never 0, which means "absent"."""
        return xxhash.xxh3_64_intdigest(data, self._seed) or 1

    def hasher(self) -> xxhash.xxh3_64:
        """Return a hasher for bytes that come in pieces; `mark_from` ends it."""
        return xxhash.xxh3_64(seed=self._seed)


def mark_from(hasher: xxhash.xxh3_64) -> int:
    """Return the mark of all that a `Marker`'s hasher has been given."""
    return hasher.intdigest() or 1


def marker_of(directory: Path) -> Marker:
    """Return the marker of a cache; the first to ask makes its seed.

    Where it can neither be read nor made, one that knows nothing of what is there.
    """
    for _ in range(2):
        seed = _read(directory / SEED_NAME)
        if seed is not None:
            return Marker(seed)
        with suppress(OSError):
            _make(directory)
    return Marker()


def _read(path: Path) -> int | None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(_SEED_BYTES + 1)
        if len(data) == _SEED_BYTES:
            return int.from_bytes(data, "little")
        path.unlink()  # torn
    return None


def _make(directory: Path) -> None:
    """Put a seed there, whole, if there is none."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".seed-") as file:
        file.write(secrets.token_bytes(_SEED_BYTES))
        file.flush()
        try:
            os.link(file.name, directory / SEED_NAME)
        except FileExistsError:
            return
        except OSError:  # a filesystem without hard links: what is torn there is made anew
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(directory / SEED_NAME, flags, 0o600)
            with open(fd, "wb") as seed:
                seed.write(secrets.token_bytes(_SEED_BYTES))

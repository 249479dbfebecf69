"""Cache directories as mounts leave them, without mounts."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyfs.content.marks import marker_of

KIB = 1024
TAR_TAG = "tar-256k-0123456789abcdef"
CHUNK = 256 * KIB


def put_layer(
    directory: Path,
    data: bytes,
    used_at_s: float | None = None,
    tag: str = TAR_TAG,
    *,
    absent: frozenset[int] = frozenset(),
) -> Path:
    """Keep a plain tar, but for the chunks that are absent; return its directory."""
    home = directory / "layers" / f"sha256-{hashlib.sha256(data).hexdigest()}.{tag}"
    home.mkdir(mode=0o700, parents=True)
    with open(home / "content", "xb") as content, open(home / "marks", "xb") as marks:
        content.truncate(len(data))
        for index, start in enumerate(range(0, len(data), CHUNK)):
            chunk = data[start : start + CHUNK]
            if index not in absent:
                content.seek(start)
                content.write(chunk)
            mark = 0 if index in absent else marker_of(directory).of(chunk)
            marks.write(mark.to_bytes(8, "little"))
    if used_at_s is not None:
        (home / "used").touch()
        os.utime(home / "used", (used_at_s, used_at_s))
    return home


@contextmanager
def using(home: Path) -> Iterator[int]:
    """Use a layer, as a mount does."""
    file = os.open(home / "content", os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file
    finally:
        os.close(file)


def layers_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("layers/*"))

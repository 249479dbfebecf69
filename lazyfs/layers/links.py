"""Hard links, resolved: an archive says "the same as that earlier name", a reader wants a file."""

from lazyfs.ground.errors import MalformedError
from lazyfs.layers.model import Entry, EntryType

ENTRIES_MOST = 1_000_000
"""Names in a layer; the largest images have some hundred thousand."""


def resolve_link(by_path: dict[str, Entry], path: str, target: str) -> Entry:
    """Return the entry of a hard link at `path` to the earlier entry at `target`.

    Raises:
        MalformedError: there is no such entry, or it is a directory.
    """
    first = by_path.get(target)
    if first is None or first.type is EntryType.DIRECTORY or not path:
        raise MalformedError(
            f"hard link {path[:200]!r} points at {target[:200]!r}, which is no earlier file"
        )
    link_of = (first.link_of or first.path) if first.type is EntryType.FILE else ""
    return Entry(
        path=path,
        type=first.type,
        mode=first.mode,
        uid=first.uid,
        gid=first.gid,
        size_bytes=first.size_bytes,
        mtime_ns=first.mtime_ns,
        content_start=first.content_start,
        symlink_target=first.symlink_target,
        link_of=link_of,
        xattrs=first.xattrs,
    )

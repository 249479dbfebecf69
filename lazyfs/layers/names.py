"""Names as archives carry them, made into paths that cannot leave the tree they are shown in.

Shared by every format, so that a name means the same whichever of them carried it.
Limits: Linux, `limits.h` (PATH_MAX 4096, NAME_MAX 255), counted in bytes.
"""

from lazyfs.ground.errors import MalformedError

PATH_MOST_BYTES = 4096
NAME_MOST_BYTES = 255


def decode_name(raw: bytes) -> str:
    """Read bytes of a name as UTF-8; what is not UTF-8 is surrogate-escaped."""
    return raw.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """Return the bytes that `decode_name` made a name of, whatever this machine's locale is."""
    return name.encode("utf-8", "surrogateescape")


def entry_path(name: str) -> str:
    """Return `name` relative and normalised; "" for the layer's root.

    Leading "/" and "./", single "." and trailing "/" are dropped, as tar programs do.

    Raises:
        MalformedError: "..", NUL, an empty component, or longer than Linux can name.
    """
    _check_text(name, "name", PATH_MOST_BYTES)
    rest = name.rstrip("/")
    while rest.startswith(("/", "./")):
        rest = rest[1:] if rest[0] == "/" else rest[2:]
    if rest in ("", "."):
        return ""
    parts = rest.split("/")
    if "." in parts:
        parts = [part for part in parts if part != "."]
    for part in parts:
        if part in ("", ".."):
            raise MalformedError(f"name {name[:200]!r} has an empty or '..' component")
        if len(part) * 4 > NAME_MOST_BYTES and _size_bytes(part) > NAME_MOST_BYTES:
            raise MalformedError(
                f"name {name[:200]!r} has a component of more than {NAME_MOST_BYTES} bytes"
            )
    return "/".join(parts)


def link_target(target: str, path: str) -> str:
    """Return a symlink's target as it is, if Linux could hold it.

    Raises:
        MalformedError: empty, longer than a path may be, or with a NUL.
    """
    if not target:
        raise MalformedError(f"symlink {path[:200]!r} has no target")
    _check_text(target, f"target of symlink {path[:200]!r}:", PATH_MOST_BYTES)
    return target


def _check_text(text: str, what: str, most_bytes: int) -> None:
    if "\0" in text:
        raise MalformedError(f"{what} {text[:200]!r} holds a NUL")
    if len(text) * 4 > most_bytes and _size_bytes(text) > most_bytes:
        raise MalformedError(f"{what} {text[:200]!r}… is longer than {most_bytes} bytes")
    if not text.isascii():
        _size_bytes(text)


def _size_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as err:
        raise MalformedError(f"name {text[:200]!r} cannot be written as bytes") from err

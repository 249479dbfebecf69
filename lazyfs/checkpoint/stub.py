"""The marker that makes a checkpoint a stub: it names the real one, whose pages were left out.

A stub is a checkpoint image less its pages files. Engines pull it, unpack it and copy its images
directory; `lazyfs-runtime` finds the marker there, and has CRIU restore from the real image
instead (`stub_image.py` makes stubs, `follow.py` goes on from one). The marker lies in the images
directory itself since that is all that Podman, CRI-O and containerd hand on to their runtime.

The marker was written by whoever pushed the stub. What it says of sizes is for people; what it
names is an image by digest in a registry, and nothing else: no tag, no file of this machine.

Decides nothing else; sans-I/O.
"""

from typing import Annotated

import msgspec

from lazyfs.checkpoint.reference import RegistryReference, parse_reference
from lazyfs.ground.errors import LazyfsError, MalformedError

MARKER = "lazyfs-stub.json"
"""Name of the marker, in CRIU's images directory."""
ANNOTATION = "lazyfs.stub.reference"
"""Of a stub's manifest: the real image, as in the marker."""
LARGEST_MARKER_BYTES = 1 << 20
VERSION = 1
_SCHEME = "docker://"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Pages(msgspec.Struct, frozen=True):
    """A file of the images directory that the stub lacks."""

    name: _Name
    """Below the images directory: `pages-1.img`."""
    size_bytes: _Size


class Stub(msgspec.Struct, frozen=True, kw_only=True):
    """What a marker says."""

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)] = VERSION
    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    """The real image: `HOST/REPOSITORY@DIGEST`."""
    pages: Annotated[list[Pages], msgspec.Meta(max_length=10_000)] = []
    checkpoint_bytes: _Size = 0
    """All files of the real images directory."""
    image_bytes: _Size = 0
    """All layers of the real image, as they are in the registry."""
    lazy_pages: bool | None = None
    """How whoever made the stub wants it restored; the machine's own policy goes first."""
    made_by: Annotated[str, msgspec.Meta(max_length=200)] = ""

    @property
    def pages_bytes(self) -> int:
        """How much the stub lacks."""
        return sum(each.size_bytes for each in self.pages)


_DECODER = msgspec.json.Decoder(Stub)


def write_stub(stub: Stub) -> bytes:
    """Return a marker's bytes, for people to read too."""
    return msgspec.json.format(msgspec.json.encode(stub), indent=1) + b"\n"


def read_stub(data: bytes) -> Stub:
    """Read a marker.

    Raises:
        MalformedError: it is none, or names something else than an image in a registry by digest.
    """
    if len(data) > LARGEST_MARKER_BYTES:
        raise MalformedError(f"{MARKER} is larger than {LARGEST_MARKER_BYTES} bytes")
    try:
        stub = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"{MARKER} cannot be understood: {error}") from None
    real_reference(stub)
    return stub


def real_reference(stub: Stub) -> RegistryReference:
    """Return the image that a stub stands for.

    Raises:
        MalformedError: it is no image in a registry, or not named by its digest.
    """
    text = stub.reference
    try:  # as it says: what lies in the current directory has no say
        reference = parse_reference(text if text.startswith(_SCHEME) else _SCHEME + text)
    except LazyfsError:
        raise MalformedError(
            f"{MARKER} names no image; it has to be one in a registry, HOST/REPOSITORY@DIGEST"
        ) from None
    if not isinstance(reference, RegistryReference) or reference.digest is None:
        raise MalformedError(
            f"{MARKER} names {stub.reference!r}; it has to be an image in a registry, by digest"
        )
    return reference

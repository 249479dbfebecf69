"""The formats that lazyfs reads. A new one: its file, and a line here.

Bytes decide, not labels: Podman, for one, writes gzip into OCI layouts whatever it is told.
"""

from lazyfs.ground.errors import UnsupportedLayer
from lazyfs.layers.estargz import EStargz
from lazyfs.layers.gzip import Gzip
from lazyfs.layers.model import LayerDescriptor, LayerFormat
from lazyfs.layers.plain_zstd import PlainZstd
from lazyfs.layers.seekable_zstd import SeekableZstd
from lazyfs.layers.stargz_zstd import StargzZstd
from lazyfs.layers.tar import Tar
from lazyfs.layers.zstd_chunked import ZstdChunked

FORMATS: tuple[LayerFormat, ...] = (
    ZstdChunked(),
    StargzZstd(),
    EStargz(),
    SeekableZstd(),
    PlainZstd(),
    Gzip(),
    Tar(),
)
"""In the order in which they are asked: the more particular first."""

_MAGICS = {
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"\x7fELF": "an ELF program",
    b"hsqs": "a squashfs",
}
_FAMILIES = {"gzip": ("gzip", "estargz", "soci"), "zstd": ("zstd",)}
"""By what a media type says, what the formats' names may begin with."""


def choose_by_words(layer: LayerDescriptor) -> LayerFormat | None:
    """Return the format of a layer whose annotations alone tell it, digests and all."""
    return next((item for item in FORMATS if item.recognises(layer, b"")), None)


def choose(layer: LayerDescriptor, head: bytes) -> LayerFormat:
    """Return the format of a layer that begins with the bytes `head`.

    Raises:
        UnsupportedLayer: none reads it; the message says what the layer is and what works.
    """
    for item in FORMATS:
        if item.recognises(layer, head):
            return item
    what = f"layer {layer.digest}" if layer.digest is not None else "the archive"
    seen = next((name for magic, name in _MAGICS.items() if head.startswith(magic)), None)
    looks = f"its bytes look like {seen}" if seen else f"its bytes begin {head[:8].hex(' ')}"
    works = "tar, or tar compressed by gzip or zstd (plain, chunked, seekable, eStargz, SOCI)"
    raise UnsupportedLayer(
        f"{what} of media type {layer.media_type[:100]!r} cannot be read: {looks}. "
        f"What works: {works}"
    )


def label_of(layer: LayerDescriptor) -> str | None:
    """Return the compression that the media type promises: "tar", "gzip", "zstd"; or None."""
    words = layer.media_type.replace(".", "+").split("+")
    if "tar" not in words and "x-tar" not in layer.media_type:
        return None
    return next((label for label in _FAMILIES if label in words), Tar.name)


def is_mislabelled(layer: LayerDescriptor, format_name: str) -> bool:
    """Whether the media type promises another compression than the bytes have.

    An archive outside of an image has no label of its own.
    """
    label = label_of(layer)
    if layer.digest is None or label is None:
        return False
    return format_name.split(":")[0] not in _FAMILIES.get(label, (label,))

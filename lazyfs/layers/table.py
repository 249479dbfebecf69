"""The formats that lazyfs reads. A new one: its file, and a line here."""

from lazyfs.ground.errors import UnsupportedLayer
from lazyfs.layers.model import LayerDescriptor, LayerFormat
from lazyfs.layers.tar import Tar
from lazyfs.layers.zstd_chunked import ZstdChunked

FORMATS: tuple[LayerFormat, ...] = (ZstdChunked(), Tar())
"""In the order in which they are asked: the more particular first."""


def choose(layer: LayerDescriptor) -> LayerFormat:
    """Return the format of a layer, by the manifest's words alone.

    Raises:
        UnsupportedLayer: none reads it; the message says what the layer is and what works.
    """
    for candidate in FORMATS:
        if candidate.recognises(layer):
            return candidate
    works = "; ".join(f"{item.name} ({', '.join(item.media_types)})" for item in FORMATS)
    raise UnsupportedLayer(
        f"layer {layer.digest or ''} of media type {layer.media_type!r} cannot be read lazily: "
        f"{_reason(layer.media_type)}. What works: {works}"
    )


def _reason(media_type: str) -> str:
    """Say why bytes of a media type cannot be reached at random."""
    if media_type.endswith("+encrypted"):
        return "it is encrypted, and lazyfs holds no keys; push it unencrypted"
    if media_type.endswith(("+gzip", ".gzip")):
        return "gzip has no index; push it with --compression-format zstd:chunked"
    if media_type.endswith(("+zstd", ".zstd")):
        return (
            "plain zstd has no index, and no zstd:chunked annotations are on the layer; "
            "push it with --compression-format zstd:chunked"
        )
    return "the media type is not known"

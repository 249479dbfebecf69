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
    what = f"layer {layer.digest}" if layer.digest is not None else "the archive"
    works = "; ".join(f"{item.name} ({', '.join(item.media_types)})" for item in FORMATS)
    raise UnsupportedLayer(
        f"{what} of media type {layer.media_type!r} cannot be read lazily: "
        f"{_reason(layer)}. What works: {works}"
    )


def _reason(layer: LayerDescriptor) -> str:
    """Say why a layer's bytes cannot be reached at random, and what to do."""
    media_type = layer.media_type
    advice = "push it with --compression-format zstd:chunked"
    if layer.digest is None:
        advice = "unpack it to a plain tar first (gunzip, zstd -d)"
    if media_type.endswith("+encrypted"):
        return "it is encrypted, and lazyfs holds no keys; push it unencrypted"
    if media_type.endswith(("+gzip", ".gzip")):
        return f"gzip has no index; {advice}"
    if media_type.endswith(("+zstd", ".zstd")):
        return f"plain zstd has no index, and no zstd:chunked annotations are there; {advice}"
    return "the media type is not known"

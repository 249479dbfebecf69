"""Encrypted layers: recognised, and explained to whoever wants to see one.

Source: containers/ocicrypt, spec/spec.go (media types), keywrap/*/ (annotations), and
docs/keyprovider.md.
"""

from lazyfs.ground.errors import UnsupportedLayer
from lazyfs.layers.model import LayerDescriptor

_SUFFIX = "+encrypted"
_KEYS = "org.opencontainers.image.enc.keys."
_PROVIDER = "provider."
_PROTOCOLS = ("jwe", "pgp", "pkcs7", "pkcs11")


def check_not_encrypted(layer: LayerDescriptor) -> None:
    """Pass a layer that is not encrypted.

    Raises:
        UnsupportedLayer: it is; the message names the protocols that its key is wrapped by.
    """
    if not layer.media_type.endswith(_SUFFIX):
        return
    protocols = " or ".join(key_protocols(layer)) or "somebody whom the manifest does not name"
    raise UnsupportedLayer(
        f"layer {layer.digest} is encrypted for {protocols[:300]}, and lazyfs holds no keys. "
        "Decrypt it first: skopeo copy --decryption-key KEY docker://… docker://…"
    )


def key_protocols(layer: LayerDescriptor) -> list[str]:
    """Return how the layer's key is wrapped: `jwe`, `pgp`, …, `key provider NAME`."""
    found = []
    for key in sorted(layer.annotations):
        kind = key.removeprefix(_KEYS) if key.startswith(_KEYS) else ""
        if kind in _PROTOCOLS:
            found.append(kind)
        elif kind.startswith(_PROVIDER) and kind != _PROVIDER:
            found.append(f"key provider {kind.removeprefix(_PROVIDER)[:100]!r}")
    return found

"""Where in the tree that is shown each layer of an image belongs, by its media type and title.

Nothing is read for it. What a layer is made of, its bytes tell later.

Source: OCI image-spec, manifest.md, layer.md and annotations.md
(`org.opencontainers.image.title`); oras-go, content/file (`io.deis.oras.content.unpack`: a
folder that was made into a tar, whose names begin with the folder's); containerd as in
containerd.py.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from lazyfs.checkpoint.containerd import CRIU_TAR, FILE_NAMES, PRE_DUMP_TAR, RW_TAR
from lazyfs.checkpoint.encryption import check_not_encrypted
from lazyfs.checkpoint.manifest import EMPTY_TYPES
from lazyfs.ground.errors import MalformedError, UnsupportedLayer
from lazyfs.layers.model import LayerDescriptor
from lazyfs.layers.names import entry_path

CHECKPOINT = "checkpoint"
ROOTFS_DIFF = "rootfs-diff"

_LAYERS_MOST = 2000
"""Each takes two descriptors and some memory; the files of a checkpoint pushed one by one are
some hundred."""
_TITLE = "org.opencontainers.image.title"
_UNPACK = "io.deis.oras.content.unpack"
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst")
_LAYER_PREFIXES = (
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
)

Kind = Literal["layer", "file", "diff"]


class PlacedLayer(msgspec.Struct, frozen=True):
    """A layer, and what of the tree it makes."""

    descriptor: LayerDescriptor
    place: str
    """Relative path of the directory that it fills, "" for the root; of a file, its own path."""
    kind: Kind
    """"layer": a tar, whatever its compression, over what earlier ones put there, by OCI's rules.
    "file": the blob is one file, and `place` its name. "diff": a layer that is not laid over
    anything but shown as a directory of its own: what a container changed in its files."""
    names_a_tar: bool = False
    """Of a "file": its name is a tar's. If its bytes are one too, it may as well be a "layer" at
    the root, which is then a checkpoint archive that was pushed as it is."""


def place_layers(layers: Sequence[LayerDescriptor], reference: str) -> tuple[PlacedLayer, ...]:
    """Say where an image's layers belong, in the order in which they lie over each other.

    Raises:
        UnsupportedLayer: there are none, or one is encrypted.
        MalformedError: the title of one is no path.
    """
    contents = [layer for layer in layers if layer.media_type not in EMPTY_TYPES]
    if len(contents) > _LAYERS_MOST:
        raise UnsupportedLayer(
            f"{reference} has {len(contents)} layers; more than {_LAYERS_MOST} are not read"
        )
    if not contents:
        raise UnsupportedLayer(f"{reference} has no layers, so there is nothing in it to be shown")
    for layer in contents:
        check_not_encrypted(layer)
    is_containerds = any(layer.media_type == CRIU_TAR for layer in contents)
    try:
        placed = [_place(layer, is_containerds) for layer in contents]
    except MalformedError as error:
        raise MalformedError(f"{reference}: the title of a layer: {error}") from None
    # What was dumped before lies below.
    return tuple(sorted(placed, key=lambda each: each.descriptor.media_type != PRE_DUMP_TAR))


def _place(layer: LayerDescriptor, is_containerds: bool) -> PlacedLayer:
    media_type = layer.media_type
    if media_type in (CRIU_TAR, PRE_DUMP_TAR):
        return PlacedLayer(layer, CHECKPOINT, "layer")
    if media_type in FILE_NAMES:
        return PlacedLayer(layer, FILE_NAMES[media_type], "file")
    title = layer.annotations.get(_TITLE, "")
    is_file = bool(title) and layer.annotations.get(_UNPACK) != "true"
    names_a_tar = title.lower().endswith(_TAR_SUFFIXES)
    is_layer = media_type.startswith(_LAYER_PREFIXES) and (names_a_tar or not is_file)
    if media_type == RW_TAR or (is_containerds and is_layer):
        return PlacedLayer(layer, ROOTFS_DIFF, "diff")
    if is_file:
        path = entry_path(title)
        if not path:
            raise MalformedError(f"{title[:200]!r} names no file")
        return PlacedLayer(layer, path, "file", names_a_tar)
    return PlacedLayer(layer, "", "layer")

"""Checkpoints as containerd's own clients make them, `ctr containers checkpoint` above all.

Such a checkpoint is an index that points straight at blobs: a tar of CRIU's images directory, the
container's changed files as an ordinary layer, its runtime spec and options as protobuf, and, if
asked for, the image that the container was made of. The same blobs are found as layers of image
manifests (containerd issue 8661, image-spec issue 962), so where they belong goes by media type.

Source: containerd, core/images/mediatypes.go, client/container_checkpoint_opts.go,
client/container.go (annotations of the index), client/task.go (`image.name`),
plugins/services/tasks/local.go (what the blobs hold); typeurl: an Any of a type that is no
protobuf message holds it as JSON.
"""

from collections.abc import Mapping

import msgspec

from lazyfs.checkpoint.engines import Dump, parse_dump
from lazyfs.checkpoint.manifest import ImageIndex, ImageManifest, Platform
from lazyfs.ground.errors import MalformedError
from lazyfs.ground.settings import MIB

_PREFIX = "application/vnd.containerd.container."
CRIU_TAR = _PREFIX + "criu.checkpoint.criu.tar"
PRE_DUMP_TAR = _PREFIX + "criu.checkpoint.predump.tar"
RW_TAR = _PREFIX + "rw.tar"
CONFIG = _PREFIX + "checkpoint.config.v1+proto"

FILE_NAMES: Mapping[str, str] = {
    CONFIG: "container-config.pb",
    _PREFIX + "checkpoint.options.v1+proto": "checkpoint-options.pb",
    _PREFIX + "checkpoint.runtime.name": "runtime-name",
    _PREFIX + "checkpoint.runtime.options+proto": "runtime-options.pb",
}
"""Blobs that are one file each, by media type, and what they are called where they are shown."""

_MEDIA_TYPES = (CRIU_TAR, PRE_DUMP_TAR, RW_TAR, *FILE_NAMES)
_IMAGE_NAMES = ("org.opencontainers.image.ref.name", "image.name")
"""Annotations of the index that name the container's image."""
_BASE_NAME = "org.opencontainers.image.base.name"
_BASE_DIGEST = "org.opencontainers.image.base.digest"
_SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/"
_CONFIG_MOST_BYTES = 4 * MIB


class IndexAsImage(msgspec.Struct, frozen=True):
    """A checkpoint's index, read as a manifest whose layers are the blobs it points at."""

    manifest: ImageManifest
    platform: Platform | None


def as_image(index: ImageIndex) -> IndexAsImage | None:
    """Read an index as a checkpoint; None if it points at nothing of a checkpoint's.

    The container's image becomes annotations (`org.opencontainers.image.base.*`), unless those are
    there already.
    """
    marks = [each for each in index.entries if each.descriptor.media_type in _MEDIA_TYPES]
    if not marks:
        return None
    blobs = tuple(each.descriptor for each in index.entries if not each.is_manifest)
    annotations = _base_image(index) | dict(index.annotations)
    manifest = ImageManifest(index.media_type, "", None, blobs, annotations)
    return IndexAsImage(manifest, marks[0].platform)


def parse_config(data: bytes, what: str) -> Dump:
    """Return the container's runtime spec, as a spec.dump would hold it; `what` is for messages.

    Raises:
        MalformedError: it is none.
    """
    if len(data) > _CONFIG_MOST_BYTES:
        raise MalformedError(f"{what} has {len(data)} bytes; at most {_CONFIG_MOST_BYTES} are read")
    from google.protobuf import any_pb2, message

    try:
        wrapped = any_pb2.Any.FromString(data)
    except message.DecodeError as error:
        raise MalformedError(f"{what} holds no protobuf message: {error}") from error
    if not wrapped.type_url.startswith(_SPEC_TYPE):
        raise MalformedError(f"{what} holds a {wrapped.type_url[:200]!r}, not a runtime spec")
    return parse_dump(wrapped.value, what)


def _base_image(index: ImageIndex) -> dict[str, str]:
    """Return the container's image as annotations."""
    names = [index.annotations[key] for key in _IMAGE_NAMES if key in index.annotations]
    digests = [str(each.digest) for each in index.entries if each.is_manifest]
    found = {_BASE_NAME: names[:1], _BASE_DIGEST: digests[:1]}
    return {key: values[0] for key, values in found.items() if values}

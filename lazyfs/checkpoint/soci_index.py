"""Which layers of an image have a SOCI index (a zTOC), where it is, and who says so.

Two ways lead to one. Version 2: the image manifest's annotation names the index manifest by
digest; what is proven by the manifest's digest is then proven for the index, too: it is *pinned*.
Version 1: an index manifest refers to the image manifest, which anybody who may push can add; it
is a hint. Pinned ones are preferred, and never mixed with others.

An index is never needed: whatever is wrong on the way to it is logged, and there is none then.

Source: soci-snapshotter, `soci/soci_index.go` (types and annotations), `soci/soci_convert.go`
(version 2), `fs/fs.go` (`findSociIndexDesc`: in which order they are looked for).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from lazyfs.checkpoint.manifest import ImageManifest, parse_manifest
from lazyfs.checkpoint.referrals import INDEX_DIGEST_KEY, INDEX_V1
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, MalformedError
from lazyfs.ground.settings import MIB
from lazyfs.layers.model import LayerDescriptor
from lazyfs.transport.source import ImageSource, ReferrerDescriptor

INDEX_V2 = "application/vnd.amazon.soci.index.v2+json"
ZTOC_TYPE = "application/octet-stream"
"""Other things in an index, lists of what to prefetch, have types of their own."""
LAYER_DIGEST_KEY = "com.amazon.soci.image-layer-digest"

_log = logging.getLogger(__name__)

_REFERRERS_TRIED_MOST = 4
_REFERRERS_TRIED_S = 5.0
"""No further one is begun after so long."""
_ZTOC_SLACK_BYTES = MIB
"""A zTOC larger than its layer by more than this (made of very small spans) is of no use."""


class ZtocRef(msgspec.Struct, frozen=True):
    """A zTOC that somebody offers for a layer."""

    descriptor: LayerDescriptor
    """Of the zTOC's blob; it has a digest."""
    pinned: bool
    """Whether the image manifest vouches for it."""
    found: str
    """Who named it, in a few words for a person."""


def find_ztocs(
    source: ImageSource,
    digest: Digest,
    annotations: Mapping[str, str],
    layers: Sequence[LayerDescriptor],
    *,
    referrers: Callable[[Digest, str], Sequence[ReferrerDescriptor]] | None,
) -> dict[Digest, ZtocRef]:
    """Return the zTOCs of an image's layers, by the layers' digests. Blocks, in a thread.

    `referrers`: tells what of a type refers to a manifest; None not to ask for indexes that only
    refer to the image.

    `digest`: of the image manifest. `annotations`: the manifest's own, and no others: those of a
    descriptor, in an OCI layout say, are not proven by the manifest's digest.

    Raises nothing of ours: no index is found if none can be had.
    """
    sizes = {layer.digest: layer.size_bytes for layer in layers if layer.digest is not None}
    named = annotations.get(INDEX_DIGEST_KEY)
    if named:
        what = f"the manifest's annotation {INDEX_DIGEST_KEY}"
        try:
            index = _read_index(source, Digest.parse(named), (INDEX_V2, INDEX_V1))
            if found := _ztocs(index, sizes, pinned=True, found=what):
                return found
            _log.info("%s: the SOCI index that %s names has none of its layers", digest, what)
        except LazyfsError as error:
            _log.warning("%s: %s names no SOCI index that can be used: %s", digest, what, error)
    if referrers is None:
        return {}
    until_s = time.monotonic() + _REFERRERS_TRIED_S
    for referrer in referrers(digest, INDEX_V1)[:_REFERRERS_TRIED_MOST]:
        if time.monotonic() > until_s:
            break
        what = f"the referrer {referrer.digest}"
        try:
            index = _read_index(source, referrer.digest, (INDEX_V1,))
        except LazyfsError as error:
            _log.info("%s: %s is no SOCI index that can be used: %s", digest, what, error)
            continue
        if found := _ztocs(index, sizes, pinned=False, found=what):
            return found
    return {}


def _read_index(source: ImageSource, digest: Digest, types: tuple[str, ...]) -> ImageManifest:
    served = source.manifest(str(digest))
    name = f"{source.name}@{digest}"
    index = parse_manifest(served.data, served.media_type, name)
    if not isinstance(index, ImageManifest) or index.artifact_type not in types:
        raise MalformedError(f"{name} is not a SOCI index")
    return index


def _ztocs(
    index: ImageManifest, sizes: Mapping[Digest, int], *, pinned: bool, found: str
) -> dict[Digest, ZtocRef]:
    ztocs: dict[Digest, ZtocRef] = {}
    for blob in index.layers:
        try:
            layer = Digest.parse(blob.annotations.get(LAYER_DIGEST_KEY, ""))
        except MalformedError:
            continue
        size_bytes = sizes.get(layer)
        if blob.media_type != ZTOC_TYPE or size_bytes is None:
            continue
        if not 0 < blob.size_bytes <= size_bytes + _ZTOC_SLACK_BYTES:
            _log.info("%s: a zTOC of %d bytes is not worth it", layer, blob.size_bytes)
            continue
        ztocs.setdefault(layer, ZtocRef(blob, pinned, found))
    return ztocs

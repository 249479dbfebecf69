"""The trace that a mount is to follow: from a file, or attached to the image by whoever may.

What is attached is a hint from a stranger. All of it is bounded, it is looked for beside the
opening of layers, and given up after some seconds; whatever is wrong with it is a line of the log,
and there is none then. It changes no byte that is served, only which are fetched first.

A trace is attached as an OCI artifact whose `subject` is the image's manifest. Its annotations,
which a list of referrers repeats, say whose it is and name the document, so that one round trip
after the list the document is here; without them the artifact's own manifest is read. Of several,
the one of the workload that was asked for counts; if none was, one without a name, else the newest.

What was found is kept with the cache's documents (`TraceMemory`). A later mount follows it at once,
and, if it is older than `FRESH_S`, asks behind that for the mounts that come after. That there was
none is believed for as long where the image is named by its digest, and never where it is by a
tag: the registry is asked then anyway.

Source: OCI image-spec 1.1, manifest.md ("Guidelines for Artifact Usage"); distribution-spec 1.1,
"Listing Referrers".
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, NamedTuple, Protocol

import msgspec
import trio

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.checkpoint.image import ResolvedImage
from lazyfs.checkpoint.referrals import TRACE_TYPE
from lazyfs.checkpoint.trace import (
    BLOB_KEY,
    BLOB_SIZE_KEY,
    HINT_LIMIT_BYTES,
    TRACE_BLOB_TYPE,
    WORKLOAD_KEY,
    Trace,
    parse_hint,
)
from lazyfs.content.documents import Documents, name_of
from lazyfs.ground.data import Data
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import LazyfsError, MalformedError
from lazyfs.ground.printable import printable
from lazyfs.transport.source import ReferrerDescriptor

log = logging.getLogger(__name__)

CREATED_KEY = "org.opencontainers.image.created"
FRESH_S = 600.0
"""For so long what was attached to an image is taken to be attached still, and nothing else."""
_WAIT_MOST_S = 5.0
_BEHIND_S = 5.0
_MANIFESTS_READ_MOST = 4
_DOCUMENTS_READ_MOST = 3
_REMEMBERED_MOST = 64
WORKLOAD_MOST = 1024
_CREATED_MOST = 64


class Offer(msgspec.Struct, frozen=True):
    """A trace that somebody has attached to an image."""

    digest: str
    """Of the document."""
    size_bytes: Annotated[int, msgspec.Meta(gt=0, le=HINT_LIMIT_BYTES)]
    workload: Annotated[str, msgspec.Meta(max_length=WORKLOAD_MOST)] = ""
    created: Annotated[str, msgspec.Meta(max_length=_CREATED_MOST)] = ""
    """When, as RFC 3339 has it in UTC; so the newest is the greatest. Empty if it is not said."""


class FoundTrace(NamedTuple):
    """A trace of at least one of the image's layers."""

    trace: Trace
    source: str
    """"file", or the digest of the document that is attached to the image."""
    needed_bytes: int


class Origin(Protocol):
    """What the offers of an image are read from: an `ImageSource`, or a part of one."""

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        """Return whole, proven, what a referrer offers. See `ImageSource.read_offer`."""


class _Remembered(msgspec.Struct, frozen=True):
    asked_at_s: float
    offers: Annotated[list[Offer], msgspec.Meta(max_length=_REMEMBERED_MOST)]


class _Blob(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: int
    media_type: str = ""


class _Artifact(msgspec.Struct, frozen=True):
    layers: list[_Blob] = []
    annotations: dict[str, str] | None = None


class TraceSearch:
    """The search for the trace of one image. Its methods wait, and raise nothing of ours."""

    def __init__(self, image: ResolvedImage, config: OpenConfig, *, by_digest: bool) -> None:
        """Ask nobody yet. `by_digest`: the image was asked for by its digest."""
        self._image = image
        self._by_digest = by_digest
        self._config = config
        self._is_stale = False

    async def find(self) -> FoundTrace | None:
        """Return the trace to follow, if there is one; within some seconds."""
        config = self._config
        if config.given_trace is not None:
            return _given(config.given_trace, self._image)
        if config.trace != "auto" or self._image.digest is None:
            return None
        found: FoundTrace | None = None
        with trio.move_on_after(_WAIT_MOST_S) as scope:
            found = await trio.to_thread.run_sync(self._find, abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.info("%s: its traces take too long, and are not waited for", self._image.reference)
        return found

    async def freshen(self) -> None:
        """Where the trace was remembered, and long ago, ask behind the mount for later ones."""
        if self._is_stale:
            await trio.sleep(_BEHIND_S)
            await trio.to_thread.run_sync(self._freshen, abandon_on_cancel=True)

    def _find(self) -> FoundTrace | None:
        image, config = self._image, self._config
        if image.digest is None or image.source is None or image.referrals is None:
            return None
        until_s = time.monotonic() + _WAIT_MOST_S
        memory = memory_of(image, config.cache.documents)
        known = memory.load() if memory is not None else None
        offers: Sequence[Offer]
        if known is not None and self._is_enough(known):
            offers = known.offers
            self._is_stale = not is_fresh(known.asked_at_s)
        else:
            found = image.referrals.of(image.digest, TRACE_TYPE)
            offers = offers_in(found, image.source)
            if memory is not None and found.is_known:
                memory.save(offers)
        return take_one(offers, image, config.workload, memory, until_s=until_s)

    def _is_enough(self, known: _Remembered) -> bool:
        """Whether nobody is asked for now: there is one, or it is believed that there is none."""
        if candidates(known.offers, self._config.workload):
            return True
        return self._by_digest and is_fresh(known.asked_at_s)

    def _freshen(self) -> None:
        image, config = self._image, self._config
        memory = memory_of(image, config.cache.documents)
        if image.digest is None or image.source is None or memory is None:
            return
        found = image.source.referrers(image.digest, TRACE_TYPE)
        if found.is_known:
            offers = offers_in(found, image.source)
            memory.save(offers)
            take_one(offers, image, config.workload, memory)


class TraceMemory:
    """What was attached to one image, as an earlier mount has seen it. Everything blocks."""

    def __init__(self, documents: Documents, digest: Digest, name: str) -> None:
        """Look at nothing yet. `digest`: of the manifest. `name`: of the repository."""
        self._documents = documents
        self._repository = name
        self._name = name_of(digest, "trace", name)

    def load(self) -> _Remembered | None:
        """Return what was attached; None if it is not known."""
        found = self._documents.find(self._name)
        if found is None:
            return None
        try:
            return msgspec.json.decode(found, type=_Remembered)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.forget()
            return None

    def save(self, offers: Sequence[Offer]) -> None:
        """Keep what is attached now."""
        known = _Remembered(time.time(), list(offers[:_REMEMBERED_MOST]))
        self._documents.keep(self._name, [msgspec.json.encode(known)])

    def forget(self) -> None:
        """Have the next mount ask."""
        self._documents.forget(self._name)

    def document(self, digest: Digest) -> Data | None:
        """Return the document of a trace as it was kept; nothing has proven it."""
        return self._documents.find(name_of(digest, "blob", self._repository))

    def keep_document(self, digest: Digest, data: bytes) -> None:
        """Keep a document that its digest has proven."""
        self._documents.keep(name_of(digest, "blob", self._repository), [data])


def memory_of(image: ResolvedImage, documents: Documents) -> TraceMemory | None:
    """Return what is remembered of an image; None of one that is had from no registry."""
    if image.digest is None or not image.is_remote:
        return None
    return TraceMemory(documents, image.digest, image.repository)


def is_fresh(asked_at_s: float) -> bool:
    """Whether a registry's answer of that time (since the epoch) still counts."""
    return 0 <= time.time() - asked_at_s < FRESH_S


def offers_in(referrers: Iterable[ReferrerDescriptor], origin: Origin) -> list[Offer]:
    """Return the traces of a list of referrers, newest first. Blocks, in a thread.

    Where the list does not name the documents, some of the artifacts' manifests are read.
    """
    offers, unread = [], []
    for each in referrers:
        if each.artifact_type != TRACE_TYPE:
            continue
        offer = _offer(each.annotations, each.annotations.get(BLOB_KEY), _size(each.annotations))
        if offer is not None:
            offers.append(offer)
        elif BLOB_KEY not in each.annotations:
            unread.append(each)
    for each in unread[:_MANIFESTS_READ_MOST]:
        try:
            offers += _offered_by(each, origin)
        except LazyfsError as error:
            log.info("the trace %s is not used: %s", each.digest, printable(str(error)))
    return sorted(offers, key=lambda offer: offer.created, reverse=True)


def candidates(offers: Sequence[Offer], workload: str) -> list[Offer]:
    """Return which to take, the best first. `offers`: newest first."""
    if workload:
        return [offer for offer in offers if offer.workload == workload]
    return sorted(offers, key=lambda offer: bool(offer.workload))


def read_offer(offer: Offer, origin: Origin, memory: TraceMemory | None) -> Trace:
    """Return the trace that somebody offers, proven to be that. Blocks, in a thread.

    Raises:
        MalformedError: it is no trace, or larger than is believed.
        IntegrityError, SourceError: it cannot be had.
    """
    digest = Digest.parse(offer.digest)
    what = f"the trace {digest}"
    kept = memory.document(digest) if memory is not None else None
    if kept is not None and len(kept) <= HINT_LIMIT_BYTES:
        with suppress(LazyfsError):
            digest.check(kept, what)
            return parse_hint(bytes(kept), what)
    data = origin.read_offer(digest, offer.size_bytes)
    trace = parse_hint(data, what)
    if memory is not None:
        memory.keep_document(digest, data)
    return trace


def take_one(
    offers: Sequence[Offer],
    image: ResolvedImage,
    workload: str,
    memory: TraceMemory | None,
    *,
    until_s: float = float("inf"),
) -> FoundTrace | None:
    """Return the first trace that is what was asked for, and of this image. Blocks, in a thread.

    `until_s` (monotonic): no further one is begun then.
    """
    if image.source is None:
        return None
    found = candidates(offers, workload)
    if offers and not found:
        log.info(
            "%s: no trace of the workload %s; there are those of %s",
            image.reference,
            printable(workload),
            ", ".join(sorted({printable(offer.workload) or "none" for offer in offers})[:10]),
        )
    for offer in found[:_DOCUMENTS_READ_MOST]:
        if time.monotonic() > until_s:
            break
        try:
            trace = read_offer(offer, image.source, memory)
        except LazyfsError as error:
            log.info("the trace %s is not used: %s", offer.digest, printable(str(error)))
            continue
        if not is_of(trace, image):
            log.info("the trace %s is of other layers than %s", offer.digest, image.reference)
            continue
        log.info(
            "%s: follows the trace %s%s, the %s of %d",
            image.reference,
            offer.digest,
            f" of {printable(offer.workload)}" if offer.workload else "",
            "newest" if offer is offers[0] else "fitting one",
            len(offers),
        )
        return FoundTrace(trace, offer.digest, trace.needed_bytes)
    return None


def is_of(trace: Trace, image: ResolvedImage) -> bool:
    """Whether a trace names one of the image's layers."""
    return not layers_of(image).isdisjoint(layer.digest for layer in trace.layers)


def layers_of(image: ResolvedImage) -> set[str]:
    """Return the digests of the image's layers; "" for an archive, which has none."""
    return {str(layer.digest or "") for layer in image.layers}


def _given(trace: Trace, image: ResolvedImage) -> FoundTrace | None:
    if is_of(trace, image):
        return FoundTrace(trace.hint(), "file", trace.needed_bytes)
    log.warning("the trace that was named is of other layers than %s: not used", image.reference)
    return None


def _offered_by(referrer: ReferrerDescriptor, origin: Origin) -> Iterator[Offer]:
    """Yield what an artifact's manifest names.

    Raises:
        MalformedError: it is none.
        IntegrityError, SourceError: it cannot be had.
    """
    data = origin.read_offer(referrer.digest, referrer.size_bytes, is_manifest=True)
    try:
        artifact = msgspec.json.decode(data, type=_Artifact)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"it is no manifest: {error}") from None
    for blob in artifact.layers:
        if blob.media_type == TRACE_BLOB_TYPE:
            annotations = {**referrer.annotations, **(artifact.annotations or {})}
            offer = _offer(annotations, blob.digest, blob.size)
            if offer is not None:
                yield offer
            return


def _offer(annotations: Mapping[str, str], digest: str | None, size_bytes: int) -> Offer | None:
    """Return an offer, if it is one that can be taken."""
    if digest is None or not 0 < size_bytes <= HINT_LIMIT_BYTES:
        return None
    workload = annotations.get(WORKLOAD_KEY, "")
    created = _in_utc(annotations.get(CREATED_KEY, "")[:_CREATED_MOST])
    if len(workload) > WORKLOAD_MOST:
        return None
    try:
        return Offer(str(Digest.parse(digest)), size_bytes, workload, created)
    except MalformedError:
        return None


def _in_utc(text: str) -> str:
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return when.astimezone(UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError):
        return ""


def _size(annotations: Mapping[str, str]) -> int:
    said = annotations.get(BLOB_SIZE_KEY, "")
    return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else 0

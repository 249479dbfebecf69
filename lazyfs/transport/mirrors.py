"""A repository that is to be had at several places: mirrors in their order, the registry last.

Decides which place may be asked for what, and that each is asked once before any is asked again.
A place that is away, or does not have it, is no reason to fail as long as there is another; one
whose bytes contradict a digest has lied, and is never asked again by this mount. `Health` is one
for each place, shared by all that is read of it. A blob's ranges are `retry`'s to fetch: it
chooses among `places()`.

What waits between attempts is the whole round, never one place: another may have it.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    SourceError,
    UnknownHost,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.attempts import attempts
from lazyfs.transport.begun import BeginsRanges
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.httpblob import NoRanges
from lazyfs.transport.mirror_files import find_addresses
from lazyfs.transport.place import Health, ManyPlaces, Place, in_order
from lazyfs.transport.registry import REFERRERS_MOST_S, RegistrySource
from lazyfs.transport.source import Manifest, Referrers

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def open_repository(
    host: str,
    repository: str,
    *,
    by_digest: bool,
    settings: TransportSettings,
    counters: Counters,
    authfile: Path | None,
    environ: Mapping[str, str] = os.environ,
) -> "RegistrySource | MirroredSource":
    """Return where a registry's repository is to be had; connects to nobody yet.

    `by_digest`: whether the image is named by its digest. `environ`: see `mirror_files`.

    Raises:
        UsageError: `settings.mirrors` is no such word, and no path.
        SourceError: a file that says where mirrors are makes no sense; the registry is blocked.
    """
    addresses = find_addresses(
        host, repository, by_digest=by_digest, mirrors=settings.mirrors, environ=environ
    )
    sources = [
        RegistrySource(
            address.host,
            address.repository,
            settings=settings,
            counters=counters,
            authfile=authfile,
            address=address,
        )
        for address in addresses
    ]
    if len(sources) == 1:
        return sources[0]
    name = f"{host}/{repository}"
    return MirroredSource(name, sources, settings=settings, counters=counters)


class MirroredSource:
    """See `ImageSource`. Owns the sources that it asks."""

    def __init__(
        self,
        name: str,
        sources: Sequence[RegistrySource],
        *,
        settings: TransportSettings,
        counters: Counters,
    ) -> None:
        """`name`: as in the reference. `sources`: in the order of asking."""
        self._name = name
        self._sources = tuple(sources)
        self._settings = settings
        self._counters = counters

    @property
    def name(self) -> str:
        """What a person calls it: the registry's name, wherever the bytes come from."""
        return self._name

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest with this tag or digest. See `ImageSource.manifest`."""
        wanted = reference or "latest"
        by_digest = ":" in wanted
        may = [
            source
            for source in self._sources
            if (source.address.for_digests if by_digest else source.address.for_tags)
        ]
        what = f"{self._name}{'@' if by_digest else ':'}{wanted}"
        return self._from_any(what, may, lambda source: source.ask_manifest(reference))

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range from wherever it is. See `ImageSource.blob`."""
        places = []
        for source in self._having_digests:
            blob = source.blob(digest, size_bytes)
            if source is not self._sources[-1]:
                blob = _AtMirror(blob)
            places.append(Place(blob, source.health))
        return MirroredBlob(f"{self._name}@{digest}", size_bytes, places)

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole. See `ImageSource.read_blob`."""
        return self._from_any(
            f"{self._name}@{digest}",
            self._having_digests,
            lambda source: source.ask_blob(digest, size_bytes),
        )

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        """Return what the first place that knows of any says. See `ImageSource.referrers`.

        The registry itself first: many a mirror answers that there are none.
        """
        until_s = time.monotonic() + REFERRERS_MOST_S
        is_known = False
        for source in self._honest_ones(until_s):
            found = source.referrers_by(digest, artifact_types, until_s)
            if found:
                return found
            is_known = is_known or found.is_known
        return Referrers(is_known=is_known)

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        """Return what a referrer offers, from the first place that has it.

        See `ImageSource.read_offer`.
        """
        until_s = time.monotonic() + REFERRERS_MOST_S
        what = f"{self._name}@{digest}"
        error: LazyfsError = SourceError(f"{what} is to be had nowhere")
        for source in self._honest_ones(until_s):
            try:
                return source.read_offer_by(digest, size_bytes, until_s, is_manifest=is_manifest)
            except LazyfsError as failed:
                error = failed
        raise error

    def _honest_ones(self, until_s: float) -> Iterator[RegistrySource]:
        """Yield who may say what refers to an image, the registry first, while there is time."""
        *mirrors, registry = self._sources
        for source in sorted((registry, *mirrors), key=lambda source: source.health.rests):
            honest = source.address.for_tags and source.health.lie is None
            if honest and time.monotonic() < until_s:
                yield source

    def healths(self) -> Sequence[Health]:
        """Return how each place has behaved, in the order of asking. See `ImageSource.healths`."""
        return tuple(source.health for source in self._sources)

    @property
    def is_settled(self) -> bool:
        """Whether it is known what each place speaks. See `ImageSource.is_settled`."""
        return all(source.is_settled for source in self._sources)

    def close(self) -> None:
        """Close connections; those under way close when they end."""
        for source in self._sources:
            source.close()

    @property
    def _having_digests(self) -> list[RegistrySource]:
        return [source for source in self._sources if source.address.for_digests]

    def _from_any(
        self, what: str, may: Sequence[RegistrySource], ask: Callable[[RegistrySource], _T]
    ) -> _T:
        return attempts(
            what,
            lambda: self._round(what, may, ask),
            settings=self._settings,
            counters=self._counters,
        )

    def _round(
        self, what: str, may: Sequence[RegistrySource], ask: Callable[[RegistrySource], _T]
    ) -> _T:
        """Ask each once, those that rest after the others, until one has it."""
        errors: dict[RegistrySource, LazyfsError] = {}
        for source in sorted(may, key=lambda source: source.health.rests):
            if source.health.lie is not None:
                errors[source] = source.health.lie
                continue
            began_s = time.monotonic()
            self._counters.requests += bool(errors)
            try:
                found = ask(source)
            except IntegrityError as error:
                _log.warning("%s gave wrong bytes and is asked no more: %s", source.name, error)
                source.health.lied(error)
                errors[source] = error
            except SourceError as error:
                _log.info("%s is looked for elsewhere: %s", what, error)
                # What lacks one small thing may have the large ones: a short rest in any case.
                source.health.failed(FetchError(str(error), transient=True))
                errors[source] = error
            else:
                source.health.answered(time.monotonic() - began_s)
                return found
        raise _nowhere(what, [(source.name, errors[source]) for source in may])


class MirroredBlob(ManyPlaces):
    """One blob at several places, which give the same bytes or lie."""

    def __init__(self, name: str, size_bytes: int, places: Sequence[Place]) -> None:
        """Ask nobody yet. `places`: in the order of asking, at least one."""
        self._name = name
        self._size_bytes = size_bytes
        self._places = tuple(places)

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self._name

    @property
    def size_bytes(self) -> int:
        """Its size as promised."""
        return self._size_bytes

    def places(self) -> Sequence[Place]:
        """Return where it is to be had. See `ManyPlaces.places`."""
        return in_order(self._places)

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Make one attempt at the first place. See `Blob.read_into`.

        Raises:
            IntegrityError: all places have lied.
        """
        self.places()[0].blob.read_into(byte_range, sink)

    def begin(self, byte_range: ByteRange) -> "Future[bytes]":
        """Begin to receive a range where it would be asked for. See `BeginsRanges.begin`.

        Raises:
            IntegrityError: all places have lied.
            FetchError: that place cannot.
        """
        return _begin(self.places()[0].blob, byte_range)

    def close(self) -> None:
        """Close the blob everywhere."""
        for place in self._places:
            place.blob.close()


class _AtMirror:
    """A blob at a mirror that may still be fetching it itself.

    A pull-through cache that does not have a blob yet sends all of it, whatever was asked for:
    soon it will have it, and then serves ranges (distribution, `registry/proxy`).
    """

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self.name = blob.name
        self.size_bytes = blob.size_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver the bytes of `byte_range`. See `Blob.read_into`."""
        try:
            self._blob.read_into(byte_range, sink)
        except NoRanges:
            raise FetchError(
                f"{self.name}: everything was sent for a range: the mirror does not have it yet, "
                "or knows no ranges",
                transient=True,
            ) from None

    def begin(self, byte_range: ByteRange) -> "Future[bytes]":
        """Begin to receive a range. See `BeginsRanges.begin`.

        Raises:
            FetchError: it cannot.
        """
        return _begin(self._blob, byte_range)

    def close(self) -> None:
        """Close it."""
        self._blob.close()


def _begin(blob: Blob, byte_range: ByteRange) -> "Future[bytes]":
    if not isinstance(blob, BeginsRanges):
        raise FetchError(f"{blob.name} is not asked ahead", transient=True)
    return blob.begin(byte_range)


def _nowhere(what: str, errors: Sequence[tuple[str, LazyfsError]]) -> LazyfsError:
    """Return one error for all places; what one of them may still mend is transient."""
    if not errors:
        return SourceError(
            f"{what}: no place may be asked for it (the capabilities of its mirrors)"
        )
    if len(errors) == 1:
        return errors[0][1]
    said = "; ".join(f"{name}: {error}" for name, error in errors)
    message = f"{what} is to be had nowhere: {said}"
    kinds = [error for _name, error in errors]
    if all(isinstance(error, IntegrityError) for error in kinds):
        return IntegrityError(message)
    if isinstance(kinds[-1], UnknownHost):
        return UnknownHost(message, transient=True)
    waits = [error for error in kinds if isinstance(error, FetchError) and error.transient]
    if waits:
        wishes = [error.retry_after_s or 0.0 for error in waits]
        return FetchError(message, transient=True, retry_after_s=min(wishes) or None)
    return SourceError(message)

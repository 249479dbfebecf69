"""One repository of an OCI registry: manifests by tag or digest, blobs by digest.

A digest is proven over the bytes as they were served. A tag's manifest is trusted as far as the
connection is: its digest is computed here, and everything below it is proven by that.

Plain HTTP is spoken to this machine's own loopback and where the settings or the address say so;
to loopback HTTPS is tried when plain HTTP is refused (400) for being plain. A registry that need
not prove who it is has HTTPS tried first, and plain HTTP when that is not what it speaks: who does
not mind who answers does not mind who listens.

What begins with `ask_` makes one attempt; the rest asks again as the settings have it.

Sources: OCI distribution-spec, "Pull", "Listing Referrers"; containerd, docs/hosts.md (`ns`).
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from msgspec.structs import replace

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
    NotTls,
    SourceError,
)
from lazyfs.ground.ranges import ByteRange
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.address import Address
from lazyfs.transport.answers import Question, refusal, warnings_in
from lazyfs.transport.attempts import attempts
from lazyfs.transport.auth import RegistryAuthorizer, login_advice
from lazyfs.transport.blob import Blob, Sink
from lazyfs.transport.certs import certs_directories, registry_endpoints
from lazyfs.transport.client import HttpClient, SmallReply, refuse_encoding
from lazyfs.transport.credentials import Credentials, find_credentials
from lazyfs.transport.httpblob import HttpBlob
from lazyfs.transport.place import Health
from lazyfs.transport.referrers import list_referrers
from lazyfs.transport.source import MANIFEST_LIMIT_BYTES, Manifest, Referrers
from lazyfs.transport.tls import Endpoint, Endpoints
from lazyfs.transport.urls import Origin, is_loopback, origin_of

if TYPE_CHECKING:
    from lazyfs.transport.http import Upload

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TOKEN_LIMIT_BYTES = 256 * 1024
# Where an answer is welcome but not needed: for connecting and for each byte, for asking again
# (some registries answer 500 to what they do not know), and in all.
_HURRY_STALL_S, _HURRY_AGAIN_S, REFERRERS_MOST_S = 2.0, 0.5, 4.0
_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.artifact.manifest.v1+json",
    )
)


def endpoints_of(address: Address, settings: TransportSettings) -> Endpoints:
    """Return how the server that a person names, and whoever it leads to, is spoken to."""
    if not settings.tls_verify:
        _log.warning("%s: its TLS certificate is not checked (--tls-verify=false)", address.host)
    elif not address.tls.verify:
        _log.info("%s: its TLS certificate is not checked (its mirror entry)", address.host)
    tls = replace(address.tls, verify=address.tls.verify and settings.tls_verify)
    return registry_endpoints(
        address.host,
        served_by=address.served_by,
        own=Endpoint(tls, address.headers),
        directories=certs_directories(os.environ),
    )


class RegistrySource:
    """See `ImageSource`. Connections and tokens are shared by all its blobs."""

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        settings: TransportSettings,
        counters: Counters,
        authfile: Path | None = None,
        address: Address | None = None,
        scopes: Sequence[str] = (),
    ) -> None:
        """Connect to nobody yet.

        `host` may have a port; `authfile` is before the settings'; `address`: if there is more to
        be said of where it is; `scopes`: what tokens shall be good for beside pulling.
        """
        self._scopes = scopes
        self.address = address = address or Address(host, repository)
        self.health = Health(address.name)
        if address.connect_timeout_s is not None:
            settings = replace(settings, connect_timeout_s=address.connect_timeout_s)
        self._host = address.host
        self._repository = address.repository
        self._settings = settings
        self._counters = counters
        self._told: set[str] = set()
        self._blobs: dict[tuple[Digest, int], HttpBlob] = {}
        """What was given, for who asks again: it knows where the registry redirects to."""
        named = settings.authfile
        self._authfile = authfile or (None if named is None else Path(named))
        endpoints = endpoints_of(address, settings)
        self._client = HttpClient(settings, endpoints=endpoints)
        # Timeouts belong to a client: what may not wait has its own.
        self._hurried = self._client.with_settings(
            replace(
                settings,
                connect_timeout_s=min(settings.connect_timeout_s, _HURRY_STALL_S),
                stall_timeout_s=min(settings.stall_timeout_s, _HURRY_STALL_S),
                deadline_s=min(settings.deadline_s, _HURRY_AGAIN_S),
            )
        )
        self._schemes = address.schemes or _schemes_of(address, settings)
        self._settling = threading.Lock()
        self._settled = len(self._schemes) == 1
        self._speak(self._schemes[0])

    @property
    def name(self) -> str:
        """What a person calls it: `docker.io/library/alpine`."""
        return f"{self._host}/{self._repository}"

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest with this tag or digest. See `ImageSource.manifest`."""
        return self._patiently(reference or "latest", lambda: self.ask_manifest(reference))

    def ask_manifest(self, reference: str | None) -> Manifest:
        """Ask once for the manifest with this tag or digest.

        Raises: as `ImageSource.manifest`, and a transient FetchError.
        """
        wanted = reference or "latest"
        digest = Digest.parse(wanted) if ":" in wanted else None
        what = _called(self.name, wanted)
        reply = self._get_once(what, f"manifests/{quote(wanted, safe=':')}", MANIFEST_LIMIT_BYTES)
        promised = reply.headers.get("Docker-Content-Digest")
        if promised is not None:
            try:
                Digest.parse(promised.strip()).check(reply.body, f"{what} as {self._host} sent it")
            except MalformedError as error:
                raise IntegrityError(f"{what}: Docker-Content-Digest: {error}") from None
        if digest is None:
            digest = Digest.of(reply.body)
        else:
            digest.check(reply.body, what)
        media_type = reply.headers.get("Content-Type", "").partition(";")[0].strip()
        return Manifest(reply.body, media_type, digest)

    def ask_tag(self, tag: str) -> bytes | None:
        """Ask once for what a tag names; None if it names nothing.

        Raises: as `ImageSource.manifest`, and a transient FetchError.
        """
        what = _called(self.name, tag)
        url = self._url(f"manifests/{quote(tag)}")
        reply = self._client.get(
            url,
            {"Accept": _ACCEPT},
            limit_bytes=MANIFEST_LIMIT_BYTES,
            authorizer=self._authorizer,
        )
        if reply.status == 404:
            return None
        if reply.status != 200:
            raise self.refusal(what, reply)
        return reply.body

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. See `ImageSource.blob`."""
        what = f"{self.name}@{digest}"
        if not self._settled:
            return _Unsettled(self, digest, size_bytes)
        known = self._blobs.get((digest, size_bytes))
        if known is not None:
            return known
        blob = HttpBlob(
            self._client,
            self._url(f"blobs/{digest}"),
            question=self._question(what),
            size_bytes=size_bytes,
            authorizer=self._authorizer,
            health=self.health,
        )
        return self._blobs.setdefault((digest, size_bytes), blob)

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole. See `ImageSource.read_blob`."""
        return self._patiently(str(digest), lambda: self.ask_blob(digest, size_bytes))

    def ask_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Ask once for a small blob.

        Raises: as `ImageSource.read_blob`, and a transient FetchError.
        """
        what = f"{self.name}@{digest}"
        if size_bytes > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{what} is said to have {size_bytes} bytes: too many to be read")
        body = self._get_once(what, f"blobs/{digest}", size_bytes).body
        digest.check(body, what)
        return body

    def referrers(self, digest: Digest, *artifact_types: str) -> Referrers:
        """Return what refers to the manifest. See `ImageSource.referrers`."""
        return self.referrers_by(digest, artifact_types, time.monotonic() + REFERRERS_MOST_S)

    def referrers_by(
        self, digest: Digest, artifact_types: Sequence[str], until_s: float
    ) -> Referrers:
        """Return what refers to the manifest, as far as it has come by `until_s` (monotonic)."""
        what = f"the referrers of {self.name}@{digest}"
        try:
            self._settle_with(self._hurried)
            found = attempts(
                what,
                lambda: list_referrers(
                    lambda url: self._ask_by(url, until_s),
                    self._url,
                    digest,
                    artifact_types,
                    self._question(what),
                ),
                settings=self._hurried.settings,
                counters=self._counters,
            )
        except LazyfsError as error:
            _log.info("%s are taken to be none: %s", what, error)
            return Referrers(is_known=False)
        return Referrers(found)

    def read_offer(self, digest: Digest, size_bytes: int, *, is_manifest: bool = False) -> bytes:
        """Return what a referrer offers. See `ImageSource.read_offer`."""
        until_s = time.monotonic() + REFERRERS_MOST_S
        return self.read_offer_by(digest, size_bytes, until_s, is_manifest=is_manifest)

    def read_offer_by(
        self, digest: Digest, size_bytes: int, until_s: float, *, is_manifest: bool
    ) -> bytes:
        """Return what a referrer offers, if it has come by `until_s` (monotonic).

        Raises: as `ImageSource.read_offer`.
        """
        what = f"{self.name}@{digest}"
        if size_bytes > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{what} is said to have {size_bytes} bytes: too many to be read")
        self._settle_with(self._hurried)
        url = self._url(f"{'manifests' if is_manifest else 'blobs'}/{digest}")
        reply = attempts(
            what,
            lambda: self._ask_by(url, until_s, size_bytes),
            settings=self._hurried.settings,
            counters=self._counters,
        )
        if reply.status != 200:
            raise self.refusal(what, reply)
        digest.check(reply.body, what)
        return reply.body

    def send(
        self, what: str, where: str, headers: Mapping[str, str], upload: "Upload"
    ) -> SmallReply:
        """Ask once for something else than to be given bytes; return the answer.

        `where` is below the repository ("blobs/uploads/"), or the URL that an earlier answer of
        this registry named, whose credentials go with it only to the registry itself.

        Raises:
            FetchError: transient: nobody answered, or the registry is not well.
            SourceError: TLS failed; it leads where it may not; it answered 401, 403 or 407.
        """
        self.settle()
        is_url = where.startswith(("http://", "https://"))
        reply = self._client.send(
            where if is_url else self._url(where),
            headers,
            upload,
            self._authorizer,
            led_by=self._origin if is_url else None,
        )
        if reply.status in (401, 403, 407, 408, 425, 429) or reply.status >= 500:
            raise self.refusal(what, reply)
        return reply

    def refusal(self, what: str, reply: SmallReply) -> SourceError:
        """Return the error for an answer that is none of those that were hoped for."""
        credentials = self._credentials() if reply.status in (401, 403, 404) else None
        question = self._question(what, credentials)
        return refusal(question, reply.status, reply.headers, reply.body)

    def healths(self) -> Sequence[Health]:
        """Return how it has behaved. See `ImageSource.healths`."""
        return (self.health,)

    @property
    def is_settled(self) -> bool:
        """Whether it is known what it speaks. See `ImageSource.is_settled`."""
        return self._settled

    def settle(self) -> None:
        """Find out what it speaks, if that is not known, by asking for the API's root.

        Raises:
            FetchError: transient: nobody answered.
            SourceError: it speaks none of what it may.
        """
        self._settle_with(self._client)

    def _settle_with(self, client: HttpClient) -> None:
        with self._settling:
            errors: list[LazyfsError] = []
            for scheme in () if self._settled else self._schemes:
                try:
                    url = f"{scheme}://{self.address.served_by}{self.address.root}/"
                    with client.open(url, {"Accept": "*/*"}) as reply:
                        status = reply.status
                        reply.discard()
                except LazyfsError as error:
                    errors.append(error)
                    continue
                if status != 400 or scheme != "http" or len(self._schemes) == 1:
                    self._settle(scheme)
                    return
                errors.append(SourceError(f"{self._host} wants another scheme than plain HTTP"))
            if errors:
                speaks_tls = not isinstance(errors[-1], NotTls | FetchError)
                raise errors[-1 if speaks_tls else 0]

    def close(self) -> None:
        """Close connections; those under way close when they end."""
        self._client.close()
        self._hurried.close()

    def _settle(self, scheme: str) -> None:
        self._speak(scheme)
        self._settled = True

    def _speak(self, scheme: str) -> None:
        self._base = f"{scheme}://{self.address.served_by}"
        self._authorizer = RegistryAuthorizer(
            self._origin,
            self._repository,
            self._credentials,
            self._get_token,
            name=self._host,
            scopes=self._scopes,
        )

    @property
    def _origin(self) -> Origin:
        return origin_of(self._base)

    def _url(self, path: str) -> str:
        namespace = self.address.namespace
        if namespace is not None:
            path += f"{'&' if '?' in path else '?'}ns={quote(namespace, safe='')}"
        return f"{self._base}{self.address.root}/{self._repository}/{path}"

    def _question(self, what: str, credentials: Credentials | None = None) -> Question:
        return Question(what, self._host, login_advice(self._host, credentials))

    def _credentials(self) -> Credentials | None:
        return find_credentials(
            self._host, self._repository, authfile=self._authfile, environ=os.environ
        )

    def _get_token(self, url: str, headers: Mapping[str, str], form: bytes | None) -> SmallReply:
        limit_bytes, led_by = _TOKEN_LIMIT_BYTES, self._origin
        if form is None:
            return self._client.get(url, headers, limit_bytes=limit_bytes, led_by=led_by)
        return self._client.post(url, headers, form, limit_bytes=limit_bytes, led_by=led_by)

    def _patiently(self, wanted: str, action: Callable[[], _T]) -> _T:
        what = _called(self.name, wanted)
        return attempts(what, action, settings=self._settings, counters=self._counters)

    def _ask_by(
        self, url: str, until_s: float, limit_bytes: int = MANIFEST_LIMIT_BYTES
    ) -> SmallReply:
        """Return the answer to a GET, whatever its status, if it has come by `until_s`."""
        body = bytearray()
        headers = {"Accept": _ACCEPT}
        with self._hurried.open(url, headers, self._authorizer) as reply:
            refuse_encoding(reply)
            for piece in reply.pieces():
                body += piece
                if len(body) > (limit_bytes if reply.status == 200 else MANIFEST_LIMIT_BYTES):
                    raise SourceError(f"{self._host} sent more than {limit_bytes} bytes")
                if time.monotonic() > until_s:
                    raise SourceError(f"{self._host} takes too long for what is not needed")
            self._counters.bytes_fetched += len(body)
            return SmallReply(reply.url, reply.status, reply.headers, bytes(body))

    def _get_once(self, what: str, path: str, limit_bytes: int) -> SmallReply:
        headers = {"Accept": _ACCEPT if path.startswith("manifests/") else "*/*"}
        try:
            reply = self._client.get(
                self._url(path), headers, limit_bytes=limit_bytes, authorizer=self._authorizer
            )
        except SourceError:
            if self._settled or self._origin.scheme != "https":
                raise
            self.settle()
            if self._origin.scheme == "https":
                raise
            return self._get_once(what, path, limit_bytes)
        if reply.status == 400 and not self._settled:
            self._settle("https")
            return self._get_once(what, path, limit_bytes)
        if reply.status != 200:
            raise self.refusal(what, reply)
        self._settled = True
        self._counters.bytes_fetched += len(reply.body)
        self._pass_on(reply.headers.get("Warning"))
        return reply

    def _pass_on(self, warning: str | None) -> None:
        """Tell what the registry wants its users told, once each."""
        for said in warnings_in(warning):
            if said not in self._told:
                self._told.add(said)
                _log.warning("%s says: %s", self._host, said)


class _Unsettled:
    """A blob of a registry of which it is not known yet what it speaks."""

    def __init__(self, source: RegistrySource, digest: Digest, size_bytes: int) -> None:
        self._source = source
        self._digest = digest
        self._blob: Blob | None = None
        self.name = f"{source.name}@{digest}"
        self.size_bytes = size_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver the bytes of `byte_range`. See `Blob.read_into`."""
        if self._blob is None:
            self._source.settle()
            self._blob = self._source.blob(self._digest, self.size_bytes)
        self._blob.read_into(byte_range, sink)

    def close(self) -> None:
        """Do nothing: the source has the connections."""


def _schemes_of(address: Address, settings: TransportSettings) -> tuple[str, ...]:
    if settings.plain_http:
        return ("http",)
    if not (settings.tls_verify and address.tls.verify):
        return ("https", "http")
    host = address.host
    loopback = is_loopback(host if host.endswith("]") else host.rpartition(":")[0] or host)
    return ("http", "https") if loopback else ("https",)


def _called(name: str, wanted: str) -> str:
    return f"{name}{'@' if ':' in wanted else ':'}{wanted}"

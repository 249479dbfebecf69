"""One repository of an OCI registry: manifests by tag or digest, blobs by digest.

A digest is proven over the bytes as they were served. A tag's manifest is trusted as far as the
connection is: its digest is computed here, and everything below it is proven by that.

Plain HTTP is spoken to this machine's own loopback and where the settings say so; to loopback
HTTPS is tried when plain HTTP is refused (400) for being plain. A registry that need not prove who
it is has HTTPS tried first, and plain HTTP when that is not what it speaks.

Source: OCI distribution-spec, "Pull", "Listing Referrers".
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError, LazyfsError, MalformedError, SourceError
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.answers import Question, refusal
from lazyfs.transport.auth import RegistryAuthorizer, login_advice
from lazyfs.transport.blob import Blob
from lazyfs.transport.certs import certs_directories, registry_endpoints
from lazyfs.transport.client import HttpClient, SmallReply, refuse_encoding
from lazyfs.transport.credentials import Credentials, find_credentials
from lazyfs.transport.http import NotTls
from lazyfs.transport.httpblob import HttpBlob
from lazyfs.transport.referrers import list_referrers
from lazyfs.transport.retry import attempts
from lazyfs.transport.source import MANIFEST_LIMIT_BYTES, Manifest, ReferrerDescriptor
from lazyfs.transport.tls import Endpoint, Endpoints, TlsConfig
from lazyfs.transport.urls import Origin, is_loopback, origin_of

_log = logging.getLogger(__name__)

_TOKEN_LIMIT_BYTES = 256 * 1024
# Where an answer is welcome but not needed: for connecting and for each byte, for asking again
# (some registries answer 500 to what they do not know), and in all.
_HURRY_STALL_S, _HURRY_AGAIN_S, _HURRY_MOST_S = 2.0, 0.5, 4.0
_ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.artifact.manifest.v1+json",
    )
)
_SERVED_BY = {"docker.io": "registry-1.docker.io"}


def endpoints_of(host: str, settings: TransportSettings) -> Endpoints:
    """Return how the server that a person names, and whoever it leads to, is spoken to."""
    if not settings.tls_verify:
        _log.warning("%s: its TLS certificate is not checked (--tls-verify=false)", host)
    return registry_endpoints(
        host,
        served_by=_SERVED_BY.get(host),
        own=Endpoint(TlsConfig(verify=settings.tls_verify)),
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
    ) -> None:
        """Connect to nobody yet. `host` may have a port; `authfile` is before the settings'."""
        self._host = host
        self._repository = repository
        self._settings = settings
        self._counters = counters
        named = settings.authfile
        self._authfile = authfile or (None if named is None else Path(named))
        endpoints = endpoints_of(host, settings)
        self._client = HttpClient(settings, endpoints=endpoints)
        # Timeouts belong to a client: what may not wait has its own.
        self._hurried = HttpClient(
            replace(
                settings,
                connect_timeout_s=min(settings.connect_timeout_s, _HURRY_STALL_S),
                stall_timeout_s=min(settings.stall_timeout_s, _HURRY_STALL_S),
                deadline_s=min(settings.deadline_s, _HURRY_AGAIN_S),
            ),
            endpoints=endpoints,
        )
        loopback = is_loopback(host if host.endswith("]") else host.rpartition(":")[0] or host)
        if settings.plain_http or (loopback and settings.tls_verify):
            self._may_be_tls = loopback and not settings.plain_http
            self._speak("http")
        else:
            self._may_be_tls = False
            self._speak("https")

    @property
    def name(self) -> str:
        """What a person calls it: `docker.io/library/alpine`."""
        return f"{self._host}/{self._repository}"

    def manifest(self, reference: str | None) -> Manifest:
        """Return the manifest with this tag or digest. See `ImageSource.manifest`."""
        wanted = reference or "latest"
        digest = Digest.parse(wanted) if ":" in wanted else None
        what = f"{self.name}{'@' if digest else ':'}{wanted}"
        reply = self._get(what, f"manifests/{quote(wanted, safe=':')}", MANIFEST_LIMIT_BYTES)
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

    def blob(self, digest: Digest, size_bytes: int) -> Blob:
        """Return the blob, to be read by range. See `ImageSource.blob`."""
        what = f"{self.name}@{digest}"
        return HttpBlob(
            self._client,
            self._url(f"blobs/{digest}"),
            question=self._question(what),
            size_bytes=size_bytes,
            authorizer=self._authorizer,
        )

    def read_blob(self, digest: Digest, size_bytes: int) -> bytes:
        """Return a small blob whole. See `ImageSource.read_blob`."""
        what = f"{self.name}@{digest}"
        if size_bytes > MANIFEST_LIMIT_BYTES:
            raise MalformedError(f"{what} is said to have {size_bytes} bytes: too many to be read")
        body = self._get(what, f"blobs/{digest}", size_bytes).body
        digest.check(body, what)
        return body

    def referrers(self, digest: Digest, artifact_type: str) -> list[ReferrerDescriptor]:
        """Return what refers to the manifest. See `ImageSource.referrers`."""
        what = f"the referrers of {self.name}@{digest}"
        until_s = time.monotonic() + _HURRY_MOST_S
        try:
            return attempts(
                what,
                lambda: list_referrers(
                    lambda url: self._ask_by(url, until_s),
                    self._url(""),
                    digest,
                    artifact_type,
                    self._question(what),
                ),
                settings=self._hurried.settings,
                counters=self._counters,
            )
        except LazyfsError as error:
            _log.info("%s are taken to be none: %s", what, error)
            return []

    def close(self) -> None:
        """Close connections; those under way close when they end."""
        self._client.close()
        self._hurried.close()

    def _speak(self, scheme: str) -> None:
        self._base = f"{scheme}://{_SERVED_BY.get(self._host, self._host)}"
        self._authorizer = RegistryAuthorizer(
            self._origin, self._repository, self._credentials, self._get_token, name=self._host
        )

    @property
    def _origin(self) -> Origin:
        return origin_of(self._base)

    def _url(self, path: str) -> str:
        return f"{self._base}/v2/{self._repository}/{path}"

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

    def _get(self, what: str, path: str, limit_bytes: int) -> SmallReply:
        return attempts(
            what,
            lambda: self._get_once(what, path, limit_bytes),
            settings=self._settings,
            counters=self._counters,
        )

    def _ask_by(self, url: str, until_s: float) -> SmallReply:
        """Return the answer to a GET, whatever its status, if it has come by `until_s`."""
        body = bytearray()
        headers = {"Accept": _ACCEPT}
        with self._hurried.open(url, headers, self._authorizer) as reply:
            refuse_encoding(reply)
            for piece in reply.pieces():
                body += piece
                if len(body) > MANIFEST_LIMIT_BYTES:
                    raise SourceError(f"{self._host} sent more than {MANIFEST_LIMIT_BYTES} bytes")
                if time.monotonic() > until_s:
                    raise SourceError(f"{self._host} takes too long for what is not needed")
            self._counters.bytes_fetched += len(body)
            return SmallReply(reply.url, reply.status, reply.headers, bytes(body))

    def _get_once(self, what: str, path: str, limit_bytes: int) -> SmallReply:
        headers = {"Accept": _ACCEPT if path.startswith("manifests/") else "*/*"}
        authorizer = self._authorizer
        try:
            reply = self._client.get(
                self._url(path), headers, limit_bytes=limit_bytes, authorizer=authorizer
            )
        except NotTls:
            if self._settings.tls_verify or self._origin.scheme != "https":
                raise
            self._speak("http")  # who does not mind who answers does not mind who listens
            return self._get_once(what, path, limit_bytes)
        if reply.status == 400 and self._may_be_tls:
            self._may_be_tls = False
            self._speak("https")
            return self._get_once(what, path, limit_bytes)
        if reply.status != 200:
            credentials = self._credentials() if reply.status in (401, 403, 404) else None
            question = self._question(what, credentials)
            raise refusal(question, reply.status, reply.headers, reply.body)
        self._may_be_tls = False
        self._counters.bytes_fetched += len(reply.body)
        return reply

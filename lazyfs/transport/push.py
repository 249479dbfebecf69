"""Writing to a registry: blobs by their digest, then the manifest that names them.

A blob is asked for before it is sent; where the same registry has it in another repository it is
asked to mount it from there. It is sent in one PUT after a POST, which all registries take; from a
file, so that its size does not matter and a lost connection costs one more attempt, from the
blob's start. No mirror is ever written to.

Sources: OCI distribution-spec, "Push": "POST then PUT", "Mounting a blob from another
repository", "Pushing Manifests", "Pushing Manifests with Subject", "Referrers Tag Schema";
containers-registries.conf(5), "Remapping and mirroring registries": a location in the place of a
prefix holds for pushes too.
"""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, Literal, TypeVar, cast
from urllib.parse import quote

from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import (
    FetchError,
    IntegrityError,
    LazyfsError,
    MalformedError,
    SourceError,
)
from lazyfs.ground.settings import TransportSettings
from lazyfs.transport.attempts import attempts
from lazyfs.transport.auth import pull_scope, push_scope
from lazyfs.transport.client import SmallReply
from lazyfs.transport.http import Upload
from lazyfs.transport.mirror_files import find_addresses
from lazyfs.transport.referrers import INDEX_TYPE, fallback_tag, rivals, with_referrer
from lazyfs.transport.registry import RegistrySource
from lazyfs.transport.urls import redirect_target

_T = TypeVar("_T")
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_OCTETS = "application/octet-stream"
_LARGE_MANIFEST = 4 * 1024 * 1024
_RACES_MOST, _RACE_PAUSE_S = 6, 0.3


class RegistryTarget:
    """One repository that is written to. See `Target`."""

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        settings: TransportSettings,
        counters: Counters,
        mount_from: Sequence[str] = (),
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect to nobody yet.

        `mount_from`: repositories of the same registry that may have the blobs already. `pause`:
        lets so many seconds pass.

        Raises:
            UsageError: `settings.mirrors` is no such word, and no path.
            SourceError: a file that says where the registry is makes no sense, or blocks it.
        """
        *_mirrors, address = find_addresses(
            host, repository, by_digest=False, mirrors=settings.mirrors, environ=os.environ
        )
        self._name = f"{host}/{repository}"
        self._mount_from = tuple(each for each in mount_from if each != repository)
        self._settings = settings
        self._counters = counters
        self._pause = pause
        self._source = RegistrySource(
            address.host,
            address.repository,
            settings=settings,
            counters=counters,
            address=address,
            scopes=(push_scope(address.repository), *map(pull_scope, self._mount_from)),
        )

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self._name

    def try_out(self) -> None:
        """Begin an upload and leave it, to learn early whether anything will be taken.

        Raises:
            SourceError: nothing will.
        """
        attempts(
            f"writing {self._name}",
            lambda: self._begin(self._name),
            settings=self._settings.at_the_prompt,
            counters=self._counters,
        )

    def put_blob(self, digest: Digest, size_bytes: int, open_blob: Callable[[], BinaryIO]) -> None:
        """See `Target.put_blob`."""
        what = f"{self._name}@{digest}"
        if self._patiently(what, lambda: self._has(what, digest, size_bytes)):
            return
        if self._patiently(what, lambda: self._mount(what, digest)):
            return
        with open_blob() as file:
            body = _Sent(file)

            def send() -> None:
                body.seek(0)
                self._send(what, digest, size_bytes, cast(BinaryIO, body))

            self._patiently(what, send, lambda: body.read_s)

    def put_manifest(self, data: bytes, media_type: str, tag: str | None) -> Digest:
        """See `Target.put_manifest`."""
        digest = Digest.of(data)
        what = f"{self._name}:{tag}" if tag is not None else f"{self._name}@{digest}"
        if len(data) > _LARGE_MANIFEST:
            raise MalformedError(f"{what}: a manifest of {len(data)} bytes; no registry takes it")
        self._patiently(what, lambda: self._put(what, digest, data, media_type, tag))
        return digest

    def attach(
        self, data: bytes, subject: Digest, entry: Mapping[str, Any], key: str
    ) -> Literal["api", "tag", "index"]:
        """See `Target.attach`. Who lists it is told by the registry's answer (`OCI-Subject`)."""
        digest = Digest.of(data)
        what = f"{self._name}@{digest}"
        reply = self._patiently(what, lambda: self._put(what, digest, data, _OCI_MANIFEST, None))
        if reply.headers.get("OCI-Subject", "").strip():
            return "api"
        self._list_by_tag(fallback_tag(subject), entry, key)
        return "tag"

    def _list_by_tag(self, tag: str, entry: Mapping[str, Any], key: str) -> None:
        """Add to the list that clients keep; again, if somebody else has written it meanwhile.

        No registry writes it only if it is still what was read: so it is read after it was
        written, and after a while in which whoever had read it before us has written, too.
        """
        what = f"{self._name}:{tag}"
        older: set[str] | None = None
        for _ in range(_RACES_MOST):
            listed = self._patiently(what, lambda: self._source.ask_tag(tag))
            changed = with_referrer(listed, entry, key)
            others = rivals(listed, entry, key)
            if older is None:
                older = others
            if changed is None or others - older:  # one of the same name has come since
                return
            self.put_manifest(changed, INDEX_TYPE, tag)
            self._pause(random.uniform(1, 2) * _RACE_PAUSE_S)  # noqa: S311 - no secret
        raise SourceError(
            f"{what}: others write this list of referrers at the same time; try again"
        )

    def close(self) -> None:
        """Close connections."""
        self._source.close()

    def _patiently(
        self, what: str, action: Callable[[], _T], heard_s: Callable[[], float] = lambda: 0.0
    ) -> _T:
        settings, counters = self._settings, self._counters
        what = f"writing {what}"
        return attempts(what, action, settings=settings, counters=counters, heard_s=heard_s)

    def _has(self, what: str, digest: Digest, size_bytes: int) -> bool:
        reply = self._source.send(what, f"blobs/{digest}", {}, Upload("HEAD"))
        if reply.status != 200:
            return False
        said = reply.headers.get("Content-Length", "").strip()
        if said.isdigit() and int(said) != size_bytes:
            raise IntegrityError(f"{what} has {said} bytes there, though it has {size_bytes} here")
        return True

    def _mount(self, what: str, digest: Digest) -> bool:
        """Ask for the blob to be taken from another repository; return whether it was.

        What the registry begins in its place (202) is left to it: it forgets that by itself.
        """
        for repository in self._mount_from:
            query = f"mount={quote(str(digest), safe='')}&from={quote(repository, safe='')}"
            try:
                reply = self._source.send(what, f"blobs/uploads/?{query}", {}, Upload("POST"))
            except FetchError:
                raise
            except SourceError:
                return False  # it may be forbidden there; sending it is another matter
            if reply.status == 201:
                return True
        return False

    def _send(self, what: str, digest: Digest, size_bytes: int, file: BinaryIO) -> None:
        where = _upload_url(self._begin(what), digest)
        headers = {"Content-Type": _OCTETS}
        done = self._source.send(what, where, headers, Upload("PUT", file, size_bytes))
        if done.status not in (201, 204):
            raise self._refused(what, done)

    def _begin(self, what: str) -> SmallReply:
        begun = self._source.send(what, "blobs/uploads/", {}, Upload("POST"))
        if begun.status != 202:
            raise self._refused(what, begun)
        return begun

    def _put(
        self, what: str, digest: Digest, data: bytes, media_type: str, tag: str | None
    ) -> SmallReply:
        where = f"manifests/{quote(tag or str(digest), safe=':')}"
        headers = {"Content-Type": media_type}
        reply = self._source.send(what, where, headers, Upload("PUT", data, len(data)))
        if reply.status not in (200, 201, 202):
            raise self._refused(what, reply)
        promised = reply.headers.get("Docker-Content-Digest", str(digest)).strip()
        if promised != str(digest):
            raise IntegrityError(
                f"{what}: the registry took it for {promised[:200]!r}, though it is {digest}"
            )
        return reply

    def _refused(self, what: str, reply: SmallReply) -> LazyfsError:
        """Return the error for a registry that does not take what it is given."""
        error = self._source.refusal(f"writing {what}", reply)
        advice = _ADVICE.get(reply.status)
        return error if advice is None else SourceError(f"{error}; {advice}")


class _Sent:
    """A file that is sent, and when it was last read from: the registry took what came before."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read_s = 0.0

    def read(self, size: int = -1) -> bytes:
        self.read_s = time.monotonic()
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


_ADVICE = {
    405: "it can only be read: it may be a mirror or a pull-through cache; name another registry",
    413: "it takes nothing of that size: see the limit of the proxy before it (nginx: "
    "client_max_body_size)",
    415: "it does not take manifests of this kind",
}


def _upload_url(begun: SmallReply, digest: Digest) -> str:
    """Return where to PUT a blob: a place that the registry names, which may be elsewhere.

    Raises:
        SourceError: it names none.
    """
    target = redirect_target(begun.url, begun.headers.get("Location"))
    return f"{target}{'&' if '?' in target else '?'}digest={quote(str(digest), safe='')}"

"""Who refers to a manifest: what registries answer, and what lies in a layout. Sans-I/O.

A list of referrers is an image index. Where a registry has no such API, clients keep the list
themselves, under a tag made of the digest. Anybody who may push can add to either: nothing that
is found here is trusted more than that.

Source: OCI distribution-spec 1.1, "Listing Referrers", "Unavailable Referrers API", "Referrers
Tag Schema"; RFC 8288 (`Link`).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urljoin

import msgspec

from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import MalformedError, SourceError
from lazyfs.transport.answers import Question, refusal
from lazyfs.transport.source import MANIFEST_LIMIT_BYTES, ReferrerDescriptor
from lazyfs.transport.urls import origin_of

if TYPE_CHECKING:  # layouts on this machine are read without an HTTP library
    from lazyfs.transport.client import SmallReply

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
PAGES_MOST = 8
REFERRERS_MOST = 1000

_ALGORITHM_MOST, _ENCODED_MOST = 32, 64
_ANSWER_LATER = (408, 425, 429, 500, 502, 503, 504)
_FALLBACK_TAG = re.compile(r"sha(256|512)-[0-9a-f]{64}")
_LINK = re.compile(r"<([^<>]{1,4096})>([^<>,]{0,1024})")
_NEXT = re.compile(r";\s*rel\s*=\s*\"?next\"?\s*(;|$)", re.IGNORECASE)


class _Listed(msgspec.Struct, frozen=True, rename="camel"):
    digest: str
    size: Annotated[int, msgspec.Meta(ge=0)]
    media_type: str = ""
    artifact_type: str | None = None
    annotations: dict[str, str] | None = None


class _List(msgspec.Struct, frozen=True):
    manifests: list[_Listed] | None = None


class _Named(msgspec.Struct, frozen=True):
    digest: str


class _Config(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str = ""


class _Referrer(msgspec.Struct, frozen=True, rename="camel"):
    subject: _Named | None = None
    artifact_type: str | None = None
    config: _Config | None = None


def parse_referrers(data: bytes, *artifact_types: str) -> list[ReferrerDescriptor]:
    """Return those of a list of referrers that are of the types; a server need not filter.

    What has a digest that cannot be computed here, or is larger than a manifest, is left out.

    Raises:
        MalformedError: it is not an index.
    """
    try:
        listed = msgspec.json.decode(data, type=_List).manifests
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"a list of referrers cannot be read: {error}") from None
    if listed is None:
        raise MalformedError("a list of referrers that is not an index")
    found = []
    for each in listed:
        kind = each.artifact_type
        if kind is None or kind not in artifact_types or each.size > MANIFEST_LIMIT_BYTES:
            continue
        try:
            digest = Digest.parse(each.digest)
        except MalformedError:
            continue
        found.append(
            ReferrerDescriptor(digest, each.media_type, each.size, kind, each.annotations or {})
        )
    return found[:REFERRERS_MOST]


def referring_as(data: bytes, subject: Digest) -> str:
    """Return the artifact type of a manifest that says that it refers to `subject`; else ""."""
    try:
        manifest = msgspec.json.decode(data, type=_Referrer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if manifest.subject is None or manifest.subject.digest != str(subject):
        return ""
    return manifest.artifact_type or (manifest.config.media_type if manifest.config else "")


def referrers_path(digest: Digest, *artifact_types: str) -> str:
    """Return where a repository lists referrers, below `/v2/NAME/`.

    Those of one type, or else of any: a server can be asked for one type at a time.
    """
    path = f"referrers/{digest}"
    if len(artifact_types) == 1:
        path += f"?artifactType={quote(artifact_types[0], safe='')}"
    return path


def fallback_tag(digest: Digest) -> str:
    """Return the tag under which clients keep the list where there is no API for it."""
    return f"{digest.algorithm[:_ALGORITHM_MOST]}-{digest.hex[:_ENCODED_MOST]}"


def is_fallback_tag(tag: str) -> bool:
    """Whether a tag can be one of those."""
    return _FALLBACK_TAG.fullmatch(tag) is not None


def next_page(url: str, link: str | None) -> str | None:
    """Return where the next page is; None if this was the last.

    A page elsewhere than at the registry itself is nobody's good will: it counts as none.
    """
    for target, parameters in _LINK.findall((link or "")[:8192]):
        if not _NEXT.search(parameters):
            continue
        try:
            found = urljoin(url, target)
            return found if origin_of(found) == origin_of(url) else None
        except (ValueError, SourceError):
            return None
    return None


def with_referrer(index: bytes | None, entry: Mapping[str, Any], key: str) -> bytes | None:
    """Return a list of referrers with `entry` in it; None if that is what it is already.

    It takes the place of those of its artifact type with the same annotation `key`. Whatever else
    is there is kept as it is. `index`: the list so far; None if there is none.

    Raises:
        MalformedError: there is something that is not a list.
    """
    document: Any = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
    if index is not None:
        try:
            document = json.loads(index)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"a list of referrers cannot be read: {error}") from None
    listed = entries_of(document)
    if listed is None:
        raise MalformedError("a list of referrers that is not an index")
    kept = [each for each in listed if not is_replaced(each, entry, key)]
    if any(each.get("digest") == entry["digest"] for each in listed) and len(kept) + 1 == len(
        listed
    ):
        return None
    document["manifests"] = [*kept, dict(entry)]
    return json.dumps(document, separators=(",", ":")).encode()


def entries_of(document: Any) -> list[dict[str, Any]] | None:
    """Return the descriptors of an index that somebody wrote; None if it is none."""
    listed = document.get("manifests") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        return None
    return listed


def is_replaced(old: Mapping[str, Any], entry: Mapping[str, Any], key: str) -> bool:
    """Whether `entry` takes the place of `old`: of its type, and with the same annotation `key`."""
    return (
        old.get("artifactType") == entry.get("artifactType")
        and _annotation(old, key) == _annotation(entry, key)
    ) or old.get("digest") == entry["digest"]


def rivals(index: bytes | None, entry: Mapping[str, Any], key: str) -> set[str]:
    """Return the digests of what `entry` takes the place of, itself left out; as `with_referrer`.

    Of what is no list: none.
    """
    try:
        listed = entries_of(json.loads(index)) if index is not None else None
    except (ValueError, RecursionError):
        return set()
    digests = {str(each.get("digest")) for each in listed or () if is_replaced(each, entry, key)}
    return digests - {entry["digest"]}


def _annotation(entry: Mapping[str, Any], key: str) -> str:
    annotations = entry.get("annotations")
    return str(annotations.get(key, "")) if isinstance(annotations, dict) else ""


def list_referrers(
    ask: "Callable[[str], SmallReply]",
    url_of: Callable[[str], str],
    digest: Digest,
    artifact_types: Sequence[str],
    question: Question,
) -> list[ReferrerDescriptor]:
    """List what refers to the manifest, by the API or, where there is none, by the tag.

    Several types are one question, unfiltered; where so much refers to an image that the answer
    has more than one page, each type is asked for by itself.

    `ask`: gives the answer to a GET, whatever its status. `url_of`: gives the URL of a path below
    `/v2/NAME/`.

    Raises:
        FetchError: the server wants to be asked later.
        SourceError: no list is to be had.
        MalformedError: what it gave is not one.
    """
    found: list[ReferrerDescriptor] = []
    url: str | None = url_of(referrers_path(digest, *artifact_types))
    for page in range(PAGES_MOST):
        if url is None or len(found) >= REFERRERS_MOST:
            break
        reply = ask(url)
        if reply.status != 200:
            if page or reply.status in _ANSWER_LATER:
                raise refusal(question, reply.status, reply.headers, reply.body)
            return _by_tag(ask, url_of, digest, artifact_types, question)
        url = next_page(url, reply.headers.get("Link"))
        if url is not None and len(artifact_types) > 1:
            return [
                each
                for kind in artifact_types
                for each in list_referrers(ask, url_of, digest, (kind,), question)
            ]
        found += parse_referrers(reply.body, *artifact_types)
    return found[:REFERRERS_MOST]


def _by_tag(
    ask: "Callable[[str], SmallReply]",
    url_of: Callable[[str], str],
    digest: Digest,
    artifact_types: Sequence[str],
    question: Question,
) -> list[ReferrerDescriptor]:
    reply = ask(url_of(f"manifests/{fallback_tag(digest)}"))
    if reply.status == 404:
        return []
    if reply.status != 200:
        raise refusal(question, reply.status, reply.headers, reply.body)
    return parse_referrers(reply.body, *artifact_types)

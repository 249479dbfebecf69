"""What an HTTP answer means: its ranges, its wish to be asked later, its refusals. Sans-I/O.

Sources: RFC 9110, sections 10.2.3 (Retry-After), 14 (ranges), 15 (status codes); OCI
distribution-spec, "Error Codes".
"""

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple

import msgspec

from lazyfs.ground.errors import FetchError, SourceError
from lazyfs.ground.ranges import ByteRange

_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.IGNORECASE)
_RETRY_AFTER_MOST_S = 3600.0
_SAID_MOST_BYTES = 16384
_WANTS_TLS = re.compile(rb"HTTP request (?:was sent )?to (?:an )?HTTPS (?:server|port)")
"""As Go's net/http and nginx answer plain HTTP."""
_OCI_CODE = re.compile(rb'"code"\s*:\s*"([A-Z_]{1,40})"')
_WARNING = re.compile(r'299 - "((?:[^"\\]|\\.)*)"')
_WARNING_MOST = 4096
_TRANSIENT_STATUS = {408, 425, 429}


class ContentRange(NamedTuple):
    """Which bytes of how many a 206 says it holds; `total_bytes` None: it does not know."""

    byte_range: ByteRange
    total_bytes: int | None


def parse_content_range(text: str | None) -> ContentRange | None:
    """Read a `Content-Range` header; None if it is missing or makes no sense."""
    found = _CONTENT_RANGE.fullmatch((text or "").strip())
    if found is None:
        return None
    byte_range = ByteRange(int(found[1]), int(found[2]) + 1)
    total_bytes = None if found[3] == "*" else int(found[3])
    if byte_range.size_bytes <= 0 or (total_bytes is not None and byte_range.stop > total_bytes):
        return None
    return ContentRange(byte_range, total_bytes)


def range_header(byte_range: ByteRange) -> str:
    """Write a `Range` header: HTTP's ranges are closed."""
    return f"bytes={byte_range.start}-{byte_range.stop - 1}"


def retry_after_s(text: str | None, now_s: float | None = None) -> float | None:
    """Read a `Retry-After` header, seconds or a date, as seconds from now (at most an hour)."""
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]{1,10}", text):
        return min(float(text), _RETRY_AFTER_MOST_S)
    try:
        wish_s = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    wait_s = wish_s - (time.time() if now_s is None else now_s)
    return min(max(wait_s, 0.0), _RETRY_AFTER_MOST_S)


def warnings_in(text: str | None) -> list[str]:
    """Read what a registry wants its users told (`Warning`), without what a terminal obeys.

    Source: OCI distribution-spec, "Warnings": code 299, agent `-`, at most 4096 bytes.
    """
    found = _WARNING.findall((text or "")[:_WARNING_MOST])
    plain = [re.sub(r"\\(.)", r"\1", each) for each in found]
    return ["".join(filter(str.isprintable, each)) for each in plain]


class Question(msgspec.Struct, frozen=True):
    """What was asked of whom, and what a person may do if it is refused."""

    what: str
    host: str
    login: str
    """What to do about missing or refused credentials: "log in with `podman login …`"."""


def refusal(
    question: Question, status: int, headers: Mapping[str, str], body: bytes = b""
) -> SourceError:
    """Return the error for an answer that does not give what was asked.

    429, 503 and their like become a transient FetchError with the server's own wish.
    """
    what, host = question.what, question.host
    said = _said(status, body)
    if status in _TRANSIENT_STATUS or status >= 500:
        wish_s = retry_after_s(headers.get("Retry-After"))
        return FetchError(f"{what}: {host} answered {said}", transient=True, retry_after_s=wish_s)
    if status == 401:
        return SourceError(f"{what}: {host} wants credentials ({said}); {question.login}")
    if status == 403:
        return SourceError(f"{what}: {host} does not allow it ({said}); {question.login}")
    if status in (404, 410):
        return SourceError(
            f"{what}: {host} has no such thing, or does not show it to you ({said}); "
            f"check the name; if it is private, {question.login}"
        )
    if status == 407:
        return SourceError(
            f"{what}: the proxy before {host} wants credentials ({said}); set them in the "
            "proxy's URL (HTTPS_PROXY), or except the host (NO_PROXY)"
        )
    if status == 400 and _WANTS_TLS.search(body[:_SAID_MOST_BYTES]):
        return SourceError(f"{what}: {host} speaks HTTPS; leave out --plain-http or `insecure`")
    return SourceError(f"{what}: {host} answered {said}")


def _said(status: int, body: bytes) -> str:
    try:
        phrase = f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        phrase = str(status)
    code = _OCI_CODE.search(body[:_SAID_MOST_BYTES])
    return f"{phrase}, {code[1].decode()}" if code else phrase

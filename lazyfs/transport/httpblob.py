"""A blob by HTTP range, from a registry or from any web server.

Decides what an answer must look like before a byte of it is believed: 206, the very range that
was asked, of as many bytes as were promised, not encoded. What a registry serves is proven by
digests above; what has no digest is pinned (`Pin`), so that a file replaced under way is an
error and never a mixture.

A registry redirects to an object store with a signed URL. It is remembered, to save a round
trip per range, until it fails: then the registry is asked again, once per attempt. Threads race
for `_location` harmlessly: each value is a good place to ask or will be forgotten.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Self

import msgspec

from lazyfs.ground.errors import FetchError, IntegrityError, LazyfsError, OddAnswer, SourceError
from lazyfs.ground.ranges import ByteRange
from lazyfs.transport.answers import Question, parse_content_range, range_header, refusal
from lazyfs.transport.begun import Begun
from lazyfs.transport.blob import Sink
from lazyfs.transport.client import Authorizer, HttpClient, Reply, refuse_encoding
from lazyfs.transport.place import Health
from lazyfs.transport.urls import origin_of, shown

_NOT_THE_LOCATIONS_FAULT = {408, 412, 416, 425, 429}
_NO_LOGIN = "lazyfs has no credentials for web servers; a signed URL works"


class NoRanges(SourceError):
    """Everything was sent for a range, and everything is too much."""


class Pin(msgspec.Struct, frozen=True):
    """What a file without a digest was when it was opened (RFC 9110, section 13)."""

    etag: str | None
    last_modified: str | None

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Self:
        """Take the validators of an answer."""
        return cls(headers.get("ETag"), headers.get("Last-Modified"))

    def conditions(self) -> dict[str, str]:
        """Return the headers that make a server refuse (412) to serve another file."""
        if self.etag is not None and not self.etag.startswith("W/"):
            return {"If-Match": self.etag}
        if self.last_modified is not None:
            return {"If-Unmodified-Since": self.last_modified}
        return {}

    def agrees(self, headers: Mapping[str, str]) -> bool:
        """Whether an answer is of the same file, as far as it says."""
        return self == Pin.of(headers)


class HttpBlob:
    """Bytes behind one URL. Safe in several threads at once."""

    def __init__(
        self,
        client: HttpClient,
        url: str,
        *,
        question: Question,
        size_bytes: int,
        authorizer: Authorizer | None = None,
        pin: Pin | None = None,
        owns_client: bool = False,
        health: Health | None = None,
    ) -> None:
        """Ask for nothing yet. `question.what` is its name; `health`: of a source it shares."""
        self._client = client
        self._url = url
        self._question = question
        self._size_bytes = size_bytes
        self._authorizer = authorizer
        self._pin = pin
        self._owns_client = owns_client
        self._location: str | None = None
        self._begun = Begun()
        self.health = health if health is not None else Health(str(origin_of(url)))
        """How its source has behaved."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self._question.what

    @property
    def size_bytes(self) -> int:
        """Its size as promised."""
        return self._size_bytes

    def read_into(self, byte_range: ByteRange, sink: Sink) -> None:
        """Deliver the bytes of `byte_range`, in one request. See `Blob.read_into`.

        Raises:
            IntegrityError: a pinned file is not what it was.
        """
        if not 0 <= byte_range.start <= byte_range.stop <= self._size_bytes:
            raise SourceError(f"{self.name} has {self._size_bytes} bytes; asked for {byte_range}")
        if byte_range.size_bytes == 0:
            return
        if self._begun.give(byte_range, sink, most_s=self._client.settings.stall_timeout_s):
            return
        self._receive(byte_range, sink)

    def begin(self, byte_range: ByteRange) -> "Future[bytes]":
        """Begin to receive a range. See `BeginsRanges.begin`."""
        return self._begun.begin(byte_range, self._receive)

    def _receive(self, byte_range: ByteRange, sink: Sink) -> None:
        try:
            with self._ask(byte_range) as reply:
                skip_bytes = self._check(reply, byte_range)
                self._copy(reply, skip_bytes, byte_range.size_bytes, sink)
        except LazyfsError:
            self._location = None
            raise

    def close(self) -> None:
        """Close connections, unless they are those of a source with other blobs."""
        if self._owns_client:
            self._client.close()

    def _ask(self, byte_range: ByteRange) -> Reply:
        headers = {"Range": range_header(byte_range)}
        if self._pin is not None:
            headers.update(self._pin.conditions())
        location = self._location
        if location is not None:
            led_by = origin_of(self._url)
            reply = self._client.open(location, headers, self._authorizer, led_by=led_by)
            if not 400 <= reply.status < 500 or reply.status in _NOT_THE_LOCATIONS_FAULT:
                return reply
            reply.discard()
            self._location = None
        reply = self._client.open(self._url, headers, self._authorizer)
        if reply.url != self._url and reply.status in (200, 206):
            self._location = reply.url
        return reply

    def _check(self, reply: Reply, byte_range: ByteRange) -> int:
        """Return how many bytes of the body come before those asked for."""
        if reply.status not in (200, 206):
            raise self._refused(reply, byte_range)
        refuse_encoding(reply)
        if self._pin is not None and not self._pin.agrees(reply.headers):
            raise self._replaced("its ETag or modification time is another now")
        if reply.status == 206:
            self._check_partial(reply, byte_range)
            return 0
        whole = byte_range.size_bytes == self._size_bytes
        if not whole and self._size_bytes > self._client.settings.whole_body_limit_bytes:
            raise NoRanges(
                f"{self.name}: {origin_of(reply.url)} does not support byte ranges (it answered "
                f"200 with everything), so nothing of it can be had lazily; copy the image to a "
                "registry that does, or to an OCI layout (`skopeo copy … oci:DIRECTORY`)"
            )
        length = reply.headers.get("Content-Length")
        if length is not None and length.strip() != str(self._size_bytes):
            raise self._another_size(length)
        return byte_range.start

    def _check_partial(self, reply: Reply, byte_range: ByteRange) -> None:
        text = reply.headers.get("Content-Range")
        found = parse_content_range(text)
        if found is None or found.byte_range != byte_range:
            raise OddAnswer(
                f"{self.name}: {origin_of(reply.url)} answered another range than was asked: "
                f"asked for {range_header(byte_range)}, Content-Range is {(text or '')[:100]!r}"
            )
        if found.total_bytes not in (None, self._size_bytes):
            raise self._another_size(str(found.total_bytes))
        length = reply.headers.get("Content-Length")
        if length is not None and length.strip() != str(byte_range.size_bytes):
            raise OddAnswer(
                f"{self.name}: {origin_of(reply.url)} announces {length[:20]} bytes for "
                f"{byte_range}"
            )

    def _copy(self, reply: Reply, skip_bytes: int, left_bytes: int, sink: Sink) -> None:
        partial = reply.status == 206
        for piece in reply.pieces():
            if skip_bytes >= len(piece):
                skip_bytes -= len(piece)
                continue
            with memoryview(piece) as view:
                at = skip_bytes
                skip_bytes = 0
                while at < len(view) and left_bytes:
                    room = sink.space()
                    count = min(len(room), len(view) - at, left_bytes)
                    room[:count] = view[at : at + count]
                    sink.advance(count)
                    at += count
                    left_bytes -= count
                if at < len(view) and partial:
                    raise SourceError(
                        f"{self.name}: {origin_of(reply.url)} sent more than was asked for"
                    )
            if not left_bytes and not partial:
                reply.discard()
                return
        if left_bytes:
            raise FetchError(
                f"{self.name}: {origin_of(reply.url)} ended {left_bytes} bytes early",
                transient=True,
            )

    def _refused(self, reply: Reply, byte_range: ByteRange) -> LazyfsError:
        if reply.status == 412 and self._pin is not None:
            return self._replaced("the server says so")
        if reply.status == 416:
            if self._pin is not None:
                return self._replaced("it has become smaller")
            return SourceError(
                f"{self.name}: {origin_of(reply.url)} does not have {byte_range} of it, though "
                f"{self._size_bytes} bytes were promised: the source is broken"
            )
        body = reply.discard()
        question = self._question
        origin = origin_of(reply.url)
        if origin != origin_of(self._url):
            question = Question(question.what, f"{origin}, to which it redirects,", question.login)
        return refusal(question, reply.status, reply.headers, body)

    def _another_size(self, said: str) -> LazyfsError:
        if self._pin is not None:
            return self._replaced(f"it has {said[:20]} bytes now, {self._size_bytes} before")
        return SourceError(
            f"{self.name}: {self._question.host} has {said[:20]} bytes of it, though "
            f"{self._size_bytes} were promised: the source is broken"
        )

    def _replaced(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self.name} was replaced since it was opened: {why}; mount it anew")


def open_url(client: HttpClient, url: str) -> HttpBlob:
    """Return the file at `url` as a blob, pinned to what it is now, that owns `client`.

    One request: its size comes from a range of one byte, as HEAD may be refused and this shows
    besides whether the server knows ranges.

    Raises:
        FetchError: transient: no answer, or one that asks to come again.
        SourceError: it is not to be had, is empty, or does not say how large it is.
    """
    question = Question(shown(url), str(origin_of(url)), _NO_LOGIN)
    with client.open(url, {"Range": range_header(ByteRange(0, 1))}) as reply:
        if reply.status == 206:
            found = parse_content_range(reply.headers.get("Content-Range"))
            size_bytes = found.total_bytes if found is not None else None
        elif reply.status == 200:
            length = reply.headers.get("Content-Length", "").strip()
            size_bytes = int(length) if length.isdecimal() and len(length) < 20 else None
        elif reply.status == 416:
            raise SourceError(f"{question.what} is empty")
        else:
            raise refusal(question, reply.status, reply.headers, reply.discard())
        refuse_encoding(reply)
        if size_bytes is None:
            raise SourceError(
                f"{question.what}: {question.host} does not say how large it is, so it cannot "
                "be had by ranges; download it and mount the file"
            )
        pin = Pin.of(reply.headers)
        if reply.status == 206:
            reply.discard()
    return HttpBlob(
        client, url, question=question, size_bytes=size_bytes, pin=pin, owns_client=True
    )

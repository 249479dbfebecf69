"""Who refers to an image, asked once however many want to know: SOCI indexes, traces.

The question can be begun before anybody wants the answer: beside the request for a manifest that
is named by its digest, or for several types of referrers at a time. Each question has a thread
of its own, so that it waits for no other. Imports no trio: it is at work before that is there
(`ahead.py`).
"""

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from lazyfs.checkpoint.remembered import is_remembered
from lazyfs.content.documents import Documents
from lazyfs.ground.digest import Digest
from lazyfs.transport.source import ImageSource, Referrers

if TYPE_CHECKING:
    from lazyfs.checkpoint.image import ResolvedImage

TRACE_TYPE = "application/vnd.lazyfs.trace.v1"
"""The artifact type of a manifest that attaches a trace (`trace.py`) to an image."""

INDEX_V1 = "application/vnd.amazon.soci.index.v1+json"
"""The artifact type of a SOCI index that only refers to an image (`soci_index.py`)."""
INDEX_DIGEST_KEY = "com.amazon.soci.index-digest"
"""The annotation of an image's manifest that names an index, so that none is looked for."""

_Asked = tuple[Digest, frozenset[str], "Future[Referrers]"]


class Referrals:
    """The referrers of the manifests of one source. Thread-safe."""

    def __init__(self, source: ImageSource) -> None:
        """Ask nobody yet. `source` stays its owner's."""
        self._source = source
        self._lock = threading.Lock()
        self._questions: list[_Asked] = []

    def begin(self, digest: Digest, kinds: Iterable[str]) -> None:
        """Ask in a thread for all referrers of these types, but for what has been asked."""
        with self._lock:
            wanted = frozenset(kinds)
            for asked, known, _ in self._questions:
                if asked == digest:
                    wanted -= known
            if not wanted:
                return
            future: Future[Referrers] = Future()
            self._questions.append((digest, wanted, future))
        arguments = digest, wanted, future
        threading.Thread(target=self._ask, args=arguments, name="referrers", daemon=True).start()

    def of(self, digest: Digest, kind: str) -> Referrers:
        """Return the referrers of one type. Blocks, for some seconds at most."""
        self.begin(digest, (kind,))
        with self._lock:
            future = next(
                future
                for asked, known, future in self._questions
                if asked == digest and kind in known
            )
        found = future.result()
        return Referrers(
            (each for each in found if each.artifact_type == kind), is_known=found.is_known
        )

    def ask_anew(self, digest: Digest, kind: str) -> Referrers:
        """Return the referrers of one type as they are now. Blocks, for some seconds at most."""
        return self._source.referrers(digest, kind)

    def _ask(self, digest: Digest, kinds: frozenset[str], future: "Future[Referrers]") -> None:
        try:
            found = self._source.referrers(digest, *sorted(kinds))
        except BaseException as error:  # noqa: BLE001 - told to who asks
            future.set_exception(error)
        else:
            future.set_result(found)


def trusts_referrers(policy: str, *, by_digest: bool) -> bool:
    """Whether to read by what only refers to an image. `policy`: see `OpenConfig.referrers`."""
    return policy == "always" or (policy == "auto" and not by_digest)


def ask_who_refers(image: "ResolvedImage", documents: Documents, *, trusts_referrers: bool) -> None:
    """Begin to ask for traces, and in the same question for indexes if one may be wanted.

    Not where it is remembered which traces there are: who wants an index asks for it then.
    """
    if image.referrals is None or image.digest is None:
        return
    if is_remembered(documents, image.digest, image.repository, "trace"):
        return
    is_gzip = any(layer.media_type.endswith("gzip") for layer in image.layers)
    is_pinned = INDEX_DIGEST_KEY in image.manifest.annotations
    wants_index = is_gzip and trusts_referrers and not is_pinned
    image.referrals.begin(image.digest, (TRACE_TYPE, *([INDEX_V1] if wants_index else [])))

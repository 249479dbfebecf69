"""Resolving an image while what opens it is still being imported.

A command that reads a checkpoint spends longer on importing libraries than on the round trips to
the registry. So these are made in a thread, begun as soon as the few modules are there that it
needs; the rest, trio first of all, is imported meanwhile. What the first request needs is imported
before the thread starts, not in it: two that import vie for the one interpreter, and the round
trips would begin later. When the image is known, the ranges of its layers that will be asked for
first are begun there, too (`first_ranges.py`), and the question who refers to it.

Imports no trio, and nothing that does.
"""

import threading
from concurrent.futures import Future

from lazyfs.checkpoint.image import ResolvedImage, resolve
from lazyfs.checkpoint.reference import Reference, RegistryReference, parse_reference
from lazyfs.checkpoint.referrals import TRACE_TYPE, ask_who_refers, trusts_referrers
from lazyfs.checkpoint.remembered import is_remembered
from lazyfs.content.cache import Cache
from lazyfs.ground.counters import Counters
from lazyfs.ground.settings import TransportSettings


class Ahead:
    """One image that is being resolved in a thread, for whoever opens it with the same words."""

    def __init__(
        self,
        text: str,
        settings: TransportSettings,
        cache: Cache,
        *,
        traced: bool = False,
        referrers: str = "never",
    ) -> None:
        """Begin. `text` is the reference; `traced`: whether its traces are wanted, too.

        `referrers`: see `OpenConfig.referrers`.

        Raises:
            UsageError: it is none.
        """
        reference = parse_reference(text)
        if isinstance(reference, RegistryReference) and not _is_kept(reference, cache):
            import lazyfs.transport.http
            import lazyfs.transport.mirrors  # noqa: F401 - see above
        self.counters = Counters()
        """What it costs, and then whatever else is done with the image."""
        self._text = text
        self._future: Future[ResolvedImage] | None = Future()
        self._traced, self._referrers = traced, referrers
        arguments = reference, settings, cache, self._future
        self._thread = threading.Thread(target=self._run, args=arguments, name="ahead", daemon=True)
        self._thread.start()

    def take(self, text: str) -> "Future[ResolvedImage] | None":
        """Return the image to be; None if another was asked for, or somebody has it already."""
        if text != self._text:
            return None
        future, self._future = self._future, None
        return future

    def wait(self) -> None:
        """Come back when all has been asked for that could be. Blocks."""
        self._thread.join()

    def _run(
        self,
        reference: Reference,
        settings: TransportSettings,
        cache: Cache,
        future: "Future[ResolvedImage]",
    ) -> None:
        try:
            early = (TRACE_TYPE,) if self._traced else ()
            image = resolve(
                reference, settings, self.counters, documents=cache.documents, early=early
            )
        except BaseException as error:  # noqa: BLE001 - told to who takes it
            future.set_exception(error)
        else:
            future.set_result(image)
            from lazyfs.checkpoint.stub import ANNOTATION

            if self._traced and ANNOTATION not in image.annotations:
                by_digest = getattr(reference, "digest", None) is not None
                trusts = trusts_referrers(self._referrers, by_digest=by_digest)
                ask_who_refers(image, cache.documents, trusts_referrers=trusts)
            from lazyfs.checkpoint.first_ranges import begin_layers

            begin_layers(image, cache)


def _is_kept(reference: RegistryReference, cache: Cache) -> bool:
    """Whether it is likely that the registry will not be asked for the manifest."""
    name = f"{reference.host}/{reference.repository}"
    return reference.digest is not None and is_remembered(cache.documents, reference.digest, name)
